"""Packing: a tree's numbers are those of its rows one by one, and nothing is computed twice."""

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mint_lib.packing import collate_trees, group_by_length, move_to, pack_tree, predict_edges, sum_answers
from mint_lib.student import StudentConfig, load_student

TOKENS = st.integers(min_value=1, max_value=200)
PROMPTS = st.lists(TOKENS, min_size=1, max_size=9)
ANSWERS = st.lists(st.lists(TOKENS, min_size=1, max_size=6).map(tuple), min_size=1, max_size=5, unique=True)


@pytest.fixture(scope="module")
def model():
    return load_student(StudentConfig(model="tiny"))


def score_row(model, prompt_ids, answer_ids):
    """Log-probability of each token of an answer by a plain causal pass over prompt and answer."""
    row = torch.tensor([[*prompt_ids, *answer_ids]])
    log_probabilities = model(row, use_cache=False).logits[0].float().log_softmax(-1)
    places = range(len(prompt_ids) - 1, row.shape[1] - 1)
    return torch.stack([log_probabilities[place, row[0, place + 1]] for place in places])


def score_rows(model, rows):
    """Log-probabilities of the tokens of all answers, one after another."""
    return torch.cat([score_row(model, prompt, answer) for prompt, answers in rows for answer in answers])


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(PROMPTS, ANSWERS), min_size=1, max_size=4), st.booleans())
def test_packing_ragged_trees_equal_plain_rows(model, rows, one_row):
    trees = [pack_tree(prompt, answers) for prompt, answers in rows]
    batch = collate_trees(trees, pad_token_id=0, one_row=one_row)
    with torch.inference_mode():
        packed_N = predict_edges(model, batch)
        plain_L = score_rows(model, rows)
    torch.testing.assert_close(packed_N[batch["edge_L"]], plain_L, atol=1e-5, rtol=0.0)  # float32, values of about 6
    plain_A = torch.stack(
        [row.sum() for row in plain_L.split([len(answer) for _, answers in rows for answer in answers])]
    )
    torch.testing.assert_close(sum_answers(packed_N, batch), plain_A, atol=6e-5, rtol=0.0)  # sums of up to 6 of them


@pytest.mark.parametrize("one_row", [False, True])
def test_packing_gradients_equal_those_of_plain_rows(one_row):
    rows = [([5, 6, 7, 8], [(10, 11, 12), (10, 11, 13, 14), (20,)]), ([9], [(5, 6), (7, 8, 9)])]
    torch.manual_seed(0)
    model = build_wide()
    trees = [pack_tree(prompt, answers) for prompt, answers in rows]
    batch = collate_trees(trees, pad_token_id=0, one_row=one_row)
    weight_L = torch.linspace(-1.0, 1.0, len(batch["edge_L"]))
    (predict_edges(model, batch)[batch["edge_L"]] * weight_L).sum().backward()
    packed = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    (score_rows(model, rows) * weight_L).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().max() > 1e-3, f"{name} would equal anything small"
        torch.testing.assert_close(packed[name], parameter.grad, atol=1e-5, rtol=1e-5)  # float32 sums in another order


@given(PROMPTS, ANSWERS, st.booleans())
def test_packing_places_are_all_beginnings_once_and_depth_first(prompt, answers, with_prompt_edges):
    tree = pack_tree(prompt, answers, with_prompt_edges=with_prompt_edges)
    num_places = len(tree.input_ids)
    seen = [[k for k in range(q + 1) if q < tree.ends[k]] for q in range(num_places)]
    read = [tuple(tree.input_ids[k] for k in places) for places in seen]
    rows = [(*prompt, *answer) for answer in answers]
    beginnings = list(dict.fromkeys(row[:length] for row in rows for length in range(1, len(row) + 1)))
    inner = {row[:length] for row in rows for length in range(1, len(row))}
    assert sorted(read) == sorted(inner), "each beginning has one place, and the last tokens have none"
    assert tree.positions == tuple(len(beginning) - 1 for beginning in read)
    # Depth first is the order of paths, each step of a path counted by when it first appeared among the answers.
    ranks = {
        beginning: [beginnings.index(beginning[: depth + 1]) for depth in range(len(beginning))] for beginning in read
    }
    assert read == sorted(read, key=ranks.__getitem__)
    for answer, path in zip(answers, tree.paths, strict=True):
        steps = [(read[tree.sources[edge]], tree.targets[edge]) for edge in path]
        assert steps == [((*prompt, *answer[:index]), token) for index, token in enumerate(answer)]
    steps = [(read[tree.sources[edge]], tree.targets[edge]) for edge in tree.prompt_path]
    inside = [(tuple(prompt[:index]), prompt[index]) for index in range(1, len(prompt))]
    assert steps == (inside if with_prompt_edges else [])


