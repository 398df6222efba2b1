"""Reads versions again to the last byte, and says what is damaged or missing.

Goes in: the layout and a reference. Comes out: a `Verification`, which goes on after a damage. Bytes are read through
and not kept, so the memory does not grow with a version. It mends nothing, and does not know what the files mean.
"""

import io
from typing import Any

from pydantic import ValidationError

from mint_lib.errors import IntegrityError, InvalidInput, NotFound
from mint_lib.records import Record, Reference, StageRecord
from mint_lib.storage.client import S3
from mint_lib.storage.layout import Layout
from mint_lib.storage.manifest import MANIFEST, RECORD, FileEntry
from mint_lib.storage.reader import locate_file, read_committed, was_removed


class Damage(Record):
    """One object that is not what was committed."""

    reference: str
    """The version that it belongs to, or that needs it."""
    path: str
    problem: str
    """Names the object as the server knows it."""


class Verification(Record):
    """What reading versions again has shown."""

    num_versions: int
    num_files: int
    """Files read, damaged ones among them."""
    num_bytes: int
    """As committed."""
    damages: tuple[Damage, ...]

    @property
    def is_whole(self) -> bool:
        """Every byte is what was committed, and every input exists."""
        return not self.damages


def verify_version(s3: S3, layout: Layout, reference: Reference, *, with_lineage: bool = False) -> Verification:
    """Read every file of a version and compare its size and sha256 with what was committed.

    The versions that its record names as inputs must exist; `with_lineage` reads them in the same way, and theirs. An
    earlier version of the same name may be gone: the bytes that are still used of it are files of this one.

    Raises:
        StoreUnreachable: the server does not answer: nothing is known then.
    """
    waiting, seen = [reference], {reference}
    num_files = num_bytes = 0
    damages: list[Damage] = []
    while waiting:
        current = waiting.pop()
        try:
            files = read_committed(s3, layout, current)[0].files
        except (IntegrityError, NotFound) as error:
            damages.append(Damage(reference=str(current), path=MANIFEST, problem=str(error)))
            continue
        for path, entry in sorted(files.items()):
            problem = _find_damage(s3, locate_file(layout, current, path, entry), entry)
            if problem:
                damages.append(Damage(reference=str(current), path=path, problem=problem))
        num_files += len(files)
        num_bytes += sum(entry.size for entry in files.values())
        try:
            inputs = read_inputs(s3, layout, current)
        except IntegrityError as error:
            known = any((item.reference, item.path) == (str(current), RECORD) for item in damages)
            if not known:
                damages.append(Damage(reference=str(current), path=RECORD, problem=str(error)))
            continue
        for source in sorted(inputs - seen, key=str):
            if grew_from(current, source) and was_removed(s3, layout, source):
                continue
            seen.add(source)
            if with_lineage:
                waiting.append(source)
                continue
            try:
                read_committed(s3, layout, source)
            except (IntegrityError, NotFound) as error:
                damages.append(Damage(reference=str(current), path=RECORD, problem=f"its input {source}: {error}"))
    num_versions = len(seen) if with_lineage else 1
    return Verification(num_versions=num_versions, num_files=num_files, num_bytes=num_bytes, damages=tuple(damages))


def read_inputs(s3: S3, layout: Layout, reference: Reference) -> set[Reference]:
    """The versions that a version was made from, by its record; what is no reference in it is left out.

    Raises:
        NotFound: there is no such version.
        IntegrityError: its record is not what was committed, or no record.
    """
    entry = read_committed(s3, layout, reference)[0].files[RECORD]
    key = locate_file(layout, reference, RECORD, entry)
    sink = io.BytesIO()
    s3.get_verified(key, entry, sink)
    try:
        inputs = StageRecord.model_validate_json(sink.getvalue()).inputs
        return {Reference.parse(text) for text in inputs.values() if "@" in text}
    except (ValidationError, InvalidInput) as error:
        raise IntegrityError(f"{s3.locate(key)} is not a record. Make the version again under a new number.") from error


def grew_from(version: Reference, source: Reference) -> bool:
    """`source` is an earlier version of the same name: `version` holds what it uses of it and does without the rest."""
    return (version.kind, version.name) == (source.kind, source.name)


def _find_damage(s3: S3, key: str, entry: FileEntry) -> str:
    try:
        s3.get_verified(key, entry, _Nowhere())
    except IntegrityError as error:
        return str(error)
    return ""


class _Nowhere(io.BytesIO):
    """Takes everything and keeps nothing."""

    def write(self, data: Any, /) -> int:
        return len(data)
