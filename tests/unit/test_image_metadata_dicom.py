"""DICOM files: the picture goes on, the header does not, and what may have writing in it is put aside."""

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mint_lib.image_inputs.dicom import read_dicom

pydicom = pytest.importorskip("pydicom")
from dicom_files import CANARY, GREY, write_dicom  # noqa: E402
from pydicom.encaps import encapsulate  # noqa: E402
from pydicom.uid import (  # noqa: E402
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEGBaseline8Bit,
    JPEGLSLossless,
    RLELossless,
    SecondaryCaptureImageStorage,
)

MAX_PIXELS = 1_000_000
COLOUR = np.stack([GREY, GREY[::-1], GREY // 2], axis=-1)


def _read(data: bytes) -> np.ndarray:
    picture = read_dicom(data, max_pixels=MAX_PIXELS)
    assert isinstance(picture, bytes), picture
    assert CANARY.encode() not in picture
    image = Image.open(io.BytesIO(picture))
    assert image.format == "PNG"
    assert not image.info
    return np.asarray(image)


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian, RLELossless, ExplicitVRBigEndian])
def test_dicom_of_each_plain_syntax_gives_its_pixels_and_nothing_of_its_header(syntax: str) -> None:
    # A picture over the whole range keeps its values when it is stretched to 8 bits.
    pixels = GREY.copy()
    pixels[0, 0], pixels[0, 1] = 0, 255
    data = write_dicom(pixels, syntax)

    assert data.count(CANARY.encode()) > 3
    np.testing.assert_array_equal(_read(data), pixels)


def test_dicom_in_colour_keeps_its_colours() -> None:
    np.testing.assert_array_equal(_read(write_dicom(COLOUR)), COLOUR)


def test_dicom_in_jpeg_is_decoded() -> None:
    smooth = np.add.outer(np.arange(20) * 4, np.arange(30) * 5).astype(np.uint8)
    smooth[0, 0], smooth[-1, -1] = 0, 255
    buffer = io.BytesIO()
    Image.fromarray(smooth).save(buffer, "JPEG", quality=95)
    data = write_dicom(smooth, JPEGBaseline8Bit, encapsulate([buffer.getvalue()]))

    # JPEG at quality 95 is a few of 255 steps off.
    assert np.abs(_read(data).astype(int) - smooth).mean() < 4


def test_dicom_with_a_window_shows_what_lies_in_it() -> None:
    values = np.array([[0, 900, 1000, 1100, 4000]], dtype=np.int16).repeat(4, axis=0)
    data = write_dicom(values, RescaleSlope=1, RescaleIntercept=-1000, WindowCenter=0, WindowWidth=200)

    shown = _read(data)[0].tolist()

    assert shown[0] == shown[1] == 0
    assert shown[4] == 255
    assert 120 <= shown[2] <= 135
    assert shown[3] >= 250


def test_dicom_whose_low_values_are_white_is_inverted() -> None:
    pixels = np.array([[0, 255]], dtype=np.uint8)

    np.testing.assert_array_equal(_read(write_dicom(pixels, PhotometricInterpretation="MONOCHROME1")), 255 - pixels)


@pytest.mark.parametrize(
    ("tags", "cause"),
    [
        ({"BurnedInAnnotation": "YES"}, "burned-in annotation"),
        ({"BurnedInAnnotation": "PERHAPS"}, "burned-in annotation"),
        ({"Modality": "US"}, "burned-in annotation"),
        ({"Modality": "SC"}, "burned-in annotation"),
        ({"SOPClassUID": SecondaryCaptureImageStorage}, "burned-in annotation"),
        ({"NumberOfFrames": 2, "PixelData": GREY.tobytes() * 2}, "multi-frame image"),
        ({"Rows": 40_000, "Columns": 40_000}, "image too large"),
        ({"Rows": 21}, "corrupt image"),
        ({"PhotometricInterpretation": "CMYK"}, "colours not supported"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_dicom_that_cannot_be_trusted_gives_a_cause(tags: dict[str, Any], cause: str) -> None:
    assert read_dicom(write_dicom(**tags), max_pixels=MAX_PIXELS) == cause


def test_dicom_of_ultrasound_that_says_it_has_no_writing_is_read() -> None:
    assert _read(write_dicom(Modality="US", BurnedInAnnotation="NO")).shape == GREY.shape


def test_dicom_with_a_compressed_picture_larger_than_its_header_says_is_refused() -> None:
    buffer = io.BytesIO()
    Image.new("L", (3000, 3000)).save(buffer, "JPEG")
    data = write_dicom(GREY, JPEGBaseline8Bit, encapsulate([buffer.getvalue()]))

    assert read_dicom(data, max_pixels=MAX_PIXELS) == "corrupt image"


def test_dicom_in_a_syntax_that_is_not_decoded_gives_a_cause() -> None:
    data = write_dicom(GREY, JPEGLSLossless, encapsulate([b"\0" * 64]))

    assert read_dicom(data, max_pixels=MAX_PIXELS) == "transfer syntax not supported"


def test_dicom_that_unpacks_to_a_flood_is_refused_before_it_unpacks() -> None:
    plain = write_dicom(GREY, ExplicitVRLittleEndian)
    deflated = write_dicom(GREY, DeflatedExplicitVRLittleEndian)
    (length,) = struct.unpack_from("<I", deflated, 140)
    squeezer = zlib.compressobj(wbits=-15)
    flood = squeezer.compress(b"\0" * 50_000_000) + squeezer.flush()

    assert read_dicom(deflated[: 144 + length] + flood, max_pixels=MAX_PIXELS) == "transfer syntax not supported"
    assert isinstance(read_dicom(plain, max_pixels=MAX_PIXELS), bytes)


def test_dicom_without_a_picture_gives_a_cause() -> None:
    data = write_dicom()
    dataset = pydicom.dcmread(io.BytesIO(data))
    del dataset.PixelData
    buffer = io.BytesIO()
    dataset.save_as(buffer)

    assert read_dicom(buffer.getvalue(), max_pixels=MAX_PIXELS) == "no picture"


def test_dicom_cut_anywhere_or_not_dicom_at_all_gives_a_cause() -> None:
    data = write_dicom()
    for piece in (b"", b"DICM", CANARY.encode() * 20, *(data[:end] for end in range(0, len(data) - 1, 53))):
        assert isinstance(read_dicom(piece, max_pixels=MAX_PIXELS), str)


def test_dicom_with_values_that_break_the_standard_is_never_quoted(
    caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    with pydicom.config.disable_value_validation():
        data = write_dicom(PatientBirthDate=CANARY, PatientAge=CANARY, BurnedInAnnotation="perhaps " + CANARY)
    recwarn.clear()
    caplog.clear()

    with caplog.at_level(0):
        assert read_dicom(data, max_pixels=MAX_PIXELS) == "burned-in annotation"
        assert read_dicom(data[:-50], max_pixels=MAX_PIXELS) == "burned-in annotation"

    assert CANARY not in caplog.text
    assert not [warning for warning in recwarn if CANARY in str(warning.message)]
