"""Checkpoints on a real S3 server, when processes die, the network misbehaves, or objects are damaged."""

import os
import secrets
import signal
import subprocess
import sys
import threading
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from s3_proxy import ALWAYS, Fault, Proxy, running_proxy

from mint_lib.errors import Conflict, StoreUnreachable
from mint_lib.store import Store
from mint_lib.training.checkpoint_writer import CheckpointWriter
from mint_lib.training.checkpoints import RunCheckpoints

ROOT = Path(__file__).parents[2]
RUN = "run-1"
SAVE = """
import sys
from pathlib import Path
from mint_lib.store import Store
from mint_lib.training.checkpoint_writer import CheckpointWriter

attempt, rank, num_ranks, step, folder = sys.argv[1:]
writer = CheckpointWriter(
    Store.from_environment(), "run-1", attempt=attempt, rank=int(rank), num_ranks=int(num_ranks)
)
writer.save(int(step), Path(folder), wait=True)
"""


@pytest.fixture
def proxy(s3_environment: dict[str, str]) -> Iterator[Proxy]:
    with running_proxy(urllib.parse.urlsplit(s3_environment["MINT_S3_ENDPOINT_URL"]).netloc) as server:
        yield server


@pytest.fixture
def faulty(proxy: Proxy, store: Store) -> Store:
    """The same store, reached through the proxy; it is patient enough for a request that the proxy holds."""
    return Store(store.settings.model_copy(update={"endpoint_url": proxy.endpoint_url, "deadline_seconds": 60}))


def make_folder(root: Path, **files: str | bytes) -> Path:
    folder = root / secrets.token_hex(4)
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def open_writer(
    store: Store, attempt: str = "a", rank: int = 0, num_ranks: int = 1, **options: Any
) -> CheckpointWriter:
    return CheckpointWriter(store, RUN, attempt=attempt, rank=rank, num_ranks=num_ranks, **options)


def save_steps(store: Store, root: Path, *steps: int, attempt: str = "a") -> None:
    """Write whole checkpoints of two files, which say where they belong."""
    with open_writer(store, attempt) as writer:
        for step in steps:
            content = f"{attempt}-{step}"
            writer.save(step, make_folder(root, **{"optimizer.bin": content, "weights.bin": content}), wait=True)


def restore(store: Store, root: Path) -> tuple[int, dict[str, str]] | None:
    """Step and contents of what is restored; None if there is nothing."""
    folder = root / secrets.token_hex(4)
    found = RunCheckpoints(store, RUN).restore(folder)
    return (found.step, {path.name: path.read_text() for path in folder.iterdir()}) if found else None


def whole(attempt: str, step: int) -> tuple[int, dict[str, str]]:
    """What `restore` gives for a checkpoint of `save_steps`."""
    return step, dict.fromkeys(("optimizer.bin", "weights.bin"), f"{attempt}-{step}")


def list_paths(store: Store, run_id: str = RUN) -> list[str]:
    return [item.key for item in store.open_run(run_id).list_objects("")]


def count_unfinished_uploads(store: Store) -> int:
    found = store._s3.client.list_multipart_uploads(Bucket=store.settings.bucket, Prefix=store.settings.prefix)
    return len(found.get("Uploads", ()))


def start_saving(store: Store, folder: Path, *, attempt: str, rank: int, num_ranks: int, step: int) -> subprocess.Popen:
    command = [sys.executable, "-c", SAVE, attempt, str(rank), str(num_ranks), str(step), str(folder)]
    environment = os.environ | {
        "MINT_S3_ENDPOINT_URL": store.settings.endpoint_url,
        "MINT_S3_PREFIX": store.settings.prefix,
    }
    return subprocess.Popen(command, cwd=ROOT, env=environment)


def kill_while_held(proxy: Proxy, process: subprocess.Popen) -> None:
    """Kill the process while the proxy holds one of its requests, which then reaches the server after its death."""
    assert proxy.held.wait(60)
    process.send_signal(signal.SIGKILL)
    process.wait()
    proxy.released.set()


@pytest.mark.parametrize("part", ["weights.bin", "partNumber=2"])
def test_process_killed_in_mid_upload_leaves_the_checkpoint_before(
    proxy: Proxy, faulty: Store, store: Store, tmp_path: Path, part: str
):
    save_steps(store, tmp_path, 100)
    weights = os.urandom(17 * 2**20) if part == "partNumber=2" else b"new"
    folder = make_folder(tmp_path, **{"optimizer.bin": b"new", "weights.bin": weights})
    proxy.faults = [Fault("PUT", part, "hold", ALWAYS)]
    kill_while_held(proxy, start_saving(faulty, folder, attempt="b", rank=0, num_ranks=1, step=200))
    assert restore(store, tmp_path) == whole("a", 100)
    save_steps(store, tmp_path, 150, attempt="c")
    assert restore(store, tmp_path) == whole("c", 150)
    assert [path for path in list_paths(store) if "-b-" in path and not path.endswith("manifest.json")] == []
    assert count_unfinished_uploads(store) == 0


