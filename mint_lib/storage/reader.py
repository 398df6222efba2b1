"""Reads versions: their files, and the rows of their tables.

Goes in: the layout and a `Reference`. Comes out: bytes, rows and files whose size and sha256 are those that were
committed, wherever in the store they lie. It does not know what the files mean.
"""

import contextlib
import functools
import io
import json
import tempfile
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Generic, TypeVar

from mint_lib.errors import IntegrityError, NotFound
from mint_lib.records import Record, Reference, StageRecord
from mint_lib.rows import iterate_parquet
from mint_lib.storage.client import S3
from mint_lib.storage.layout import Layout, shards_of
from mint_lib.storage.manifest import RECORD, FileEntry, Manifest

R = TypeVar("R", bound=Record)


def read_manifest(s3: S3, layout: Layout, kind: str, name: str, version: str) -> tuple[Manifest, str]:
    """The manifest of the version with this number, and its ETag.

    Raises:
        NotFound: there is no such version, or it was removed.
        IntegrityError: the manifest is damaged, or another version's.
    """
    key = layout.manifest(kind, name, version)
    where = s3.locate(key)
    try:
        data, etag = s3.get(key)
    except NotFound as error:
        raise NotFound(
            f"There is no version {kind}/{name}@{version}: {where} is missing. `mint ls` shows what exists."
        ) from error
    if not data:
        raise NotFound(
            f"There is no version {kind}/{name}@{version}: {where} is empty, so it was removed. `mint ls` shows what "
            "exists."
        )
    manifest = Manifest.parse(data, where=where)
    if (manifest.kind, manifest.name, manifest.version) != (kind, name, version):
        raise IntegrityError(f"{where} belongs to {manifest.kind}/{manifest.name}@{manifest.version}.")
    return manifest, etag


def read_committed(s3: S3, layout: Layout, reference: Reference) -> tuple[Manifest, str]:
    """The manifest of the version that `reference` means, and its ETag.

    Raises:
        NotFound: there is no such version, or it was removed.
        IntegrityError: the manifest is damaged, or its digest is not that of the reference.
    """
    manifest, etag = read_manifest(s3, layout, reference.kind, reference.name, reference.version)
    if manifest.digest != reference.digest:
        where = s3.locate(layout.manifest(reference.kind, reference.name, reference.version))
        raise IntegrityError(
            f"{where} has the digest {manifest.digest} and the reference "
            f"says {reference.digest}. The reference belongs to another store, or the manifest was replaced; "
            "`mint show` prints the version's own reference."
        )
    return manifest, etag


def was_removed(s3: S3, layout: Layout, reference: Reference) -> bool:
    """There was a version with this number, or the beginning of one, and somebody took it away."""
    try:
        return not s3.get(layout.manifest(reference.kind, reference.name, reference.version))[0]
    except NotFound:
        return False


def locate_file(layout: Layout, reference: Reference, path: str, entry: FileEntry) -> str:
    """The key under which the bytes of a version's file lie: in its own folder, or in an earlier version's."""
    version = entry.stored_in or reference.version
    return layout.folder(reference.kind, reference.name, version) + (entry.stored_as or path)


class StoredRows(Generic[R]):
    """The rows of a table, read anew each time."""

    def __init__(self, reader: "VersionReader", reference: Reference, table: str, row_type: type[R]):
        self._read = functools.partial(reader.iterate_rows, reference, table, row_type)

    def __iter__(self) -> Iterator[R]:
        """Every row in its order; raises as `VersionReader.iterate_rows`."""
        return self._read()


