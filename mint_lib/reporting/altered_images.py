"""Altered images: what is shown to a student instead of a case's image.

Goes in: encoded images. Comes out: encoded images of the same size without their content (one colour, noise) or in a
worse state (stain, blur, compression). It knows neither cases nor students. Shapes: H x W x C pixels.
"""

import io
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
Colour = tuple[int, int, int]


def mean_colour(images: Sequence[bytes]) -> Colour:
    """The mean over images of each image's mean colour."""
    red, green, blue = np.mean([decode_pixels(data).mean(axis=(0, 1)) for data in images], axis=0)
    return round(red), round(green), round(blue)


def make_flat(data: bytes, colour: Colour) -> bytes:
    """An image of one colour, as large as `data`."""
    return encode_pixels(np.broadcast_to(np.array(colour, dtype=np.uint8), decode_pixels(data).shape))


def make_noise(data: bytes, rng: np.random.Generator) -> bytes:
    """Independent uniform values, as large as `data`."""
    return encode_pixels(rng.integers(0, 256, decode_pixels(data).shape, dtype=np.uint8))


def scale_stains(data: bytes, level: float, rng: np.random.Generator) -> bytes:
    """`data` with its haematoxylin and its eosin each scaled by 1 + `level` or 1 - `level`, by lot.

    As when a section is stained for too long or too short. Stains are separated by Beer and Lambert's law with the
    vectors of Ruifrok and Johnston, Anal. Quant. Cytol. Histol. 2001, which scikit-image holds. Its own functions cut
    negative amounts off and so change an image even where nothing is scaled; here level 0 gives the image back.
    """
    from skimage.color import hed_from_rgb, rgb_from_hed

    signs = rng.choice([-1.0, 1.0], size=2)
    factors_C = np.array([1 + level * signs[0], 1 + level * signs[1], 1.0])
    density_HWC = -np.log((decode_pixels(data).astype(np.float64) + 1) / 256)
    scaled_HWC = (density_HWC @ hed_from_rgb * factors_C) @ rgb_from_hed
    return encode_pixels(np.clip(np.rint(np.exp(-scaled_HWC) * 256 - 1), 0, 255).astype(np.uint8))


def blur(data: bytes, radius_pixels: float) -> bytes:
    """`data` blurred by a Gaussian whose standard deviation is `radius_pixels`."""
    from PIL import Image, ImageFilter

    blurred = Image.fromarray(decode_pixels(data)).filter(ImageFilter.GaussianBlur(radius_pixels))
    return encode_pixels(np.asarray(blurred))


def compress(data: bytes, quality: int) -> bytes:
    """`data` as a JPEG of this quality, with the colours at half the resolution as cameras and scanners write them."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(decode_pixels(data)).save(file, "JPEG", quality=quality, subsampling="4:2:0")
    return file.getvalue()


def shrink(data: bytes, *, longest_pixels: int) -> bytes:
    """`data` itself where its sides are at most `longest_pixels`, or a smaller image of it."""
    from PIL import Image

    pixels_HWC = decode_pixels(data)
    factor = longest_pixels / max(pixels_HWC.shape[:2])
    if factor >= 1:
        return data
    height, width = (max(1, math.floor(side * factor)) for side in pixels_HWC.shape[:2])
    return encode_pixels(np.asarray(Image.fromarray(pixels_HWC).resize((width, height), Image.Resampling.LANCZOS)))


def decode_pixels(data: bytes) -> Pixels:
    """[H, W, 3] of a PNG or JPEG, transparent places on white as students see them."""
    from PIL import Image

    with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as image:
        if not image.has_transparency_data:
            return np.asarray(image.convert("RGB"))
        rgba = image.convert("RGBA")
        return np.asarray(Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB"))


def encode_pixels(pixels_HWC: Pixels) -> bytes:
    """A PNG."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels_HWC)).save(file, "PNG")
    return file.getvalue()
