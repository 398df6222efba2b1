"""The entry point of a Ray job for real: a Ray head with token authentication on, and `ray job submit` to it."""

import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest

from mint_lib.cluster import ClusterConfig, Images
from mint_lib.placement import RayWorkers, StepOnCluster
from mint_lib.ray_job import render_ray_job
from mint_lib.recipe import load_recipe
from mint_lib.records import Reference
from mint_lib.stages import output_key, run_stage
from mint_lib.storage.settings import S3Settings
from mint_lib.store import Store
from mint_lib.training.settings import AlignmentConfig

PROJECT = Path(__file__).parents[2]
RECIPE = load_recipe(Path(__file__).parent / "recipes" / "tiny.yaml")
TOKEN = secrets.token_hex(32)
NUM_WORKERS = 2

pytestmark = pytest.mark.timeout(400)


class Head(NamedTuple):
    """A Ray head of this machine alone."""

    url: str
    environment: dict[str, str]
    folder: Path

    def run(self, *words: str, token: str | None = TOKEN) -> subprocess.CompletedProcess[str]:
        """Run `ray job ...` against the head, with `token` in its environment."""
        environment = {key: value for key, value in self.environment.items() if key != "RAY_AUTH_TOKEN"}
        environment |= {"HOME": str(self.folder), **({"RAY_AUTH_TOKEN": token} if token else {})}
        return subprocess.run(
            [sys.executable, "-m", "ray.scripts.scripts", "job", words[0], "--address", self.url, *words[1:]],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    def ask(self, method: str, path: str, token: str | None) -> int:
        """HTTP status of a request to the dashboard."""
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {token}"} if token else {})}
        request = urllib.request.Request(f"{self.url}{path}", method=method, headers=headers, data=None)
        if method in ("POST", "PUT"):
            request.data = b'{"entrypoint": "true"}'
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code

    def read_log(self, job: str) -> str:
        """What a job has said so far."""
        headers = {"Authorization": f"Bearer {TOKEN}"}
        request = urllib.request.Request(f"{self.url}/api/jobs/{job}/logs", headers=headers)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return str(json.load(answer)["logs"])


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for item in sockets:
            item.bind(("127.0.0.1", 0))
        return [item.getsockname()[1] for item in sockets]


@contextlib.contextmanager
def start_head(variables: dict[str, str]) -> Iterator[Head]:
    """A head that stays for the block; sockets below its folder have short paths only."""
    folder = Path(tempfile.mkdtemp(prefix="mray-", dir="/tmp"))
    dashboard, client, agent = free_ports(3)
    environment = {
        **os.environ,
        **variables,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(PROJECT),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("RAY_ADDRESS", None)
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"),
        *("--num-cpus", str(NUM_WORKERS + 1), "--object-store-memory", str(128 * 2**20)),
        *("--dashboard-host", "127.0.0.1", "--dashboard-port", str(dashboard)),
        *("--port", "0", "--min-worker-port", "0", "--max-worker-port", "0", "--ray-client-server-port", str(client)),
        *("--dashboard-agent-listen-port", str(agent), "--temp-dir", str(folder / "ray"), "--disable-usage-stats"),
    ]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=subprocess.STDOUT, cwd=folder, start_new_session=True
        )
    head = Head(f"http://127.0.0.1:{dashboard}", environment, folder)
    try:
        wait_until_ready(head, process)
        yield head
    finally:
        started = [process, *psutil.Process(process.pid).children(recursive=True)] if process.poll() is None else []
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        for item in started:
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                item.kill()
        shutil.rmtree(folder, ignore_errors=True)


def wait_until_ready(head: Head, process: "subprocess.Popen[bytes]") -> None:
    give_up = time.monotonic() + 120
    while time.monotonic() < give_up and process.poll() is None:
        with contextlib.suppress(OSError):
            if head.ask("GET", "/api/jobs/", TOKEN) == 200:
                return
        time.sleep(0.5)
    raise RuntimeError((head.folder / "log").read_text()[-3000:])


@pytest.fixture(scope="module")
def store(s3_store: Any) -> Store:
    made: Store = s3_store()
    return made


@pytest.fixture(scope="module")
def head(store: Store) -> Iterator[Head]:
    pytest.importorskip("aiohttp_cors", reason="Ray's job server needs ray[default]")
    with start_head({"MINT_S3_PREFIX": store.settings.prefix}) as head:
        yield head


@pytest.fixture(scope="module")
def preferences(store: Store) -> Reference:
    """Pairs as the first three stages of the tiny recipe make them."""
    cases = run_stage("data", RECIPE.data.model_dump_json(), {}, store=store).reference
    rankings = run_stage("teacher", RECIPE.teacher.model_dump_json(), {"cases": str(cases)}, store=store).reference
    inputs = {"cases": str(cases), "rankings": str(rankings)}
    return run_stage("preferences", RECIPE.preferences.model_dump_json(), inputs, store=store).reference


