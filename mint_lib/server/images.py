"""Images of requests: decoded only after everything that their header tells was found in order.

Goes in: base64, a data URL or bytes. Comes out: an RGB image, or its bytes in a format that students read, or
`InvalidInput` in words. Nothing is ever fetched. It knows no model.
"""

import base64
import binascii
import contextlib
import io
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

from mint_lib.errors import InvalidInput
from mint_lib.server.limits import RequestLimits

if TYPE_CHECKING:
    from PIL.Image import Image

_FORMATS = ("PNG", "JPEG", "WEBP")
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA")  # eight bits a channel, without print colours
_MIN_SIDE_PIXELS = 8
_PNG_START = b"\x89PNG\r\n\x1a\n"


def read_base64(text: str, limits: RequestLimits) -> bytes:
    """The bytes that `text`, strict base64 without line breaks, spells.

    Raises:
        InvalidInput: other characters, wrong padding, or more than `max_image_bytes`.
    """
    if len(text) > (limits.max_image_bytes + 2) // 3 * 4:
        raise _too_large(limits)
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise InvalidInput(
            "The image is not base64. Encode its bytes in the standard alphabet, with padding."
        ) from None
    if len(data) > limits.max_image_bytes:
        raise _too_large(limits)
    return data


def read_data_url(url: str, limits: RequestLimits) -> bytes:
    """The bytes of a `data:image/...;base64,` URL.

    Raises:
        InvalidInput: any other URL; such are not fetched.
    """
    head, separator, payload = url.partition(",")
    if not separator or head.lower() not in {f"data:image/{kind.lower()};base64" for kind in _FORMATS}:
        raise InvalidInput(
            "image_url must be a URL of the form data:image/png;base64,... (or jpeg, webp). Other addresses are never "
            "fetched: send the image itself."
        )
    return read_base64(payload, limits)


def check_image(data: bytes, limits: RequestLimits) -> bytes:
    """`data` as a student's reader takes it: PNG and JPEG as they are, found in order but not decoded; WebP as PNG.

    Raises:
        InvalidInput: as `decode_image`, but for what only decoding shows.
    """
    with _open(data, limits) as image:
        if image.format != "WEBP":
            return data
        file = io.BytesIO()
        _flatten(image).save(file, "PNG", compress_level=1)
        return file.getvalue()


def decode_image(data: bytes, limits: RequestLimits) -> "Image":
    """The one picture that `data` holds, in RGB, transparent places on white.

    Raises:
        InvalidInput: not PNG, JPEG or WebP by its content; animated, cut off or corrupt; more than eight bits a channel
            or CMYK; smaller than 8 pixels or larger than the limits. Size is checked before anything is decoded.
    """
    with _open(data, limits) as image:
        image.load()
        return _flatten(image)


@contextlib.contextmanager
def _open(data: bytes, limits: RequestLimits) -> "Iterator[Image]":
    """The image in `data`, not decoded yet, and whatever Pillow raises about it in words."""
    from PIL import Image, UnidentifiedImageError

    if len(data) > limits.max_image_bytes:
        raise _too_large(limits)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                _check_header(image, data, limits)
                yield image
    except InvalidInput:
        raise
    except UnidentifiedImageError:
        raise InvalidInput("The image is neither PNG, JPEG nor WebP. Convert it to one of these.") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise _too_many_pixels(limits) from None
    except Exception:  # Pillow's decoders raise many types on hostile bytes, and each means the same here
        raise InvalidInput("The image is corrupt or cut off. Save it again and send it whole.") from None


def _check_header(image: "Image", data: bytes, limits: RequestLimits) -> None:
    """What can be told before decoding."""
    width, height = image.size
    if width * height > limits.max_image_pixels:
        raise _too_many_pixels(limits)
    if min(width, height) < _MIN_SIDE_PIXELS:
        raise InvalidInput(
            f"The image has {width} x {height} pixels; each side needs at least {_MIN_SIDE_PIXELS}. Send a larger one."
        )
    if getattr(image, "n_frames", 1) != 1 or getattr(image, "is_animated", False):
        raise InvalidInput("The image has several frames. Send one still picture.")
    # Pillow reads 16-bit colour PNGs as 8-bit ones; the depth stands in byte 24, in the IHDR chunk.
    is_deep_png = image.format == "PNG" and data[24:25] == b"\x10"
    if image.mode not in _MODES or is_deep_png:
        raise InvalidInput("The image must have 8 bits a channel in grey or RGB (not CMYK, not 16 bits). Convert it.")
    if not _ends_with_its_picture(image.format, data):
        raise InvalidInput("The image is corrupt or cut off, or other data stands behind it. Save it again and alone.")


def _ends_with_its_picture(kind: str | None, data: bytes) -> bool:
    """Whether the format's own end is the end of `data`: a file that is something else as well goes on behind it."""
    if kind == "PNG":
        place = len(_PNG_START)
        while place + 12 <= len(data):
            place, chunk = place + 12 + int.from_bytes(data[place : place + 4], "big"), data[place + 4 : place + 8]
            if chunk == b"IEND":
                break
        return place == len(data)
    if kind == "WEBP":
        return int.from_bytes(data[4:8], "little") + 8 == len(data)
    return data.rstrip(b"\0").endswith(b"\xff\xd9")


def _flatten(image: "Image") -> "Image":
    """`image` in RGB."""
    from PIL import Image

    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _too_large(limits: RequestLimits) -> InvalidInput:
    return InvalidInput(f"The image is larger than {limits.max_image_bytes} bytes. Send a smaller one.")


def _too_many_pixels(limits: RequestLimits) -> InvalidInput:
    return InvalidInput(f"The image has more than {limits.max_image_pixels} pixels. Scale it down.")
