"""Mllama (Llama 3.2 Vision): one token for each image, and layers in which places look at the image's tiles.

Goes in: images. Comes out: tiles with the shape they were cut to, and which place of a tree sees which tile. A place
sees the images that stand before it, so all answers of a tree see what the prompt's last token sees. It knows no
conversation.

A place before the first image sees none, and the model's own code then averages over all images of its row. Padding
would change that average, so rows of a batch get the same number of images by repeating their own: up to the least
common multiple of the rows' numbers. Repeated images cost their share of the vision tower, and nothing else sees them.

Shape suffixes: B trees, T places in a row, I images of a row, C tiles of an image.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mint_lib.image_inputs.family import ImageFamily, ImageInputs, PreparedImages
from mint_lib.packing import PackedTrees, Tree

if TYPE_CHECKING:
    from PIL.Image import Image


class Mllama(ImageFamily):
    """Images beside the row, seen by cross-attention."""

    model_types = ("mllama",)
    needs_images = True
    """Without images the model leaves out its layers of cross-attention, so a batch cannot hold both kinds."""

    def prepare(self, images: "Sequence[Image]") -> PreparedImages:
        """`pixel_values` [1, images, tiles, 3, height, width], ids of their shapes and a mask of the tiles in use."""
        found = self.image_processor([list(images)], return_tensors="pt")
        names = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
        return PreparedImages({name: found[name] for name in names}, [self.image_token] * len(images))

    def count_features(self, inputs: ImageInputs) -> int:
        """Images: each has one token, whatever its size."""
        return int((inputs["aspect_ratio_ids"] > 0).sum())

    def collate(
        self, image_inputs: Sequence[ImageInputs | None], trees: Sequence[Tree], batch: PackedTrees
    ) -> dict[str, Any]:
        """Images, as many in every row, and `cross_attention_mask` [B, T, I, C]."""
        import torch

        rows = [inputs for inputs in image_inputs if inputs is not None]
        numbers = [inputs["aspect_ratio_ids"].shape[1] for inputs in rows]
        num_images = math.lcm(*numbers)
        collated: dict[str, Any] = {
            name: torch.cat(
                [
                    inputs[name].repeat(1, num_images // number, *[1] * (example.dim() - 2))
                    for inputs, number in zip(rows, numbers, strict=True)
                ]
            )
            for name, example in rows[0].items()
        }
        is_image_BT = batch["input_ids"] == self.image_token_id
        sees_BTI = torch.arange(num_images) < is_image_BT.cumsum(dim=1)[..., None]
        collated["cross_attention_mask"] = sees_BTI[..., None].long() * collated["aspect_ratio_mask"][:, None]
        return collated
