"""The store: immutable versions and movable aliases in one S3 bucket.

    <prefix>/<kind>/<name>/<version>/claim.json       first: the number belongs to one writer
                                     <data files>     each with its sha256, `record.json` among them
                                     <table>/<shard>.parquet    rows, in files of bounded size
                                     holds/<version>.json       a later version uses files of this one
                                     manifest.json    last: from here on the version exists
    <prefix>/<kind>/<name>/aliases/<alias>.json       one reference and the log of its moves
    <prefix>/outputs/<key>.json                       what a stage made from these inputs before
    <prefix>/runs/<run id>/                           checkpoints of running work

Goes in: files and a `StageRecord`. Comes out: a `Reference`, and whatever it refers to. Numbers may have gaps. An
empty manifest marks a number whose writer died. The store does not know what the files mean.
"""

import contextlib
import functools
import io
import json
import logging
import re
import secrets
import tempfile
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Generic, Self, TypeVar, cast

from mint_lib.errors import Conflict, IntegrityError, InvalidInput, NotFound
from mint_lib.records import KINDS, Kind, Record, Reference, StageRecord
from mint_lib.rows import iterate_parquet
from mint_lib.storage import aliases, orphans
from mint_lib.storage.aliases import Alias
from mint_lib.storage.client import S3
from mint_lib.storage.layout import LATEST, Layout, is_version, number_version, shards_of
from mint_lib.storage.manifest import MANIFEST, RECORD, FileEntry, Manifest
from mint_lib.storage.orphans import Orphan, Removed
from mint_lib.storage.retention import OldVersion, list_old_versions, remove_old_version
from mint_lib.storage.run_folder import RunFolder
from mint_lib.storage.settings import S3Settings
from mint_lib.storage.verification import Verification, verify_version
from mint_lib.storage.writer import VersionWriter

if TYPE_CHECKING:
    import pyarrow.fs

logger = logging.getLogger(__name__)
R = TypeVar("R", bound=Record)
_SHORT_REFERENCE = re.compile(r"(?P<kind>[a-z]+)/(?P<name>[^@#/]+)(@(?P<place>[^@#]+))?")


class StoredRows(Generic[R]):
    """The rows of a table, read anew each time."""

    def __init__(self, store: "Store", reference: Reference, table: str, row_type: type[R]):
        self._read = functools.partial(store.iterate_rows, reference, table, row_type)

    def __iter__(self) -> Iterator[R]:
        """Every row in its order; raises as `Store.iterate_rows`."""
        return self._read()


