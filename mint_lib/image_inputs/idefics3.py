"""Idefics3 and SmolVLM: an image becomes tiles and a small view of the whole, each a fixed number of tokens.

Goes in: images. Comes out: tiles of one size, padded to the same number in a batch. It knows no conversation.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mint_lib.image_inputs.family import ImageFamily, ImageInputs, PreparedImages
from mint_lib.packing import PackedTrees, Tree

if TYPE_CHECKING:
    from PIL.Image import Image

_AROUND = "<fake_token_around_image>"
_WHOLE = "<global-img>"


class Idefics3(ImageFamily):
    """Tiles in the order of reading, then the whole image."""

    model_types = ("idefics3", "smolvlm")
    image_tokens = (_AROUND, _WHOLE)

    def prepare(self, images: "Sequence[Image]") -> PreparedImages:
        """`pixel_values` [1, tiles, 3, height, width] and `pixel_attention_mask` without the channels."""
        found = self.image_processor([list(images)], return_tensors="pt", return_row_col_info=True)
        config = self.model_config.vision_config
        tokens = self.image_token * self._count_tile_features(config.image_size, config.image_size)
        texts = [_spell(tokens, *tiling) for tiling in zip(found["rows"][0], found["cols"][0], strict=True)]
        names = ("pixel_values", "pixel_attention_mask")
        return PreparedImages({name: found[name] for name in names if name in found}, texts)

    def count_features(self, inputs: ImageInputs) -> int:
        """The model takes tiles of nothing but zeros for padding, so they do not count."""
        pixels = inputs["pixel_values"]
        num_tiles = int(pixels.flatten(2).any(dim=2).sum())
        return num_tiles * self._count_tile_features(pixels.shape[-2], pixels.shape[-1])

    def collate(
        self, image_inputs: Sequence[ImageInputs | None], trees: Sequence[Tree], batch: PackedTrees
    ) -> dict[str, Any]:
        """Every row padded with tiles of zeros to the most tiles."""
        present = [inputs for inputs in image_inputs if inputs is not None]
        num_tiles = max(inputs["pixel_values"].shape[1] for inputs in present)
        collated: dict[str, Any] = {}
        for name, example in present[0].items():
            rows = example.new_zeros(len(image_inputs), num_tiles, *example.shape[2:])
            for row, inputs in enumerate(image_inputs):
                if inputs is not None:
                    rows[row, : inputs[name].shape[1]] = inputs[name][0]
            collated[name] = rows
        return collated

    def _count_tile_features(self, height: int, width: int) -> int:
        """Tokens of a tile: its patches, `scale_factor` x `scale_factor` of which become one."""
        patch_size = self.model_config.vision_config.patch_size
        return int((height // patch_size) * (width // patch_size) // self.model_config.scale_factor**2)


def _spell(tokens: str, num_rows: int, num_columns: int) -> str:
    """The text of an image that was cut into rows and columns of tiles, or not at all."""
    whole = f"{_AROUND}{_WHOLE}{tokens}{_AROUND}"
    if num_rows == num_columns == 0:
        return whole
    lines = [
        "".join(f"{_AROUND}<row_{row + 1}_col_{column + 1}>{tokens}" for column in range(num_columns))
        for row in range(num_rows)
    ]
    return "\n".join([*lines, "", whole])
