"""A frozen vision tower that turns tiles into vectors of figures, for linear probes and small teachers.

Goes in: RGB bytes. Comes out: one vector for each tile, the mean over its places. The embedded tower is
EfficientNet-Lite0; any CLIP or SigLIP vision tower of a folder or the hub will do as well. It learns nothing. It
imports torch at its top, so import it where it is needed.

Shape suffixes: B tiles, C channels, H and W places, N = H x W, F figures.
"""

import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from mint_lib.errors import IntegrityError, InvalidInput

_BATCH_TILES = 32


class FrozenTower:
    """Describes tiles by what a trained vision tower finds in them."""

    def __init__(self, source: str | None, *, revision: str | None, image_size: int):
        """Load the tower.

        Args:
            source: folder or hub name of a vision model; None: the embedded tower.
            revision: commit of `source`.
            image_size: side of the embedded tower's tiles; another tower's own processor says what it reads.

        Raises:
            InvalidInput: `source` has no vision tower.
            MissingDependency: the embedded tower's package is not installed.
        """
        self.num_figures: int
        self._describe: Callable[[np.ndarray], torch.Tensor]
        if source is not None:
            self._model, self._processor = _load_vision_model(source, revision)
            self._describe, self.num_figures = self._describe_by_processor, int(self._model.config.hidden_size)
            return
        from mint_lib.vision.efficientnet_lite import EfficientNetLiteConfig, load_embedded_tower

        self._model = load_embedded_tower(EfficientNetLiteConfig(image_size=image_size))
        self._describe, self.num_figures = self._describe_embedded, self._model.config.hidden_size

    @functools.cached_property
    def digest(self) -> str:
        """`sha256:...` of the weights."""
        hasher = hashlib.sha256()
        for name, value in sorted(self._model.state_dict().items()):
            hasher.update(name.encode() + value.numpy().tobytes())
        return f"sha256:{hasher.hexdigest()}"

    def check(self, digest: str | None) -> None:
        """Raise IntegrityError where the tower is not the one of `digest`; None is any."""
        if digest is not None and digest != self.digest:
            raise IntegrityError(
                f"The vision tower at hand has digest {self.digest}, and the teacher was fitted with {digest}. Install "
                "the package, or give the revision, that it was fitted with."
            )

    def describe(self, tiles: Sequence[np.ndarray]) -> np.ndarray:
        """Figures `[B, F]` of RGB bytes `[3, S, S]`."""
        parts = []
        with torch.inference_mode():
            for start in range(0, len(tiles), _BATCH_TILES):
                described_BF = self._describe(np.stack(tiles[start : start + _BATCH_TILES]))
                parts.append(described_BF.float().numpy())
        return np.concatenate(parts)

    def _describe_embedded(self, tiles_BCHW: np.ndarray) -> torch.Tensor:
        from mint_lib.vision.efficientnet_lite import PIXEL_DEVIATION, PIXEL_MEAN

        pixels_BCHW = torch.from_numpy(tiles_BCHW).float() / 255
        x_BCHW = (pixels_BCHW - torch.tensor(PIXEL_MEAN)[:, None, None]) / torch.tensor(PIXEL_DEVIATION)[:, None, None]
        means_BF: torch.Tensor = self._model(x_BCHW).last_hidden_state.mean(dim=1)
        return means_BF

    def _describe_by_processor(self, tiles_BCHW: np.ndarray) -> torch.Tensor:
        pixels = self._processor(images=list(tiles_BCHW), input_data_format="channels_first", return_tensors="pt")
        means_BF: torch.Tensor = self._model(pixel_values=pixels["pixel_values"]).last_hidden_state.mean(dim=1)
        return means_BF


def _load_vision_model(source: str, revision: str | None) -> tuple[Any, Any]:
    """The vision tower of `source` and its Pillow image processor."""
    from transformers import AutoImageProcessor, AutoModel

    try:
        model = AutoModel.from_pretrained(
            source, revision=revision, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
        )
        processor = AutoImageProcessor.from_pretrained(
            source, revision=revision, backend="pil", trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise InvalidInput(
            f"{source} cannot be read as a vision model ({type(error).__name__}). Give a folder or hub name of a CLIP "
            "or SigLIP model in safetensors, with its image processor."
        ) from error
    tower = getattr(model, "vision_model", model)
    if tower.main_input_name != "pixel_values":
        raise InvalidInput(f"{source} has no vision tower. Give a CLIP or SigLIP model.")
    return tower.eval(), processor