class VersionReader:
    """Reads what was committed below one prefix of one bucket."""

    def __init__(self, s3: S3, layout: Layout):
        self._s3 = s3
        self._layout = layout

    def read_bytes(self, reference: Reference, path: str) -> bytes:
        """One file of a version, after its size and sha256 were checked.

        Raises:
            NotFound: there is no such version, or no such file in it.
            IntegrityError: the bytes are not those that were committed.
        """
        entry, sink = self._entry(reference, path), io.BytesIO()
        self._s3.get_verified(self._key(reference, path, entry), entry, sink)
        return sink.getvalue()

    def read_json(self, reference: Reference, path: str) -> object:
        """One JSON file of a version; raises as `read_bytes`."""
        return json.loads(self.read_bytes(reference, path))

    def read_rows(self, reference: Reference, table: str, row_type: type[R]) -> list[R]:
        """The validated rows of a table of a version; raises as `iterate_rows`."""
        return list(self.iterate_rows(reference, table, row_type))

    def iterate_rows(self, reference: Reference, table: str, row_type: type[R]) -> Iterator[R]:
        """The rows of a table one after another, in memory that does not grow with their number.

        Each shard is copied, checked, to a temporary folder, which is removed when the iterator is exhausted or closed.

        Raises:
            NotFound: there is no such version, or no such table in it.
            IntegrityError: the bytes are not those that were committed.
            StoreError: the temporary folder cannot be written.
        """
        files = self.files(reference)
        for path in self._find_shards(reference, table, files):
            with self._fetch(reference, path, files[path]) as local_path:
                yield from iterate_parquet(local_path, row_type)

    def open_rows(self, reference: Reference, table: str, row_type: type[R]) -> "StoredRows[R]":
        """The same rows as something that can be iterated over again and again."""
        return StoredRows(self, reference, table, row_type)

    def shards(self, reference: Reference, table: str) -> list[str]:
        """Paths of a table's Parquet files in their order.

        Raises:
            NotFound: there is no such version, or no such table in it.
        """
        return self._find_shards(reference, table, self.files(reference))

    def fetch_shard(self, reference: Reference, path: str) -> contextlib.AbstractContextManager[Path]:
        """One file of a version, checked, in a temporary folder; raises as `iterate_rows`."""
        return self._fetch(reference, path, self._entry(reference, path))

    def download(self, reference: Reference, folder: Path, prefix: str = "") -> Path:
        """Copy a version's files to `folder`, under the paths they have in it; returns `folder / prefix`.

        With `prefix` (a folder of the version, or one file) only what lies there is copied. A file appears under its
        name when it is whole and checked.

        Raises:
            NotFound: there is no such version, or nothing lies at `prefix`.
            IntegrityError: a file is not what was committed.
            StoreError: the local folder cannot be written.
        """
        prefix = prefix.rstrip("/")
        chosen = {
            path: entry
            for path, entry in self.files(reference).items()
            if not prefix or path == prefix or path.startswith(prefix + "/")
        }
        if not chosen:
            raise NotFound(f"{reference} has nothing at {prefix!r}.")
        for path, entry in sorted(chosen.items()):
            self._s3.get_file(self._key(reference, path, entry), entry, folder / path)
        return folder / prefix

    def files(self, reference: Reference) -> dict[str, FileEntry]:
        """Path to size and sha256 of every file of a version.

        Raises:
            NotFound: there is no such version.
            IntegrityError: its manifest is not the one whose digest stands in the reference.
        """
        return self._manifest(reference).files

    def record(self, reference: Reference) -> StageRecord:
        """How a version was made; raises as `read_bytes`."""
        return StageRecord.model_validate_json(self.read_bytes(reference, RECORD))

    def created_at(self, reference: Reference) -> datetime:
        """When a version was committed, in UTC; raises as `files`."""
        return self._manifest(reference).created_at

    def environment(self, reference: Reference) -> dict[str, str]:
        """Python and package versions that made a version; raises as `files`."""
        return self._manifest(reference).environment

    def _manifest(self, reference: Reference) -> Manifest:
        return read_committed(self._s3, self._layout, reference)[0]

    def _key(self, reference: Reference, path: str, entry: FileEntry) -> str:
        return locate_file(self._layout, reference, path, entry)

    def _entry(self, reference: Reference, path: str) -> FileEntry:
        files = self.files(reference)
        if path not in files:
            raise NotFound(f"{reference} has no file {path!r}. It has: {', '.join(sorted(files))}.")
        return files[path]

    def _find_shards(self, reference: Reference, table: str, files: Mapping[str, FileEntry]) -> list[str]:
        found = shards_of(table, files)
        if not found:
            raise NotFound(f"{reference} has no table {table!r}. It has: {', '.join(sorted(files))}.")
        return found

    @contextlib.contextmanager
    def _fetch(self, reference: Reference, path: str, entry: FileEntry) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="mint-rows-") as folder:
            local_path = Path(folder) / path.rpartition("/")[2]
            self._s3.get_file(self._key(reference, path, entry), entry, local_path)
            yield local_path
