"""Takes a committed version away, and leaves no alias and no later version with a hole.

Goes in: a version. Comes out: what was removed. Its manifest goes through three states, each put on condition that
the last one still stands: whole; marked, which readers take for whole; empty, which is the end of the version.

No alias ends on an empty manifest. A mover reads the alias, then the manifest, and then swaps the alias if it is as it
was read. A remover marks the manifest, then writes every alias of the name anew ("fences" it) unless one needs the
version, and then empties the manifest if its own mark still stands.

- The mover saw the manifest before the mark: it had read the alias before it was fenced. Either its swap came before
  the fence, so that the remover sees it and takes its mark back, or the fence makes the swap fail, and the mover looks
  at everything again. An alias that was never set is written first as one that points nowhere, so it is fenced, too.
- The mover saw the mark: it takes the mark off before it swaps, so the remover cannot empty the manifest. A remover
  that comes after that is the case above.
- The mover saw the empty manifest: it does not swap.

Who dies on the way leaves nothing to mend. A mark without a remover changes nothing: a mover takes it off, and the next
remover puts its own in its place, which also ends the first one, should it only be slow. After the manifest is empty
no alias can come any more, and `collect_orphans` removes the files that are left.
"""

import functools
import logging
import operator
import secrets
from typing import NamedTuple

from mint_lib.errors import Conflict, InvalidInput
from mint_lib.records import Reference
from mint_lib.storage.aliases import fence_alias, list_needed
from mint_lib.storage.client import S3
from mint_lib.storage.file_use import FileUse
from mint_lib.storage.layout import Layout
from mint_lib.storage.manifest import CLAIM, MANIFEST, Manifest, canonical_json
from mint_lib.storage.reader import read_committed

logger = logging.getLogger(__name__)
_MARK = " removed by "
"""Stands in the token of a marked manifest, between the writer's and the remover's."""


class Removed(NamedTuple):
    """What the removal of one version took away."""

    num_objects: int
    size_bytes: int
    num_kept: int
    """Objects that other versions use."""


def remove_version(s3: S3, layout: Layout, reference: Reference) -> Removed:
    """Take a committed version away, but for the bytes that other versions use.

    Once its manifest is empty no reader finds it any more, and its number stays used. A writer that builds on it puts
    its hold before it looks at the manifest: it meets the empty one, or its hold is seen here.

    Raises:
        InvalidInput: an alias points at it, or would after a rollback.
        NotFound: there is no such version. Of two who remove it at the same time, both may succeed.
        Conflict: at the same time somebody else removed it, or moved an alias to it.
    """
    manifest, etag = read_committed(s3, layout, reference)
    key = layout.manifest(reference.kind, reference.name, reference.version)
    writer = manifest.token.partition(_MARK)[0]
    marked = _spell(manifest, token=f"{writer}{_MARK}{secrets.token_hex(16)}")
    etag = s3.put_if(key, marked, etag=etag, is_ours=lambda found: found == marked)
    needed = list_needed(s3, layout.folder(reference.kind, reference.name), read=fence_alias)
    if reference in needed:
        whole = _spell(manifest, token=writer)
        s3.put_if(key, whole, etag=etag, is_ours=lambda found: found == whole)
        raise InvalidInput(f"{reference} is needed by {needed[reference]} and stays.")
    s3.put_if(key, b"", etag=etag, is_ours=lambda found: not found)
    return delete_unused(s3, layout, reference.kind, reference.name, reference.version)


def stop_removal(s3: S3, layout: Layout, reference: Reference) -> None:
    """See that a version is there, and that no removal that has begun comes to its end.

    Raises:
        NotFound: there is no such version.
        IntegrityError: its manifest is not the one that the reference means.
    """
    key = layout.manifest(reference.kind, reference.name, reference.version)
    while True:
        manifest, etag = read_committed(s3, layout, reference)
        writer, mark, _ = manifest.token.partition(_MARK)
        if not mark:
            return
        whole = _spell(manifest, token=writer)
        try:
            s3.put_if(key, whole, etag=etag, is_ours=functools.partial(operator.eq, whole))
        except Conflict:
            logger.info("%s was written meanwhile; looking at it again", s3.locate(key))
            continue
        logger.warning("the removal of %s was stopped: an alias moves to it", reference)
        return


def delete_unused(s3: S3, layout: Layout, kind: str, name: str, version: str) -> Removed:
    """Delete the files of a version whose manifest is empty, but for those that other versions use."""
    folder = layout.folder(kind, name, version)
    left = (folder + MANIFEST, folder + CLAIM)
    unused = FileUse(s3, layout, kind, name).list_unused(version)
    holds = layout.hold(kind, name, version)
    num_files = sum(item.key not in left and not item.key.startswith(holds) for item in s3.list_objects(folder))
    for item in unused:
        s3.delete(item.key)
    return Removed(len(unused), sum(item.size for item in unused), num_files - len(unused))


def _spell(manifest: Manifest, *, token: str) -> bytes:
    """The manifest as it is stored, with another token."""
    return canonical_json(manifest.model_copy(update={"token": token}).model_dump(mode="json"))