def test_rank_killed_before_its_table_leaves_no_checkpoint_and_mixes_with_none(
    proxy: Proxy, faulty: Store, store: Store, tmp_path: Path
):
    save_steps(store, tmp_path, 100)
    proxy.faults = [Fault("PUT", "tables", "hold")]
    dying = start_saving(faulty, make_folder(tmp_path, shard_1="old"), attempt="b", rank=1, num_ranks=2, step=200)
    assert proxy.held.wait(60)
    with open_writer(store, "b", num_ranks=2, peers_seconds=1) as writer:
        writer.save(200, make_folder(tmp_path, shard_0="old"))
    assert writer.num_failed == 1
    assert restore(store, tmp_path) == whole("a", 100)
    kill_while_held(proxy, dying)
    with open_writer(store, "c", 1, 2) as one, open_writer(store, "c", 0, 2) as zero:
        one.save(200, make_folder(tmp_path, shard_1="new"))
        zero.save(200, make_folder(tmp_path, shard_0="new"), wait=True)
    assert restore(store, tmp_path) == (200, {"shard_0": "new", "shard_1": "new"})


def test_two_attempts_at_one_step_never_mix(proxy: Proxy, faulty: Store, store: Store, tmp_path: Path):
    proxy.faults = [Fault("PUT", "weights.bin", "hold")]
    with open_writer(faulty, "late") as late:
        late.save(100, make_folder(tmp_path, **{"optimizer.bin": "late", "weights.bin": "late"}))
        assert proxy.held.wait(60)
        save_steps(store, tmp_path, 100, attempt="new")
        assert restore(store, tmp_path) == whole("new", 100)
        proxy.released.set()
    assert restore(store, tmp_path) == whole("new", 100)


def test_attempt_that_was_cleared_away_cannot_commit(proxy: Proxy, faulty: Store, store: Store, tmp_path: Path):
    proxy.faults = [Fault("PUT", "manifest.json", "hold")]
    with open_writer(faulty, "late") as late:
        late.save(200, make_folder(tmp_path, **{"weights.bin": "late"}))
        assert proxy.held.wait(60)
        save_steps(store, tmp_path, 100, attempt="new")
        proxy.released.set()
    assert late.num_failed == 1
    assert restore(store, tmp_path) == whole("new", 100)
    with open_writer(faulty, "late") as late, pytest.raises(Conflict):
        late.save(200, make_folder(tmp_path, **{"weights.bin": "late"}), wait=True)


@pytest.mark.parametrize("part", ["rank-00000", "tables/rank-00001", "manifest.json"])
@pytest.mark.parametrize("action", ["lose-reply", "drop", "503 SlowDown"])
def test_save_with_one_fault_is_whole(
    proxy: Proxy, faulty: Store, store: Store, tmp_path: Path, part: str, action: str
):
    proxy.faults = [Fault("PUT", part, action)]
    with open_writer(faulty, rank=1, num_ranks=2) as one, open_writer(faulty, num_ranks=2) as zero:
        one.save(5, make_folder(tmp_path, shard_1="1"))
        zero.save(5, make_folder(tmp_path, shard_0="0"), wait=True)
    assert proxy.faults[0].times == 0
    assert restore(store, tmp_path) == (5, {"shard_0": "0", "shard_1": "1"})


def test_storm_of_503_is_weathered(proxy: Proxy, faulty: Store, tmp_path: Path):
    proxy.faults = [Fault(method, "", "503 SlowDown", 4) for method in ("PUT", "GET", "DELETE")]
    save_steps(faulty, tmp_path, 1, 2, 3)
    assert restore(faulty, tmp_path) == whole("a", 3)
    assert [fault.times for fault in proxy.faults] == [0, 0, 0]


def test_store_that_is_away_is_counted_and_the_training_goes_on(
    proxy: Proxy, faulty: Store, store: Store, tmp_path: Path
):
    hasty = Store(faulty.settings.model_copy(update={"deadline_seconds": 0.3}))
    proxy.faults = [Fault("PUT", "", "drop", ALWAYS)]
    with open_writer(hasty) as writer:
        for step in (1, 2, 3):
            writer.save(step, make_folder(tmp_path, x=str(step)))
        with pytest.raises(StoreUnreachable):
            writer.save(4, make_folder(tmp_path, x="4"), wait=True)
    assert writer.num_failed == 3
    assert list(tmp_path.iterdir()) == []
    assert restore(store, tmp_path) is None


