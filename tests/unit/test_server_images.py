import base64
import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy
import pytest
from PIL import Image

from mint_lib.errors import InvalidInput
from mint_lib.server.images import decode_image, read_base64, read_data_url
from mint_lib.server.limits import RequestLimits

LIMITS = RequestLimits(max_image_bytes=200_000, max_image_pixels=250_000)


def encode(image: Image.Image, kind: str, **more: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **more)
    return buffer.getvalue()


def noise(mode: str = "RGB", size: tuple[int, int] = (64, 48)) -> Image.Image:
    values = numpy.random.default_rng(3).integers(0, 255, (size[1], size[0], 3), dtype=numpy.uint8)
    return Image.fromarray(values).convert(mode)


def bomb() -> bytes:
    """A PNG whose header says 20,000 x 20,000 and whose data would decode to that."""
    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 100_000)), (b"IEND", b"")]
    chunks = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def sixteen_bit_colour() -> bytes:
    """A PNG with 16 bits a channel, which Pillow would read as one with 8."""
    header = struct.pack(">IIBBBBB", 16, 16, 16, 2, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress((b"\0" + b"\x12\x34" * 48) * 16)), (b"IEND", b"")]
    chunks = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
@pytest.mark.parametrize("mode", ["RGB", "L", "P"])
def test_image_without_loss_is_decoded_to_its_pixels(kind: str, mode: str) -> None:
    image = noise(mode)
    more = {"lossless": True} if kind == "WEBP" else {}
    found = decode_image(encode(image, kind, **more), LIMITS)
    assert found.mode == "RGB"
    assert (numpy.asarray(found) == numpy.asarray(image.convert("RGB"))).all()


def test_image_in_jpeg_is_decoded_nearly() -> None:
    image = Image.new("RGB", (64, 64), (200, 30, 90))
    found = numpy.asarray(decode_image(encode(image, "JPEG", quality=95), LIMITS), dtype=int)
    # One flat colour: what is lost is rounding between colour spaces.
    assert numpy.abs(found - numpy.asarray(image, dtype=int)).max() <= 3


def test_image_with_transparency_is_put_on_white() -> None:
    image = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
    assert decode_image(encode(image, "PNG"), LIMITS).getpixel((3, 3)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (bomb, "pixels"),
        (lambda: encode(noise(size=(501, 500)), "PNG")[:150_000], "pixels"),
        (lambda: encode(noise(size=(1, 1)), "PNG"), "1 x 1"),
        (lambda: encode(noise(size=(64, 7)), "PNG"), "at least 8"),
        (lambda: encode(noise(), "PNG", save_all=True, append_images=[noise("L").convert("RGB")]), "frames"),
        (lambda: encode(noise(), "WEBP", save_all=True, append_images=[noise("L").convert("RGB")]), "frames"),
        (lambda: encode(noise(), "GIF"), "neither PNG"),
        (lambda: encode(noise(), "TIFF"), "neither PNG"),
        (lambda: encode(noise(), "BMP"), "neither PNG"),
        (lambda: encode(noise("CMYK"), "JPEG"), "CMYK"),
        (lambda: encode(Image.new("I;16", (16, 16)), "PNG"), "8 bits"),
        (sixteen_bit_colour, "8 bits"),
        (lambda: encode(noise(), "PNG")[:2000], "corrupt or cut"),
        (lambda: encode(noise(), "JPEG")[:900], "corrupt or cut"),
        (lambda: encode(noise(), "PNG")[:300] + b"\xff" * 3000, "corrupt or cut"),
        (lambda: b"\0" * 128 + b"DICM" + b"\x02\x00", "neither PNG"),
        (lambda: b"<svg xmlns='http://www.w3.org/2000/svg'></svg>", "neither PNG"),
        (lambda: b"", "neither PNG"),
        (lambda: b"x" * 200_001, "larger than 200000 bytes"),
    ],
    ids=range(19),
)
def test_image_that_is_hostile_or_unfit_is_refused_in_words(make: Callable[[], bytes], words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        decode_image(make(), LIMITS)


def test_base64_is_read_strictly() -> None:
    data = encode(noise(), "PNG")
    text = base64.b64encode(data).decode()
    assert read_base64(text, LIMITS) == data
    assert read_data_url(f"data:image/png;base64,{text}", LIMITS) == data
    for wrong in (text[:-1], text + "=", text[:40] + "\n" + text[40:], "é", text.replace("A", "-", 1)):
        with pytest.raises(InvalidInput, match="base64"):
            read_base64(wrong, LIMITS)


def test_base64_beyond_the_limit_is_refused() -> None:
    assert len(read_base64(base64.b64encode(b"x" * 200_000).decode(), LIMITS)) == 200_000
    with pytest.raises(InvalidInput, match="larger"):
        read_base64(base64.b64encode(b"x" * 200_001).decode(), LIMITS)


def test_image_instance_for_a_text_student_is_refused_by_its_index(served: Any) -> None:
    image = {"b64": base64.b64encode(encode(noise(), "PNG")).decode()}
    response = served.predict({"instances": [{"text": "a"}, {"text": "b", "image": image}]})
    assert response.status_code == 400
    assert response.json()["error"].startswith("Case 1: tiny reads text only")


def test_image_student_needs_an_image_and_its_tensor_is_announced(make_served: Any) -> None:
    served = make_served(modality="image")
    response = served.predict()
    assert response.status_code == 400
    assert "reads images" in response.json()["error"]
    inputs = served.ask("GET", "/v2/models/tiny").json()["inputs"]
    assert [tensor["name"] for tensor in inputs] == ["text", "image"]


def test_image_student_gets_a_larger_body_and_hostile_images_are_refused(make_served: Any) -> None:
    served = make_served(modality="image", limits={"max_body_bytes": 1024, "max_image_pixels": 250_000})
    image = {"b64": base64.b64encode(bomb()).decode()}
    response = served.predict({"instances": [{"text": "a" * 1500, "image": image}]})
    assert response.status_code == 400
    assert "250000 pixels" in response.json()["error"]
