"""Attention: every form of a tree's mask lets a place see its own path and nothing else."""

import pytest
import torch
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask, create_mask

from mint_lib.attention import check_attention_window, choose_attention, make_attention_mask
from mint_lib.errors import InvalidInput
from mint_lib.packing import collate_trees, pack_tree, predict_edges, sum_answers

WINDOW_TOKENS = 24
PROMPT = list(range(3, 17))
ANSWERS = [[*range(20, 30)], [20, 21, 22, 40, 41], [50], [50, 51, 52], [20, 21, 22, 40, 42, 43]]
assert len(PROMPT) + max(map(len, ANSWERS)) == WINDOW_TOKENS

# Answers of few different tokens share many beginnings; long prompts and answers fill whole blocks of 128 places.
TREES = st.lists(
    st.tuples(
        st.integers(1, 300),
        st.lists(st.tuples(st.integers(0, 3), st.integers(1, 200)), min_size=1, max_size=4),
    ),
    min_size=1,
    max_size=3,
)


def collate(shapes, *, one_row):
    """A batch of trees, each from the length of its prompt and, for each answer, how many tokens are shared and own."""
    trees = []
    for num_prompt, answers in shapes:
        tokens = [[7] * num_shared + [index + 10] * num_own for index, (num_shared, num_own) in enumerate(answers)]
        trees.append(pack_tree([5] * num_prompt, tokens))
    return collate_trees(trees, pad_token_id=0, one_row=one_row)


def list_seen(batch, row):
    """For each place of a row, the places it sees, by walking: a place follows the last one that is less deep.

    Padding and the first place of a tree have depth 0.
    """
    path, seen = [], []
    for place, depth in enumerate(batch["position_ids"][row].tolist()):
        path = [*path[:depth], place]
        seen.append(path)
    return seen


@settings(max_examples=15, deadline=None)
@given(TREES, st.booleans())
@example([(128, [(0, 129), (0, 2)]), (256, [(0, 200)])], True)
def test_attention_mask_shows_each_place_its_own_path(shapes, one_row):
    batch = collate(shapes, one_row=one_row)
    mask = make_attention_mask(batch["end_BT"], implementation="sdpa")
    num_rows, num_places = batch["input_ids"].shape
    assert mask.shape == (num_rows, 1, num_places, num_places)
    assert mask.dtype == torch.bool
    for row in range(num_rows):
        assert [sees.nonzero().flatten().tolist() for sees in mask[row, 0]] == list_seen(batch, row)


@settings(max_examples=15, deadline=None)
@given(TREES, st.booleans())
@example([(128, [(0, 129), (0, 2)]), (256, [(0, 200)])], True)
@example([(100, [(0, 300), (0, 300), (0, 71)])], False)  # six whole blocks
def test_attention_block_mask_equals_dense_mask_and_its_blocks(shapes, one_row):
    end_BT = collate(shapes, one_row=one_row)["end_BT"]
    num_rows, num_places = end_BT.shape
    ours = make_attention_mask(end_BT, implementation="flex_attention")
    assert ours.shape == (num_rows, 1, num_places, num_places)
    dense = create_mask(ours.mask_mod, num_rows, 1, num_places, num_places, device="cpu")
    assert torch.equal(dense, make_attention_mask(end_BT, implementation="sdpa"))
    theirs = create_block_mask(ours.mask_mod, num_rows, 1, num_places, num_places, device="cpu")
    for kind in ("kv", "full_kv", "q", "full_q"):
        counts = getattr(ours, f"{kind}_num_blocks")
        assert torch.equal(counts, getattr(theirs, f"{kind}_num_blocks"))
        listed = torch.arange(counts.max()) < counts[..., None]  # entries behind the count are not read
        indices = [getattr(mask, f"{kind}_indices")[..., : counts.max()][listed] for mask in (ours, theirs)]
        assert torch.equal(*indices), kind


def test_attention_eager_mask_is_added_to_scores():
    end_BT = torch.tensor([[3, 2, 3]])
    mask = make_attention_mask(end_BT, implementation="eager", dtype=torch.bfloat16)
    inf = torch.inf
    expected = torch.tensor([[[[0, -inf, -inf], [0, 0, -inf], [0, -inf, 0]]]], dtype=torch.bfloat16)
    torch.testing.assert_close(mask, expected, rtol=0, atol=0)


def test_attention_implementation_that_takes_no_mask_is_refused():
    with pytest.raises(InvalidInput, match="flash_attention_2"):
        make_attention_mask(torch.tensor([[1]]), implementation="flash_attention_2")


@pytest.mark.parametrize(
    ("option", "use_gpu", "expected"),
    [
        ("auto", True, "flex_attention"),
        ("auto", False, "sdpa"),
        ("flex", True, "flex_attention"),
        ("sdpa", True, "sdpa"),
    ],
)
def test_attention_choice_depends_on_the_option_and_the_device(option, use_gpu, expected):
    assert choose_attention(option, use_gpu=use_gpu) == expected