class Store:
    """Versions and aliases at one endpoint. It pickles, and connects at its first request."""

    def __init__(self, settings: S3Settings):
        self.settings = settings
        self._s3 = S3(settings)
        self._layout = Layout(settings.prefix)

    def __reduce__(self) -> tuple[type["Store"], tuple[S3Settings]]:
        return Store, (self.settings,)

    @classmethod
    def from_environment(cls) -> Self:
        """The store that `MINT_S3_*` names.

        Raises:
            InvalidInput: the environment names none, or a value is not allowed.
        """
        return cls(S3Settings.from_environment())

    def write(
        self, kind: Kind, name: str, *, version: str | None = None, base: Reference | None = None
    ) -> VersionWriter:
        """A writer of a new version: of the next free number, or of `version`.

        A file whose bytes `base`, an earlier version of the same kind and name, has already is not stored again.

        Raises:
            InvalidInput: the kind, the name or the version is not spelled as a reference spells it, or the base is one
                of another kind or name.
            NotFound: the base does not exist.
        """
        self._layout.folder(kind, name, version)
        if base is not None and (base.kind, base.name) != (kind, name):
            raise InvalidInput(f"A version of {kind}/{name} cannot build on {base}. Give one of the same name.")
        return VersionWriter(self._s3, self._layout, kind, name, version, self._manifest(base) if base else None)

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

    def list_names(self, kind: Kind) -> list[str]:
        """Names of `kind` that somebody has begun to write, sorted."""
        if kind not in KINDS:
            raise InvalidInput(f"{kind!r} is not a kind. Use one of: {', '.join(KINDS)}.")
        return sorted(self._s3.list_folders(self._layout.path(kind) + "/"))

    def list_versions(self, kind: Kind, name: str) -> list[str]:
        """Committed versions, oldest number first."""
        folder = self._layout.folder(kind, name)
        found = []
        for item in self._s3.list_objects(folder):
            version, _, path = item.key.removeprefix(folder).partition("/")
            if path == MANIFEST and item.size and is_version(version):
                found.append(version)
        return sorted(found, key=number_version)

    def resolve(self, text: str) -> Reference:
        """The reference that `text` means: in full, `kind/name@v000001`, `kind/name@alias`, or `kind/name` (newest).

        Raises:
            InvalidInput: `text` is none of these.
            NotFound: there is no such version or alias.
            IntegrityError: a full reference has another digest than the version.
        """
        if "#" in text:
            reference = Reference.parse(text)
            self._manifest(reference)
            return reference
        match = _SHORT_REFERENCE.fullmatch(text.strip())
        if match is None or match["kind"] not in KINDS:
            raise InvalidInput(
                f"{text[:200]!r} is not a reference. Write kind/name, kind/name@alias or kind/name@v000001 with kind "
                f"one of {', '.join(KINDS)}; `mint ls` prints them."
            )
        kind, name, place = cast(Kind, match["kind"]), match["name"], match["place"] or LATEST
        if place == LATEST:
            versions = self.list_versions(kind, name)
            if not versions:
                where = self._s3.locate(self._layout.folder(kind, name))
                raise NotFound(f"{kind}/{name} has no version at {where}. `mint ls` shows what exists.")
            place = versions[-1]
        if not is_version(place):
            alias = self.alias(kind, name, place)
            if alias is None:
                raise NotFound(f"{kind}/{name} has no alias {place!r}. `mint ls {kind}` shows what exists.")
            return alias.reference
        manifest = self._read_manifest(kind, name, place)
        return Reference(kind=manifest.kind, name=manifest.name, version=place, digest=manifest.digest)

    def alias(self, kind: Kind, name: str, alias: str) -> Alias | None:
        """Where `alias` of `kind/name` points; None if it was never set."""
        return aliases.read_alias(self._s3, self._layout.alias(kind, name, alias))

    def move_alias(self, alias: str, to: Reference, *, who: str, why: str, expected: Reference | None) -> Alias:
        """Point `alias` of `to`'s kind and name at `to`, if it points at `expected` (None: at nothing) until then.

        Raises:
            NotFound: `to` does not exist.
            Conflict: the alias points elsewhere, or somebody else moved it first.
        """
        self._manifest(to)
        key = self._layout.alias(to.kind, to.name, alias)
        moved = aliases.swap_alias(self._s3, key, to, who=who, why=why, expected=expected)
        logger.info("%s/%s@%s moved from %s to %s", to.kind, to.name, alias, expected, to)
        return moved

    def find_output(self, key: str) -> Reference | None:
        """What `remember_output` was told under `key`; None if nothing, or if that version is gone or damaged."""
        try:
            reference = Reference.parse(self._s3.get(self._layout.output(key))[0].decode())
            self._manifest(reference)
        except NotFound:
            return None
        except (IntegrityError, ValueError) as error:
            logger.warning("a remembered output is not usable and will be made again: %s", error)
            return None
        return reference

    def remember_output(self, key: str, reference: Reference) -> None:
        """Note that the inputs whose digest is `key` give `reference`."""
        self._s3.put(self._layout.output(key), str(reference).encode())

    def verify(self, reference: Reference, *, with_lineage: bool = False) -> Verification:
        """Read every byte of a version again; with `with_lineage` of those that it was made from, too.

        Raises:
            StoreUnreachable: the server does not answer: nothing is known then.
        """
        return verify_version(self._s3, self._layout, reference, with_lineage=with_lineage)

    def list_old_versions(self, kind: Kind, name: str, *, keep_last: int) -> list[OldVersion]:
        """Every version of a name but the newest `keep_last`, oldest first, with what still needs it.

        Raises:
            InvalidInput: `keep_last` is not positive, or kind and name are not spelled as a reference spells them.
        """
        return list_old_versions(self._s3, self._layout, kind, name, keep_last=keep_last)

    def remove_old_version(self, old: OldVersion) -> Removed:
        """Take an old version away that nobody needs. For an operator's command only.

        Raises:
            InvalidInput: something needs it.
            NotFound: there is no such version.
        """
        return remove_old_version(self._s3, self._layout, old)

    def remove(self, reference: Reference) -> Removed:
        """Take a version away, but for the bytes that other versions use. For an operator's command only.

        Raises:
            NotFound: there is no such version.
        """
        self._manifest(reference)
        return orphans.remove_version(self._s3, self._layout, reference.kind, reference.name, reference.version)

    def list_orphans(self) -> list[Orphan]:
        """What failed writers left behind; a live writer that has not committed yet is among it."""
        return orphans.list_orphans(self._s3, self._layout)

    def collect_orphans(self, *, older_than_seconds: float) -> list[Orphan]:
        """Delete the orphans in which nothing was written for so long; returns them. For an operator's command only."""
        return orphans.collect_orphans(self._s3, self._layout, older_than_seconds=older_than_seconds)

    def open_run(self, run_id: str) -> RunFolder:
        """The folder of a run's working files, which nothing but that run reads.

        Raises:
            InvalidInput: `run_id` uses a character outside the allowed ones.
        """
        return RunFolder(self._s3, self._layout, run_id)

    def runs_path(self, run_id: str) -> str:
        """`bucket/prefix/runs/<run_id>`: the folder of running work, as `arrow_filesystem` takes it."""
        return f"{self.settings.bucket}/{self._layout.run(run_id)}"

    def arrow_filesystem(self) -> "pyarrow.fs.S3FileSystem":
        """The same server as a pyarrow filesystem, with the credentials that boto3 finds at this moment.

        Raises:
            AccessDenied: there are no credentials.
        """
        return self._s3.arrow_filesystem()

    @property
    def location(self) -> str:
        """Where the store is, for people: bucket, prefix and endpoint, without credentials."""
        return f"s3://{self.settings.bucket}/{self.settings.prefix} at {self.settings.endpoint_url}"

    def check_access(self) -> None:
        """Prove on an object of its own that this store can be written, read, written on condition, and deleted from.

        Raises:
            StoreError: what is missing, in the words of the failed request; IntegrityError if the server ignores the
                condition, so that two writers could overwrite each other.
        """
        key = self._layout.path("checks", f"{secrets.token_hex(8)}.json")
        self._s3.put_if(key, b"1", etag=None, is_ours=lambda found: found == b"1")
        try:
            self._s3.put_if(key, b"2", etag=None, is_ours=lambda found: found == b"2")
        except Conflict:
            logger.debug("%s honours If-None-Match", self.location)
        else:
            raise IntegrityError(f"{self.location} ignores If-None-Match. Use a store with conditional writes.")
        finally:
            self._s3.delete(key)

    def _key(self, reference: Reference, path: str, entry: FileEntry) -> str:
        version = entry.stored_in or reference.version
        return self._layout.folder(reference.kind, reference.name, version) + (entry.stored_as or path)

    def _entry(self, reference: Reference, path: str) -> FileEntry:
        files = self.files(reference)
        if path not in files:
            raise NotFound(f"{reference} has no file {path!r}. It has: {', '.join(sorted(files))}.")
        return files[path]

    def _manifest(self, reference: Reference) -> Manifest:
        manifest = self._read_manifest(reference.kind, reference.name, reference.version)
        if manifest.digest != reference.digest:
            where = self._s3.locate(self._layout.manifest(reference.kind, reference.name, reference.version))
            raise IntegrityError(
                f"{where} has the digest {manifest.digest} and the reference "
                f"says {reference.digest}. The reference belongs to another store, or the manifest was replaced; "
                "`mint show` prints the version's own reference."
            )
        return manifest

    def _read_manifest(self, kind: str, name: str, version: str) -> Manifest:
        key = self._layout.manifest(kind, name, version)
        where = self._s3.locate(key)
        try:
            data, _ = self._s3.get(key)
        except NotFound:
            data = b""
        if not data:
            raise NotFound(
                f"There is no version {kind}/{name}@{version}: {where} is missing. `mint ls` shows what exists."
            )
        manifest = Manifest.parse(data, where=where)
        if (manifest.kind, manifest.name, manifest.version) != (kind, name, version):
            raise IntegrityError(f"{where} belongs to {manifest.kind}/{manifest.name}@{manifest.version}.")
        return manifest
