"""Removes versions: what writers left behind that never committed, and versions that nobody wants any more.

Goes in: the layout and an age, or a version. Comes out: what was found, or removed. Bytes that another version uses
stay, whatever happens to the version that wrote them. Only an operator's command removes anything.
"""

import logging
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from mint_lib.errors import Conflict, IntegrityError, NotFound
from mint_lib.records import KINDS
from mint_lib.storage.client import S3, StoredObject
from mint_lib.storage.layout import Layout, is_version
from mint_lib.storage.manifest import CLAIM, HOLDS, MANIFEST, Manifest

logger = logging.getLogger(__name__)


class Orphan(NamedTuple):
    """What one writer left behind."""

    kind: str
    name: str
    version: str
    num_objects: int
    size_bytes: int
    modified: datetime
    """Of its newest object, in UTC."""


class Removed(NamedTuple):
    """What the removal of one version took away."""

    num_objects: int
    size_bytes: int
    num_kept: int
    """Objects that other versions use."""


def list_orphans(s3: S3, layout: Layout) -> list[Orphan]:
    """Everything below a version without manifest; a live writer that has not committed yet is among it.

    What other versions use of it is not counted, nor are the claim and the holds, which stay.
    """
    found: dict[tuple[str, str, str], Orphan] = {}
    removed: set[tuple[str, str, str]] = set()
    committed: set[tuple[str, str, str]] = set()
    for kind in KINDS:
        root = layout.path(kind) + "/"
        for item in s3.list_objects(root):
            name, _, rest = item.key.removeprefix(root).partition("/")
            version, _, path = rest.partition("/")
            place = (kind, name, version)
            if not is_version(version) or path.startswith(f"{HOLDS}/"):
                continue
            if path == MANIFEST:
                (committed if item.size else removed).add(place)
                continue
            known = found.get(place, Orphan(*place, 0, 0, item.modified))
            found[place] = known._replace(
                num_objects=known.num_objects + 1,
                size_bytes=known.size_bytes + item.size,
                modified=max(known.modified, item.modified),
            )
    orphans = []
    for key, orphan in sorted(found.items()):
        if key in committed:
            continue
        if key in removed:
            left = list(_list_unused(s3, layout, *key))
            if not left:
                continue
            orphan = orphan._replace(num_objects=len(left), size_bytes=sum(item.size for item in left))
        orphans.append(orphan)
    return orphans


def collect_orphans(s3: S3, layout: Layout, *, older_than_seconds: float) -> list[Orphan]:
    """Delete the orphans in which nothing was written for so long; returns them.

    An empty manifest is put first: it uses the number up, so a writer that is only slow gets `Conflict` at its commit
    and never commits a version whose files were deleted.
    """
    limit = datetime.now(UTC) - timedelta(seconds=older_than_seconds)
    collected = []
    for orphan in list_orphans(s3, layout):
        if orphan.modified > limit:
            continue
        manifest = layout.manifest(orphan.kind, orphan.name, orphan.version)
        try:
            s3.put_if(manifest, b"", etag=None, is_ours=lambda data: not data)
        except Conflict:
            logger.info("%s was committed while orphans were collected", s3.locate(manifest))
            continue
        _delete_unused(s3, layout, orphan.kind, orphan.name, orphan.version)
        collected.append(orphan)
    s3.abort_uploads(layout.path() and layout.path() + "/", before=limit)
    return collected


def remove_version(s3: S3, layout: Layout, kind: str, name: str, version: str) -> Removed:
    """Take a committed version away, but for the bytes that other versions use.

    Its manifest becomes empty first, so no reader finds it any more and its number stays used. A writer that builds on
    it puts its hold before it looks at the manifest: it meets the empty one, or its hold is seen here.

    Raises:
        NotFound: there is no such version. Of two who remove it at the same time, both may succeed.
        Conflict: the manifest is being written.
    """
    key = layout.manifest(kind, name, version)
    found, etag = s3.get(key)
    if not found:
        raise NotFound(f"There is no version {kind}/{name}@{version}: it was removed before.")
    s3.put_if(key, b"", etag=etag, is_ours=lambda data: not data)
    return _delete_unused(s3, layout, kind, name, version)


def _delete_unused(s3: S3, layout: Layout, kind: str, name: str, version: str) -> Removed:
    folder = layout.folder(kind, name, version)
    left = (folder + MANIFEST, folder + CLAIM)
    unused = list(_list_unused(s3, layout, kind, name, version))
    holds = layout.hold(kind, name, version)
    num_files = sum(item.key not in left and not item.key.startswith(holds) for item in s3.list_objects(folder))
    for item in unused:
        s3.delete(item.key)
    return Removed(len(unused), sum(item.size for item in unused), num_files - len(unused))


def _list_unused(s3: S3, layout: Layout, kind: str, name: str, version: str) -> list[StoredObject]:
    """Objects of a removed version that no other version uses; none while it is not known what a version uses.

    The holds are listed until there is no new one: a writer may build on a holder that is removed after the holds were
    listed and before its manifest is read. It puts its own hold before it sees that the holder still stands, so that
    it is in a list that is made after the manifest was found empty.
    """
    folder = layout.folder(kind, name, version)
    holds = layout.hold(kind, name, version)
    used: set[str] = set()
    asked: set[str] = set()
    while new := {item.key.removeprefix(holds).removesuffix(".json") for item in s3.list_objects(holds)} - asked:
        for holder in sorted(new):
            key = layout.manifest(kind, name, holder)
            try:
                data, _ = s3.get(key)
                entries = Manifest.parse(data, where=s3.locate(key)).files.items() if data else ()
            except (NotFound, IntegrityError) as error:
                logger.info("%s/%s@%s stays as it is: %s", kind, name, version, error)
                return []
            used |= {entry.stored_as or path for path, entry in entries if entry.stored_in == version}
        asked |= new
    kept = {folder + path for path in (MANIFEST, CLAIM, *used)}
    return [item for item in s3.list_objects(folder) if item.key not in kept and not item.key.startswith(holds)]
