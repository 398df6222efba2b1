"""Trainings that are interrupted at the worst moment, on real Ray and a real S3 server, end as if nothing had happened.

Every interrupted run must leave the very files of a run that nothing disturbed, its history and losses among them.
"""

import contextlib
import os
import pathlib
import re
import secrets
import signal
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest
import ray
from faulty_alignment import (
    NUM_STEPS,
    NUM_TRAIN_CASES,
    break_training,
    find_ray_workers,
    hash_files,
    list_run_files,
    make_config,
    open_checkpoints,
    read_history,
    run_alignment,
    write_preferences,
)
from s3_proxy import Fault, Proxy, running_proxy
from tiny_alignment import SIGNS

from mint_lib.errors import OutOfMemory, RefusedData
from mint_lib.records import Reference
from mint_lib.store import Store
from mint_lib.training import on_ray

ROOT = pathlib.Path(__file__).parents[2]
PATIENCE_SECONDS = 240
"""How long a machine that does much else may take for what a test waits for."""


@pytest.fixture(scope="module", autouse=True)
def one_ray_session() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_metrics_report_interval_ms", "1000")  # every 10 s else, and these runs are shorter
        with on_ray.ray_session(2):
            yield


@pytest.fixture(scope="module")
def unbroken(s3_store: Callable[[], Store]) -> tuple[Store, Reference]:
    """A run of one worker that nothing disturbed."""
    store = s3_store()
    return store, run_alignment(store)


@pytest.fixture(scope="module")
def unbroken_pair(s3_store: Callable[[], Store]) -> tuple[Store, Reference]:
    """A run of two workers that nothing disturbed."""
    store = s3_store()
    return store, run_alignment(store, num_workers=2)


@pytest.fixture
def proxy(s3_environment: dict[str, str]) -> Iterator[Proxy]:
    with running_proxy(urllib.parse.urlsplit(s3_environment["MINT_S3_ENDPOINT_URL"]).netloc) as server:
        yield server


@pytest.fixture
def proxied(proxy: Proxy, store: Store, monkeypatch: pytest.MonkeyPatch) -> Store:
    """The same store, reached through the proxy, for processes that the test starts too."""
    monkeypatch.setenv("MINT_S3_ENDPOINT_URL", proxy.endpoint_url)
    return Store(store.settings.model_copy(update={"endpoint_url": proxy.endpoint_url}))


def wait_until(condition: Callable[[], Any], command: "Command | None" = None) -> None:
    give_up = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < give_up, "what the test waits for did not come"
        assert command is None or command.process.poll() is None, command.read_errors()
        time.sleep(0.05)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_training_killed_in_mid_step_ends_as_the_unbroken_one(
    num_workers: int,
    store: Store,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
):
    whole = request.getfixturevalue("unbroken" if num_workers == 1 else "unbroken_pair")
    break_training(monkeypatch, "kill", tmp_path / "broken", rank=num_workers - 1)
    broken = run_alignment(store, num_workers=num_workers)
    assert (tmp_path / "broken").exists()
    assert hash_files(store, broken) == hash_files(*whole)
    assert store.record(broken).counts == whole[0].record(whole[1]).counts
    assert list_run_files(store) == []


@pytest.mark.parametrize("part", ["rank-00000/optimizer.pt", "manifest.json"])
def test_training_killed_while_it_uploads_goes_on_from_the_checkpoint_before(
    unbroken: tuple[Store, Reference], proxy: Proxy, proxied: Store, store: Store, tmp_path: pathlib.Path, part: str
):
    proxy.faults = [Fault("PUT", f"-000002/{part}", "hold")]  # of the second checkpoint, step 8
    seen: list[int] = []

    def kill_while_held() -> None:
        if proxy.held.wait(PATIENCE_SECONDS):
            for worker in find_ray_workers(os.getpid()):
                worker.kill()
            checkpoints = open_checkpoints(store)
            seen.extend(checkpoint.step for checkpoint in checkpoints.list_whole())
            restored = checkpoints.restore(tmp_path / "restored")  # checks every file's sha256
            seen.append(restored.step if restored else -1)
        proxy.released.set()  # what was held reaches the server late, beside the next attempt's files

    killer = threading.Thread(target=kill_while_held, daemon=True)
    killer.start()
    broken = run_alignment(proxied)
    killer.join()
    assert seen == [4, 4]
    assert hash_files(store, broken) == hash_files(*unbroken)


