"""Which old versions nobody needs any more, and their removal.

Goes in: a kind, a name, and how many of its newest versions stay. Comes out: what was removed, and why the others were
not. A version stays that an alias points at, or would after a rollback, or from which a version that stays was made. An
earlier version of the same name is no such source: what grew from it holds the bytes that it still uses. Whoever cannot
be asked is taken to need everything: a record that cannot be read ends it before anything is removed.
"""

import logging
from typing import NamedTuple

from mint_lib.errors import InvalidInput, NotFound
from mint_lib.records import KINDS, Kind, Reference
from mint_lib.storage.aliases import list_needed, read_alias
from mint_lib.storage.client import S3
from mint_lib.storage.layout import Layout, is_version, number_version
from mint_lib.storage.manifest import MANIFEST
from mint_lib.storage.reader import read_manifest
from mint_lib.storage.removal import Removed, remove_version
from mint_lib.storage.verification import grew_from, read_inputs

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
    folder = layout.folder(kind, name)
    committed = _list_committed(s3, layout)
    own = sorted((item for item in committed if (item.kind, item.name) == (kind, name)), key=_number)
    old = set(own[:-keep_last])
    reasons = list_needed(s3, folder, read=read_alias)
    # From what stays to what it was made from, until nothing new is found.
    waiting = [item for item in committed if item not in old or item in reasons]
    reached = set(waiting)
    while waiting:
        current = waiting.pop()
        try:
            sources = read_inputs(s3, layout, current)
        except NotFound:
            continue
        for source in {item for item in sources if not grew_from(current, item)} - reached:
            reached.add(source)
            reasons.setdefault(source, str(current))
            waiting.append(source)
    return [OldVersion(item, reasons.get(item, "")) for item in own[:-keep_last]]


def remove_old_version(s3: S3, layout: Layout, old: OldVersion) -> Removed:
    """Take away an old version that nobody needs; its aliases are looked at once more, as they move at any time.

    Raises:
        InvalidInput: something needs it.
        NotFound: there is no such version.
        Conflict: at the same time somebody else removed it, or moved an alias to it.
    """
    if old.needed_by:
        raise InvalidInput(f"{old.reference} is needed by {old.needed_by} and stays.")
    removed = remove_version(s3, layout, old.reference)
    logger.info("removed %s: %d objects, %d bytes", old.reference, removed.num_objects, removed.size_bytes)
    return removed


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
                manifest, _ = read_manifest(s3, layout, kind, name, version)
            except NotFound:
                continue
            found.append(Reference(kind=kind, name=name, version=version, digest=manifest.digest))
    return found


def _number(reference: Reference) -> int:
    return number_version(reference.version)