def test_attention_flex_without_gpu_is_refused():
    with pytest.raises(InvalidInput, match="no backward pass on CPUs"):
        choose_attention("flex", use_gpu=False)


SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "pad_token_id": 0,
    "attn_implementation": "sdpa",
}
FULL, SLIDING = "full_attention", "sliding_attention"
FAMILIES = {
    "Llama": (transformers.LlamaConfig, {}),
    "Qwen2 off": (transformers.Qwen2Config, {"sliding_window": 4}),
    "Qwen2": (transformers.Qwen2Config, {"use_sliding_window": True, "max_window_layers": 1}),
    "Qwen3": (transformers.Qwen3Config, {}),
    "Mistral": (transformers.MistralConfig, {}),
    "Phi 3": (transformers.Phi3Config, {}),
    "Gemma 2": (transformers.Gemma2Config, {"layer_types": [SLIDING, FULL], "attn_implementation": "eager"}),
    "Gemma 3": (transformers.Gemma3TextConfig, {"layer_types": [SLIDING, FULL]}),
}


def build_family(name, **values):
    """A random student of that family."""
    config_class, own = FAMILIES[name]
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config_class(**(SHAPE | own | values))).eval()


def score_rows(model):
    """Log-probabilities of the answers by plain rows, the student's own mask and nothing of ours."""
    scores = []
    for answer in ANSWERS:
        ids = torch.tensor([PROMPT + answer])
        log_probability_TV = model(ids, use_cache=False).logits[0, len(PROMPT) - 1 : -1].float().log_softmax(-1)
        scores.append(log_probability_TV[range(len(answer)), answer].sum())
    return torch.stack(scores)


def score_tree(model, *, one_row):
    """The same by a batch of the tree and another one."""
    trees = [pack_tree([9] * 5, [[8, 7]]), pack_tree(PROMPT, ANSWERS)]
    batch = collate_trees(trees, pad_token_id=0, one_row=one_row)
    return sum_answers(predict_edges(model, batch), batch)[1:]


@pytest.mark.parametrize("one_row", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_attention_families_score_trees_as_rows_up_to_their_window(name, one_row):
    windows = {} if name == "Qwen2 off" else {"sliding_window": WINDOW_TOKENS}
    model = build_family(name, **windows)
    check_attention_window(model.config, WINDOW_TOKENS)
    with torch.inference_mode():
        # Sums of up to 10 float32 terms of about 4.
        torch.testing.assert_close(score_tree(model, one_row=one_row), score_rows(model), atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["Qwen2", "Mistral", "Phi 3", "Gemma 2", "Gemma 3"])
def test_attention_beyond_a_sliding_window_is_refused_and_would_differ(name):
    model = build_family(name, sliding_window=WINDOW_TOKENS - 4)
    with pytest.raises(InvalidInput, match=f"window_tokens is {WINDOW_TOKENS}.* window of {WINDOW_TOKENS - 4} tokens"):
        check_attention_window(model.config, WINDOW_TOKENS)
    with torch.inference_mode():
        assert (score_tree(model, one_row=False) - score_rows(model)).abs().max() > 1e-4


def test_attention_window_counts_only_layers_that_are_kept():
    config = transformers.Gemma3TextConfig(**(SHAPE | {"layer_types": [FULL, SLIDING], "sliding_window": 4}))
    config.num_hidden_layers = 1
    check_attention_window(config, WINDOW_TOKENS)


def test_attention_window_of_an_image_student_is_that_of_its_language_model():
    text = {key: value for key, value in SHAPE.items() if key != "attn_implementation"}
    config = transformers.Gemma3Config(text_config=text | {"layer_types": [FULL, SLIDING], "sliding_window": 4})
    with pytest.raises(InvalidInput, match="window of 4 tokens"):
        check_attention_window(config, WINDOW_TOKENS)


def test_attention_chunks_shorter_than_the_window_are_refused():
    layers = {"layer_types": ["chunked_attention", FULL], "attention_chunk_size": 8}
    config = transformers.Llama4TextConfig(**(SHAPE | layers))
    check_attention_window(config, 8)
    with pytest.raises(InvalidInput, match="chunks of 8 tokens"):
        check_attention_window(config, 9)


def test_attention_recurrent_layers_are_refused():
    config = transformers.Lfm2Config(**(SHAPE | {"layer_types": ["conv", FULL]}))
    with pytest.raises(InvalidInput, match="type conv"):
        check_attention_window(config, 8)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("one_row", [False, True])
@pytest.mark.parametrize("name", ["Llama", "Gemma 3"])
def test_attention_flex_scores_equal_those_of_sdpa(name, one_row):
    model = build_family(name, sliding_window=WINDOW_TOKENS)
    with torch.inference_mode(), torch.compiler.set_stance("force_eager"):  # compiling its CPU kernel takes a minute
        expected = score_tree(model, one_row=one_row)
        model.set_attn_implementation("flex_attention")
        # Sums of up to 10 float32 terms of about 4.
        torch.testing.assert_close(score_tree(model, one_row=one_row), expected, atol=5e-5, rtol=1e-5)
