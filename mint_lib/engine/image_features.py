"""The eyes of an image student: what its vision tower and projector make of a prompt's images.

Goes in: a model and the images of one prompt. Comes out: an embedding for each place of the prompt that stands for an
image. Images of one prompt are computed alone, so that its numbers depend on nothing beside it. It knows no prompt and
no queue.

Shape suffixes: I places that stand for images, E hidden size.
"""

from typing import TYPE_CHECKING

from mint_lib.engine.prompt_images import PromptImages
from mint_lib.errors import InvalidInput

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

MODEL_TYPES = ("idefics3", "llava", "smolvlm")
"""Families whose images are embeddings at image-token places of a plain decoder."""


def sees_images(model: "PreTrainedModel") -> bool:
    """Whether `model` is an image-text-to-text model of any family."""
    return getattr(model.config, "vision_config", None) is not None


def is_batched(model: "PreTrainedModel") -> bool:
    """Whether images of `model` are embeddings in its prompt, so that requests share its passes."""
    return model.config.model_type in MODEL_TYPES


class ImageFeatures:
    """Computes the features of images."""

    def __init__(self, model: "PreTrainedModel"):
        """Compute with `model`, which is in evaluation mode on its device.

        Raises:
            InvalidInput: its images are no embeddings at places of the prompt.
        """
        if not is_batched(model):
            raise InvalidInput(
                f"Images of a student of the type {model.config.model_type} are not embeddings in its prompt. Requests "
                f"share the passes of {', '.join(MODEL_TYPES)} only; give the student's `collate_images` to answer one "
                "at a time, or serve it with vLLM."
            )
        self._model = model

    def compute(self, images: PromptImages) -> "torch.Tensor":
        """The features of `images`, [I, E].

        Raises:
            InvalidInput: they are not as many as the prompt's places for them.
        """
        import torch

        with torch.inference_mode():
            inputs = {name: tensor.to(self._model.device) for name, tensor in images.inputs.items()}
            found = self._model.get_image_features(**inputs, return_dict=True).pooler_output
            features_IE: torch.Tensor = torch.cat(list(found)) if not isinstance(found, torch.Tensor) else found
            features_IE = features_IE.reshape(-1, features_IE.shape[-1])
        if len(features_IE) != len(images.places):
            raise InvalidInput(
                f"The prompt has {len(images.places)} image tokens, and its images give {len(features_IE)} features. "
                "No text may hold an image token: remove it."
            )
        return features_IE
