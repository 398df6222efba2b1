"""A case's two views, its image and its text, as vectors of a dual encoder's space.

Goes in: what the encoder reads of cases. Comes out: a unit vector for each view. It knows no labels, and loads without
torch.

Shape suffixes: N cases, D joint width, W windows.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from mint_lib.clip.dual_encoder import DualEncoder


class Reading(NamedTuple):
    """A case as the encoder reads it."""

    windows: Sequence[Sequence[int]]
    """Token ids of the text's windows; none where there is no text."""
    images: np.ndarray | None
    """The image as the encoder's `read_images` makes it, `[1, ...]`; further rows are variations for training."""


class CaseVectors(NamedTuple):
    """Unit vectors of the views, `image` and `text` [N, D], zeros where a case lacks one; and which cases have it."""

    image: np.ndarray
    text: np.ndarray
    has_image: np.ndarray
    has_text: np.ndarray


def embed_cases(encoder: "DualEncoder", readings: Sequence[Reading], *, batch_size: int) -> CaseVectors:
    """Vectors of the readings' images as they are, and of their texts."""
    import torch

    has_image_N = np.array([reading.images is not None for reading in readings], dtype=bool)
    has_text_N = np.array([len(reading.windows) > 0 for reading in readings], dtype=bool)
    image_ND = np.zeros((len(readings), encoder.joint_size))
    text_ND = np.zeros((len(readings), encoder.joint_size))
    with torch.inference_mode():
        rows = np.flatnonzero(has_image_N)
        for part in _split(rows, batch_size):
            images = np.stack([images[0] for row in part if (images := readings[row].images) is not None])
            image_ND[part] = encoder.embed_images(images).cpu().numpy()
        rows = np.flatnonzero(has_text_N)
        for part in _split(rows, batch_size):
            text_ND[part] = embed_texts(encoder, [readings[row].windows for row in part])
    return CaseVectors(image_ND, text_ND, has_image_N, has_text_N)


def embed_texts(encoder: "DualEncoder", texts: Sequence[Sequence[Sequence[int]]]) -> np.ndarray:
    """Unit vectors of texts given in windows: the mean of a text's windows."""
    import torch

    with torch.inference_mode():
        window_WD = encoder.embed_windows([window for windows in texts for window in windows]).cpu().numpy()
    ends = np.cumsum([len(windows) for windows in texts])
    return np.stack(
        [average_units(window_WD[end - len(windows) : end]) for end, windows in zip(ends, texts, strict=True)]
    )


def average_units(vectors_WD: np.ndarray) -> np.ndarray:
    """The unit vector in the direction of the mean."""
    mean_D: np.ndarray = vectors_WD.astype(np.float64).mean(axis=0)
    return mean_D / max(float(np.linalg.norm(mean_D)), 1e-12)


def _split(rows: np.ndarray, size: int) -> list[np.ndarray]:
    """`rows` in parts of at most `size`."""
    return [rows[start : start + size] for start in range(0, len(rows), size)]
