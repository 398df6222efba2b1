"""QLoRA: the base held in 4 bits while its adapter is trained (Dettmers et al. 2023, arXiv 2305.14314).

Goes in: the student's precision. Comes out: how its base is to be loaded. Only training sees the 4-bit base: the
adapter is evaluated and served on the base's own weights, which the 4-bit ones approximate. Nothing else is prepared:
PEFT's `prepare_model_for_kbit_training` would hold embeddings, norms and output layer in float32, at twice their
memory, for a precision that the norms and the losses here compute in anyway.
"""

import importlib.util
from typing import TYPE_CHECKING, Literal

from mint_lib.errors import MissingDependency
from mint_lib.training.adapter import IMAGE_PARTS

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig


def quantisation_config(dtype: Literal["float32", "bfloat16"]) -> "BitsAndBytesConfig":
    """What `from_pretrained` takes as `quantization_config`: NF4 with double quantisation, computing in `dtype`.

    The decoder's linear layers are quantised. The output layer, the vision tower and the projector keep `dtype`: the
    first is read directly by the losses, the others are few weights, and a projector in 4 bits could not be trained.

    Raises:
        MissingDependency: bitsandbytes is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingDependency(
            "alignment.quantisation: nf4 needs the package bitsandbytes. Install it with `pip install bitsandbytes`, "
            "or take quantisation: none."
        )
    import torch
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
        llm_int8_skip_modules=sorted({"lm_head"} | {place for parts in IMAGE_PARTS.values() for place in parts}),
    )