def test_packing_branches_of_one_place_stand_together():
    tree = pack_tree([1, 2], [[10, 11, 12], [20, 21], [10, 13, 14]])
    assert tree.input_ids == (1, 2, 10, 11, 13, 20)
    assert tree.ends == (6, 6, 5, 4, 5, 6)
    assert tree.positions == (0, 1, 2, 3, 3, 2)
    assert tree.targets == (10, 11, 12, 20, 21, 13, 14), "edges are numbered by the answers"
    assert tree.sources == (1, 2, 3, 1, 5, 2, 4)


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


PAIR_OF_TREES = [pack_tree([1, 2], [[10, 11, 12], [20, 21, 22]]), pack_tree([1], [[5, 6]])]


def test_packing_rows_are_padded_with_places_that_see_only_themselves():
    batch = collate_trees(PAIR_OF_TREES, pad_token_id=99)
    assert batch["input_ids"].tolist() == [[1, 2, 10, 11, 20, 21], [1, 5, 99, 99, 99, 99]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 2, 3], [0, 1, 0, 0, 0, 0]]
    assert batch["end_BT"].tolist() == [[6, 6, 4, 4, 6, 6], [2, 2, 3, 4, 5, 6]]
    assert batch["source_N"].tolist() == [1, 2, 3, 1, 4, 5, 6, 7]
    assert batch["num_real_tokens"] == 8


def test_packing_one_row_holds_all_trees_without_padding():
    batch = collate_trees(PAIR_OF_TREES, pad_token_id=99, one_row=True)
    assert batch["input_ids"].tolist() == [[1, 2, 10, 11, 20, 21, 1, 5]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 2, 3, 0, 1]]
    assert batch["end_BT"].tolist() == [[6, 6, 4, 4, 6, 6, 8, 8]]
    assert batch["source_N"].tolist() == [1, 2, 3, 1, 4, 5, 6, 7]
    assert batch["num_real_tokens"] == batch["input_ids"].numel()


@pytest.mark.parametrize("one_row", [False, True])
def test_packing_answers_are_counted_through_the_batch(one_row):
    batch = collate_trees(PAIR_OF_TREES, pad_token_id=0, one_row=one_row)
    assert batch["edge_L"].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert batch["answer_L"].tolist() == [0, 0, 0, 1, 1, 1, 2, 2]
    assert batch["length_A"].tolist() == [3, 3, 2]


def test_packing_image_inputs_reach_the_model_and_may_replace_positions(model):
    batch = collate_trees(PAIR_OF_TREES, pad_token_id=0)
    expected = predict_edges(model, batch)
    moved = batch["position_ids"] * 3
    received = []
    handle = model.register_forward_pre_hook(lambda _m, _a, options: received.append(options), with_kwargs=True)
    shifted = predict_edges(model, {**batch, "image_inputs": {"position_ids": moved, "output_hidden_states": True}})
    handle.remove()
    assert received[0]["output_hidden_states"] is True
    assert not torch.allclose(shifted, expected)
    torch.testing.assert_close(shifted, predict_edges(model, {**batch, "position_ids": moved}), rtol=0.0, atol=0.0)


def test_packing_move_takes_dictionaries_inside_along():
    batch = {"input_ids": torch.zeros(2), "image_inputs": {"pixel_values": torch.zeros(3)}, "case_ids": ["a"]}
    moved = move_to(batch, torch.device("meta"))
    assert moved["input_ids"].device.type == moved["image_inputs"]["pixel_values"].device.type == "meta"
    assert moved["case_ids"] == ["a"]


@pytest.mark.parametrize(("prompt", "answers"), [([], [[1]]), ([1], [[2], []])])
def test_packing_empty_prompt_or_answer_is_refused(prompt, answers):
    with pytest.raises(ValueError, match="at least one token"):
        pack_tree(prompt, answers)


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 120))
def test_packing_groups_hold_every_index_once_within_the_budget(lengths, max_tokens):
    groups = group_by_length(lengths, max_tokens=max_tokens)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    assert all(len(group) == 1 or len(group) * max(lengths[index] for index in group) <= max_tokens for group in groups)


def test_packing_tree_beyond_the_budget_is_a_group_of_its_own():
    assert group_by_length([5, 40, 5, 12], max_tokens=20) == [[1], [3], [0, 2]]


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
