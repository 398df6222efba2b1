"""Frees a PNG or JPEG of everything but its pixels, without encoding them anew.

Goes in: the bytes of an image. Comes out: bytes that decode to the same pixels, without EXIF, XMP, IPTC, colour
profile, comment, thumbnail, time, text, and bytes behind the end. Only an image that its EXIF turns is decoded and
encoded again. What the pixels themselves show, such as burned-in text, stays. Knows no case.
"""

import io
import struct
import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from mint_lib.errors import InvalidInput

if TYPE_CHECKING:
    from PIL import Image

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_KEPT = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
_PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
# The seven passes of an interlaced PNG: first column and row, then steps (PNG specification, 8.2).
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
_INFLATED_BYTES = 1 << 20
_ORIENTATION_TAG = 0x0112
_JPEG_QUALITY = 95
_SOI, _EOI, _SOS, _TEM = 0xD8, 0xD9, 0xDA, 0x01
_RESTARTS = range(0xD0, 0xD8)
_APP0, _APP14 = 0xE0, 0xEE
# Frame headers, tables, restart interval, number of lines: what decoding needs (ITU T.81, table B.1).
_JPEG_KEPT = frozenset((*range(0xC0, 0xC8), *range(0xC9, 0xD0), 0xDB, 0xDC, 0xDD, 0xDE, 0xDF))


def strip_metadata(data: bytes) -> bytes:
    """The image with its pixels and nothing else; turned upright first if its EXIF says so.

    Raises:
        InvalidInput: the bytes are not those of a whole PNG or JPEG.
    """
    try:
        if data.startswith(_PNG_SIGNATURE):
            return _strip_png(_turn_upright(data))
        if data.startswith(b"\xff\xd8"):
            return _strip_jpeg(_turn_upright(data))
    except (struct.error, zlib.error, IndexError, OSError, SyntaxError, ValueError) as error:
        raise InvalidInput(
            f"An image is damaged ({type(error).__name__}): its metadata cannot be told from its pixels. Export it "
            "anew or leave it out."
        ) from None
    raise InvalidInput("An image is neither PNG nor JPEG. Convert it to one of these.")


def _turn_upright(data: bytes) -> bytes:
    """The bytes as they are, or encoded anew if the EXIF orientation is not 1."""
    from PIL import Image, ImageOps

    image = Image.open(io.BytesIO(data), formats=("PNG", "JPEG"))
    if image.getexif().get(_ORIENTATION_TAG, 1) in (0, 1):
        return data
    return _encode(ImageOps.exif_transpose(image), str(image.format))


def _encode(image: "Image.Image", file_format: str) -> bytes:
    """The pixels alone in the same format."""
    from PIL import Image

    bare = Image.new(image.mode, image.size)
    if image.mode == "P":
        bare.putpalette(image.getpalette(image.palette.mode) or [], image.palette.mode)  # type: ignore[union-attr]
    bare.paste(image)
    transparency = image.info.get("transparency")
    buffer = io.BytesIO()
    if file_format == "JPEG":
        bare.save(buffer, "JPEG", quality=_JPEG_QUALITY, subsampling=0)
    elif transparency is not None:
        bare.save(buffer, "PNG", transparency=transparency)
    else:
        bare.save(buffer, "PNG")
    return buffer.getvalue()


def _strip_png(data: bytes) -> bytes:
    chunks = list(_read_png_chunks(data))
    names = [name for name, _ in chunks]
    if names[:1] != [b"IHDR"] or names[-1:] != [b"IEND"] or b"IDAT" not in names:
        raise ValueError("a chunk is missing")
    if not _is_filled_exactly(chunks):
        from PIL import Image

        # Something stands behind the pixels in the compressed stream itself.
        chunks = list(_read_png_chunks(_encode(Image.open(io.BytesIO(data), formats=("PNG",)), "PNG")))
    kept = [(name, content) for name, content in chunks if name in _PNG_KEPT]
    return _PNG_SIGNATURE + b"".join(
        struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        for name, content in kept
    )


def _read_png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Name and content of each chunk up to the end of the image."""
    position = len(_PNG_SIGNATURE)
    name = b""
    while name != b"IEND":
        length, name = struct.unpack_from(">I4s", data, position)
        content = data[position + 8 : position + 8 + length]
        (checksum,) = struct.unpack_from(">I", data, position + 8 + length)
        if checksum != zlib.crc32(name + content):
            raise ValueError("a checksum is wrong")
        position += 12 + length
        yield name, content if name != b"IEND" else b""


def _is_filled_exactly(chunks: list[tuple[bytes, bytes]]) -> bool:
    """Whether the compressed stream holds the pixels and ends with them."""
    width, height, depth, colour, _, _, interlace = struct.unpack(">IIBBBBB", chunks[0][1])
    bits = depth * _PNG_CHANNELS.get(colour, 4)
    if interlace:
        sizes = [(-(-(width - x) // dx), -(-(height - y) // dy)) for x, y, dx, dy in _ADAM7]
    else:
        sizes = [(width, height)]
    expected = sum(rows * (1 + -(-columns * bits // 8)) for columns, rows in sizes if rows > 0 and columns > 0)
    inflater = zlib.decompressobj()
    pending = b"".join(content for name, content in chunks if name == b"IDAT")
    total = 0
    while pending and not inflater.eof and total <= expected:
        total += len(inflater.decompress(pending, _INFLATED_BYTES))
        pending = inflater.unconsumed_tail
    return total == expected and inflater.eof and not inflater.unused_data


def _strip_jpeg(data: bytes) -> bytes:
    kept = [b"\xff\xd8"]
    position = 2
    while True:
        marker, position = _next_marker(data, position)
        if marker == _EOI:
            return b"".join((*kept, b"\xff\xd9"))
        if marker in _RESTARTS or marker in (_SOI, _TEM):
            raise ValueError("a marker stands where none may")
        (length,) = struct.unpack_from(">H", data, position)
        content = data[position + 2 : position + length]
        if len(content) != length - 2:
            raise ValueError("a segment is cut off")
        position += length
        if marker == _APP0 and content.startswith(b"JFIF\0"):
            content = content[:12] + b"\0\0"  # without the thumbnail
        elif marker == _APP14 and content.startswith(b"Adobe"):
            content = content[:12]
        elif marker == _SOS:
            end = _end_of_scan(data, position)
            kept.append(_write_segment(marker, content) + data[position:end])
            position = end
            continue
        elif marker not in _JPEG_KEPT:
            continue
        kept.append(_write_segment(marker, content))


def _next_marker(data: bytes, position: int) -> tuple[int, int]:
    """The marker at `position`, and where its segment goes on; fill bytes before it are left out."""
    if data[position] != 0xFF:
        raise ValueError("no marker where one must stand")
    while data[position] == 0xFF:
        position += 1
    return data[position], position + 1


def _end_of_scan(data: bytes, position: int) -> int:
    """Where the compressed data that starts at `position` ends: at the next marker that is no restart."""
    while True:
        position = data.index(b"\xff", position)
        following = data[position + 1]
        if following == 0x00 or following in _RESTARTS:
            position += 2
        elif following == 0xFF:
            position += 1
        else:
            return position


def _write_segment(marker: int, content: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content