def test_training_killed_after_its_early_stop_stops_there_again(
    proxy: Proxy, proxied: Store, store: Store, s3_store: Callable[[], Store]
):
    values = {"early_stop_patience": 1, "keep_best": "reward_accuracy", "validate_every_steps": 4}
    whole = s3_store()
    expected = run_alignment(whole, **values)
    assert whole.record(expected).counts["num_steps"] < NUM_STEPS
    proxy.faults = [Fault("PUT", "outcome.json", "hold")]

    def kill_while_held() -> None:
        if proxy.held.wait(PATIENCE_SECONDS):
            for worker in find_ray_workers(os.getpid()):
                worker.kill()
        proxy.released.set()

    killer = threading.Thread(target=kill_while_held, daemon=True)
    killer.start()
    broken = run_alignment(proxied, **values)
    killer.join()
    assert proxy.faults[0].times == 0
    assert hash_files(store, broken) == hash_files(whole, expected)


def test_two_workers_train_the_student_of_one(
    unbroken: tuple[Store, Reference], unbroken_pair: tuple[Store, Reference]
):
    one, two = unbroken[0].record(unbroken[1]), unbroken_pair[0].record(unbroken_pair[1])
    assert two.counts == one.counts
    assert one.counts["num_steps"] == NUM_STEPS
    assert_same_history(unbroken, unbroken_pair)


def assert_same_history(one: tuple[Store, Reference], other: tuple[Store, Reference]) -> None:
    """Compare all logged figures: a step's gradient is one sum, whose parts float32 adds in another order."""
    for kind in ("train", "validation"):
        rows, others = read_history(*one, kind), read_history(*other, kind)
        assert [row["step"] for row in rows] == [row["step"] for row in others]
        for row, other_row in zip(rows, others, strict=True):
            compared = {name: value for name, value in row.items() if name != "kind" and name != "padding_share"}
            assert {name: other_row[name] for name in compared} == pytest.approx(compared, rel=1e-4, abs=1e-5)


def test_training_whose_loss_is_no_number_ends_at_once_with_its_cases(store: Store):
    with pytest.raises(RefusedData, match="not finite") as caught:
        run_alignment(store, learning_rate=1e30)
    assert len(caught.value.case_ids["not_finite"]) == 5
    assert set(caught.value.case_ids["not_finite"]) <= {f"case-{case}" for case in range(NUM_TRAIN_CASES)}
    assert store.list_versions("student", "test") == []


