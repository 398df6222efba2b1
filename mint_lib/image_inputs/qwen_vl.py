"""Qwen2-VL and Qwen2.5-VL: an image keeps its shape, and its tokens have positions in time, height and width.

Goes in: images. Comes out: patches of all images of a batch, and positions of a tree's places in three dimensions
(M-RoPE, Wang et al. 2024, arXiv 2409.12191, section 2.1). The text after an image goes on behind the image's longest
side, and every answer of a tree goes on where the prompt ends. It knows no conversation.

Shape suffixes: B trees, T places in a row, F features of an image, 3 dimensions: time, height, width.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mint_lib.image_inputs.family import ImageFamily, ImageInputs, PreparedImages
from mint_lib.packing import PackedTrees, Tree

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image


class QwenVl(ImageFamily):
    """As many tokens as the image's size calls for."""

    model_types = ("qwen2_vl", "qwen2_5_vl")
    image_tokens = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|video_pad|>")

    def prepare(self, images: "Sequence[Image]") -> PreparedImages:
        """`pixel_values` [patches, values] and `image_grid_thw` [images, 3], in patches."""
        found = self.image_processor(list(images), return_tensors="pt")
        num_features = found["image_grid_thw"].prod(dim=1) // self.image_processor.merge_size**2
        texts = [self.image_token * number for number in num_features.tolist()]
        return PreparedImages({name: found[name] for name in ("pixel_values", "image_grid_thw")}, texts)

    def count_features(self, inputs: ImageInputs) -> int:
        """Patches of all images, a square of which becomes one feature."""
        return int(inputs["image_grid_thw"].prod(dim=1).sum()) // self.model_config.vision_config.spatial_merge_size**2

    def collate(
        self, image_inputs: Sequence[ImageInputs | None], trees: Sequence[Tree], batch: PackedTrees
    ) -> dict[str, Any]:
        """Patches in the order of the rows, `position_ids` [3, B, T] and which places are images."""
        import torch

        rows = [inputs for inputs in image_inputs if inputs is not None]
        position_3BT = batch["position_ids"].repeat(3, 1, 1)
        for row, (inputs, tree) in enumerate(zip(image_inputs, trees, strict=True)):
            if inputs is not None:
                position_3BT[:, row, : len(tree.input_ids)] = self._place(tree, inputs["image_grid_thw"])
        return {
            "pixel_values": torch.cat([inputs["pixel_values"] for inputs in rows]),
            "image_grid_thw": torch.cat([inputs["image_grid_thw"] for inputs in rows]),
            "position_ids": position_3BT,
            "mm_token_type_ids": (batch["input_ids"] == self.image_token_id).int(),
        }

    def _place(self, tree: Tree, image_grid_thw: "torch.Tensor") -> "torch.Tensor":
        """Positions of the places of one tree, [3, T]."""
        import torch

        place_T = torch.tensor(tree.positions)
        position_3T = place_T.repeat(3, 1)
        image_places = (torch.tensor(tree.input_ids) == self.image_token_id).nonzero()[:, 0].tolist()
        merge_size = self.model_config.vision_config.spatial_merge_size
        shift = 0
        for num_frames, num_rows, num_columns in image_grid_thw.tolist():
            sides = (num_frames, num_rows // merge_size, num_columns // merge_size)
            grid_F3 = torch.cartesian_prod(*(torch.arange(side) for side in sides))
            num_features = len(grid_F3)
            first, image_places = image_places[0], image_places[num_features:]
            behind = first + num_features
            position_3T[:, first:behind] = grid_F3.T + first + shift
            shift += max(sides[1:]) - num_features
            position_3T[:, behind:] = place_T[behind:] + shift
        return position_3T
