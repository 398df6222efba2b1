"""The picture of a DICOM file and nothing of its header.

Goes in: the bytes of a DICOM file. Comes out: a PNG with 8 bits per channel, or the cause why there is none. No tag of
the header, private or not, goes on, and none is logged. A file that may have writing burned into its pixels is refused
with the cause `burned-in annotation`, for a person to look at. Knows no case. The standard: NEMA PS3.
"""

import contextlib
import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from mint_lib.errors import MissingDependency

if TYPE_CHECKING:
    import numpy as np

_UNCOMPRESSED = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2")
_RUN_LENGTH = "1.2.840.10008.1.2.5"
# JPEG and JPEG 2000, which Pillow decodes. Deflated files are left out: they unpack before any size can be checked.
_BY_PILLOW = tuple(f"1.2.840.10008.1.2.4.{suffix}" for suffix in ("50", "51", "90", "91"))
# Modalities whose devices write into the picture: without a word in the header that they did not, they may have.
_OFTEN_ANNOTATED = frozenset(("US", "SC", "OT", "ES", "XC", "GM", "IVUS", "ECG", "HC", "DOC"))
_SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
_GREY = ("MONOCHROME1", "MONOCHROME2")
_COLOUR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")

# A parser of bytes from outside has many ways to fail; memory and interrupts are not among these.
_FAULTS_OF_PARSING = (
    ArithmeticError, AttributeError, EOFError, LookupError, NotImplementedError, OSError, RuntimeError, SyntaxError,
    TypeError, ValueError, struct.error, zlib.error,
)  # fmt: skip


def read_dicom(data: bytes, *, max_pixels: int) -> bytes | str:
    """The PNG of a DICOM file with one frame, or a cause.

    Args:
        data: the file.
        max_pixels: a larger picture is refused before its pixels are decoded.

    Raises:
        MissingDependency: pydicom is not installed.
    """
    try:
        from pydicom.errors import InvalidDicomError
    except ImportError as error:
        raise MissingDependency("DICOM files are read by the package pydicom. Install mint-platform[train].") from error
    try:
        with _be_silent():
            return _convert(data, max_pixels=max_pixels)
    except (InvalidDicomError, *_FAULTS_OF_PARSING):
        return "corrupt image"


@contextlib.contextmanager
def _be_silent() -> Iterator[None]:
    """Keep pydicom from quoting values of the header in warnings and logs."""
    from pydicom import config

    was_disabled = config.logger.disabled
    config.logger.disabled = True
    try:
        with warnings.catch_warnings(), config.disable_value_validation():
            warnings.simplefilter("ignore")
            yield
    finally:
        config.logger.disabled = was_disabled


def _convert(data: bytes, *, max_pixels: int) -> bytes | str:
    import pydicom

    syntax = _read_syntax(data)
    if syntax not in (*_UNCOMPRESSED, _RUN_LENGTH, *_BY_PILLOW):
        return "transfer syntax not supported"
    dataset = pydicom.dcmread(io.BytesIO(data))
    cause = _find_fault(dataset, max_pixels=max_pixels)
    if cause is not None:
        return cause
    if syntax in _BY_PILLOW and not _has_stated_size(dataset):
        return "corrupt image"
    return _write_png(_to_8_bits(dataset))


def _read_syntax(data: bytes) -> str:
    """The transfer syntax that the first group of tags states; nothing behind this group is read."""
    from pydicom.filereader import read_dataset

    if data[128:132] != b"DICM":
        raise ValueError("not a DICOM file")
    meta = read_dataset(
        io.BytesIO(data[132:]),
        is_implicit_VR=False,
        is_little_endian=True,
        stop_when=lambda tag, _, __: tag.group != 2,
    )
    return str(meta.get("TransferSyntaxUID", ""))


def _find_fault(dataset: Any, *, max_pixels: int) -> str | None:
    """Why the picture cannot be used, from the header alone."""
    if "PixelData" not in dataset:
        return "no picture"
    if int(dataset.get("NumberOfFrames") or 1) != 1:
        return "multi-frame image"
    rows, columns = int(dataset.Rows), int(dataset.Columns)
    if rows < 1 or columns < 1:
        return "corrupt image"
    if rows * columns > max_pixels:
        return "image too large"
    if dataset.PhotometricInterpretation not in (*_GREY, *_COLOUR, "PALETTE COLOR"):
        return "colours not supported"
    annotated = str(dataset.get("BurnedInAnnotation") or "").strip().upper()
    is_often = str(dataset.get("Modality") or "").strip().upper() in _OFTEN_ANNOTATED
    is_captured = str(dataset.get("SOPClassUID") or "").startswith(_SECONDARY_CAPTURE)
    if annotated != "NO" and (annotated or is_often or is_captured):
        return "burned-in annotation"
    return None


def _has_stated_size(dataset: Any) -> bool:
    """Whether the compressed picture is as large as the header says; it is not decoded for that."""
    from PIL import Image
    from pydicom.encaps import generate_frames

    frame = next(generate_frames(dataset.PixelData, number_of_frames=1))
    return Image.open(io.BytesIO(frame), formats=("JPEG", "JPEG2000")).size == (dataset.Columns, dataset.Rows)


def _to_8_bits(dataset: Any) -> "np.ndarray":
    """Pixels (height, width) or (height, width, 3) as bytes: rescaled, windowed, and light where it is light."""
    import numpy as np
    from pydicom.pixels.processing import apply_color_lut, apply_modality_lut, apply_voi_lut

    pixels = dataset.pixel_array
    if dataset.PhotometricInterpretation == "PALETTE COLOR":
        colours = apply_color_lut(pixels, dataset)
        return (colours >> 8).astype(np.uint8) if colours.dtype == np.uint16 else colours.astype(np.uint8)
    if dataset.PhotometricInterpretation in _COLOUR:
        if pixels.dtype != np.uint8:
            pixels = pixels >> (int(dataset.BitsStored) - 8)
        return pixels.astype(np.uint8)
    values = apply_voi_lut(apply_modality_lut(pixels, dataset), dataset).astype(np.float64)
    low, high = float(values.min()), float(values.max())
    scaled = (values - low) / (high - low) if high > low else np.zeros_like(values)
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        scaled = 1 - scaled
    return np.rint(scaled * 255).astype(np.uint8)


def _write_png(pixels: "np.ndarray") -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()
