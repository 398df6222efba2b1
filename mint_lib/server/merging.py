"""Adapters of image students, put into the model when it is loaded: the engine then sees a whole model.

Goes in: a student with its adapter, and the adapter's folder, which was checked. Comes out: the model with every
trained weight in its place. A projector that was trained and adapters inside the vision tower belong to one student, so
that image students share no base. It knows no store and no engine.
"""

import pathlib
from typing import TYPE_CHECKING, Any

from mint_lib.errors import InvalidInput
from mint_lib.server.safe_adapter import WEIGHTS

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def merge_adapter(adapted: Any, folder: pathlib.Path) -> "PreTrainedModel":
    """The model inside `adapted`, a PEFT model of the adapter in `folder`, with what the adapter adds.

    Float32 weights take up the adapter's; in bfloat16, whose 8 bits would round most of it away, its layers stay beside
    those of the base, as in training.

    Raises:
        InvalidInput: a tensor of the file is not finite, or is not in the model as it is in the file.
    """
    import peft
    import safetensors.torch
    import torch

    weights = safetensors.torch.load_file(folder / WEIGHTS)
    loaded = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)
    if loaded.keys() != weights.keys():
        raise InvalidInput(f"PEFT did not load all of {WEIGHTS}. Save the adapter again with PEFT's save_pretrained.")
    for name, tensor in weights.items():
        if not bool(torch.isfinite(tensor).all()):
            raise InvalidInput(f"{WEIGHTS}: {name} holds numbers that are not finite. Train it again.")
        if not torch.equal(loaded[name].cpu().to(tensor.dtype), tensor):
            raise InvalidInput(f"PEFT did not load {name} of {WEIGHTS} unchanged. Save the adapter again.")
    is_exact = adapted.get_base_model().dtype == torch.float32
    model: PreTrainedModel = adapted.merge_and_unload() if is_exact else adapted.get_base_model()
    return model.eval()
