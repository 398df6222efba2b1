"""The files of a base model on this machine: from where its name says, or from a mirror in the store.

Goes in: a `StudentConfig`, and a version of kind `base` if there is a mirror. Comes out: a private folder with the
files that the base's digest covers and no others, once the digest was found to be the one that the student was trained
on. A mirror makes a server independent of package indexes and hubs, and lets the download run beside the imports.
"""

import multiprocessing
import pathlib
import tempfile
from collections.abc import Sequence
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from types import TracebackType
from typing import TYPE_CHECKING, Self

from mint_lib.errors import InvalidInput, StoreError
from mint_lib.records import Name, Reference, StageRecord, code_version
from mint_lib.storage.manifest import FileEntry
from mint_lib.student import StudentConfig
from mint_lib.student_weights import digest_student_files, fetch_student_folder, hash_file, list_student_files

if TYPE_CHECKING:
    from mint_lib.store import Store

FOLDER = "files"
"""Where a mirrored base's files lie in its version."""
_NUM_STREAMS = 4


def mirror_base(store: "Store", config: StudentConfig, name: Name) -> Reference:
    """A version of `base` with the weights and the tokenizer of the whole model that `config` names.

    Raises:
        InvalidInput: a file of it would not be served; see `safe_base`.
    """
    from mint_lib.server.safe_base import check_base

    folder = fetch_student_folder(config.model, revision=config.revision)
    check_base(folder)
    with store.write("base", name) as version:
        for path in list_student_files(folder):
            # A hub's folder holds links into its cache.
            version.add_file(f"{FOLDER}/{path.name}", path.resolve())
        return version.commit(
            StageRecord(
                stage="mirror",
                config={"model": config.model, "revision": config.revision},
                inputs={},
                code_version=code_version(),
            )
        )


class BaseFiles:
    """The files of one base, fetched and checked once somebody starts to. Use it as a context manager."""

    def __init__(self, store: "Store", student: StudentConfig, *, mirror: Reference | None, digest: str):
        """`digest` is that of the base that the student was trained on.

        Raises:
            InvalidInput: `mirror` is not that base.
        """
        self._store, self._student, self._mirror, self._digest = store, student, mirror, digest
        self._mirrored: dict[str, FileEntry] = {}
        if mirror is not None:
            self._mirrored = list_mirror(store, mirror)
            self._check_digest({name: entry.sha256 for name, entry in self._mirrored.items()}, str(mirror))
        self._scratch = tempfile.TemporaryDirectory(prefix="mint-base-", ignore_cleanup_errors=True)
        self._folder = pathlib.Path(self._scratch.name) / FOLDER
        self._pool: Executor | None = None
        self._fetching: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        self._scratch.cleanup()

    def start(self) -> None:
        """Begin to fetch and check the files, in the background."""
        if self._fetching is not None:
            return
        if self._mirror is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="base-files")
            self._fetching = self._pool.submit(self._link_local)
            return
        # The largest first: it decides when all are there.
        names = sorted(self._mirrored, key=lambda name: -self._mirrored[name].size)
        # A process of its own: in a thread, every piece that the network brings waits for the interpreter's lock, which
        # the imports beside it hold nearly all the time.
        self._pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        self._fetching = self._pool.submit(_download, self._store, self._mirror, names, self._folder.parent)

    def wait(self) -> pathlib.Path:
        """The folder with all files, checked against the digest.

        Raises:
            InvalidInput: these files are another base.
            StoreError: the mirror cannot be read, or is damaged.
        """
        self.start()
        assert self._fetching is not None
        try:
            self._fetching.result()
        except BrokenExecutor:
            raise StoreError(
                f"The process that fetches {self._mirror} was killed, perhaps for want of memory. Give the server more."
            ) from None
        return self._folder

    def _link_local(self) -> None:
        """Links to the digested files of a base that lies on this machine, so that nothing beside them is read."""
        paths = list_student_files(fetch_student_folder(self._student.model, revision=self._student.revision))
        self._check_digest({path.name: hash_file(path) for path in paths}, self._student.model)
        self._folder.mkdir()
        for path in paths:
            (self._folder / path.name).symlink_to(path.resolve())

    def _check_digest(self, sums: dict[str, str], where: str) -> None:
        found = digest_student_files(sums, num_layers=self._student.num_layers, dtype=self._student.dtype)
        if found != self._digest:
            raise InvalidInput(
                f"This adapter belongs to another base: it was trained on {self._student.model} with the digest "
                f"{self._digest}, and {where} has {found}. Give the base that it was trained on; `mint show` of the "
                "student names it."
            )


def _download(store: "Store", mirror: Reference, names: Sequence[str], folder: pathlib.Path) -> None:
    """Copy files of a mirrored base to `folder`. The store checks every byte while it streams."""
    with ThreadPoolExecutor(_NUM_STREAMS) as pool:
        list(pool.map(lambda name: store.download(mirror, folder, f"{FOLDER}/{name}"), names))


def list_mirror(store: "Store", mirror: Reference) -> dict[str, FileEntry]:
    """Name to size and sha256 of a mirrored base's files.

    Raises:
        InvalidInput: `mirror` is of another kind.
    """
    if mirror.kind != "base":
        raise InvalidInput(f"{mirror} is not a base. Write one with `mirror_base`, or leave it out.")
    within = f"{FOLDER}/"
    files = store.files(mirror).items()
    return {path.removeprefix(within): entry for path, entry in files if path.startswith(within)}
