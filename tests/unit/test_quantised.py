"""8-bit linear layers: the arithmetic, that rows do not see one another, and that they stand under PEFT adapters."""

import copy
import math

import pytest
import torch

from mint_lib.engine.quantised import quantise_linears
from mint_lib.errors import InvalidInput
from mint_lib.student import StudentConfig, load_student

TINY = StudentConfig(model="tiny")

pytestmark = pytest.mark.skipif(not torch.cpu._is_vnni_supported(), reason="int8 needs AVX-512 VNNI")


def quantise(linear):
    model = torch.nn.Sequential(copy.deepcopy(linear))
    quantise_linears(model)
    return model.requires_grad_(False)


def make_linear(num_inputs, num_outputs, *, bias=False, seed=0):
    torch.manual_seed(seed)
    return torch.nn.Linear(num_inputs, num_outputs, bias=bias).requires_grad_(False)


def round_weight(weight_OI):
    """The weight that 8-bit integers with one scale per output channel stand for."""
    scale_O1 = weight_OI.double().abs().amax(dim=1, keepdim=True) / 127
    return (weight_OI / scale_O1).round() * scale_O1


@pytest.fixture
def adapter(tmp_path):
    """The folder of a LoRA adapter with random weights for all linear layers of the tiny student."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(load_student(TINY), config).save_pretrained(tmp_path)
    return tmp_path


def predict(model, num_rows=2):
    ids_BT = torch.arange(4 * 11).view(4, 11)[:num_rows] * 7 % 500
    with torch.inference_mode():
        return model(input_ids=ids_BT, use_cache=False).logits


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 64), (3, 5, 64), (2, 1, 64)])
def test_quantised_linear_is_the_product_with_the_rounded_weight(shape, bias):
    linear = make_linear(64, 96, bias=bias)
    torch.manual_seed(5)
    input = torch.randn(shape) * torch.logspace(-3, 3, shape[-2])[:, None]
    expected = input.double() @ round_weight(linear.weight).T + (linear.bias if bias else 0)
    found = quantise(linear)(input)
    assert found.shape == expected.shape
    # Inputs keep 1/(127 * 254) of their row's largest value; 64 such errors of random sign meet weights of up to 1/8.
    bound = input.abs().amax(-1, keepdim=True) / (127 * 254) * math.sqrt(64) / 8
    assert ((found - expected).abs() <= bound + 1e-6).all()


def test_quantised_linear_does_not_overflow_at_the_largest_values():
    linear = torch.nn.Linear(256, 32, bias=False)
    torch.nn.init.ones_(linear.weight)
    assert quantise(linear)(torch.ones(4, 256)).sub(256).abs().max() < 1e-2  # float32 scales at a sum of 256
    assert quantise(linear)(-torch.ones(4, 256)).add(256).abs().max() < 1e-2


def test_quantised_linear_row_is_the_same_bits_alone_and_beside_any_other():
    layer = quantise(make_linear(64, 96))
    torch.manual_seed(6)
    rows = torch.randn(9, 64)
    rows[3] *= 1e4
    rows[7] = math.nan
    together = layer(rows)
    for row in set(range(9)) - {7}:
        assert torch.equal(layer(rows[row : row + 1])[0], together[row])
    assert together[7].isnan().all()


def test_quantised_linear_of_zeros_is_zero():
    layer = quantise(make_linear(64, 96))
    assert torch.equal(layer(torch.zeros(2, 64)), torch.zeros(2, 96))


def test_quantised_model_stays_near_the_float_model():
    model = load_student(TINY)
    expected = predict(model)
    quantise_linears(model)
    found = predict(model)
    # 8-bit weights err by at most 1/254 of a channel's largest; through two layers that stays within a few percent.
    assert 0 < (found - expected).norm() / expected.norm() < 0.05
    assert type(model.get_output_embeddings()).__name__ == "QuantisedLinear"
    assert model.get_input_embeddings().weight.dtype == torch.float32


def test_quantised_model_takes_its_adapter_before_or_after(adapter):
    from peft import PeftModel

    float_model = load_student(TINY, adapter)
    expected = predict(float_model)
    before = load_student(TINY, adapter)
    quantise_linears(before)
    after = load_student(TINY)
    quantise_linears(after)
    base_only = predict(after)
    after = PeftModel.from_pretrained(after, str(adapter)).eval()
    assert torch.equal(predict(before), predict(after))
    assert (predict(after) - expected).norm() / expected.norm() < 0.05
    assert (base_only - expected).norm() / expected.norm() > 0.1
    with after.disable_adapter(), torch.inference_mode():
        assert torch.equal(predict(after), base_only)
    lora = [name for name, module in before.named_modules() if ".lora_" in name and type(module) is torch.nn.Linear]
    assert len(lora) == 2 * 7 * 2


def test_quantised_model_loads_a_second_adapter(adapter):
    from peft import PeftModel

    model = load_student(TINY)
    quantise_linears(model)
    model = PeftModel.from_pretrained(model, str(adapter), adapter_name="first").eval()
    expected = predict(model)
    model.load_adapter(str(adapter), adapter_name="second")
    model.set_adapter("second")
    assert torch.equal(predict(model), expected)
    model.delete_adapter("first")
    assert torch.equal(predict(model), expected)


def test_quantised_model_frees_the_float_weights():
    model = load_student(TINY)
    before = sum(parameter.numel() for parameter in model.parameters())
    quantise_linears(model)
    embedding = model.get_input_embeddings().weight.numel()
    left = sum(parameter.numel() for parameter in model.parameters())
    assert left - embedding < 0.02 * before  # norms


def test_quantised_model_on_another_device_is_refused():
    with pytest.raises(InvalidInput, match="int8 is for CPUs"):
        quantise_linears(torch.nn.Linear(4, 4, device="meta"))
