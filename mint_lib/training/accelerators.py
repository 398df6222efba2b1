"""The devices that a run can be estimated for: memory and peak speed, from their vendor's data sheets."""

from collections.abc import Iterable
from typing import NamedTuple

from mint_lib.errors import InvalidInput


class Accelerator(NamedTuple):
    """One type."""

    memory_bytes: int | None
    """The data sheet's GB, as powers of ten; tools show up to 7 % more, which is left as a margin. None:
    it depends on the machine."""
    bfloat16_flops: float | None
    """Peak of dense bfloat16 matrix products, without the factor 2 of structured sparsity; None without such units."""
    float32_flops: float | None
    """Peak of float32 without TF32, which PyTorch leaves off for matrix products."""
    source: str


_GB, _TFLOPS = 10**9, 1e12
ACCELERATORS = {
    "t4": Accelerator(16 * _GB, None, 8.1 * _TFLOPS, "NVIDIA T4 data sheet (Turing: float16 units only)"),
    "l4": Accelerator(24 * _GB, 121 * _TFLOPS, 30.3 * _TFLOPS, "NVIDIA L4 data sheet, 242 with sparsity"),
    "a10": Accelerator(24 * _GB, 125 * _TFLOPS, 31.2 * _TFLOPS, "NVIDIA A10 data sheet"),
    "a10g": Accelerator(24 * _GB, 70 * _TFLOPS, 35 * _TFLOPS, "NVIDIA A10G product brief, as in AWS G5"),
    "l40s": Accelerator(48 * _GB, 362.05 * _TFLOPS, 91.6 * _TFLOPS, "NVIDIA L40S data sheet"),
    "a100-40gb": Accelerator(40 * _GB, 312 * _TFLOPS, 19.5 * _TFLOPS, "NVIDIA A100 data sheet"),
    "a100-80gb": Accelerator(80 * _GB, 312 * _TFLOPS, 19.5 * _TFLOPS, "NVIDIA A100 data sheet"),
    "h100-80gb": Accelerator(80 * _GB, 989 * _TFLOPS, 67 * _TFLOPS, "NVIDIA H100 SXM data sheet, 1979 with sparsity"),
    "h200": Accelerator(141 * _GB, 989 * _TFLOPS, 67 * _TFLOPS, "NVIDIA H200 SXM data sheet, 1979 with sparsity"),
    "cpu": Accelerator(None, None, None, "its speed depends on the machine: not estimated"),
}
"""By the name that `mint plan --gpu` takes."""


def choose_accelerators(names: Iterable[str]) -> dict[str, Accelerator]:
    """The types of `names`, `all` for all of them.

    Raises:
        InvalidInput: there is no such type; lists those there are.
    """
    chosen: dict[str, Accelerator] = {}
    for name in names:
        if name.lower() != "all" and name.lower() not in ACCELERATORS:
            raise InvalidInput(f"{name!r} is no GPU type that is known. Choose: all, {', '.join(ACCELERATORS)}.")
        chosen |= ACCELERATORS if name.lower() == "all" else {name.lower(): ACCELERATORS[name.lower()]}
    return chosen
