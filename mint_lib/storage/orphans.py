"""Orphans: what writers left behind that never committed.

Goes in: the layout and an age. Comes out: what was found, or removed. Only an operator's command collects orphans.
"""

import logging
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from mint_lib.errors import Conflict
from mint_lib.records import KINDS
from mint_lib.storage.client import S3
from mint_lib.storage.layout import Layout, is_version
from mint_lib.storage.manifest import MANIFEST

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
    """Everything below a version without manifest; a live writer that has not committed yet is among it."""
    found: dict[tuple[str, str, str], Orphan] = {}
    committed = set()
    for kind in KINDS:
        root = layout.path(kind) + "/"
        for item in s3.list_objects(root):
            name, _, rest = item.key.removeprefix(root).partition("/")
            version, _, path = rest.partition("/")
            place = (kind, name, version)
            if not is_version(version):
                continue
            if path == MANIFEST:
                if item.size:
                    committed.add(place)
                continue
            known = found.get(place, Orphan(*place, 0, 0, item.modified))
            found[place] = known._replace(
                num_objects=known.num_objects + 1,
                size_bytes=known.size_bytes + item.size,
                modified=max(known.modified, item.modified),
            )
    return [orphan for place, orphan in sorted(found.items()) if place not in committed]


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
        for item in list(s3.list_objects(layout.folder(orphan.kind, orphan.name, orphan.version))):
            if item.key != manifest:
                s3.delete(item.key)
        collected.append(orphan)
    s3.abort_uploads(layout.path() and layout.path() + "/", before=limit)
    return collected
