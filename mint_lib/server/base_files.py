"""The files of a base model on this machine: from where its name says, from a mirror in the store, or a student's own.

Goes in: a `StudentConfig`, and the version that holds the files if one does: a mirror, of kind `base`, or the student
itself if all of its weights were trained. Comes out: a private folder with the files that the digest covers and no
others, once the digest was found to be the expected one. A mirror makes a server independent of package indexes and
hubs, and lets the download run beside the imports.
"""

import fnmatch
import multiprocessing
import pathlib
import tempfile
from collections.abc import Sequence
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from types import TracebackType
from typing import TYPE_CHECKING, Self

from mint_lib.code_version import code_version
from mint_lib.errors import InvalidInput, StoreError
from mint_lib.records import Name, Reference, StageRecord
from mint_lib.storage.manifest import FileEntry
from mint_lib.student import StudentConfig
from mint_lib.student_weights import (
    TOKENIZER_PATTERNS,
    TUNED_FOLDERS,
    WEIGHT_PATTERNS,
    digest_student_files,
    fetch_student_folder,
    hash_file,
    list_student_files,
)

if TYPE_CHECKING:
    from mint_lib.store import Store

FOLDER = "files"
"""Where a mirrored base's files lie in its version."""
_WEIGHTS = TUNED_FOLDERS["full"]
"""Where a student's own weights, config and tokenizer lie in its version, if all of its weights were trained."""
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

    def __init__(self, store: "Store", student: StudentConfig, *, stored: Reference | None, digest: str):
        """`digest` is that of the base that the student was trained on, or of the student's own weights.

        Raises:
            InvalidInput: the files that `stored` holds are not those.
        """
        self._store, self._student, self._stored, self._digest = store, student, stored, digest
        self._prefix = FOLDER if stored is None or stored.kind == "base" else _WEIGHTS
        self._entries: dict[str, FileEntry] = {}
        if stored is not None:
            self._entries = list_mirror(store, stored) if self._prefix == FOLDER else list_weights(store, stored)
            self._check_digest({name: entry.sha256 for name, entry in self._entries.items()}, str(stored))
        self._scratch = tempfile.TemporaryDirectory(prefix="mint-base-", ignore_cleanup_errors=True)
        self._folder = pathlib.Path(self._scratch.name) / self._prefix
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
        if self._stored is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="base-files")
            self._fetching = self._pool.submit(self._link_local)
            return
        # The largest first: it decides when all are there.
        names = sorted(self._entries, key=lambda name: -self._entries[name].size)
        paths = [f"{self._prefix}/{name}" for name in names]
        # A process of its own: in a thread, every piece that the network brings waits for the interpreter's lock, which
        # the imports beside it hold nearly all the time.
        self._pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        self._fetching = self._pool.submit(_download, self._store, self._stored, paths, self._folder.parent)

    def wait(self) -> pathlib.Path:
        """The folder with all files, checked against the digest.

        Raises:
            InvalidInput: these files are another base.
            StoreError: the stored files cannot be read, or are damaged.
        """
        self.start()
        assert self._fetching is not None
        try:
            self._fetching.result()
        except BrokenExecutor:
            raise StoreError(
                f"The process that fetches {self._stored} was killed, perhaps for want of memory. Give the server more."
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


def _download(store: "Store", stored: Reference, paths: Sequence[str], folder: pathlib.Path) -> None:
    """Copy files of a version to `folder`. The store checks every byte while it streams."""
    with ThreadPoolExecutor(_NUM_STREAMS) as pool:
        list(pool.map(lambda path: store.download(stored, folder, path), paths))


def list_mirror(store: "Store", mirror: Reference) -> dict[str, FileEntry]:
    """Name to size and sha256 of a mirrored base's files.

    Raises:
        InvalidInput: `mirror` is of another kind.
    """
    if mirror.kind != "base":
        raise InvalidInput(f"{mirror} is not a base. Write one with `mirror_base`, or leave it out.")
    return _list_files(store, mirror, FOLDER)


def list_weights(store: "Store", student: Reference) -> dict[str, FileEntry]:
    """Name to size and sha256 of the files of a student, or model, of which all weights were trained.

    Raises:
        InvalidInput: it holds no weights of its own, or files beside weights, config and tokenizer.
    """
    files = _list_files(store, student, _WEIGHTS)
    patterns = (*WEIGHT_PATTERNS, *TOKENIZER_PATTERNS)
    foreign = [name for name in files if "/" in name or not any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]
    if "config.json" not in files or foreign:
        raise InvalidInput(
            f"{student} says that all of its weights were trained, and {_WEIGHTS}/ in it holds "
            f"{len(foreign)} files that are neither weights, config nor tokenizer, of {len(files)}. Align it again."
        )
    return files


def digest_weights(store: "Store", reference: Reference, student: StudentConfig) -> str:
    """`sha256:...` of a version's own weights, as the digest of a base is made. Raises as `list_weights` does."""
    sums = {name: entry.sha256 for name, entry in list_weights(store, reference).items()}
    return digest_student_files(sums, num_layers=student.num_layers, dtype=student.dtype)


def _list_files(store: "Store", reference: Reference, folder: str) -> dict[str, FileEntry]:
    within = f"{folder}/"
    files = store.files(reference).items()
    return {path.removeprefix(within): entry for path, entry in files if path.startswith(within)}
