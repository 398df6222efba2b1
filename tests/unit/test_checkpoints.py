"""Checkpoints without a server: names, damaged manifests, which ones go, and back pressure on the training."""

import contextlib
import hashlib
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mint_lib.errors import IntegrityError, InvalidInput, NotFound, StoreUnreachable
from mint_lib.storage.client import StoredObject
from mint_lib.storage.manifest import FileEntry
from mint_lib.training.checkpoint_writer import CheckpointWriter, choose_removals
from mint_lib.training.checkpoints import Place, RunCheckpoints

NOW = datetime(2026, 1, 1, tzinfo=UTC)


class MemoryRun:
    """A run folder in memory. `gate` holds the uploads of files until it is set; `errors` fail them in turn."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.gate = threading.Event()
        self.gate.set()
        self.errors: list[Exception] = []

    def open_run(self, run_id: str) -> "MemoryRun":
        return self

    def put_file(self, path: str, local_path: Path) -> FileEntry:
        assert self.gate.wait(20)
        if self.errors:
            raise self.errors.pop(0)
        data = local_path.read_bytes()
        self.put(path, data)
        return FileEntry(size=len(data), sha256=hashlib.sha256(data).hexdigest())

    def put(self, path: str, data: bytes) -> None:
        self.objects[path] = data

    put_once = put

    def get(self, path: str) -> bytes:
        if path not in self.objects:
            raise NotFound(path)
        return self.objects[path]

    def get_file(self, path: str, entry: FileEntry, target: Path) -> None:
        if hashlib.sha256(self.objects[path]).hexdigest() != entry.sha256:
            raise IntegrityError(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(self.objects[path])

    def list_objects(self, prefix: str) -> Iterator[StoredObject]:
        for path in sorted(self.objects):
            if path.startswith(prefix):
                yield StoredObject(path, len(self.objects[path]), NOW)

    def delete(self, path: str) -> None:
        self.objects.pop(path, None)

    def abort_uploads(self, prefix: str) -> None:
        pass

    def locate(self, path: str) -> str:
        return path


def make_folder(root: Path, **files: str) -> Path:
    folder = root / "checkpoint"
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def open_writer(run: Any, attempt: str = "a", rank: int = 0, num_ranks: int = 1, **options: Any) -> CheckpointWriter:
    return CheckpointWriter(run, "r", attempt=attempt, rank=rank, num_ranks=num_ranks, **options)


def steps_of(run: Any) -> list[int]:
    return [checkpoint.step for checkpoint in RunCheckpoints(run, "r").list_whole()]


@given(st.integers(0, 10**12), st.integers(1, 10**8), st.from_regex("[a-z0-9]{1,64}", fullmatch=True))
def test_place_written_and_parsed_is_the_same(step: int, number: int, attempt: str):
    place = Place(step, number, attempt)
    assert Place.parse(place.path + "rank-00000/model.safetensors") == place


@pytest.mark.parametrize("path", ["checkpoints/", "checkpoints/100-a-1/x", "checkpoints/000000100-A-000001/x", "x/y"])
def test_path_of_no_checkpoint_has_no_place(path: str):
    assert Place.parse(path) is None


@pytest.mark.parametrize(
    ("whole", "begun", "gone"),
    [
        ([(1, 1, "b"), (2, 2, "b"), (3, 3, "b")], [], [(1, 1, "b")]),
        ([(3, 3, "b"), (1, 1, "a"), (2, 2, "a")], [], [(1, 1, "a")]),
        ([(2, 2, "b"), (3, 3, "b"), (9, 9, "a")], [], [(9, 9, "a")]),
        ([(3, 3, "b"), (8, 8, "a"), (9, 9, "a")], [], [(8, 8, "a")]),
        ([(3, 3, "b")], [(2, 2, "b"), (2, 2, "a"), (4, 4, "a")], [(2, 2, "a"), (2, 2, "b"), (4, 4, "a")]),
        ([(3, 3, "b")], [(4, 4, "b"), (5, 5, "b")], []),
    ],
    ids=["own", "others", "damaged and ahead", "one of the others stays", "dead", "being written"],
)
def test_removals_leave_the_newest_two_and_what_is_being_written(whole: Any, begun: Any, gone: Any):
    places = {Place(*item): NOW for item in whole}
    found = choose_removals(Place(3, 3, "b"), whole=places, begun=[*(Place(*item) for item in begun), Place(3, 3, "b")])
    assert found == [Place(*item) for item in gone]


def test_removals_among_attempts_at_one_step_keep_the_later():
    early, late = Place(2, 2, "a"), Place(2, 1, "c")
    whole = {Place(3, 1, "b"): NOW, early: NOW - timedelta(hours=2), late: NOW - timedelta(hours=1)}
    assert choose_removals(Place(3, 1, "b"), whole=whole, begun=[]) == [early]


def test_files_of_one_name_from_two_ranks_are_refused(tmp_path: Path):
    run = MemoryRun()
    with open_writer(run, rank=1, num_ranks=2) as one:
        one.save(7, make_folder(tmp_path / "one", shard_1="1", state="1"))
    with (
        open_writer(run, num_ranks=2) as zero,
        pytest.raises(InvalidInput, match="rank-00000/state and rank-00001/state"),
    ):
        zero.save(7, make_folder(tmp_path / "zero", shard_0="0", state="0"), wait=True)
    assert steps_of(run) == []


@pytest.mark.parametrize(("attempt", "rank"), [("", 0), ("A", 0), ("a-b", 0), ("a" * 65, 0), ("a", 2), ("a", -1)])
def test_writer_of_an_impossible_place_is_refused(attempt: str, rank: int):
    with pytest.raises(InvalidInput):
        open_writer(MemoryRun(), attempt, rank, 2)


def test_folder_saved_is_taken_over_and_gone_after_the_upload(tmp_path: Path):
    run = MemoryRun()
    run.gate.clear()
    with open_writer(run) as writer:
        folder = make_folder(tmp_path, **{"model.safetensors": "1", "sub/state.json": "2"})
        writer.save(100, folder)
        assert not folder.exists()
        make_folder(tmp_path, **{"model.safetensors": "later"})
        run.gate.set()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
    RunCheckpoints(run, "r").restore(tmp_path / "restored")
    assert (tmp_path / "restored" / "model.safetensors").read_text() == "1"
    assert (tmp_path / "restored" / "sub" / "state.json").read_text() == "2"


def test_third_save_waits_for_the_first_upload(tmp_path: Path):
    run = MemoryRun()
    run.gate.clear()
    with open_writer(run) as writer:
        for step in (1, 2):
            writer.save(step, make_folder(tmp_path, x=str(step)))
        third = threading.Thread(target=lambda: writer.save(3, make_folder(tmp_path, x="3")), daemon=True)
        third.start()
        third.join(0.3)
        assert third.is_alive()
        run.gate.set()
        third.join(20)
        assert not third.is_alive()
    assert steps_of(run) == [3, 2]


@pytest.mark.parametrize("error", [StoreUnreachable("gone"), OSError("disk"), RuntimeError("a mistake of ours")])
def test_failed_upload_is_counted_and_the_next_is_tried(tmp_path: Path, error: Exception):
    run = MemoryRun()
    run.errors = [error]
    with open_writer(run) as writer:
        for step in (1, 2):
            writer.save(step, make_folder(tmp_path, x=str(step)))
    assert (writer.num_failed, steps_of(run)) == (1, [2])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [StoreUnreachable("gone"), RuntimeError("a mistake of ours")])
def test_failed_upload_that_is_waited_for_raises(tmp_path: Path, error: Exception):
    run = MemoryRun()
    run.errors = [error]
    with open_writer(run) as writer, pytest.raises(type(error)):
        writer.save(1, make_folder(tmp_path, x="1"), wait=True)
    assert list(tmp_path.iterdir()) == []


def test_step_saved_twice_by_one_attempt_is_the_later_one(tmp_path: Path):
    run = MemoryRun()
    with open_writer(run) as writer:
        for content in ("first", "second"):
            writer.save(5, make_folder(tmp_path, x=content))
    RunCheckpoints(run, "r").restore(tmp_path / "restored")
    assert (tmp_path / "restored" / "x").read_text() == "second"


def test_files_of_all_ranks_are_restored_together(tmp_path: Path):
    run = MemoryRun()
    with open_writer(run, rank=1, num_ranks=3) as one, open_writer(run, rank=2, num_ranks=3) as two:
        one.save(7, make_folder(tmp_path / "one", shard_1="1"))
        two.save(7, make_folder(tmp_path / "two"))
        with open_writer(run, num_ranks=3) as zero:
            zero.save(7, make_folder(tmp_path / "zero", shard_0="0"), wait=True)
    restored = RunCheckpoints(run, "r").restore(tmp_path / "restored")
    assert restored
    assert restored.num_ranks == 3
    assert {path.name for path in (tmp_path / "restored").iterdir()} == {"shard_0", "shard_1"}


def test_rank_that_brings_nothing_in_time_leaves_no_checkpoint(tmp_path: Path):
    run = MemoryRun()
    with open_writer(run, num_ranks=2, peers_seconds=0.2) as writer, pytest.raises(StoreUnreachable, match="rank 1"):
        writer.save(7, make_folder(tmp_path, x="0"), wait=True)
    assert steps_of(run) == []


def test_writer_left_with_an_error_does_not_wait_for_other_ranks(tmp_path: Path):
    run = MemoryRun()

    def train() -> None:
        with contextlib.suppress(ConnectionError), open_writer(run, num_ranks=2, peers_seconds=30) as writer:
            writer.save(7, make_folder(tmp_path, x="0"))
            raise ConnectionError("another rank is gone")

    thread = threading.Thread(target=train, daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()
    assert steps_of(run) == []


def test_link_in_a_checkpoint_is_refused(tmp_path: Path):
    folder = make_folder(tmp_path)
    (folder / "link").symlink_to("/etc/hostname")
    with open_writer(MemoryRun()) as writer, pytest.raises(InvalidInput, match="link"):
        writer.save(1, folder, wait=True)


@pytest.mark.parametrize(
    "change", [lambda data: data[:-1], lambda data: data.replace(b"rank-00000/x", b"rank-00000/y"), lambda data: b"{}"]
)
def test_damaged_manifest_is_passed_over(tmp_path: Path, change: Any):
    run = MemoryRun()
    with open_writer(run) as writer:
        for step in (1, 2):
            writer.save(step, make_folder(tmp_path, x=str(step)), wait=True)
    manifest = Place(2, 2, "a").path + "manifest.json"
    run.objects[manifest] = change(run.objects[manifest])
    assert steps_of(run) == [1]


def test_manifest_of_another_place_is_passed_over(tmp_path: Path):
    run = MemoryRun()
    with open_writer(run) as writer:
        for step in (1, 2):
            writer.save(step, make_folder(tmp_path, x=str(step)), wait=True)
    run.put(Place(2, 2, "a").path + "manifest.json", run.get(Place(1, 1, "a").path + "manifest.json"))
    assert steps_of(run) == [1]


def test_restore_to_a_folder_with_files_is_refused(tmp_path: Path):
    run = MemoryRun()
    with open_writer(run) as writer:
        writer.save(1, make_folder(tmp_path, x="1"), wait=True)
    with pytest.raises(InvalidInput, match="not empty"):
        RunCheckpoints(run, "r").restore(make_folder(tmp_path, old="old"))


def test_attempt_that_wrote_before_a_damaged_one_survives_its_pruning(tmp_path: Path):
    run = MemoryRun()
    with open_writer(run, "a") as writer:
        for step in (100, 200):
            writer.save(step, make_folder(tmp_path, x="a"), wait=True)
    for number, step in ((1, 100), (2, 200)):
        run.objects[Place(step, number, "a").path + "rank-00000/x"] = b"damaged"
    with open_writer(run, "b") as writer:
        for step in (10, 20):
            writer.save(step, make_folder(tmp_path, x=f"b{step}"), wait=True)
            RunCheckpoints(run, "r").restore(tmp_path / f"restored{step}")
            assert (tmp_path / f"restored{step}" / "x").read_text() == f"b{step}"
    assert steps_of(run) == [20, 10]
