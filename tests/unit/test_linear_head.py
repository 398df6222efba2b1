"""The linear head: the numbers and gradients of whole logits, in chunks, and no model whose logits it gets wrong."""

import types
import weakref

import peft
import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from mint_lib.errors import InvalidInput
from mint_lib.linear_head import Tail, predict_by_forward, predict_targets

TAILS = [Tail(), Tail(scale=0.25), Tail(softcap=3.0), Tail(scale=2.0, softcap=3.0)]
NUM_TOKENS = 160
SIZES = {
    "vocab_size": NUM_TOKENS,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "pad_token_id": 0,
    "initializer_range": 0.3,  # logits of several nats
}
IDS_BT = torch.arange(3, 33).reshape(3, 10)
SOURCE_N = torch.tensor([1, 4, 4, 7, 12, 13, 20, 25, 28] * 3)
TARGET_N = torch.arange(27) * 41 % (NUM_TOKENS - 10)
WEIGHT_N = torch.linspace(-1.0, 1.0, 27)


class Watch(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation gives, and how many of that size lived at once."""

    def __init__(self):
        super().__init__()
        self.largest = self.num_largest = 0
        self._seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outputs = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(outputs):
            if isinstance(leaf, torch.Tensor) and leaf.numel() >= self.largest:
                if leaf.numel() > self.largest:
                    self.largest, self.num_largest, self._seen = leaf.numel(), 0, []
                self._seen.append(weakref.ref(leaf))
                alive = [tensor for seen in self._seen if (tensor := seen()) is not None]
                self.num_largest = max(self.num_largest, len({tensor.data_ptr() for tensor in alive}))
        return outputs


def draw(num_edges, *, hidden_size=16, num_tokens=50, dtype=torch.float32, bias=False):
    generator = torch.Generator().manual_seed(5)
    options = {"generator": generator, "dtype": torch.float64}
    tensors = [torch.randn(num_edges, hidden_size, **options), torch.randn(num_tokens, hidden_size, **options) / 2]
    if bias:
        tensors.append(torch.randn(num_tokens, **options))
    tensors = [tensor.to(dtype).requires_grad_() for tensor in tensors] + [None] * (not bias)
    return *tensors, torch.randint(num_tokens, (num_edges,), generator=generator)


def predict_plainly(hidden_NH, weight_VH, bias_V, target_N, tail=TAILS[0]):
    """Whole logits, and autograd."""
    logits_NV = torch.nn.functional.linear(hidden_NH, weight_VH, bias_V) * tail.scale
    if tail.softcap is not None:
        logits_NV = torch.tanh(logits_NV / tail.softcap) * tail.softcap
    wide = torch.promote_types(logits_NV.dtype, torch.float32)
    return logits_NV.to(wide).log_softmax(-1).gather(-1, target_N[:, None])[:, 0]


def gradients(log_probability_N, inputs):
    """By a weighting of the edges with both signs and a 0, as a preference loss has."""
    weight_N = torch.linspace(-1.0, 1.0, len(log_probability_N), dtype=log_probability_N.dtype)
    return torch.autograd.grad((log_probability_N * weight_N).sum(), inputs)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("bias", [False, True])
def test_linear_head_gradients_pass_gradcheck(tail, bias):
    *tensors, target_N = draw(7, hidden_size=4, num_tokens=11, dtype=torch.float64, bias=bias)
    assert torch.autograd.gradcheck(lambda *t: predict_targets(*t, target_N, chunk_tokens=3, tail=tail), tensors)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("chunk_tokens", [1, 4, 5, 13, 100])
def test_linear_head_every_chunk_size_equals_whole_logits(chunk_tokens, tail):
    *tensors, target_N = draw(13, bias=True)
    chunked = predict_targets(*tensors, target_N, chunk_tokens=chunk_tokens, tail=tail)
    plain = predict_plainly(*tensors, target_N, tail)
    assert chunked.dtype == torch.float32
    close = {"rtol": 1e-6, "atol": 2e-6}  # float32 sums of 16 products of about 1: a few times 1.2e-7
    torch.testing.assert_close(chunked, plain, **close)
    for ours, reference in zip(gradients(chunked, tensors), gradients(plain, tensors), strict=True):
        torch.testing.assert_close(ours, reference, **close)


@pytest.mark.parametrize(
    ("hidden_dtype", "weight_dtype"),
    [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)],
)
def test_linear_head_bfloat16_gives_float32_log_probabilities(hidden_dtype, weight_dtype):
    hidden_NH, weight_VH, _, target_N = draw(13)
    hidden_NH, weight_VH = (
        tensor.detach().to(dtype).requires_grad_()
        for tensor, dtype in ((hidden_NH, hidden_dtype), (weight_VH, weight_dtype))
    )
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=weight_dtype == torch.float32):
        chunked = predict_targets(hidden_NH, weight_VH, None, target_N, chunk_tokens=5)
        plain = predict_plainly(hidden_NH, weight_VH, None, target_N)
    exact = predict_plainly(hidden_NH.double(), weight_VH.double(), None, target_N)
    assert chunked.dtype == torch.float32
    # bfloat16 rounds to 2**-9: a logit of up to 8 by 0.016, of rounded inputs by a little more; a gradient by 2**-8 of
    # the largest term in its sum.
    torch.testing.assert_close(chunked, plain, atol=0.04, rtol=0.0)
    torch.testing.assert_close(chunked.double(), exact, atol=0.08, rtol=0.0)
    tensors = [hidden_NH, weight_VH]
    found, expected = gradients(chunked, tensors), gradients(exact, tensors)
    assert [gradient.dtype for gradient in found] == [hidden_dtype, weight_dtype]
    for ours, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), reference.double(), atol=0.02 * reference.abs().max(), rtol=0.0)


def test_linear_head_bfloat16_weight_gradient_does_not_drift_with_the_number_of_chunks():
    hidden_NH, weight_VH, _, target_N = draw(400, num_tokens=5, dtype=torch.bfloat16)
    many, plain = (
        gradients(predicted, weight_VH)[0].float()
        for predicted in (
            predict_targets(hidden_NH, weight_VH, None, target_N, chunk_tokens=1),
            predict_plainly(hidden_NH, weight_VH, None, target_N),
        )
    )
    # Both are rounded once, at the end, so they are neighbours at most: 2**-7 of the largest entry.
    torch.testing.assert_close(many, plain, atol=2**-7 * plain.abs().max().item(), rtol=0.0)


def test_linear_head_without_edges_gives_none_and_zero_gradients():
    *tensors, target_N = draw(0, bias=True)
    predicted = predict_targets(*tensors, target_N, chunk_tokens=4)
    assert predicted.shape == (0,)
    assert [gradient.abs().sum().item() for gradient in gradients(predicted, tensors)] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_linear_head_without_autograd_does_no_work_for_it(mode):
    hidden_NH, weight_VH, _, target_N = draw(13)
    with mode(), FlopCounterMode(display=False) as counter:
        predicted = predict_targets(hidden_NH, weight_VH, None, target_N, chunk_tokens=4)
    assert not predicted.requires_grad
    assert counter.get_total_flops() == 2 * 13 * weight_VH.numel()
    torch.testing.assert_close(predicted, predict_plainly(hidden_NH, weight_VH, None, target_N).detach())


@pytest.mark.parametrize(("trained", "num_products"), [("hidden", 2), ("weight", 3), ("both", 4)])
def test_linear_head_computes_only_the_gradients_that_are_wanted(trained, num_products):
    hidden_NH, weight_VH, _, target_N = draw(13)
    hidden_NH.requires_grad_(trained != "weight")
    weight_VH.requires_grad_(trained != "hidden")
    with FlopCounterMode(display=False) as counter:
        predict_targets(hidden_NH, weight_VH, None, target_N, chunk_tokens=4).sum().backward()
    assert counter.get_total_flops() == num_products * 2 * 13 * weight_VH.numel()


def test_linear_head_twice_in_a_graph_adds_its_gradients():
    hidden_NH, weight_VH, _, target_N = draw(13)

    def both(predict):
        first, second = predict(hidden_NH, target_N), predict(hidden_NH.tanh(), target_N.flip(0))
        return gradients(torch.cat([first, second]), [hidden_NH, weight_VH])

    chunked = both(lambda hidden, target: predict_targets(hidden, weight_VH, None, target, chunk_tokens=4))
    plain = both(lambda hidden, target: predict_plainly(hidden, weight_VH, None, target))
    torch.testing.assert_close(chunked, plain, rtol=1e-6, atol=2e-6)  # as above


@pytest.mark.parametrize("trained", ["hidden", "both"])
def test_linear_head_holds_one_chunk_of_logits(trained):
    num_edges, num_tokens, chunk_tokens = 512, 32_000, 64
    hidden_NH, weight_VH, _, target_N = draw(num_edges, num_tokens=num_tokens)
    weight_VH.requires_grad_(trained == "both")
    with Watch() as watch:
        predict_targets(hidden_NH, weight_VH, None, target_N, chunk_tokens=chunk_tokens).sum().backward()
    assert watch.largest == chunk_tokens * num_tokens
    assert watch.num_largest == 1


def build(family, **options):
    torch.manual_seed(2)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, "tie_word_embeddings": False, **options})
    return getattr(transformers, f"{family}ForCausalLM")._from_config(config, attn_implementation="eager").eval()


class OddLlama(transformers.LlamaForCausalLM):
    """Does something to its logits that no tail says."""

    def forward(self, *arguments, **options):
        output = super().forward(*arguments, **options)
        output.logits = self.finish(output.logits)
        return output


ODD = {
    "cuts the vocabulary": lambda logits: logits[..., :-10],
    "forbids a token": lambda logits: logits.index_fill(-1, torch.tensor([5]), -1e4),
    "adds to each token": lambda logits: logits + torch.linspace(0.0, 3.0, NUM_TOKENS),
    "clamps": lambda logits: logits.clamp(-0.5, 0.5),
    "squares": lambda logits: logits * logits.abs(),
    "keeps the largest": lambda logits: logits.where(logits >= logits.topk(80).values[..., -1:], -9.0),
    "normalises": lambda logits: torch.nn.functional.layer_norm(logits, (NUM_TOKENS,)),
    "subtracts the average": lambda logits: logits - 0.5 * logits.mean(-1, keepdim=True).exp(),
}


def build_odd(name):
    model = build("Llama")
    model.__class__ = OddLlama
    model.finish = ODD[name]
    return model


def build_adapted(**options):
    config = peft.LoraConfig(r=4, init_lora_weights=False, **options)
    return peft.get_peft_model(build("Llama"), config).eval()


def hook_head(model, hook):
    model.get_output_embeddings().register_forward_hook(hook)
    return model


CHUNKED = {
    "Llama": lambda: build("Llama"),
    "Llama, tied": lambda: build("Llama", tie_word_embeddings=True),
    "Qwen2": lambda: build("Qwen2"),
    "Gemma 2, soft cap": lambda: build("Gemma2", final_logit_softcapping=2.0),
    "Granite, scale": lambda: build("Granite", logits_scaling=3.0),
    "Cohere, scale": lambda: build("Cohere", logit_scale=0.3, tie_word_embeddings=True),
    "Phi, bias": lambda: build("Phi"),
    "LoRA": lambda: build_adapted(target_modules=["q_proj", "down_proj"]),
}
WHOLE = {
    **{f"odd: {name}": lambda name=name: build_odd(name) for name in ODD},
    "LoRA on the head": lambda: build_adapted(target_modules=["q_proj", "lm_head"]),
    "DoRA on the head": lambda: build_adapted(target_modules=["lm_head"], use_dora=True),
    "trained copy of the head": lambda: build_adapted(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "hook on the head": lambda: hook_head(build("Llama"), lambda _module, _inputs, output: output.clamp(-1, 1)),
}


def predict_by_model(model, *, chunk_tokens=4):
    return predict_by_forward(
        model, lambda: model(input_ids=IDS_BT), source_N=SOURCE_N, target_N=TARGET_N, chunk_tokens=chunk_tokens
    )


def predict_by_rows(model):
    """The model's own logits of every place."""
    logits_NV = model(input_ids=IDS_BT).logits.flatten(0, 1)[SOURCE_N]
    return logits_NV.float().log_softmax(-1).gather(-1, TARGET_N[:, None])[:, 0]


def check_against_rows(model):
    if not any(isinstance(module, peft.PeftModel) for module in model.modules()):
        model.requires_grad_(True)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    reference = predict_by_rows(model)
    expected = torch.autograd.grad((reference * WEIGHT_N).sum(), parameters, allow_unused=True)
    for _ in range(2):  # the first pass looks at what the model does to its logits, the second knows
        predicted = predict_by_model(model)
        found = torch.autograd.grad((predicted * WEIGHT_N).sum(), parameters, allow_unused=True)
        torch.testing.assert_close(predicted, reference, rtol=1e-6, atol=4e-6)  # float32 logits of up to 10
        for ours, theirs in zip(found, expected, strict=True):
            assert (ours is None) == (theirs is None)
            if ours is not None:  # sums of a hundred rounded terms of the size of the largest entry
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * max(1.0, theirs.abs().max().item()))


