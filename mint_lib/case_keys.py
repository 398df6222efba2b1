"""What the data stage holds of every case while it splits: names and hashes, some 600 bytes, no text and no image.

Goes in: a `Case`. Comes out: its `CaseKey`. Knows neither splits nor where the case itself lies.
"""

import hashlib
import io
import sys
from collections.abc import Sequence
from typing import Literal, NamedTuple

from mint_lib.records import Case, Split

Content = Literal["text", "image"]
_DIGEST_BYTES = 16


class CaseKey(NamedTuple):
    """One case."""

    place: int
    """Its number where it is read from: in the spool, or among the rows of a version."""
    case_id: str
    group_id: str
    label_id: str | None
    synthetic: bool
    has_image: bool
    assigned: Split | None
    """The split that the source assigned."""
    text: bytes | None
    """Hash of the text without case and spacing; None where texts do not make two cases identical."""
    image: bytes | None
    """Hash of the image's pixels."""
    digest: bytes
    """Hash of everything that a delivery says of the case: its batch and a label that may have been withheld are left
    out."""

    @property
    def contents(self) -> tuple[bytes, ...]:
        """Hashes of what no case of another split may hold."""
        return tuple(content for content in (self.text, self.image) if content is not None)


def make_key(case: Case, *, place: int, contents: Sequence[Content], assigned: Split | None = None) -> CaseKey:
    """The key of a case.

    Args:
        case: the case; its image can be decoded.
        place: its number where it is read from.
        contents: of what makes two cases identical.
        assigned: the split that the source assigned.
    """
    return CaseKey(
        place=place,
        case_id=case.case_id,
        group_id=sys.intern(case.group_id),  # one string for all cases of a patient
        label_id=None if case.label_id is None else sys.intern(case.label_id),
        synthetic=case.synthetic,
        has_image=case.image is not None,
        assigned=assigned,
        text=_hash_text(case.text) if case.text and "text" in contents else None,
        image=_hash_pixels(case.image) if case.image and "image" in contents else None,
        digest=_hash_case(case),
    )


def _hash_text(text: str) -> bytes:
    return _hash(b"text", " ".join(text.casefold().split()).encode())


def _hash_pixels(data: bytes) -> bytes:
    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        return _hash(f"image {image.size}".encode(), image.convert("RGB").tobytes())


def _hash_case(case: Case) -> bytes:
    values = case.model_dump(exclude={"label_id", "image"})
    values["attributes"] = sorted((key, value) for key, value in case.attributes.items() if key != "batch")
    return _hash(repr(sorted(values.items())).encode(), case.image or b"")


def _hash(*parts: bytes) -> bytes:
    return hashlib.blake2b(b"\0".join(parts), digest_size=_DIGEST_BYTES).digest()
