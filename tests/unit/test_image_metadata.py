"""Metadata of images: everything but the pixels goes, and the pixels stay as they are."""

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from mint_lib.errors import InvalidInput
from mint_lib.image_inputs.metadata import strip_metadata

CANARY = "Ysolde Quarrington 1931-07-04"
ORIENTATION, ARTIST = 0x0112, 0x013B


def _picture(mode: str = "RGB", size: tuple[int, int] = (37, 23)) -> Image.Image:
    rng = np.random.default_rng(3)
    smooth = np.cumsum(rng.integers(-4, 5, (*size[::-1], 4)), axis=1).clip(-90, 90) + 128
    picture = Image.fromarray(smooth.astype(np.uint8), "RGBA")
    return picture.convert(mode)


def _exif(orientation: int = 1) -> Image.Exif:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    exif[ARTIST] = CANARY
    return exif


def _jpeg(orientation: int = 1, **options: Any) -> bytes:
    buffer = io.BytesIO()
    xmp = f"<x:xmpmeta>{CANARY}</x:xmpmeta>".encode()
    _picture(str(options.pop("mode", "RGB"))).save(
        buffer, "JPEG", exif=_exif(orientation), comment=CANARY, icc_profile=CANARY.encode(), xmp=xmp, **options
    )
    iptc = b"Photoshop 3.0\0" + CANARY.encode()
    data = buffer.getvalue()
    return data[:2] + struct.pack(">BBH", 0xFF, 0xED, len(iptc) + 2) + iptc + data[2:] + CANARY.encode()


def _png(mode: str = "RGB", orientation: int = 1, **options: Any) -> bytes:
    info = PngInfo()
    info.add_text("Patient", CANARY)
    info.add_text("Note", CANARY, zip=True)
    info.add_itxt("Author", CANARY, zip=False)
    info.add(b"tIME", struct.pack(">HBBBBB", 1931, 7, 4, 1, 2, 3))
    info.add(b"prVt", CANARY.encode())
    buffer = io.BytesIO()
    _picture(mode).save(buffer, "PNG", pnginfo=info, exif=_exif(orientation), icc_profile=CANARY.encode(), **options)
    return buffer.getvalue() + CANARY.encode()


def _pixels(data: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(data))
    return np.asarray(image.convert("RGBA") if image.mode == "P" else image)


def _chunk_names(data: bytes) -> set[bytes]:
    names, position = set(), 8
    while position < len(data):
        length, name = struct.unpack_from(">I4s", data, position)
        names.add(name)
        position += 12 + length
    return names


@pytest.mark.parametrize(
    "options",
    [{}, {"progressive": True}, {"mode": "L"}, {"mode": "CMYK"}, {"restart_marker_rows": 1}, {"subsampling": 2}],
    ids=str,
)
def test_jpeg_with_metadata_keeps_its_pixels_and_nothing_else(options: dict[str, Any]) -> None:
    data = _jpeg(**options)
    stripped = strip_metadata(data)

    assert CANARY.encode() in data
    assert CANARY.encode() not in stripped
    np.testing.assert_array_equal(_pixels(stripped), _pixels(data))
    image = Image.open(io.BytesIO(stripped))
    assert not image.getexif()
    assert set(image.info) <= {"jfif", "jfif_version", "jfif_unit", "jfif_density", "adobe", "adobe_transform", "dpi",
                               "progressive", "progression"}  # fmt: skip


@pytest.mark.parametrize("mode", ["RGB", "L", "LA", "RGBA", "P", "1"])
def test_png_with_metadata_keeps_its_pixels_and_nothing_else(mode: str) -> None:
    data = _png(mode)
    stripped = strip_metadata(data)

    assert CANARY.encode() in data
    assert CANARY.encode() not in stripped
    np.testing.assert_array_equal(_pixels(stripped), _pixels(data))
    assert _chunk_names(stripped) <= {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"}


def test_png_with_a_transparent_colour_keeps_it() -> None:
    data = _png("P", transparency=3)

    np.testing.assert_array_equal(_pixels(strip_metadata(data)), _pixels(data))


def test_png_with_bytes_behind_its_pixels_in_the_compressed_stream_loses_them() -> None:
    buffer = io.BytesIO()
    _picture().save(buffer, "PNG")
    data = buffer.getvalue()
    start = data.index(b"IDAT") - 4
    (length,) = struct.unpack_from(">I", data, start)
    raw = zlib.decompress(data[start + 8 : start + 8 + length])
    for content in (zlib.compress(raw) + CANARY.encode(), zlib.compress(raw + CANARY.encode(), 0)):
        chunk = struct.pack(">I", len(content)) + b"IDAT" + content + struct.pack(">I", zlib.crc32(b"IDAT" + content))
        hidden = data[:start] + chunk + data[start + 12 + length :]

        stripped = strip_metadata(hidden)

        assert CANARY.encode() in hidden
        assert CANARY.encode() not in stripped
        np.testing.assert_array_equal(_pixels(stripped), _pixels(data))


def test_jpeg_with_a_thumbnail_in_its_header_loses_it() -> None:
    thumbnail = b"JFIF\0\1\2\0\0\1\0\1" + bytes((3, 3)) + (CANARY.encode() * 2)[:27]
    data = _jpeg()
    start = data.index(b"JFIF") - 4
    (length,) = struct.unpack_from(">H", data, start + 2)
    header = struct.pack(">BBH", 0xFF, 0xE0, len(thumbnail) + 2) + thumbnail
    data = data[:start] + header + data[start + 2 + length :]

    assert thumbnail[14:] not in strip_metadata(data)


@pytest.mark.parametrize("orientation", range(2, 9))
def test_png_that_its_exif_turns_is_turned_itself(orientation: int) -> None:
    data = _png(orientation=orientation)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))

    np.testing.assert_array_equal(_pixels(strip_metadata(data)), np.asarray(upright))


def test_jpeg_that_its_exif_turns_is_turned_itself() -> None:
    data = _jpeg(orientation=6)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data)))).astype(int)
    stripped = strip_metadata(data)

    assert CANARY.encode() not in stripped
    # Encoding once more at quality 95 moves a value of a smooth picture by a few of 255 steps.
    assert np.abs(_pixels(stripped).astype(int) - upright).mean() < 2


def test_strip_metadata_of_what_it_gave_changes_nothing() -> None:
    for data in (_jpeg(), _png()):
        stripped = strip_metadata(data)
        assert strip_metadata(stripped) == stripped


@pytest.mark.parametrize("data", [b"", b"GIF89a", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", CANARY.encode()], ids=repr)
def test_strip_metadata_of_no_image_is_refused_without_its_content(data: bytes) -> None:
    with pytest.raises(InvalidInput) as error:
        strip_metadata(data)
    assert CANARY not in repr(error.value)


@pytest.mark.parametrize("make", [_jpeg, _png])
def test_strip_metadata_of_a_cut_image_is_refused_or_keeps_no_metadata(make: type) -> None:
    data = make()
    for end in range(10, len(data) - len(CANARY), 97):
        try:
            stripped = strip_metadata(data[:end])
        except InvalidInput:
            continue
        assert CANARY.encode() not in stripped