def test_training_out_of_memory_on_one_worker_ends_for_all_and_is_not_tried_again(
    store: Store, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    break_training(monkeypatch, "out_of_memory", tmp_path / "broken", rank=1)
    with pytest.raises(OutOfMemory, match="too much"):
        run_alignment(store, num_workers=2)
    assert store.list_versions("student", "test") == []


def test_training_metrics_are_exported_without_cases(
    store: Store, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    (node,) = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    marker = tmp_path / "waits"
    break_training(monkeypatch, "wait", marker)
    lines: list[str] = []

    def read_lines() -> list[str]:
        text = urllib.request.urlopen(url, timeout=30).read().decode()
        return [line for line in text.splitlines() if "mint_alignment" in line]

    def is_exported(found: list[str]) -> bool:
        return any(line.startswith("ray_mint_alignment_loss_nats{") for line in found)

    def read_during_the_run() -> None:
        try:
            wait_until(marker.exists)
            # Ray forgets the metrics of a process that has ended.
            wait_until(lambda: is_exported(read_lines()))
            lines.extend(read_lines())
        finally:
            marker.write_text("go on")

    reader = threading.Thread(target=read_during_the_run, daemon=True)
    reader.start()
    run_alignment(store)
    reader.join()
    assert is_exported(lines)
    assert all('student="test"' in line for line in lines if not line.startswith("#"))
    assert not any(word in line for line in lines for word in ("case-", "OMIM", *SIGNS))


class Command:
    """The stage as a process of its own, with a Ray session of its own."""

    def __init__(self, store: Store, preferences: Reference, folder: pathlib.Path):
        self.errors_path = folder / f"{secrets.token_hex(4)}.log"
        command = [sys.executable, "-m", "mint_lib", "alignment", "--config", make_config().model_dump_json()]
        with self.errors_path.open("wb") as errors:
            self.process = subprocess.Popen(
                [*command, "--input", f"preferences={preferences}"],
                cwd=ROOT,
                env=os.environ | {"MINT_S3_ENDPOINT_URL": store.settings.endpoint_url},
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )

    def read_errors(self) -> str:
        return self.errors_path.read_text()

    def wait_for_step(self, store: Store, step: int) -> None:
        """Wait until the checkpoint of `step` is whole."""
        wait_until(lambda: any(f"/{step:09d}-" in path and "manifest" in path for path in list_run_files(store)), self)

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def kill_with_ray(self) -> None:
        """End it and all that it started, as the end of a machine does."""
        tree = [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]
        for process in tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()

    def read_reference(self) -> Reference:
        """What it printed after success."""
        printed, _ = self.process.communicate(timeout=PATIENCE_SECONDS)
        assert self.process.returncode == 0, self.read_errors()
        return Reference.parse(printed.split()[-1])


@pytest.fixture
def start(store: Store, tmp_path: pathlib.Path) -> Iterator[Callable[[Store], Command]]:
    """A function that starts the command on a store; what still runs after the test is killed."""
    preferences = write_preferences(store)
    commands: list[Command] = []

    def start_command(seen: Store) -> Command:
        commands.append(Command(seen, preferences, tmp_path))
        return commands[-1]

    yield start_command
    for command in commands:
        if command.process.poll() is None:
            command.kill_with_ray()


def slow_down(proxy: Proxy) -> None:
    """Let every checkpoint take seconds, so that a run with several is not over before a test can disturb it."""
    take_fault = proxy.take_fault

    def wait_and_take(method: str, path: str, host: str) -> str:
        time.sleep(0.2 if method == "PUT" and "/checkpoints/" in path else 0)
        return take_fault(method, path, host)

    proxy.take_fault = wait_and_take  # type: ignore[method-assign]


def test_command_killed_with_all_its_processes_goes_on_when_started_again(
    unbroken: tuple[Store, Reference], start: Callable[[Store], Command], proxy: Proxy, proxied: Store, store: Store
):
    proxy.faults = [Fault("PUT", "-000003/", "hold")]  # two more may wait, so the run stands at step 20
    killed = start(proxied)
    killed.wait_for_step(store, 8)
    killed.kill_with_ray()
    assert [checkpoint.step for checkpoint in open_checkpoints(store).list_whole()] == [8, 4]
    proxy.released.set()
    again = start(store)
    reference = again.read_reference()
    assert "goes on from step 8" in again.read_errors()
    assert hash_files(store, reference) == hash_files(*unbroken)
    assert store.record(reference).counts == unbroken[0].record(unbroken[1]).counts


def test_command_told_to_stop_writes_a_checkpoint_and_goes_on_when_started_again(
    unbroken: tuple[Store, Reference], start: Callable[[Store], Command], proxy: Proxy, proxied: Store, store: Store
):
    slow_down(proxy)
    stopped = start(proxied)
    stopped.wait_for_step(store, 4)
    stopped.terminate()
    # A checkpoint that took longer than on_ray.STOP_GRACE_SECONDS would end it with 143.
    assert stopped.process.wait(PATIENCE_SECONDS) == 75, stopped.read_errors()
    found = re.search(rf"Interrupted: .* after step (\d+) of {NUM_STEPS}", stopped.read_errors())
    assert found, stopped.read_errors()
    assert "Traceback" not in stopped.read_errors()
    assert open_checkpoints(store).list_whole()[0].step == int(found[1])
    assert store.list_versions("student", "test") == []

    hasty = start(proxied)
    wait_until(lambda: "goes on from" in hasty.read_errors(), hasty)
    hasty.terminate()
    wait_until(lambda: "told to stop" in hasty.read_errors(), hasty)
    hasty.terminate()
    assert hasty.process.wait(PATIENCE_SECONDS) == 143, hasty.read_errors()

    reference = start(store).read_reference()
    assert hash_files(store, reference) == hash_files(*unbroken)
