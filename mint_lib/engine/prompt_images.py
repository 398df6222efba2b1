"""The images of one prompt, as the engine takes them: tensors, the places they fill, and a digest of what is seen.

Goes in: a prompt's token ids and what the student's image processor made of its images. Comes out: a record whose
digest is equal only for equal content, by which prefixes of prompts with images are told apart. It knows no model.
"""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    import torch


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class PromptImages:
    """All images of one prompt."""

    inputs: "Mapping[str, torch.Tensor]"
    """By the name of the model's argument."""
    places: tuple[int, ...]
    """The places of the prompt whose tokens stand for images, in their order."""
    digest: str
    """SHA-256 over the tensors: names, element types, shapes and bytes."""
    num_bytes: int
    """Memory of the tensors."""

    @classmethod
    def build(cls, prompt_ids: Sequence[int], inputs: "Mapping[str, torch.Tensor]", *, image_token_id: int) -> Self:
        """The images that `inputs` holds, which stand where `prompt_ids` has the image token."""
        import torch

        hasher, num_bytes = hashlib.sha256(), 0
        for name, tensor in sorted(inputs.items()):
            hasher.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            # numpy has no bfloat16, so the bytes are looked at as such.
            hasher.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
            num_bytes += tensor.numel() * tensor.element_size()
        places = tuple(place for place, token_id in enumerate(prompt_ids) if token_id == image_token_id)
        return cls(inputs=inputs, places=places, digest=hasher.hexdigest(), num_bytes=num_bytes)
