"""Checkpoints of a training run in the store: where they lie, which one is the newest, and how it is read back.

    runs/<run id>/checkpoints/<step>-<attempt>-<number>/rank-00000/<files>       what each rank brought
                                                        tables/rank-00001.json   a rank's files are all there
                                                        manifest.json            last: the checkpoint exists

Goes in: the id of a run. Comes out: the files of its newest whole checkpoint, each checked by size and sha256. An empty
manifest marks a checkpoint that will never exist. `checkpoint_writer` writes them. This module never looks into a file.
"""

import logging
import re
import shutil
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple, Self

from pydantic import Field, StringConstraints, ValidationError, model_validator

from mint_lib.errors import IntegrityError, InvalidInput, NotFound
from mint_lib.records import Record
from mint_lib.storage.manifest import MANIFEST, FileEntry, check_path, digest_files

if TYPE_CHECKING:
    from mint_lib.store import Store

logger = logging.getLogger(__name__)
ROOT = "checkpoints/"
ATTEMPT = "[a-z0-9]{1,64}"
"""How an attempt's random word is spelled."""
_PLACE = re.compile(rf"(?P<step>\d{{9,}})-(?P<attempt>{ATTEMPT})-(?P<number>\d{{6,}})")


class Place(NamedTuple):
    """The folder of one checkpoint, whole or not. Places are ordered by step."""

    step: int
    number: int
    """Counts what one attempt saved, from 1: a step may be saved twice."""
    attempt: str

    @property
    def path(self) -> str:
        """Its path below the run's folder, with a slash at the end."""
        return f"{ROOT}{self.step:09d}-{self.attempt}-{self.number:06d}/"

    @classmethod
    def parse(cls, path: str) -> Self | None:
        """The place below which `path` lies; None if it is none."""
        match = _PLACE.fullmatch(path.removeprefix(ROOT).partition("/")[0])
        return cls(int(match["step"]), int(match["number"]), match["attempt"]) if match else None


class FileTable(Record):
    """Files below one checkpoint's folder, as `rank-00000/<path>`."""

    format: Literal[1] = 1
    files: dict[str, FileEntry]
    digest: str
    """`digest_files(files)`: a table that was damaged is not believed."""

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        for path in self.files:
            check_path(path)
        if self.digest != digest_files(self.files):
            raise ValueError("the digest is not that of the files")
        return self


class Checkpoint(FileTable):
    """A whole checkpoint: its manifest. It pickles, so one rank can choose for all."""

    step: int = Field(ge=0)
    attempt: Annotated[str, StringConstraints(pattern=f"^{ATTEMPT}$")]
    number: int = Field(ge=1)
    num_ranks: int = Field(ge=1)
    created_at: datetime

    @property
    def place(self) -> Place:
        """Where its files lie."""
        return Place(self.step, self.number, self.attempt)


class RunCheckpoints:
    """The whole checkpoints of one run."""

    def __init__(self, store: "Store", run_id: str):
        self._run = store.open_run(run_id)

    def list_whole(self) -> list[Checkpoint]:
        """Newest first: by step, and by time where two attempts reached the same. Damaged manifests are left out."""
        found = []
        for item in self._run.list_objects(ROOT):
            place = Place.parse(item.key)
            if place and item.key == place.path + MANIFEST and item.size:
                checkpoint = self._read(place)
                found += [checkpoint] if checkpoint else []
        return sorted(found, key=lambda checkpoint: (checkpoint.step, checkpoint.created_at), reverse=True)

    def newest(self) -> Checkpoint | None:
        """The whole checkpoint of the highest step; None if there is none."""
        return next(iter(self.list_whole()), None)

    def download(self, checkpoint: Checkpoint, folder: Path) -> None:
        """Copy the files of all ranks to `folder`, which is empty or missing, and is removed again on failure.

        Raises:
            InvalidInput: `folder` holds something already.
            IntegrityError: a file is missing or is not what was saved.
            StoreUnreachable: the store does not answer.
        """
        if folder.exists() and any(folder.iterdir()):
            raise InvalidInput(
                f"{folder} is not empty. A checkpoint is restored to a folder of its own; name a new one."
            )
        folder.mkdir(parents=True, exist_ok=True)
        try:
            for path, entry in sorted(checkpoint.files.items()):
                self._run.get_file(checkpoint.place.path + path, entry, folder / local_path(path))
        except BaseException:
            shutil.rmtree(folder)
            raise

    def restore(self, folder: Path) -> Checkpoint | None:
        """Download the newest checkpoint that is undamaged; None, and no folder, if there is none.

        Several ranks must go on from the same one: one rank restores and tells the others, which `download` it.
        Raises as `download`, other than IntegrityError: a damaged checkpoint is passed over with a warning.
        """
        rejected: set[Place] = set()
        while True:
            # Listed anew each time: a checkpoint that was deleted during the download has a successor.
            checkpoint = next((found for found in self.list_whole() if found.place not in rejected), None)
            if checkpoint is None:
                return None
            try:
                self.download(checkpoint, folder)
            except IntegrityError as error:
                logger.warning("step %d is not restored, the one before it is: %s", checkpoint.step, error)
                rejected.add(checkpoint.place)
            else:
                return checkpoint

    def delete_all(self) -> None:
        """Remove every checkpoint and all that attempts left behind; for a run whose results are stored."""
        self._run.abort_uploads(ROOT)
        paths = [item.key for item in self._run.list_objects(ROOT)]
        # Manifests first, so that no reader meets half a checkpoint.
        for path in sorted(paths, key=lambda path: not path.endswith(MANIFEST)):
            self._run.delete(path)

    def _read(self, place: Place) -> Checkpoint | None:
        path = place.path + MANIFEST
        try:
            checkpoint = Checkpoint.model_validate_json(self._run.get(path))
        except NotFound:
            return None
        except ValidationError as error:
            logger.warning("%s is damaged and passed over (%d errors)", self._run.locate(path), error.error_count())
            return None
        if checkpoint.place != place:
            logger.warning("%s belongs to another checkpoint and is passed over", self._run.locate(path))
            return None
        return checkpoint


def local_path(path: str) -> PurePosixPath:
    """Where a checkpoint's file, given as `rank-00000/<path>`, lies in a local folder."""
    return PurePosixPath(*PurePosixPath(path).parts[1:])
