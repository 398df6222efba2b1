"""Finds and removes what writers and removers left behind that did not come to their end.

Goes in: the layout and an age. Comes out: what was found, or removed. Bytes that another version uses stay, whatever
happens to the version that wrote them. Only an operator's command removes anything.
"""

import logging
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from mint_lib.errors import Conflict
from mint_lib.records import KINDS
from mint_lib.storage.client import S3
from mint_lib.storage.file_use import FileUse
from mint_lib.storage.layout import Layout, is_version
from mint_lib.storage.manifest import HOLDS, MANIFEST
from mint_lib.storage.removal import delete_unused

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
    uses: dict[tuple[str, str], FileUse] = {}
    for key, orphan in sorted(found.items()):
        if key in committed:
            continue
        if key in removed:
            use = uses.setdefault(key[:2], FileUse(s3, layout, *key[:2]))
            left = use.list_unused(orphan.version)
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
        delete_unused(s3, layout, orphan.kind, orphan.name, orphan.version)
        collected.append(orphan)
    s3.abort_uploads(layout.path() and layout.path() + "/", before=limit)
    return collected
