"""Rows as sources read them, and the cases they become once they are validated.

Goes in: a `Row`, any of which may be wrong. Comes out: a `Case`, or the cause for which the row is refused. Images are
read here for the first time: PNG, JPEG or DICOM becomes PNG or JPEG without anything of a patient beside the pixels.
"""

import io
import struct
import warnings
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from pydantic import ValidationError

from mint_lib.errors import InvalidInput
from mint_lib.records import Case, Finding, Split

_IMAGE_FORMATS = ("PNG", "JPEG")


@dataclass(frozen=True, slots=True)
class Row:
    """One row as a source reads it; any of it may be wrong. The fields are those of `Case`."""

    case_id: str
    group_id: str
    source: str
    synthetic: bool
    text: str | None = None
    image: bytes | None = None
    findings: tuple[Finding, ...] = ()
    label_id: str | None = None
    attributes: Mapping[str, str] = field(default_factory=dict)
    split: Split | None = None
    """The split that the source itself assigns; None leaves it to the stage."""


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A row that a source does not hand on."""

    case_id: str
    cause: str
    refused: bool
    """True: the row is bad. False: it is not wanted (a filter)."""


class ImageLimits(NamedTuple):
    """How large an image may be."""

    max_pixels: int
    max_bytes: int
    """Encoded."""


def validate_row(
    row: Row, limits: ImageLimits, *, label_ids: set[str], seen: set[str], batch: str | None = None
) -> Case | str:
    """The case that a row holds, or the cause for which it is refused.

    Args:
        row: what a source gave.
        limits: largest images.
        label_ids: the label set.
        seen: ids of the rows before.
        batch: name of the delivery, which the case keeps unless the source names one.
    """
    if not row.case_id or not row.group_id:
        return "no case id or patient"
    if row.case_id in seen:
        return "case id given twice"
    if row.label_id is not None and row.label_id not in label_ids:
        return "unknown label"
    if not (row.text and row.text.strip()) and not row.image:
        return "neither text nor image"
    image = row.image
    if image is not None:
        outcome = _read_image(image, limits, has_metadata=not row.synthetic)
        if isinstance(outcome, str):
            return outcome
        image = outcome
    try:
        case = Case(
            case_id=row.case_id,
            group_id=row.group_id,
            text=row.text if row.text and row.text.strip() else None,
            image=image,
            findings=row.findings,
            label_id=row.label_id,
            attributes=({"batch": batch} if batch else {}) | dict(row.attributes),
            source=row.source,
            synthetic=row.synthetic,
        )
    except ValidationError:
        return "field of a wrong type"
    words = [case.case_id, case.group_id, case.source, case.text or "", *case.attributes.values()]
    words += [word for item in case.findings for word in (item.id, item.label)]
    try:
        "".join(words).encode()
    except UnicodeEncodeError:
        return "not valid Unicode"
    return case


def _read_image(data: bytes, limits: ImageLimits, *, has_metadata: bool) -> bytes | str:
    """The pixels as PNG or JPEG, or the cause for which the image is refused.

    Metadata are taken away where there may be any of a patient: what a program drew carries its mark there.
    """
    from mint_lib.image_inputs.metadata import strip_metadata

    picture = read_picture(data, limits)
    if isinstance(picture, str):
        return picture
    try:
        return strip_metadata(picture) if has_metadata else picture
    except InvalidInput:
        return "corrupt image"


def read_picture(data: bytes, limits: ImageLimits) -> bytes | str:
    """The picture of a PNG, JPEG or DICOM file as PNG or JPEG, or the cause for which it is refused.

    Metadata of a PNG or JPEG stay; a DICOM file gives a PNG without any.
    """
    if len(data) > limits.max_bytes:
        return "image too large"
    if data[128:132] == b"DICM":
        from mint_lib.image_inputs.dicom import read_dicom

        outcome = read_dicom(data, max_pixels=limits.max_pixels)
        if isinstance(outcome, str):
            return f"DICOM: {outcome}"
        data = outcome
    return find_image_fault(data, max_pixels=limits.max_pixels, max_bytes=limits.max_bytes) or data


def find_image_fault(data: bytes, *, max_pixels: int, max_bytes: int) -> str | None:
    """Why encoded bytes cannot be taken as a PNG or JPEG image, or None. Pixels are counted before decoding."""
    from PIL import Image

    if len(data) > max_bytes:
        return "image too large"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is stricter
            image = Image.open(io.BytesIO(data), formats=_IMAGE_FORMATS)
        if image.width * image.height > max_pixels:
            return "image too large"
        if getattr(image, "n_frames", 1) != 1:
            return "animated image"
        image.verify()  # checksums of a PNG up to its end, which decoding does not look at
        Image.open(io.BytesIO(data), formats=_IMAGE_FORMATS).load()
    except Image.DecompressionBombError:
        return "image too large"
    except (OSError, SyntaxError, ValueError, EOFError, ArithmeticError, struct.error, zlib.error):
        return "corrupt image"
    return None
