"""Writes the checkpoints of a training run beside the training, by the protocol that `checkpoints` draws.

Goes in: a local folder per rank and step. Comes out: a checkpoint that exists when every rank's files are in the store,
or not at all. An attempt writes below names of its own, so two attempts never mix; a rank that dies leaves no manifest.
This module knows neither Ray nor collectives: ranks meet in the store alone.
"""

import logging
import re
import secrets
import shutil
import threading
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import TYPE_CHECKING, Self

from pydantic import ValidationError

from mint_lib.errors import InvalidInput, MintError, NotFound, StoreError, StoreUnreachable
from mint_lib.storage.manifest import MANIFEST, FileEntry, canonical_json, check_path, digest_files
from mint_lib.training.checkpoints import ATTEMPT, ROOT, Checkpoint, FileTable, Place, local_path

if TYPE_CHECKING:
    from mint_lib.store import Store

logger = logging.getLogger(__name__)
NUM_KEPT = 2
"""The newest, and the one to fall back to when that is damaged."""
PEERS_SECONDS = 300.0
"""How long the first rank waits for the others' files; Ray's process group gives a late rank up after 1800 s."""
_FIRST_PAUSE_SECONDS = 0.05
_MAX_PAUSE_SECONDS = 2.0


class CheckpointWriter:
    """One rank's end of the checkpoints of one attempt. Use it as a context manager, so that its uploads end with it.

    Every rank makes one with the same `attempt`, a random word, and saves the same steps in the same order.
    """

    def __init__(
        self,
        store: "Store",
        run_id: str,
        *,
        attempt: str,
        rank: int,
        num_ranks: int,
        peers_seconds: float = PEERS_SECONDS,
    ):
        if not re.fullmatch(ATTEMPT, attempt):
            raise InvalidInput(f"{attempt[:200]!r} is not an attempt. Use up to 64 of a-z and 0-9, drawn at random.")
        if not 0 <= rank < num_ranks:
            raise InvalidInput(f"rank {rank} of {num_ranks} is not possible. Ranks count from 0.")
        self._run = store.open_run(run_id)
        self._attempt = attempt
        self._rank = rank
        self._num_ranks = num_ranks
        self._peers_seconds = peers_seconds
        self._number = 0
        # One in flight and one waiting: more would fill the disk when the store is slower than the training.
        self._slots = threading.BoundedSemaphore(2)
        self._uploader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._is_given_up = threading.Event()
        self.num_failed = 0
        """Checkpoints that this rank could not write."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            # What ended this rank has probably ended others: their files may never come.
            self._is_given_up.set()
        self.close()

    def save(self, step: int, folder: Path, *, wait: bool = False) -> None:
        """Take over a local folder, which is gone at the return, and upload its files in the background.

        The files have names that no other rank's have; the folder may be empty. While one upload is in flight and one
        waits, a further call waits for the first. A checkpoint that cannot be written is counted and logged, and the
        training goes on. With `wait`, returns when this rank's part is there, for rank 0 when the checkpoint exists.

        Raises:
            InvalidInput: a file's name is not allowed, or another rank has it too (with `wait`, as all below).
            StoreUnreachable: the store does not answer, or another rank's files did not come in time.
            StoreError: the store refuses.
        """
        taken = folder.rename(folder.with_name(f".{secrets.token_hex(8)}.checkpoint"))
        self._slots.acquire()
        self._number += 1
        upload = self._uploader.submit(self._upload, Place(step, self._number, self._attempt), taken, wait)
        if wait:
            upload.result()

    def close(self) -> None:
        """Wait for the uploads that were begun."""
        self._uploader.shutdown(wait=True)

    def _upload(self, place: Place, folder: Path, is_waited_for: bool) -> None:
        try:
            files = self._put_files(place, folder)
            if self._rank:
                self._run.put(place.path + _table_path(self._rank), _spell_table(files))
            else:
                self._commit(place, files)
        except Exception as error:
            if is_waited_for:
                raise
            self.num_failed += 1
            is_expected = isinstance(error, (MintError, OSError))
            logger.warning(
                "the checkpoint of step %d was not written and training goes on: %s",
                place.step,
                error,
                exc_info=None if is_expected else error,
            )
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            self._slots.release()

    def _put_files(self, place: Place, folder: Path) -> dict[str, FileEntry]:
        files = {}
        for local in sorted(folder.rglob("*")):
            if local.is_symlink() or not (local.is_file() or local.is_dir()):
                raise InvalidInput(
                    f"{local.name} is not a plain file. Copy what it refers to; links and devices are not stored."
                )
            if local.is_file():
                path = check_path(f"{_rank_folder(self._rank)}{local.relative_to(folder).as_posix()}")
                files[path] = self._run.put_file(place.path + path, local)
        return files

    def _commit(self, place: Place, files: dict[str, FileEntry]) -> None:
        give_up = time.monotonic() + self._peers_seconds
        for rank in range(1, self._num_ranks):
            files = files | self._wait_for_table(place, rank, give_up)
        _check_distinct(files)
        manifest = Checkpoint(
            files=files,
            digest=digest_files(files),
            step=place.step,
            attempt=place.attempt,
            number=place.number,
            num_ranks=self._num_ranks,
            created_at=datetime.now(UTC),
        )
        self._run.put_once(place.path + MANIFEST, canonical_json(manifest.model_dump(mode="json")))
        logger.info("the checkpoint of step %d is written: %d files", place.step, len(files))
        try:
            self._prune(place)
        except StoreError as error:
            logger.warning("old checkpoints stay until the next one is written: %s", error)

    def _wait_for_table(self, place: Place, rank: int, give_up: float) -> dict[str, FileEntry]:
        path = place.path + _table_path(rank)
        pause = _FIRST_PAUSE_SECONDS
        while True:
            try:
                files = FileTable.model_validate_json(self._run.get(path)).files
                if all(name.startswith(_rank_folder(rank)) for name in files):
                    return files
            except (NotFound, ValidationError):
                logger.debug("%s is not there", path)
            if self._is_given_up.is_set() or time.monotonic() > give_up:
                raise StoreUnreachable(
                    f"{self._run.locate(path)} did not come: rank {rank} did not upload its files in "
                    f"{self._peers_seconds:.0f} s, or the training ended before. Look at that rank's log."
                )
            self._is_given_up.wait(pause)
            pause = min(2 * pause, _MAX_PAUSE_SECONDS)

    def _prune(self, newest: Place) -> None:
        objects: dict[Place, list[str]] = {}
        whole = {}
        for item in self._run.list_objects(ROOT):
            place = Place.parse(item.key)
            if place is None:
                continue
            if item.key != place.path + MANIFEST:
                objects.setdefault(place, []).append(item.key)
            elif item.size:
                whole[place] = item.modified
        for place in choose_removals(newest, whole=whole, begun=objects):
            self._remove(place, objects.get(place, []))

    def _remove(self, place: Place, paths: list[str]) -> None:
        manifest = place.path + MANIFEST
        if place.attempt == self._attempt:
            self._run.delete(manifest)
        else:
            # Its writer may live on, unheard: with a manifest in its way it cannot commit files that are deleted here.
            self._run.put(manifest, b"")
        self._run.abort_uploads(place.path)
        for path in paths:
            self._run.delete(path)


def choose_removals(newest: Place, *, whole: Mapping[Place, datetime], begun: Iterable[Place]) -> list[Place]:
    """Which places go once `newest` is written: all but the newest `NUM_KEPT` whole ones and what is being written.

    `whole` maps places to the time of their manifest; `begun` are those that hold files. Checkpoints of `newest`'s own
    attempt count as newer than any other: one of another attempt and a higher step is damaged, or that attempt would
    have been taken up there.
    """
    own = sorted((place for place in whole if place.attempt == newest.attempt), key=lambda place: -place.number)
    others = [place for place in whole if place.attempt != newest.attempt]
    others.sort(key=lambda place: (place.step, whole[place]), reverse=True)
    # Other ranks may be ahead of what exists, but never behind: each of them is done with `newest`.
    ahead = {place for place in begun if place.attempt == newest.attempt and place.number > newest.number}
    return sorted({*whole, *begun} - {*(own + others)[:NUM_KEPT]} - ahead)


def _check_distinct(files: Iterable[str]) -> None:
    """Raise InvalidInput if two ranks brought a file of the same name: only one of them could be restored."""
    owners: dict[PurePosixPath, str] = {}
    for path in files:
        other = owners.setdefault(local_path(path), path)
        if other != path:
            raise InvalidInput(f"{other} and {path} would be one file. Give every rank file names of its own.")


def _rank_folder(rank: int) -> str:
    return f"rank-{rank:05d}/"


def _table_path(rank: int) -> str:
    return f"tables/rank-{rank:05d}.json"


def _spell_table(files: dict[str, FileEntry]) -> bytes:
    return canonical_json(FileTable(files=files, digest=digest_files(files)).model_dump(mode="json"))