@pytest.mark.parametrize("name", CHUNKED)
def test_linear_head_of_a_family_equals_its_logits_in_chunks(name):
    model = CHUNKED[name]()
    check_against_rows(model)
    model.requires_grad_(False)
    with Watch() as watch:
        predict_by_model(model)
    assert watch.largest < len(SOURCE_N) * NUM_TOKENS


@pytest.mark.parametrize("name", WHOLE)
def test_linear_head_that_does_more_equals_its_logits(name):
    check_against_rows(WHOLE[name]())


def test_linear_head_leaves_the_model_as_it_was_even_if_the_pass_fails():
    model = build("Llama")
    before = model(input_ids=IDS_BT).logits
    predict_by_model(model)
    with pytest.raises(IndexError):
        predict_by_forward(
            model, lambda: model(input_ids=IDS_BT), source_N=SOURCE_N + 999, target_N=TARGET_N, chunk_tokens=4
        )
    assert torch.equal(model(input_ids=IDS_BT).logits, before)


class Twice(torch.nn.Module):
    """Calls its output layer as often as it is told."""

    def __init__(self, num_calls):
        super().__init__()
        self.head, self.num_calls = torch.nn.Linear(16, NUM_TOKENS), num_calls

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids):
        hidden_BTH = torch.ones(*input_ids.shape, 16)
        outputs = [self.head(hidden_BTH) for _ in range(self.num_calls)]
        return types.SimpleNamespace(logits=sum(outputs, torch.zeros(1, NUM_TOKENS)))


@pytest.mark.parametrize("num_calls", [0, 2])
def test_linear_head_that_is_not_called_once_is_refused(num_calls):
    with pytest.raises(InvalidInput, match=f"called its output layer {num_calls} times"):
        predict_by_model(Twice(num_calls))


def test_linear_head_second_look_drops_out_the_same_units():
    model = build("Granite", logits_scaling=3.0, attention_dropout=0.5).train()
    torch.manual_seed(7)
    first, after_first = predict_by_model(model), torch.rand(1)
    torch.manual_seed(7)
    known, after_known = predict_by_model(model), torch.rand(1)
    assert torch.equal(first, known)
    assert torch.equal(after_first, after_known)
    torch.manual_seed(8)
    assert not torch.equal(predict_by_model(model), known), "dropout is at work"
