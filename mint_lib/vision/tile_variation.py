"""Varies tissue tiles in ways that do not change what they show, for training.

Goes in: RGB bytes. Comes out: the same tile turned, mirrored and in another stain. Knows neither labels nor models.
"""

import numpy as np

_STAIN_SHARE = 0.15
"""Most that a stain's amount changes; 0.05 is called light and 0.2 strong (Tellez et al., Med. Image Anal. 2019)."""


def vary_tile(tile_CHW: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """`tile_CHW` in one of its eight orientations, each stain stronger or weaker by up to 15 %.

    Tissue has no up. Stains are changed in optical density, where they add up (Ruifrok and Johnston 2001).
    """
    from skimage.color import hed2rgb, rgb2hed

    turned = np.rot90(tile_CHW, int(rng.integers(4)), axes=(1, 2))
    if rng.random() < 0.5:
        turned = turned[:, :, ::-1]
    stains_HWC = rgb2hed(turned.transpose(1, 2, 0)) * rng.uniform(1 - _STAIN_SHARE, 1 + _STAIN_SHARE, size=3)
    return np.rint(hed2rgb(stains_HWC) * 255).astype(np.uint8).transpose(2, 0, 1)
