"""Reads the rows in which two versions may differ, and finds which of them belong together.

Goes in: two references. Comes out: their files of rows, sorted by who has them, and the digests of the rows. Files are
told apart by their sha256 alone. It does not say what the differences mean.
"""

from collections import Counter
from typing import TYPE_CHECKING, Literal, NamedTuple

from mint_lib.data_difference.row_digests import ROW_TYPES, RowDigests, TableKind, match_rows
from mint_lib.errors import NotFound
from mint_lib.records import SPLITS, Reference, Split
from mint_lib.rows import iterate_parquet
from mint_lib.storage.layout import shards_of
from mint_lib.storage.manifest import FileEntry

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from mint_lib.store import Store


class Shards(NamedTuple):
    """The files of rows, each with its split: of both versions, of the first alone, of the second alone."""

    shared: list[tuple[Split, str, FileEntry]]
    gone: list[tuple[Split, str, FileEntry]]
    new: list[tuple[Split, str, FileEntry]]

    def count_bytes(self, whose: Literal["shared", "gone", "new"]) -> int:
        """The size of these files together."""
        return sum(entry.size for _, _, entry in getattr(self, whose))


class MatchedRows(NamedTuple):
    """The rows that were read, and which of them belong together."""

    kind: TableKind
    common: RowDigests
    """In files of both versions."""
    before: RowDigests
    """In files that `after` has not."""
    after: RowDigests
    """In files that `before` has not."""
    places_before: "NDArray[np.intp]"
    """With `places_after`: the row of `before` there is the same as that of `after`, or became it."""
    places_after: "NDArray[np.intp]"


def sort_shards(before: Reference, after: Reference, store: "Store") -> Shards:
    """The files of rows of both versions. One that is in another split of the other version is not shared.

    Raises:
        NotFound: a version has no table of rows.
    """
    shards = Shards([], [], [])
    listed = [_list_shards(reference, store) for reference in (before, after)]
    left = Counter((split, entry.size, entry.sha256) for split, _, entry in listed[1])
    for split, path, entry in listed[0]:
        key = (split, entry.size, entry.sha256)
        (shards.shared if left[key] else shards.gone).append((split, path, entry))
        left[key] -= bool(left[key])
    for split, path, entry in listed[1]:
        key = (split, entry.size, entry.sha256)
        if left[key]:
            shards.new.append((split, path, entry))
            left[key] -= 1
    return shards


def _list_shards(reference: Reference, store: "Store") -> list[tuple[Split, str, FileEntry]]:
    files = store.files(reference)
    found = [(split, path, files[path]) for split in SPLITS for path in shards_of(split, files)]
    if not found:
        raise NotFound(f"{reference} has no table {', '.join(SPLITS)}. It has: {', '.join(sorted(files))}.")
    return found


def read_rows(
    kind: TableKind, before: Reference, after: Reference, shards: Shards, store: "Store", *, read_shared: bool
) -> MatchedRows:
    """The rows of the files that only one version has, and, with `read_shared`, of the others.

    Raises:
        IntegrityError: a file is not what was committed.
    """
    common = RowDigests(kind)
    gone, new = RowDigests(kind, like=common), RowDigests(kind, like=common)
    wanted = (
        (common, before, shards.shared if read_shared else []),
        (gone, before, shards.gone),
        (new, after, shards.new),
    )
    for table, reference, found in wanted:
        for split, path, _ in found:
            with store.fetch_shard(reference, path) as local_path:
                for row in iterate_parquet(local_path, ROW_TYPES[kind]):
                    table.add(row, split)
    return MatchedRows(kind, common, gone, new, *match_rows(gone, new, kind))
