"""Packing: a tree's numbers are those of its rows one by one, and nothing is computed twice."""

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mint_lib.packing import collate_trees, group_by_length, pack_tree, predict_edges, sum_answers
from mint_lib.student import StudentConfig, load_student

TOKENS = st.integers(min_value=1, max_value=200)
PROMPTS = st.lists(TOKENS, min_size=1, max_size=9)
ANSWERS = st.lists(st.lists(TOKENS, min_size=1, max_size=6).map(tuple), min_size=1, max_size=5, unique=True)


@pytest.fixture(scope="module")
def model():
    return load_student(StudentConfig(model="tiny"))


def score_row(model, prompt_ids, answer_ids):
    """Log-probability of an answer by a plain causal pass over prompt and answer."""
    row = torch.tensor([[*prompt_ids, *answer_ids]])
    log_probabilities = model(row).logits[0].float().log_softmax(-1)
    places = range(len(prompt_ids) - 1, row.shape[1] - 1)
    return sum(log_probabilities[place, row[0, place + 1]] for place in places)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(PROMPTS, ANSWERS), min_size=1, max_size=4))
def test_packing_ragged_trees_equal_plain_rows(model, rows):
    batch = collate_trees([pack_tree(prompt, answers) for prompt, answers in rows], pad_token_id=0)
    with torch.inference_mode():
        packed = sum_answers(predict_edges(model, batch), batch)
        plain = torch.stack([score_row(model, prompt, answer) for prompt, answers in rows for answer in answers])
    torch.testing.assert_close(packed, plain, atol=2e-4, rtol=1e-5)  # sums of up to 6 float32 terms of about 6


def test_packing_shared_beginnings_and_equal_answers_take_one_place():
    tree = pack_tree([1, 2, 3], [[10, 11, 12], [10, 11, 13], [10, 11, 12]])
    assert tree.input_ids == (1, 2, 3, 10, 11)  # last tokens are only predicted
    assert tree.targets == (10, 11, 12, 13)
    assert tree.paths == ((0, 1, 2), (0, 1, 3), (0, 1, 2))


def test_packing_answer_that_begins_another_keeps_both():
    tree = pack_tree([1], [[10], [10, 11]])
    assert tree.input_ids == (1, 10)
    assert [[tree.targets[edge] for edge in path] for path in tree.paths] == [[10], [10, 11]]


def test_packing_prompt_edges_come_first_and_only_if_asked():
    assert pack_tree([1, 2, 3], [[9]]).prompt_path == ()
    tree = pack_tree([1, 2, 3], [[9]], with_prompt_edges=True)
    assert [tree.targets[edge] for edge in tree.prompt_path] == [2, 3]


def test_packing_branches_do_not_see_each_other_and_restart_positions():
    batch = collate_trees([pack_tree([1, 2], [[10, 11, 12], [20, 21, 22]]), pack_tree([1], [[5, 6]])], pad_token_id=0)
    assert batch["position_ids"][0].tolist() == [0, 1, 2, 3, 2, 3]
    sees = batch["attention_mask"][0, 0].int().tolist()
    assert sees[3] == [1, 1, 1, 1, 0, 0]
    assert sees[5] == [1, 1, 0, 0, 1, 1]
    assert batch["attention_mask"].any(dim=-1).all(), "a row that sees nothing turns into NaN"
    assert batch["num_real_tokens"] == 8


@pytest.mark.parametrize(("prompt", "answers"), [([], [[1]]), ([1], [[2], []])])
def test_packing_empty_prompt_or_answer_is_refused(prompt, answers):
    with pytest.raises(ValueError, match="at least one token"):
        pack_tree(prompt, answers)


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 120))
def test_packing_groups_hold_every_index_once_within_the_budget(lengths, max_tokens):
    groups = group_by_length(lengths, max_tokens=max_tokens)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    assert all(len(group) == 1 or len(group) * max(lengths[index] for index in group) <= max_tokens for group in groups)


class WidestRows(TorchDispatchMode):
    """Remembers the most rows that any tensor as wide as the vocabulary has."""

    def __init__(self, num_tokens):
        super().__init__()
        self.num_tokens, self.num_rows = num_tokens, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outputs = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(outputs):
            if isinstance(leaf, torch.Tensor) and leaf.dim() and leaf.shape[-1] == self.num_tokens:
                self.num_rows = max(self.num_rows, leaf.numel() // self.num_tokens)
        return outputs


def build_wide(**options):
    """A model of one thin layer and many tokens."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32_000, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, **options
    )
    return transformers.LlamaForCausalLM(config)


def test_packing_logits_of_many_edges_are_never_whole():
    model = build_wide()
    batch = collate_trees([pack_tree(range(1, 514), [[10], [20]], with_prompt_edges=True)], pad_token_id=0)
    with WidestRows(32_000) as widest:
        predict_edges(model, batch).sum().backward()
    assert len(batch["target_N"]) == 514
    assert 0 < widest.num_rows <= 257  # two equal chunks


@pytest.mark.parametrize("find_unused_parameters", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_packing_data_parallel_gradients_equal_those_of_the_model(find_unused_parameters, tied):
    batch = collate_trees([pack_tree(range(1, 9), [[10, 11], [20, 21, 22]])], pad_token_id=0)
    alone, wrapped = build_wide(tie_word_embeddings=tied), build_wide(tie_word_embeddings=tied)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        parallel = torch.nn.parallel.DistributedDataParallel(wrapped, find_unused_parameters=find_unused_parameters)
        for _ in range(2):  # a reduction that did not end fails the next pass
            alone.zero_grad()
            parallel.zero_grad()
            predict_edges(alone, batch).sum().backward()
            predict_edges(parallel, batch).sum().backward()
            for ours, theirs in zip(wrapped.parameters(), alone.parameters(), strict=True):
                torch.testing.assert_close(ours.grad, theirs.grad, rtol=0.0, atol=0.0)  # the same operations
    finally:
        torch.distributed.destroy_process_group()


def test_packing_logits_exist_only_for_edges(model):
    batch = collate_trees([pack_tree(range(1, 40), [[10, 11], [20, 21]])], pad_token_id=0)
    shapes = []
    handle = model.get_output_embeddings().register_forward_hook(lambda _m, _i, output: shapes.append(output.shape))
    predict_edges(model, batch)
    handle.remove()
    assert [shape[0] for shape in shapes] == [4]
    assert model(batch["input_ids"]).logits.shape[1] == 41, "the gathering ends with the call"
