"""Aliases: one small object each, moved by compare-and-swap, with a log of who moved what and why.

Goes in: a key, a reference. Comes out: an `Alias`. This module does not know whether the referenced version exists.
"""

import secrets
from datetime import UTC, datetime
from typing import NamedTuple

from mint_lib.errors import Conflict, IntegrityError, NotFound
from mint_lib.records import Record, Reference
from mint_lib.storage.client import S3
from mint_lib.storage.manifest import canonical_json


class AliasMove(Record):
    """One line of an alias' log."""

    reference: str
    previous: str | None
    who: str
    why: str
    at: datetime
    token: str
    """Random; tells a mover whose reply was lost that this move is its own."""


class Alias(NamedTuple):
    """Where an alias points, and how it came there."""

    reference: Reference
    log: tuple[AliasMove, ...]
    """Oldest first."""
    etag: str

    @property
    def trail(self) -> list[str]:
        """Where it pointed, oldest first, without what was rolled back; the last but one is where a rollback goes."""
        trail: list[str] = []
        for move in self.log:
            if move.reference in trail:
                del trail[trail.index(move.reference) + 1 :]
            else:
                trail.append(move.reference)
        return trail


class _AliasFile(Record):
    reference: str
    log: tuple[AliasMove, ...]


def read_alias(s3: S3, key: str) -> Alias | None:
    """The alias at `key`; None if it was never set.

    Raises:
        IntegrityError: the object is not an alias.
    """
    try:
        data, etag = s3.get(key)
    except NotFound:
        return None
    try:
        file = _AliasFile.model_validate_json(data)
        return Alias(Reference.parse(file.reference), file.log, etag)
    except ValueError as error:
        advice = "Restore it from a backup, or delete it and set the alias again."
        raise IntegrityError(f"{s3.locate(key)} is not an alias. {advice}") from error


def swap_alias(s3: S3, key: str, to: Reference, *, who: str, why: str, expected: Reference | None) -> Alias:
    """Point the alias at `key` at `to`, if it points at `expected` (None: at nothing) until then.

    Raises:
        Conflict: it points elsewhere, or somebody else moved it first.
    """
    current = read_alias(s3, key)
    found = current.reference if current else None
    if found != expected:
        raise Conflict(
            f"{s3.locate(key)} points at {found or 'nothing'}, not at {expected or 'nothing'}: somebody else moved it. "
            "Look at it again (`mint show`) and decide anew."
        )
    move = AliasMove(
        reference=str(to),
        previous=str(found) if found else None,
        who=who,
        why=why,
        at=datetime.now(UTC),
        token=secrets.token_hex(16),
    )
    file = _AliasFile(reference=str(to), log=(*(current.log if current else ()), move))
    etag = s3.put_if(
        key,
        canonical_json(file.model_dump(mode="json")),
        etag=current.etag if current else None,
        is_ours=lambda data: move.token.encode() in data,
    )
    return Alias(to, file.log, etag)
