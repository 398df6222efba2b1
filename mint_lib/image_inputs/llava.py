"""LLaVA: every image is resized to the square that its vision tower reads, and becomes one token for each patch.

Goes in: images. Comes out: pixels of all images of a batch, one after another. It knows no conversation.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mint_lib.errors import InvalidInput
from mint_lib.image_inputs.family import ImageFamily, ImageInputs, PreparedImages
from mint_lib.packing import PackedTrees, Tree

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import BaseImageProcessor, PretrainedConfig, PreTrainedTokenizerBase

_CLASS_TOKENS = {"clip_vision_model": 1, "siglip_vision_model": 0, "efficientnet_lite": 0}
"""Vision towers, and how many outputs each has before those of its patches."""


class Llava(ImageFamily):
    """One square for each image."""

    model_types = ("llava",)

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        image_processor: "BaseImageProcessor",
        model_config: "PretrainedConfig",
    ):
        """Read for a model of `model_config`.

        Raises:
            InvalidInput: another vision tower than CLIP's, SigLIP's or EfficientNet-Lite's.
        """
        super().__init__(tokenizer, image_processor, model_config)
        tower = model_config.vision_config.model_type
        if tower not in _CLASS_TOKENS:
            raise InvalidInput(
                f"this LLaVA student sees by {tower!r}, and only {', '.join(_CLASS_TOKENS)} can be read for. Choose "
                "another student."
            )

    def prepare(self, images: "Sequence[Image]") -> PreparedImages:
        """`pixel_values` [images, 3, height, width]."""
        pixels = self.image_processor(list(images), return_tensors="pt")["pixel_values"]
        size = self.model_config.vision_config.image_size
        text = self.image_token * self._count_image_features(size, size)
        return PreparedImages({"pixel_values": pixels}, [text] * len(images))

    def count_features(self, inputs: ImageInputs) -> int:
        """Patches of all images, and class tokens where the model keeps them."""
        num_images, _, height, width = inputs["pixel_values"].shape
        return num_images * self._count_image_features(height, width)

    def collate(
        self, image_inputs: Sequence[ImageInputs | None], trees: Sequence[Tree], batch: PackedTrees
    ) -> dict[str, Any]:
        """The images in the order of the rows: the model fills image tokens in that order."""
        import torch

        return {"pixel_values": torch.cat([inputs["pixel_values"] for inputs in image_inputs if inputs is not None])}

    def _count_image_features(self, height: int, width: int) -> int:
        """Features of one image; the `default` strategy leaves out the first, the class token."""
        config = self.model_config.vision_config
        num_features = (height // config.patch_size) * (width // config.patch_size) + _CLASS_TOKENS[config.model_type]
        return int(num_features - (self.model_config.vision_feature_select_strategy == "default"))
