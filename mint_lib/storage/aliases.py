"""Aliases: one small object each, moved by compare-and-swap, with a log of who moved what and why.

Goes in: a key, a reference. Comes out: an `Alias`. This module does not know whether the referenced version exists.
"""

import functools
import logging
import operator
import secrets
from collections.abc import Callable
from datetime import UTC, datetime
from typing import NamedTuple

from mint_lib.errors import Conflict, IntegrityError, NotFound
from mint_lib.records import Record, Reference
from mint_lib.storage.client import S3
from mint_lib.storage.manifest import canonical_json

logger = logging.getLogger(__name__)


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
    reference: str | None
    """None: it points nowhere, as its first move has only begun."""
    log: tuple[AliasMove, ...]
    fence: str = ""
    """Random; changed by `fence_alias`, for nothing but to change the object."""


def read_alias(s3: S3, key: str) -> Alias | None:
    """The alias at `key`; None if it points nowhere.

    Raises:
        IntegrityError: the object is not an alias.
    """
    try:
        file, etag = _read_file(s3, key)
    except NotFound:
        return None
    return _describe(file, etag)


def swap_alias(
    s3: S3,
    key: str,
    to: Reference,
    *,
    who: str,
    why: str,
    expected: Reference | None,
    check_target: Callable[[], None],
) -> Alias:
    """Point the alias at `key` at `to`, if it points at `expected` (None: at nothing) until then.

    `check_target` raises if nothing may point at `to`. It is called after the alias was read: who forbids that and
    then fences the alias is heard.

    Raises:
        Conflict: it points elsewhere, or somebody else moved it first.
    """
    token = secrets.token_hex(16)
    while True:
        file, etag = _open_file(s3, key)
        if file.reference != (str(expected) if expected else None):
            raise Conflict(
                f"{s3.locate(key)} points at {file.reference or 'nothing'}, not at {expected or 'nothing'}: somebody "
                "else moved it. Look at it again (`mint show`) and decide anew."
            )
        check_target()
        move = AliasMove(
            reference=str(to), previous=file.reference, who=who, why=why, at=datetime.now(UTC), token=token
        )
        moved = _AliasFile(reference=str(to), log=(*file.log, move))
        try:
            etag = s3.put_if(key, _spell(moved), etag=etag, is_ours=lambda data: token.encode() in data)
        except Conflict:
            logger.info("%s was written meanwhile; looking at it again", s3.locate(key))
            continue
        return Alias(to, moved.log, etag)


def fence_alias(s3: S3, key: str) -> Alias | None:
    """The alias at `key`, written anew as it is: no `swap_alias` that has read it before succeeds without a new look.

    Raises:
        IntegrityError: the object is not an alias.
    """
    while True:
        try:
            file, etag = _read_file(s3, key)
        except NotFound:
            return None
        data = _spell(file.model_copy(update={"fence": secrets.token_hex(16)}))
        try:
            etag = s3.put_if(key, data, etag=etag, is_ours=functools.partial(operator.eq, data))
        except Conflict:
            logger.info("%s was written meanwhile; looking at it again", s3.locate(key))
            continue
        return _describe(file, etag)


def list_needed(s3: S3, folder: str, *, read: Callable[[S3, str], Alias | None]) -> dict[Reference, str]:
    """Where the aliases of the name in `folder` point, and where a rollback would take them, to who needs it there.

    `read` is `read_alias` or `fence_alias`.
    """
    folder += "aliases/"
    found: dict[Reference, str] = {}
    for item in s3.list_objects(folder):
        alias = read(s3, item.key)
        if alias is not None:
            word = item.key.removeprefix(folder).removesuffix(".json")
            found |= {Reference.parse(text): f"alias {word}" for text in alias.trail[-2:]}
    return found


def _read_file(s3: S3, key: str) -> tuple[_AliasFile, str]:
    """What lies at `key`, and its ETag; raises NotFound if nothing does."""
    data, etag = s3.get(key)
    try:
        file = _AliasFile.model_validate_json(data)
        if file.reference is not None:
            Reference.parse(file.reference)
    except ValueError as error:
        advice = "Restore it from a backup, or delete it and set the alias again."
        raise IntegrityError(f"{s3.locate(key)} is not an alias. {advice}") from error
    return file, etag


def _open_file(s3: S3, key: str) -> tuple[_AliasFile, str]:
    """What lies at `key`, and its ETag. An alias that was never set is written first: it can be fenced then."""
    while True:
        try:
            return _read_file(s3, key)
        except NotFound:
            file = _AliasFile(reference=None, log=())
        data = _spell(file)
        try:
            return file, s3.put_if(key, data, etag=None, is_ours=functools.partial(operator.eq, data))
        except Conflict:
            logger.info("%s was written meanwhile; looking at it again", s3.locate(key))


def _describe(file: _AliasFile, etag: str) -> Alias | None:
    return Alias(Reference.parse(file.reference), file.log, etag) if file.reference is not None else None


def _spell(file: _AliasFile) -> bytes:
    return canonical_json(file.model_dump(mode="json", exclude_defaults=True))
