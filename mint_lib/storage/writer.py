"""Writes one version: claim, files, manifest.

Goes in: files, a `StageRecord` and, if wanted, a base: an earlier version of the name, whose files are not stored
twice. Comes out: a `Reference`, or nothing at all: until the manifest stands, no reader sees the version. A number
belongs to the writer whose claim stands, so two writers never mix below it.
"""

import errno
import hashlib
import logging
import secrets
import tempfile
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from mint_lib.errors import Conflict, InvalidInput, NotFound, StoreError
from mint_lib.records import Kind, Record, Reference, StageRecord
from mint_lib.rows import write_shards
from mint_lib.storage.client import S3
from mint_lib.storage.layout import (
    Layout,
    is_version,
    number_shard,
    number_version,
    shards_of,
    spell_shard,
    spell_version,
)
from mint_lib.storage.manifest import (
    CLAIM,
    RECORD,
    FileEntry,
    Manifest,
    canonical_json,
    check_path,
    describe_environment,
    digest_files,
)

if TYPE_CHECKING:
    import pyarrow

logger = logging.getLogger(__name__)


class VersionWriter:
    """One version in the making. Use it as a context manager and end with `commit`.

    Leaving it without `commit` leaves nothing that a reader sees; `collect_orphans` removes what was written.
    """

    def __init__(
        self, s3: S3, layout: Layout, kind: Kind, name: str, version: str | None, base: Manifest | None = None
    ):
        self._s3 = s3
        self._layout = layout
        self._kind = kind
        self._name = name
        self._wanted = version
        self._base = base
        self._same: dict[str, FileEntry] = {}
        self._token = secrets.token_hex(16)
        self._files: dict[str, FileEntry] = {}
        self._version = ""
        self._is_committed = False

    def __enter__(self) -> Self:
        """Claims the version, and holds what its base consists of.

        Raises:
            Conflict: an explicit version was asked for, and its number is used up; or the base was just removed.
        """
        self._take_number()
        self._hold_base()
        return self

    def _take_number(self) -> None:
        if self._wanted is not None:
            if not self._claim(self._wanted):
                raise Conflict(
                    f"{self._kind}/{self._name}@{self._wanted} is taken: a number is used once, even when its writer "
                    "died. Leave the version out to get the next free number."
                )
            return
        folder = self._layout.folder(self._kind, self._name)
        taken = [number_version(item) for item in self._s3.list_folders(folder) if is_version(item)]
        number = max(taken, default=0) + 1
        while not self._claim(spell_version(number)):
            number += 1

    def _hold_base(self) -> None:
        """Say in the base that this version uses its files, then see that it still exists.

        One hold is enough, also for bytes of the base that lie in earlier versions: `FileUse` asks who holds a base
        that is gone. A remover empties the manifest first and looks for holds then, so one of both notices.
        """
        if self._base is None:
            return
        self._s3.put(self._layout.hold(self._kind, self._name, self._base.version, by=self._version), b"{}")
        manifest = self._layout.manifest(self._kind, self._name, self._base.version)
        try:
            found, _ = self._s3.get(manifest)
        except NotFound:
            found = b""
        if not found:
            raise Conflict(f"{self._s3.locate(manifest)} was removed while a version was made from it.")
        self._same = {path: self._point_at(path) for path in self._base.files}

    def _point_at(self, path: str) -> FileEntry:
        """The base's file `path` as an entry of this version."""
        assert self._base is not None
        entry = self._base.files[path]
        return entry.model_copy(
            update={"stored_in": entry.stored_in or self._base.version, "stored_as": entry.stored_as or path}
        )

    def _find_same(self, size: int, sha256: str) -> FileEntry | None:
        """A file of the base with these very bytes."""
        return next((entry for entry in self._same.values() if (entry.size, entry.sha256) == (size, sha256)), None)

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._is_committed:
            logger.warning("%s/%s@%s was not committed", self._kind, self._name, self._version)

    @property
    def version(self) -> str:
        """The claimed version, for instance `v000001`."""
        return self._version

    @property
    def files(self) -> dict[str, FileEntry]:
        """The files written so far, by path."""
        return dict(self._files)

    def add_bytes(self, path: str, data: bytes) -> None:
        """Write one file.

        Raises:
            InvalidInput: the path is not allowed, or was added before.
            StoreUnreachable: the server does not answer, or its disk is full.
        """
        self._check(path)
        digest = hashlib.sha256(data).hexdigest()
        self._files[path] = self._find_same(len(data), digest) or self._s3.put(self._key(path), data)

    def add_file(self, path: str, local_path: Path) -> None:
        """Copy one local file of any size; raises as `add_bytes`, and if it is not a plain file."""
        if local_path.is_symlink() or not local_path.is_file():
            raise InvalidInput(f"{local_path} is not a plain file. Give a file; links and devices are not stored.")
        self._check(path)
        same = None
        if any(entry.size == local_path.stat().st_size for entry in self._same.values()):
            with local_path.open("rb") as file:
                same = self._find_same(local_path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())
        self._files[path] = same or self._s3.put_file(self._key(path), local_path)

    def add_folder(self, prefix: str, local_folder: Path) -> None:
        """Copy every file below a local folder to below `prefix` ("" for the top); raises as `add_file`."""
        prefix = prefix.rstrip("/")
        paths = sorted(path for path in local_folder.rglob("*") if path.is_symlink() or not path.is_dir())
        if not paths:
            raise InvalidInput(f"{local_folder} holds no file. Give a folder with the files to store.")
        for path in paths:
            inner = path.relative_to(local_folder).as_posix()
            self.add_file(f"{prefix}/{inner}" if prefix else inner, path)

    def add_json(self, path: str, value: object) -> None:
        """Write `value` as canonical JSON; raises as `add_bytes`."""
        self.add_bytes(path, canonical_json(value))

    def add_rows(self, table: str, rows: Iterable[Record], schema: "pyarrow.Schema") -> None:
        """Write `rows` as the table `table`, or behind the shards that it has already; raises as `add_bytes`.

        A table is a folder of Parquet files, `train/000000.parquet` and so on. One row group is held at a time.
        """
        try:
            with tempfile.TemporaryDirectory(prefix="mint-rows-") as folder:
                self.add_shards(table, _remove_behind(write_shards(rows, schema, Path(folder))))
        except OSError as error:
            if isinstance(error, StoreError) or error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            place = f"{tempfile.gettempdir()} ({error.strerror})"
            raise StoreError(
                f"Rows cannot be written to the temporary folder {place}. Make room, or set TMPDIR to a larger one."
            ) from None

    def add_shards(self, table: str, paths: Iterable[Path]) -> None:
        """Take Parquet files as the table's next shards; raises as `add_file`."""
        number = 1 + max((number_shard(path) for path in shards_of(table, self._files)), default=-1)
        for path in paths:
            self.add_file(spell_shard(table, number), path)
            number += 1

    def carry(self, path: str) -> None:
        """Take over a file of the base as it is, without copying it.

        Raises:
            NotFound: the writer has no base, or the base has no such file.
        """
        if self._base is None or path not in self._base.files:
            raise NotFound(f"{path!r} is not a file of the base of {self._kind}/{self._name}@{self._version}.")
        self._check(path)
        self._files[path] = self._point_at(path)

    def carry_table(self, table: str) -> None:
        """Take over all shards of a table of the base; raises as `carry`."""
        for path in shards_of(table, self._base.files if self._base else {}) or [table]:
            self.carry(path)

    def commit(self, record: StageRecord) -> Reference:
        """Make the version exist. `record` stands beside the files as `record.json`.

        Raises:
            Conflict: the claim was given up in the meantime because nothing was written for long.
        """
        self.add_json(RECORD, record.model_dump(mode="json"))
        manifest = Manifest(
            kind=self._kind,
            name=self._name,
            version=self._version,
            token=self._token,
            created_at=datetime.now(UTC),
            environment=describe_environment(),
            files=self._files,
            digest=digest_files(self._files),
        )
        data = canonical_json(manifest.model_dump(mode="json"))
        key = self._layout.manifest(self._kind, self._name, self._version)
        self._s3.put_if(key, data, etag=None, is_ours=lambda found: found == data)
        self._is_committed = True
        reference = Reference(kind=self._kind, name=self._name, version=self._version, digest=manifest.digest)
        logger.info("committed %s with %d files", reference, len(self._files))
        return reference

    def _claim(self, version: str) -> bool:
        data = canonical_json({"token": self._token})
        key = self._layout.folder(self._kind, self._name, version) + CLAIM
        try:
            self._s3.put_if(key, data, etag=None, is_ours=lambda found: found == data)
        except Conflict:
            return False
        self._version = version
        return True

    def _key(self, path: str) -> str:
        return self._layout.folder(self._kind, self._name, self._version) + path

    def _check(self, path: str) -> None:
        if not self._version or self._is_committed:
            raise RuntimeError("files are added between `with store.write(...)` and `commit`")
        check_path(path)
        clash = [known for known in self._files if f"{known}/".startswith(f"{path}/") or path.startswith(f"{known}/")]
        if clash:
            raise InvalidInput(
                f"{path!r} cannot be added: {clash[0]!r} is already there. Give every file its own path."
            )


def _remove_behind(paths: Iterable[Path]) -> Iterator[Path]:
    """Each of `paths`, which is removed when the next one is asked for."""
    for path in paths:
        yield path
        path.unlink()
