"""Images as the gate remembers them: a fault, or a perceptual hash, a thumbnail and how much they vary.

Goes in: encoded bytes. Comes out: `ImageSketch` of about 1.2 kB, and the pairs of images that look alike. The size of
an image is read from its header before anything is decoded. Knows nothing of splits.
"""

import io
import struct
import warnings
import zlib
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from mint_lib.gate.settings import SimilarityConfig
from mint_lib.gate.text_sketches import pair_bucket_mates

_FORMATS = ("PNG", "JPEG")
_HASH_SIDE = 8
"""Signs of finer frequencies are noise in smooth images."""
_THUMBNAIL_SIDE = 32
_BITS_OF_BYTE = np.array([byte.bit_count() for byte in range(256)], dtype=np.uint8)
_FAULTS = (OSError, SyntaxError, ValueError, EOFError, ArithmeticError, struct.error, zlib.error)


class ImageSketch(NamedTuple):
    """What is kept of one image."""

    fault: Literal["undecodable", "too large"] | None
    bits: bytes
    """Perceptual hash of 64 bits; empty with a fault."""
    thumbnail: bytes
    """32 x 32 grey levels."""
    deviation: float
    """Standard deviation of the grey levels."""


def sketch_image(data: bytes, max_pixels: int) -> ImageSketch:
    """The sketch of encoded bytes.

    The hash is the signs of the low frequencies of a cosine transform against their median (Zauner 2010, as the package
    imagehash computes it).
    """
    import imagehash
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is stricter
            image = Image.open(io.BytesIO(data), formats=_FORMATS)
        if image.width * image.height > max_pixels:
            return ImageSketch("too large", b"", b"", float("nan"))
        grey = image.convert("RGB").convert("L")
    except Image.DecompressionBombError:
        return ImageSketch("too large", b"", b"", float("nan"))
    except _FAULTS:
        return ImageSketch("undecodable", b"", b"", float("nan"))
    bits = np.packbits(imagehash.phash(grey, hash_size=_HASH_SIDE).hash).tobytes()
    thumbnail = grey.resize((_THUMBNAIL_SIDE, _THUMBNAIL_SIDE), Image.Resampling.BOX).tobytes()
    return ImageSketch(None, bits, thumbnail, float(np.asarray(grey).std()))


def find_similar_images(sketches: Sequence[ImageSketch], config: SimilarityConfig) -> np.ndarray:
    """Pairs of images `[pairs, 2]` whose hashes and thumbnails agree, as indices into `sketches`."""
    sound = np.array([index for index, item in enumerate(sketches) if item.fault is None], dtype=np.int64)
    if len(sound) < 2:
        return np.zeros((0, 2), np.int64)
    bits = np.frombuffer(b"".join(sketches[index].bits for index in sound), np.uint8).reshape(len(sound), -1)
    bands = np.ascontiguousarray(bits).view(np.uint16)
    pairs = pair_bucket_mates([bands[:, band] for band in range(bands.shape[1])])
    alike: list[np.ndarray] = []
    for part in np.array_split(pairs, max(1, len(pairs) // 100_000)):
        distances = _BITS_OF_BYTE[bits[part[:, 0]] ^ bits[part[:, 1]]].sum(axis=1)
        part = part[distances <= config.image_bits]
        found = [_correlate_thumbnails(sketches[sound[one]], sketches[sound[other]]) for one, other in part]
        alike.append(part[np.array(found, dtype=np.float64) >= config.image_correlation])
    return sound[np.concatenate(alike)]


def _correlate_thumbnails(one: ImageSketch, other: ImageSketch) -> float:
    """Correlation of the grey levels; two thumbnails without any variation are equal."""
    first, second = (np.frombuffer(item.thumbnail, np.uint8).astype(np.float64) for item in (one, other))
    first, second = first - first.mean(), second - second.mean()
    scale = float(np.sqrt((first @ first) * (second @ second)))
    return float(first @ second) / scale if scale else float(first.any() == second.any())
