"""The forward pass over segments: the same numbers as the model's own, whatever is computed together."""

import pytest
import torch
import transformers

from mint_lib.engine.forward import ForwardPass, Segment
from mint_lib.engine.key_values import KeyValues
from mint_lib.errors import InvalidInput

# Sums are taken in another order than in the model's own pass; logits are of the order of 1.
ROUNDING = 1e-5
SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}


def make_model(kind, *, attention="sdpa", **changes):
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **changes})
    torch.manual_seed(1)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def own_logits(model, token_ids):
    with torch.inference_mode():
        return model(torch.tensor([token_ids])).logits[0]


def make_memory(forward_pass, num_places):
    key_values = KeyValues(forward_pass.geometry)
    key_values.reserve(num_places)
    return key_values


def draw_tokens(seed, count):
    return tuple(
        torch.randint(0, SIZES["vocab_size"], (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    )


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("Llama", {}),
        ("Llama", {"num_key_value_heads": 6}),
        ("Qwen2", {}),
        ("Qwen3", {"head_dim": 16}),
        ("Mistral", {"sliding_window": None}),
        ("Granite", {"logits_scaling": 3.0}),
    ],
)
def test_forward_ragged_chunks_of_many_requests_equal_the_model_alone(kind, changes):
    model = make_model(kind, **changes)
    prompts = [draw_tokens(seed, count) for seed, count in enumerate((40, 7, 23, 1))]
    expected = [own_logits(model, prompt) for prompt in prompts]
    forward_pass = ForwardPass(model)
    memories = [make_memory(forward_pass, len(prompt)) for prompt in prompts]
    for chunks in ([(0, 17), (0, 7), (0, 1), (0, 1)], [(17, 40), (1, 23)]):
        rows = [row for row, (start, stop) in zip((0, 1, 2, 3) if len(chunks) == 4 else (0, 2), chunks, strict=True)]
        segments = [
            Segment(
                key_values=memories[row],
                start=start,
                token_ids=prompts[row][start:stop],
                wanted=tuple(range(stop - start)),
            )
            for row, (start, stop) in zip(rows, chunks, strict=True)
        ]
        for row, (start, stop), logits in zip(rows, chunks, forward_pass.run(segments), strict=True):
            torch.testing.assert_close(logits, expected[row][start:stop], atol=ROUNDING, rtol=ROUNDING)


def test_forward_tree_behind_a_prompt_equals_each_branch_alone():
    model = make_model("Llama")
    prompt, first, second = draw_tokens(5, 11), (3, 4, 5), (3, 8)
    expected = [own_logits(model, prompt + branch) for branch in (first, second)]
    forward_pass = ForwardPass(model)
    memory = make_memory(forward_pass, 15)
    seen = torch.zeros(6, 15, dtype=torch.bool)
    seen[:2, :11] = torch.ones(2, 11, dtype=torch.bool).tril(9)
    seen[2:, :11] = True
    for row, places in enumerate([(11,), (11, 12), (11, 12, 13), (11, 14)]):
        seen[2 + row, list(places)] = True
    forward_pass.run([Segment(key_values=memory, start=0, token_ids=prompt[:9])])
    (logits,) = forward_pass.run(
        [
            Segment(
                key_values=memory,
                start=9,
                token_ids=(*prompt[9:], 3, 4, 5, 8),
                positions=(9, 10, 11, 12, 13, 12),
                seen=seen,
                wanted=(1, 2, 3, 4, 5),
            )
        ]
    )
    torch.testing.assert_close(logits[:4], expected[0][10:], atol=ROUNDING, rtol=ROUNDING)
    torch.testing.assert_close(logits[[0, 1, 4]], expected[1][10:], atol=ROUNDING, rtol=ROUNDING)


def test_forward_prepared_model_still_answers_in_the_ordinary_way():
    model = make_model("Qwen2")
    padded = torch.tensor([[0, 0, 5, 6], [1, 2, 3, 4]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    with torch.inference_mode():
        expected = model(padded, attention_mask=mask).logits
        ForwardPass(model)
        assert torch.equal(model(padded, attention_mask=mask).logits, expected)


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        ("Mistral", {"sliding_window": 8}, "mistral.*sliding"),
        ("Gemma2", {"head_dim": 8}, "gemma2.*sliding"),
        ("GptOss", {"head_dim": 8, "num_local_experts": 2, "layer_types": ["full_attention"] * 3}, "gpt_oss.*s_aux"),
        ("Mamba", {}, "mamba"),
    ],
)
def test_forward_model_with_other_attention_is_refused_by_name(kind, changes, reason):
    model = make_model(kind, attention="eager", **changes)
    with pytest.raises(InvalidInput, match=f"type {reason}"):
        ForwardPass(model)


def test_key_values_growing_and_copying_blocks_keeps_what_was_written():
    forward_pass = ForwardPass(make_model("Llama"))
    prompt = draw_tokens(9, 70)
    source = make_memory(forward_pass, 3)
    forward_pass.run([Segment(key_values=source, start=0, token_ids=prompt[:3])])
    source.reserve(70)
    (expected,) = forward_pass.run([Segment(key_values=source, start=3, token_ids=prompt[3:], wanted=(66,))])
    copy = make_memory(forward_pass, 70)
    for start in (0, 32):
        copy.copy_in(start, source.copy_out(start, start + 32))
    (logits,) = forward_pass.run([Segment(key_values=copy, start=64, token_ids=prompt[64:], wanted=(5,))])
    torch.testing.assert_close(logits, expected, atol=ROUNDING, rtol=ROUNDING)
    torch.testing.assert_close(logits[0], own_logits(make_model("Llama"), prompt)[-1], atol=ROUNDING, rtol=ROUNDING)
