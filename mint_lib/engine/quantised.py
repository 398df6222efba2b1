"""Linear layers with 8-bit weights: a quarter of the memory to read for each token, so decoding on a CPU is faster.

Goes in: a model. Comes out: the same model, its `torch.nn.Linear` layers replaced in place. Weights have one scale per
output channel, inputs one scale per row (token), found when they arrive. Sums are of integers, so a row's result is the
same bits whatever else is in the batch. It does not decide whether the result is good enough: that is measured.

Shape suffixes: B rows (tokens), I inputs, O outputs.
"""

import functools
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from mint_lib.errors import InvalidInput

if TYPE_CHECKING:
    import torch

_LEVELS = 127
_ZERO_POINT = 128
_FINE_STEPS = 254  # a rounding error is at most half a step, so 254 of its own steps fill the same 127 levels


def quantise_linears(model: "torch.nn.Module") -> None:
    """Replace every `torch.nn.Linear` of `model` by an 8-bit one, in place; adapters of PEFT stay as they are.

    Adapters may be added before or after. The output layer is quantised as a copy where it shares the embedding's
    weight. The model can only be used for inference from then on.

    The method is the row-wise and column-wise absmax of LLM.int8() (Dettmers et al., arXiv 2208.07339, section 2.1),
    with inputs in two parts of 8 bits, coarse and fine, in place of its path for outliers: a token is then two rows for
    the same weights, which costs little where reading the weights is what takes the time. One scale for a whole batch,
    as in PyTorch's own dynamic layers, loses everything but the first token of a text, whose activations are hundreds
    of times larger than all others.

    Raises:
        InvalidInput: this machine's processor or the model's device has no such kernels.
    """
    import torch

    # Without VNNI these kernels add pairs of products in 16 bits, which overflow.
    if "fbgemm" not in torch.backends.quantized.supported_engines or not torch.cpu._is_vnni_supported():
        raise InvalidInput("int8 needs an x86 processor with AVX-512 VNNI. Serve this student in float32.")
    if any(parameter.device.type != "cpu" for parameter in model.parameters()):
        raise InvalidInput("int8 is for CPUs. Move the model to the CPU, or serve it in its own precision.")
    for parent, name, linear in list(_find_linears(model)):
        setattr(parent, name, _layer_type()(linear))


@functools.cache
def _layer_type() -> type["torch.nn.Linear"]:
    """The layer's class, made when torch is wanted."""
    import torch

    class QuantisedLinear(torch.nn.Linear):
        """A linear layer for inference. It is a `torch.nn.Linear` so that PEFT accepts it under an adapter."""

        def __init__(self, linear: torch.nn.Linear):
            # The weight lives in `_packed`; an empty one stays for those who ask for its device and type.
            torch.nn.Module.__init__(self)
            self.in_features, self.out_features = linear.in_features, linear.out_features
            self.weight = torch.nn.Parameter(linear.weight.new_empty(0), requires_grad=False)
            self.bias = None if linear.bias is None else torch.nn.Parameter(linear.bias.detach(), requires_grad=False)
            self._packed = _pack(linear.weight.detach().float())
            self._multiply = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            """`input` [..., I] times the weight [O, I] plus the bias: [..., O]."""
            input_BI = input.reshape(-1, self.in_features).float()
            # Without the floor a row of zeros would be divided by zero. Rows that are not finite stay so, and alone.
            scale_B1 = input_BI.abs().amax(dim=-1, keepdim=True).clamp_min_(1e-30).div_(_LEVELS)
            both_2BI = input_BI.new_empty(2, *input_BI.shape)
            coarse_BI, fine_BI = both_2BI.unbind()
            torch.div(input_BI, scale_B1, out=fine_BI)
            # Rounded here, because the kernel rounds after adding its zero point and near a half would not agree.
            torch.round(fine_BI, out=coarse_BI)
            fine_BI.sub_(coarse_BI).mul_(_FINE_STEPS)
            coarse_BO, fine_BO = self._multiply(both_2BI, 1.0, _ZERO_POINT, self._packed).unbind()
            output_BO = coarse_BO.add_(fine_BO, alpha=1 / _FINE_STEPS).mul_(scale_B1)
            if self.bias is not None:
                output_BO += self.bias
            return output_BO.view(*input.shape[:-1], self.out_features).to(input.dtype)

    return QuantisedLinear


def _find_linears(parent: "torch.nn.Module") -> Iterator[tuple["torch.nn.Module", str, "torch.nn.Linear"]]:
    """Every linear layer with its parent and its name there; of an adapted layer the base only."""
    import torch

    for name, child in parent.named_children():
        if hasattr(parent, "base_layer") and name != "base_layer":
            continue
        if type(child) is torch.nn.Linear:
            yield parent, name, child
        else:
            yield from _find_linears(child)


def _pack(weight_OI: "torch.Tensor") -> Any:
    """The weight as FBGEMM reads it: symmetric 8-bit integers with one scale per output channel."""
    import torch

    scale_O = (weight_OI.abs().amax(dim=1) / _LEVELS).clamp_min(1e-30).double()
    zero_point_O = torch.zeros(len(scale_O), dtype=torch.long)
    engine = torch.backends.quantized.engine
    torch.backends.quantized.engine = "fbgemm"
    try:
        with warnings.catch_warnings():
            # PyTorch means to retire quantised tensors; one is only made here, to pack it.
            warnings.simplefilter("ignore")
            quantised_OI = torch.quantize_per_channel(weight_OI, scale_O, zero_point_O, 0, torch.qint8)
            return torch.ops.quantized.linear_prepack(quantised_OI, None)
    finally:
        torch.backends.quantized.engine = engine
