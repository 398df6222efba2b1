"""Which old versions nobody needs any more, and their removal.

Goes in: a kind, a name, and how many of its newest versions stay. Comes out: what was removed, and why the others were
not. A version stays that an alias points at, or would after a rollback, or from which a version that stays was made.
Whoever cannot be asked is taken to need everything: a record that cannot be read ends it before anything is removed.
"""

import logging
from typing import NamedTuple

from mint_lib.errors import IntegrityError, InvalidInput, NotFound
from mint_lib.records import KINDS, Kind, Reference
from mint_lib.storage.aliases import read_alias
from mint_lib.storage.client import S3
from mint_lib.storage.layout import Layout, is_version, number_version
from mint_lib.storage.manifest import MANIFEST, Manifest
from mint_lib.storage.orphans import Removed, remove_version
from mint_lib.storage.verification import read_inputs

logger = logging.getLogger(__name__)


class OldVersion(NamedTuple):
    """A version that is older than those that stay by their number."""

    reference: Reference
    needed_by: str
    """The alias or the version that keeps it; empty: nobody needs it."""


def list_old_versions(s3: S3, layout: Layout, kind: Kind, name: str, *, keep_last: int) -> list[OldVersion]:
    """Every version of a name but the newest `keep_last`, oldest first, with what still needs it.

    Raises:
        InvalidInput: `keep_last` is not positive, or kind and name are not spelled as a reference spells them.
        IntegrityError: a record in the store cannot be read, so that it is not known what it needs.
    """
    if keep_last < 1:
        raise InvalidInput(f"--keep-last {keep_last} would remove every version. Keep 1 or more.")
    layout.folder(kind, name)
    committed = _list_committed(s3, layout)
    own = sorted((item for item in committed if (item.kind, item.name) == (kind, name)), key=_number)
    old = set(own[:-keep_last])
    reasons = _read_pointed(s3, layout, kind, name)
    # From what stays to what it was made from, until nothing new is found.
    waiting = [item for item in committed if item not in old or item in reasons]
    reached = set(waiting)
    while waiting:
        current = waiting.pop()
        try:
            sources = read_inputs(s3, layout, current)
        except NotFound:
            continue
        for source in sources - reached:
            reached.add(source)
            reasons.setdefault(source, str(current))
            waiting.append(source)
    return [OldVersion(item, reasons.get(item, "")) for item in own[:-keep_last]]


def remove_old_version(s3: S3, layout: Layout, old: OldVersion) -> Removed:
    """Take away an old version that nobody needs; its aliases are looked at once more, as they move at any time.

    Raises:
        InvalidInput: something needs it.
        NotFound: there is no such version.
        Conflict: somebody else removed it at the same time.
    """
    reference = old.reference
    needed_by = old.needed_by or _read_pointed(s3, layout, reference.kind, reference.name).get(reference, "")
    if needed_by:
        raise InvalidInput(f"{reference} is needed by {needed_by} and stays.")
    removed = remove_version(s3, layout, reference.kind, reference.name, reference.version)
    logger.info("removed %s: %d objects, %d bytes", reference, removed.num_objects, removed.size_bytes)
    return removed


def _read_pointed(s3: S3, layout: Layout, kind: Kind, name: str) -> dict[Reference, str]:
    """Where the aliases of a name point, and where a rollback would take them, to the alias."""
    folder = layout.folder(kind, name) + "aliases/"
    found: dict[Reference, str] = {}
    for item in s3.list_objects(folder):
        alias = read_alias(s3, item.key)
        if alias is not None:
            word = item.key.removeprefix(folder).removesuffix(".json")
            found |= {Reference.parse(text): f"alias {word}" for text in alias.trail[-2:]}
    return found


def _list_committed(s3: S3, layout: Layout) -> list[Reference]:
    """Every version in the store. One small request a version tells its digest."""
    found = []
    for kind in KINDS:
        root = layout.path(kind) + "/"
        for item in s3.list_objects(root):
            name, _, rest = item.key.removeprefix(root).partition("/")
            version, _, path = rest.partition("/")
            if path != MANIFEST or not item.size or not is_version(version):
                continue
            try:
                data, _ = s3.get(item.key)
            except NotFound:
                data = b""
            if not data:
                continue
            manifest = Manifest.parse(data, where=s3.locate(item.key))
            if (manifest.kind, manifest.name, manifest.version) != (kind, name, version):
                raise IntegrityError(f"{s3.locate(item.key)} belongs to another version. `mint verify` tells more.")
            found.append(Reference(kind=kind, name=name, version=version, digest=manifest.digest))
    return found


def _number(reference: Reference) -> int:
    return number_version(reference.version)