def align_with(**changes: Any) -> AlignmentConfig:
    return AlignmentConfig.model_validate({**RECIPE.alignment.model_dump(), "num_workers": NUM_WORKERS, **changes})


def entrypoint_of(config: AlignmentConfig, preferences: Reference) -> str:
    """The command of the job that the cluster would get."""
    image = "registry.example.org/mint@sha256:" + "ab" * 32
    cluster = ClusterConfig(
        namespace="mint",
        images=Images(serve=image, train=image),
        s3=S3Settings(endpoint_url="https://s3.example.org"),
    )
    step = StepOnCluster(num_cpus=NUM_WORKERS, ray=RayWorkers(workers_per_pod=1))
    inputs = {"preferences": str(preferences)}
    job = render_ray_job("alignment", config, inputs, cluster=cluster, step=step, name="mint-alignment-test")
    return str(job["spec"]["entrypoint"])


def submit(head: Head, entrypoint: str, **options: Any) -> subprocess.CompletedProcess[str]:
    # As KubeRay's submitter does: the command stands behind `--` in a line that bash reads.
    words = subprocess.run(["bash", "-c", f"printf '%s\\0' {entrypoint}"], capture_output=True, text=True, check=True)
    return head.run("submit", "--submission-id", options.pop("id"), "--", *words.stdout.split("\0")[:-1], **options)


def test_submitted_job_trains_with_workers_and_its_output_is_found(
    head: Head, store: Store, preferences: Reference
) -> None:
    config = align_with(name="submitted")
    done = submit(head, entrypoint_of(config, preferences), id="good")
    assert done.returncode == 0, done.stdout[-3000:]
    assert "succeeded" in head.run("status", "good").stdout.lower()
    found = store.find_output(output_key("alignment", config, {"preferences": preferences}))
    assert found is not None
    assert str(found) in done.stdout
    assert store.record(found).counts["num_train_pairs"] > 0


def test_submitted_job_that_fails_says_the_stage_s_own_error(head: Head, preferences: Reference) -> None:
    student = RECIPE.student.model_copy(update={"window_tokens": 16})
    config = align_with(name="failing", num_workers=1, student=student)
    done = submit(head, entrypoint_of(config, preferences), id="bad")
    assert done.returncode != 0
    assert re.search(r"^PromptTooLong: .+", done.stdout, re.MULTILINE)
    status = head.run("status", "bad").stdout
    assert "failed" in status.lower()
    assert "exit code 1" in status


def test_submitted_job_that_is_stopped_ends_with_its_own_exit_code(
    head: Head, preferences: Reference, store: Store
) -> None:
    config = align_with(name="stopped", num_workers=1, epochs=500, early_stop_patience=10_000)
    code = head.folder / "code"
    # The shell stays, to say how its child ended.
    command = f'trap "" TERM; {entrypoint_of(config, preferences)}; echo $? > {code}.part; mv {code}.part {code}'
    started = head.run("submit", "--submission-id", "stopped", "--no-wait", "--", "bash", "-c", command)
    assert started.returncode == 0, started.stdout[-3000:]
    wait_for(lambda: "alignment: stopped" in head.read_log("stopped"))
    (process,) = (
        process
        for process in psutil.process_iter(["cmdline"])
        if (process.info["cmdline"] or [])[1:4] == ["-m", "mint_lib", "alignment"]
        and process.environ().get("RAY_AUTH_TOKEN") == TOKEN
    )
    process.terminate()
    wait_for(code.is_file)
    assert code.read_text() == "75\n", "it wrote a checkpoint first"
    assert store.find_output(output_key("alignment", config, {"preferences": preferences})) is None


def wait_for(condition: Callable[[], bool]) -> None:
    give_up = time.monotonic() + 180
    while not condition():
        if time.monotonic() > give_up:
            raise TimeoutError
        time.sleep(0.5)


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE"])
@pytest.mark.parametrize("path", ["/api/jobs/", "/api/jobs/good", "/api/jobs/good/stop"])
def test_job_api_without_the_token_refuses_every_method(head: Head, method: str, path: str) -> None:
    assert head.ask(method, path, None) == 401
    assert head.ask(method, path, "0" * 64) in (401, 403)


def test_job_api_with_the_token_answers(head: Head) -> None:
    assert head.ask("GET", "/api/jobs/", TOKEN) == 200


def test_submitting_without_the_token_fails_and_starts_nothing(head: Head) -> None:
    marker = head.folder / "ran"
    done = head.run("submit", "--submission-id", "intruder", "--", "touch", str(marker), token=None)
    assert done.returncode != 0
    assert head.ask("GET", "/api/jobs/intruder", TOKEN) == 404
    assert not marker.exists()


def test_head_s_job_server_listens_on_loopback_only(head: Head) -> None:
    port = int(head.url.rsplit(":", 1)[1])
    listening = {
        item.laddr.ip
        for item in psutil.net_connections(kind="tcp")
        if item.status == psutil.CONN_LISTEN and item.laddr.port == port
    }
    assert listening == {"127.0.0.1"}