def test_restore_from_a_store_that_is_away_does_not_begin_anew(
    proxy: Proxy, faulty: Store, store: Store, tmp_path: Path
):
    save_steps(store, tmp_path, 1)
    proxy.faults = [Fault("GET", "weights.bin", "507 InsufficientStorage", ALWAYS)]
    with pytest.raises(StoreUnreachable):
        restore(faulty, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["changed", "cut", "missing"])
@pytest.mark.parametrize("name", ["weights.bin", "manifest.json"])
def test_damaged_checkpoint_falls_back_to_the_one_before(store: Store, tmp_path: Path, name: str, damage: str):
    save_steps(store, tmp_path, 100, 200)
    run = store.open_run(RUN)
    path = next(path for path in list_paths(store) if "000000200" in path and path.endswith(name))
    data = run.get(path)
    if damage == "missing":
        run.delete(path)
    else:
        run.put(path, data[:-1] if damage == "cut" else data[:-3] + b"%" + data[-2:])
    assert restore(store, tmp_path) == whole("a", 100)
    save_steps(store, tmp_path, 150, attempt="b")
    save_steps(store, tmp_path, 200, attempt="b")
    assert restore(store, tmp_path) == whole("b", 200)


@pytest.mark.parametrize("action", ["flip-bit", "cut-reply", "503 SlowDown"])
def test_restore_with_one_fault_reads_the_newest(
    proxy: Proxy, faulty: Store, store: Store, tmp_path: Path, action: str
):
    save_steps(store, tmp_path, 100, 200)
    proxy.faults = [Fault("GET", "weights.bin", action)]
    assert restore(faulty, tmp_path) == whole("a", 200)
    assert proxy.faults[0].times == 0


def test_save_returns_while_its_upload_is_held(proxy: Proxy, faulty: Store, store: Store, tmp_path: Path):
    proxy.faults = [Fault("PUT", "x", "hold")]
    with open_writer(faulty) as writer:
        writer.save(1, make_folder(tmp_path, x="1"))
        assert proxy.held.wait(60)
        assert RunCheckpoints(store, RUN).newest() is None
        proxy.released.set()
    assert restore(store, tmp_path) == (1, {"x": "1"})


def test_two_checkpoints_are_kept_and_other_runs_are_left_alone(store: Store, tmp_path: Path):
    with CheckpointWriter(store, "run-10", attempt="a", rank=0, num_ranks=1) as other:
        other.save(1, make_folder(tmp_path, x="other"), wait=True)
    save_steps(store, tmp_path, 1, 2, 3, 4)
    checkpoints = RunCheckpoints(store, RUN)
    assert [found.step for found in checkpoints.list_whole()] == [4, 3]
    assert len(list_paths(store)) == 2 * 3
    save_steps(store, tmp_path, 5, attempt="b")
    assert [found.step for found in checkpoints.list_whole()] == [5, 4]
    key = store.open_run(RUN).locate("checkpoints/unfinished").removeprefix(f"s3://{store.settings.bucket}/")
    store._s3.client.create_multipart_upload(Bucket=store.settings.bucket, Key=key)
    checkpoints.delete_all()
    assert count_unfinished_uploads(store) == 0
    assert list_paths(store) == []
    assert restore(store, tmp_path) is None
    assert len(list_paths(store, "run-10")) == 2


def test_reader_beside_the_writers_never_sees_half_a_checkpoint(store: Store, tmp_path: Path):
    finished = threading.Event()
    seen = []

    def write(rank: int) -> None:
        with open_writer(store, rank=rank, num_ranks=2) as writer:
            for step in range(1, 11):
                files = {f"shard_{rank}_{part}": str(step) for part in range(3)}
                writer.save(step, make_folder(tmp_path, **files))

    def write_all() -> None:
        threads = [threading.Thread(target=write, args=(rank,), daemon=True) for rank in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        finished.set()

    threading.Thread(target=write_all, daemon=True).start()
    while not finished.is_set():
        seen += [found] if (found := restore(store, tmp_path)) else []
    seen += [restore(store, tmp_path)]
    assert all(len(files) == 6 and set(files.values()) == {str(step)} for step, files in seen)
    steps = [step for step, _ in seen]
    assert steps == sorted(steps)
    assert steps[-1] == 10
