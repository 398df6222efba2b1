"""The follower of Ray jobs against an API server of this process, over real HTTP."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("kmock", reason="the double of the API server is kmock's")

from fake_cluster import FakeCluster, Fault, Moment, serve

from components.api_server import ApiServer, connect
from components.cluster import delete_ray_jobs, run_ray_job
from components.ray_job import find_or_make
from mint_lib.cluster import ClusterConfig, Images
from mint_lib.errors import ClusterError, InvalidInput, MintError, PromptTooLong
from mint_lib.placement import RayWorkers, StepOnCluster
from mint_lib.ray_job import CONTENT_ANNOTATION, JOB_LABEL
from mint_lib.records import Reference
from mint_lib.storage.settings import S3Settings

PROJECT = Path(__file__).parents[2]
NAME = "mint-alignment-0123456789abcdef"
JOB: dict[str, Any] = {
    "apiVersion": "ray.io/v1",
    "kind": "RayJob",
    "metadata": {
        "name": NAME,
        "namespace": "clinic",
        "labels": {"mint.platform/run": "run-a", "kueue.x-k8s.io/queue-name": "night", JOB_LABEL: NAME},
        "annotations": {CONTENT_ANNOTATION: "sha256:1"},
    },
    "spec": {"entrypoint": "python -m mint_lib alignment"},
}
PATH = "/apis/ray.io/v1/namespaces/clinic/rayjobs"
LOG = tuple(f"line {index}" for index in range(7))


def pod(component: str, name: str = "", *, phase: str = "Running", age: int = 0, **status: Any) -> dict[str, Any]:
    return {
        "metadata": {
            "name": name or component,
            "creationTimestamp": f"2030-01-01T00:00:0{age}Z",
            "labels": {"app.kubernetes.io/component": component, JOB_LABEL: NAME},
        },
        "status": {"phase": phase, **status},
    }


SUBMITTER = pod("ray-submitter", "submitter-1")
PODS = (pod("ray-head"), pod("ray-worker"), SUBMITTER)
SUCCEEDED = {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED", "jobId": "1"}


def at(state: str, *, pods: tuple[dict[str, Any], ...] = PODS, log: tuple[str, ...] = (), **status: Any) -> Moment:
    return Moment({"jobDeploymentStatus": state, "jobId": "1", "jobStatus": "", **status}, pods, log)


def running(num_lines: int) -> Moment:
    return at("Running", log=LOG[:num_lines], jobStatus="RUNNING")


def failed(reason: str, message: str = "", log: tuple[str, ...] = (), **status: Any) -> Moment:
    return at("Failed", log=log, **{"jobStatus": "FAILED", "reason": reason, "message": message, **status})


END = Moment(SUCCEEDED, PODS, LOG)


@pytest.fixture
def cluster() -> FakeCluster:
    return FakeCluster()


@pytest.fixture
def url(cluster: FakeCluster) -> Iterator[str]:
    with serve(cluster) as url:
        yield url


@pytest.fixture
def api(url: str) -> ApiServer:
    return make_api(url)


def make_api(url: str, patience_seconds: float = 20.0) -> ApiServer:
    from kubernetes import client

    configuration = client.Configuration(host=url)
    configuration.retries = False
    return ApiServer(client.ApiClient(configuration), patience_seconds=patience_seconds)


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("components.api_server._FIRST_PAUSE_SECONDS", 0.02)


@pytest.fixture
def told() -> list[str]:
    return []


@pytest.fixture
def follow(api: ApiServer, told: list[str]) -> Callable[..., None]:
    def run(manifest: dict[str, Any] = JOB, **options: float) -> None:
        settings = {"deadline_seconds": 30.0, "poll_seconds": 0.01, "delete_seconds": 3.0} | options
        run_ray_job(manifest, api=api, tell=told.append, **settings)

    return run


def own(told: list[str]) -> list[str]:
    """What the follower itself said."""
    return [line.removeprefix(f"Ray job {NAME}: ") for line in told if line.startswith("Ray job")]


def log_of(told: list[str]) -> list[str]:
    return [line for line in told if not line.startswith("Ray job")]


def another(**metadata: Any) -> dict[str, Any]:
    return {**JOB, "metadata": {**JOB["metadata"], **metadata}}


def test_job_that_succeeds_is_told_line_by_line_and_deleted(
    cluster: FakeCluster, follow: Callable[..., None], told: list[str]
) -> None:
    waiting = Moment({"jobDeploymentStatus": "Suspended"})
    starting = at("Initializing", pods=(pod("ray-submitter", "submitter-1", phase="Pending"),))
    cluster.moments = [Moment({}), waiting, starting, running(0), running(2), running(3), running(3), running(6), END]
    follow()
    assert log_of(told) == list(LOG)
    assert own(told) == [
        "created",
        "waiting for KubeRay to see it",
        "waiting in queue night",
        "its pods are starting",
        "running",
        "Complete",
    ]
    assert len(cluster.created) == 1
    assert cluster.jobs == []


def test_job_whose_progress_is_told_as_events_passes_them_on(
    cluster: FakeCluster, follow: Callable[..., None], told: list[str]
) -> None:
    event = '@progress {"event": "progress", "done": 3}'
    cluster.moments = [at("Running", log=(event,)), Moment(SUCCEEDED, PODS, (event,))]
    follow()
    assert log_of(told) == [event]


@pytest.mark.parametrize(
    "fault",
    [
        Fault("POST", 503, times=2),
        Fault("POST", 0),
        Fault("POST", -1),
        Fault(f"GET {PATH}/", 500, times=3),
        Fault(f"GET {PATH}/", 429, times=1, retry_after="1"),
        Fault(f"GET {PATH}/", 0, times=2),
        Fault("GET .*/pods$", 502, times=2),
        Fault("GET .*/pods$", 0, times=2),
        Fault("GET .*/log", 500, times=2),
        Fault("GET .*/log", 0, times=2),
        Fault("GET .*/log", -1, times=2),
        Fault("DELETE", 503, times=2),
        Fault("DELETE", -1),
    ],
    ids=lambda fault: f"{fault.matches}-{fault.status}",
)
def test_api_server_that_is_away_for_a_while_costs_no_line_and_no_second_job(
    cluster: FakeCluster, follow: Callable[..., None], told: list[str], fault: Fault
) -> None:
    cluster.moments = [running(2), running(4), END]
    cluster.faults = [fault]
    follow()
    assert log_of(told) == list(LOG)
    assert len(cluster.created) == 1
    assert cluster.jobs == []
    assert cluster.faults[0].times == 0


def test_api_server_that_asks_for_patience_gets_it(cluster: FakeCluster, follow: Callable[..., None]) -> None:
    cluster.moments = [END]
    cluster.faults = [Fault("POST", 429, retry_after="2")]
    started = time.monotonic()
    follow()
    assert time.monotonic() - started > 1.5


def test_api_server_that_stays_away_is_given_up_in_words(cluster: FakeCluster, url: str, told: list[str]) -> None:
    cluster.moments = [running(1)]
    cluster.faults = [Fault(f"GET {PATH}/", 503, times=1000, message="etcd is electing")]
    with pytest.raises(ClusterError, match=r"no usable answer to GET .*etcd is electing"):
        run_ray_job(JOB, api=make_api(url, 1.0), tell=told.append, deadline_seconds=30, poll_seconds=0.01)
    assert own(told)[-1].startswith("may still be there: kubectl delete rayjob")


def test_second_submitter_repeats_the_log_and_it_is_told_once(
    cluster: FakeCluster, follow: Callable[..., None], told: list[str]
) -> None:
    second = (pod("ray-submitter", "submitter-1", phase="Failed"), pod("ray-submitter", "submitter-2", age=5))
    cluster.moments = [
        running(3),
        at("Running", pods=second, log=LOG[:2]),
        at("Running", pods=second, log=LOG[:5]),
        Moment(SUCCEEDED, second, LOG),
    ]
    follow()
    assert log_of(told) == list(LOG)


def test_log_with_the_same_line_twice_is_told_twice(
    cluster: FakeCluster, follow: Callable[..., None], told: list[str]
) -> None:
    log = ("same", "same", "same", "other", "same")
    cluster.moments = [at("Running", log=log[:2]), at("Running", log=log[:3]), Moment(SUCCEEDED, PODS, log)]
    follow()
    assert log_of(told) == list(log)


def test_log_longer_than_an_answer_is_told_whole(
    cluster: FakeCluster, follow: Callable[..., None], told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("components.job_log._MAX_BYTES", 200)
    log = tuple(f"line {index}" for index in range(40))
    cluster.moments = [*[at("Running", log=log)] * 30, Moment(SUCCEEDED, PODS, log)]
    follow()
    assert log_of(told) == list(log)


def test_job_that_fails_raises_the_stage_s_own_error(cluster: FakeCluster, follow: Callable[..., None]) -> None:
    log = (*LOG, "PromptTooLong: The prompt of case-3 has 900 tokens.")
    cluster.moments = [running(4), failed("AppFailed", log=log)]
    with pytest.raises(PromptTooLong, match=r"^The prompt of case-3 has 900 tokens\.$"):
        follow()
    assert cluster.jobs == []


@pytest.mark.parametrize(
    ("moment", "words"),
    [
        (failed("AppFailed"), "failed (AppFailed): the stage failed"),
        (failed("DeadlineExceeded", jobStatus="RUNNING"), "ray.deadline_hours. Allow more"),
        (failed("SubmissionFailed", "Job submission has failed", jobStatus=""), "port 8265 of the head's"),
        (at("ValidationFailed", reason="ValidationFailed", message="rayVersion"), "KubeRay says: rayVersion"),
        (failed("SomethingNew", "as yet unknown"), "failed (SomethingNew): see the log above. KubeRay says: as yet"),
        (at("Complete", jobStatus="STOPPED"), "ended as STOPPED: it was stopped from outside"),
        (at("Complete"), "ended as unknown"),
    ],
)
def test_job_that_fails_says_why_and_is_deleted(
    cluster: FakeCluster, follow: Callable[..., None], moment: Moment, words: str
) -> None:
    cluster.moments = [running(2), moment]
    with pytest.raises(ClusterError, match=re.escape(words)):
        follow()
    assert cluster.jobs == []
    assert len(cluster.created) == 1


@pytest.mark.parametrize("separator", [", last available logs (truncated to 20,000 chars):", "\n"])
def test_failure_quotes_nothing_of_the_job_s_log(
    cluster: FakeCluster, follow: Callable[..., None], separator: str
) -> None:
    message = f"Job entrypoint command failed with exit code 3{separator}KeyError: SECRET note"
    log = ("KeyError: SECRET note",)
    cluster.moments = [failed("AppFailed", message, log=log)]
    with pytest.raises(ClusterError) as caught:
        follow()
    assert "exit code 3" in str(caught.value)
    assert "SECRET" not in str(caught.value)


def test_job_that_met_an_error_of_its_input_is_not_begun_anew(
    cluster: FakeCluster, follow: Callable[..., None]
) -> None:
    error = (*LOG[:2], "InvalidInput: there are no pairs")
    retrying = at("Retrying", log=error, jobStatus="FAILED", failed=1)
    cluster.moments = [running(2), retrying, at("", jobId="", failed=1), running(3), END]
    with pytest.raises(InvalidInput, match="there are no pairs"):
        follow()
    assert cluster.jobs == []


def test_job_whose_error_is_seen_after_it_was_begun_anew_is_ended(
    cluster: FakeCluster, follow: Callable[..., None]
) -> None:
    cluster.moments = [at("Running", log=("InvalidInput: there are no pairs",)), at("", jobId=""), running(3), END]
    with pytest.raises(InvalidInput, match="there are no pairs"):
        follow()
    assert cluster.jobs == []


def test_job_that_lost_its_store_is_begun_anew_and_succeeds(
    cluster: FakeCluster, follow: Callable[..., None], told: list[str]
) -> None:
    error = ("StoreUnreachable: no answer",)
    second = (pod("ray-submitter", "submitter-2", age=5),)
    cluster.moments = [
        at("Running", log=error),
        at("Retrying", log=error, jobStatus="FAILED"),
        at("Initializing", jobId="2", pods=()),
        Moment({**SUCCEEDED, "jobId": "2"}, second, LOG),
    ]
    follow()
    assert log_of(told) == [*error, *LOG]


def test_job_that_the_queue_takes_away_and_gives_back_is_followed_on(
    cluster: FakeCluster, follow: Callable[..., None], told: list[str]
) -> None:
    again = (pod("ray-submitter", "submitter-2", age=5),)
    cluster.moments = [
        running(3),
        at("Suspending"),
        at("Suspended", jobId="", pods=()),
        Moment({"jobDeploymentStatus": "Running", "jobId": "2"}, again, LOG[:4]),
        Moment({**SUCCEEDED, "jobId": "2"}, again, LOG),
    ]
    follow()
    assert log_of(told) == [*LOG[:3], *LOG]
    assert "waiting in queue night" in own(told)


UNSCHEDULABLE = pod(
    "ray-worker",
    phase="Pending",
    conditions=[
        {
            "type": "PodScheduled",
            "status": "False",
            "reason": "Unschedulable",
            "message": "0/3 nodes are available: 3 Insufficient nvidia.com/gpu.",
        }
    ],
)


def waiting_for(reason: str, component: str = "ray-head") -> dict[str, Any]:
    state = {"waiting": {"reason": reason, "message": "pull access denied"}}
    return pod(component, phase="Pending", containerStatuses=[{"name": "x", "state": state}])


def test_pod_that_no_node_takes_is_told_once_and_waited_for(
    cluster: FakeCluster, follow: Callable[..., None], told: list[str]
) -> None:
    cluster.moments = [*[at("Initializing", pods=(UNSCHEDULABLE,))] * 3, END]
    follow(stuck_seconds=0.0)
    assert own(told).count("ray-worker: no node takes it: 0/3 nodes are available: 3 Insufficient nvidia.com/gpu.") == 1


def test_pod_that_no_node_takes_is_named_when_the_step_gives_up(
    cluster: FakeCluster, follow: Callable[..., None]
) -> None:
    cluster.moments = [at("Initializing", pods=(UNSCHEDULABLE,))]
    with pytest.raises(ClusterError, match=r"did not end within .*Insufficient nvidia\.com/gpu"):
        follow(deadline_seconds=0.2)
    assert cluster.jobs == []


@pytest.mark.parametrize(
    "reason",
    ["ImagePullBackOff", "ErrImagePull", "InvalidImageName", "CreateContainerConfigError", "CrashLoopBackOff"],
)
@pytest.mark.parametrize("component", ["ray-head", "ray-worker", "ray-submitter"])
def test_pod_that_cannot_start_ends_the_job_in_words(
    cluster: FakeCluster, follow: Callable[..., None], reason: str, component: str
) -> None:
    cluster.moments = [at("Initializing", pods=(waiting_for(reason, component),))]
    with pytest.raises(ClusterError, match=f"cannot start.*{component}: {reason}: .*pull access denied"):
        follow(stuck_seconds=0.2)
    assert cluster.jobs == []


def test_pod_whose_image_comes_after_all_is_waited_for(cluster: FakeCluster, follow: Callable[..., None]) -> None:
    stuck, fine = at("Initializing", pods=(waiting_for("ErrImagePull"),)), at("Initializing", pods=())
    cluster.moments = [*[stuck, fine] * 20, END]
    follow(stuck_seconds=0.2)
    assert cluster.jobs == []


def test_pod_that_is_killed_for_memory_is_told(
    cluster: FakeCluster, follow: Callable[..., None], told: list[str]
) -> None:
    end = {"terminated": {"reason": "OOMKilled", "exitCode": 137}}
    killed = pod("ray-worker", phase="Failed", containerStatuses=[{"name": "x", "state": end}])
    cluster.moments = [at("Running", pods=(killed,)), END]
    follow()
    assert any("ray-worker: killed for memory" in line for line in own(told))


def test_job_that_waits_in_a_queue_too_long_is_given_up_and_deleted(
    cluster: FakeCluster, follow: Callable[..., None]
) -> None:
    cluster.moments = [Moment({"jobDeploymentStatus": "Suspended"})]
    with pytest.raises(ClusterError, match="it is waiting in queue night"):
        follow(deadline_seconds=0.2)
    assert cluster.jobs == []


@pytest.mark.parametrize("happens", ["deleted", "replaced"])
def test_job_that_somebody_deletes_ends_the_step_in_words(
    cluster: FakeCluster, follow: Callable[..., None], happens: str
) -> None:
    cluster.moments = [running(2), Moment({}, happens=happens)]
    with pytest.raises(ClusterError, match="was deleted while it ran"):
        follow()
    assert len(cluster.created) == 1


def test_cluster_without_kuberay_is_said_in_words(cluster: FakeCluster, follow: Callable[..., None]) -> None:
    cluster.has_kuberay = False
    with pytest.raises(ClusterError, match=r"KubeRay is not installed .*k8s/README\.md"):
        follow()


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (Fault("POST", 401, 99, "Unauthorized"), "The token was not accepted"),
        (Fault("POST", 403, 99, 'cannot create resource "rayjobs"'), 'cannot create resource "rayjobs". Where a'),
        (Fault("POST", 403, 99, "exceeded quota: mint"), "exceeded quota: mint"),
        (Fault("POST", 422, 99, "spec.x: Required value"), "spec.x: Required value"),
        (Fault("POST", 400, 99, "strict decoding error"), "strict decoding error"),
    ],
)
def test_server_that_refuses_is_quoted_and_asked_once(
    cluster: FakeCluster, follow: Callable[..., None], fault: Fault, words: str
) -> None:
    cluster.faults = [fault]
    with pytest.raises(ClusterError, match=re.escape(words)):
        follow()
    assert cluster.faults[0].times == 98
    assert cluster.jobs == []


@pytest.mark.parametrize("path", [f"GET {PATH}/", "GET .*/pods$", "GET .*/log"])
def test_permission_that_is_missing_for_following_ends_the_job(
    cluster: FakeCluster, follow: Callable[..., None], path: str
) -> None:
    cluster.moments = [running(2)]
    cluster.faults = [Fault(path, 403, message="is not allowed")]
    with pytest.raises(ClusterError, match="is not allowed"):
        follow()
    assert cluster.jobs == []


def test_job_that_runs_already_is_taken_up_by_the_next_attempt(
    cluster: FakeCluster, follow: Callable[..., None], told: list[str]
) -> None:
    cluster.put_job(JOB, jobDeploymentStatus="Running")
    cluster.moments = [running(5), running(6), END]
    follow()
    assert cluster.created == []
    assert log_of(told) == list(LOG)
    assert cluster.jobs == []


@pytest.mark.parametrize("num_looks", [0, 3])
@pytest.mark.parametrize(
    ("content", "state"), [("sha256:1", "Failed"), ("sha256:1", "Complete"), ("sha256:2", "Running")]
)
def test_job_of_the_same_name_that_is_over_or_another_is_replaced(
    cluster: FakeCluster, follow: Callable[..., None], num_looks: int, content: str, state: str
) -> None:
    cluster.num_looks_until_deleted = num_looks
    old = cluster.put_job(another(annotations={CONTENT_ANNOTATION: content}), jobDeploymentStatus=state)
    cluster.moments = [Moment({"jobDeploymentStatus": state}), running(2), END]
    follow()
    (new,) = cluster.created
    assert new["metadata"]["uid"] != old["metadata"]["uid"]
    assert cluster.jobs == []


def test_job_that_another_run_began_is_followed_and_left_to_it(
    cluster: FakeCluster, follow: Callable[..., None], told: list[str]
) -> None:
    labels = {**JOB["metadata"]["labels"], "mint.platform/run": "run-b"}
    cluster.put_job(another(labels=labels), jobDeploymentStatus="Running")
    cluster.moments = [running(5), END]
    follow()
    assert log_of(told) == list(LOG)
    assert cluster.created == []
    assert cluster.jobs == [NAME]


def test_job_that_cannot_be_deleted_is_told_and_hides_neither_success_nor_error(
    cluster: FakeCluster, follow: Callable[..., None], told: list[str]
) -> None:
    cluster.moments = [END]
    cluster.faults = [Fault("DELETE", 403, 99, "may not delete")]
    follow()
    assert own(told)[-1] == f"may still be there: kubectl delete rayjob {NAME} -n clinic"
    cluster.moments = [failed("DeadlineExceeded")]
    with pytest.raises(ClusterError, match="DeadlineExceeded"):
        follow({**JOB, "metadata": {**JOB["metadata"], "name": "mint-alignment-other"}})


def test_job_whose_operator_is_dead_is_not_waited_for_without_end(
    cluster: FakeCluster, follow: Callable[..., None], told: list[str]
) -> None:
    cluster.num_looks_until_deleted = None
    cluster.moments = [END]
    started = time.monotonic()
    follow(delete_seconds=0.5)
    assert time.monotonic() - started < 10
    assert own(told)[-1].startswith("may still be there")


def test_delete_ray_jobs_deletes_those_of_the_run_only(cluster: FakeCluster, api: ApiServer) -> None:
    cluster.put_job(JOB)
    cluster.put_job(another(name="second"))
    labels = {**JOB["metadata"]["labels"], "mint.platform/run": "run-b"}
    cluster.put_job(another(name="of-another-run", labels=labels))
    assert delete_ray_jobs("clinic", "run-a", api=api) == 2
    assert cluster.jobs == ["of-another-run"]
    assert delete_ray_jobs("clinic", "run-a", api=api) == 0


def test_delete_ray_jobs_without_a_run_deletes_nothing(cluster: FakeCluster, api: ApiServer) -> None:
    cluster.put_job(JOB)
    with pytest.raises(InvalidInput):
        delete_ray_jobs("clinic", "", api=api)
    assert cluster.jobs == [NAME]


def test_delete_ray_jobs_without_kuberay_finds_none(cluster: FakeCluster, api: ApiServer) -> None:
    cluster.has_kuberay = False
    assert delete_ray_jobs("clinic", "run-a", api=api) == 0


def test_connecting_without_any_cluster_is_said_in_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "none"))
    with pytest.raises(ClusterError, match="No cluster is known"):
        connect()


FOLLOWER = """
import json, sys
from kubernetes import client
from components.api_server import ApiServer
from components.cluster import run_ray_job
configuration = client.Configuration(host=sys.argv[1])
configuration.retries = False
api = ApiServer(client.ApiClient(configuration))
def tell(line):
    print(line, flush=True)
run_ray_job(json.loads(sys.argv[2]), api=api, tell=tell, deadline_seconds=60, poll_seconds=0.05)
"""


def start_follower(url: str) -> "subprocess.Popen[str]":
    """A follower in a process of its own, after it has told the first line of the log."""
    process = subprocess.Popen(
        [sys.executable, "-c", FOLLOWER, url, json.dumps(JOB)],
        cwd=PROJECT,
        env={**os.environ, "NO_PROXY": "127.0.0.1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert any(line.strip() == LOG[0] for line in process.stdout)
    return process


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, -signal.SIGINT)])
def test_follower_that_is_told_to_stop_deletes_its_job_first(
    cluster: FakeCluster, url: str, number: signal.Signals, code: int
) -> None:
    cluster.moments = [running(3)]
    cluster.num_looks_until_deleted = 3
    process = start_follower(url)
    process.send_signal(number)
    assert process.wait(30) == code
    assert cluster.deleted == [NAME]
    assert cluster.jobs == []


def test_follower_that_is_told_to_stop_twice_still_deletes_its_job(cluster: FakeCluster, url: str) -> None:
    cluster.moments = [running(3)]
    cluster.num_looks_until_deleted = 8
    process = start_follower(url)
    process.terminate()
    give_up = time.monotonic() + 20
    while not cluster.deleted and time.monotonic() < give_up:
        time.sleep(0.02)
    process.terminate()
    assert process.wait(30) == 143
    assert cluster.jobs == []


def test_follower_that_is_killed_leaves_its_job_to_the_next_one(
    cluster: FakeCluster, url: str, follow: Callable[..., None], told: list[str]
) -> None:
    cluster.moments = [running(3)]
    process = start_follower(url)
    process.kill()
    process.wait(30)
    assert cluster.jobs == [NAME]
    cluster.play(running(3), running(4), END)
    follow()
    assert len(cluster.created) == 1
    assert log_of(told) == list(LOG)
    assert cluster.jobs == []


REFERENCE = Reference(kind="student", name="study", version="v000001", digest="sha256:" + "ab" * 32)
PREFERENCES = "preferences=preferences/study@v000001#sha256:" + "cd" * 32
CONFIG = '{"name": "study", "seed": 1, "student": {"model": "tiny", "window_tokens": 512}}'
IMAGE = "registry.example.org/mint@sha256:" + "ef" * 32
ON = ClusterConfig(
    namespace="clinic", images=Images(serve=IMAGE, train=IMAGE), s3=S3Settings(endpoint_url="https://s3.example.org")
)


class FakeStore:
    """Says that the output is there from its `since`-th question on."""

    location = "s3://models"

    def __init__(self, since: int):
        self.num_left = since

    def find_output(self, key: str) -> Reference | None:
        self.num_left -= 1
        return REFERENCE if self.num_left < 0 else None


@pytest.fixture
def make(api: ApiServer) -> Callable[..., tuple[Reference, bool]]:
    def run(since: int, **environment: str) -> tuple[Reference, bool]:
        return find_or_make(
            "alignment",
            CONFIG,
            PREFERENCES,
            cluster=ON,
            step=StepOnCluster(ray=RayWorkers()),
            store=FakeStore(since),  # type: ignore[arg-type]
            environment=environment,
            tell=lambda line: None,
            api=api,
            poll_seconds=0.01,
        )

    return run


def test_step_whose_output_is_in_the_store_creates_no_job(
    cluster: FakeCluster, make: Callable[..., tuple[Reference, bool]]
) -> None:
    assert make(0) == (REFERENCE, True)
    assert cluster.asked == []


def test_step_takes_its_output_from_the_store_after_its_job(
    cluster: FakeCluster, make: Callable[..., tuple[Reference, bool]]
) -> None:
    cluster.moments = [END]
    assert make(1, MINT_RUN_ID="run-a") == (REFERENCE, False)
    (job,) = cluster.created
    assert job["metadata"]["labels"]["mint.platform/run"] == "run-a"
    assert cluster.jobs == []


def test_step_whose_job_leaves_no_output_fails_in_words(
    cluster: FakeCluster, make: Callable[..., tuple[Reference, bool]]
) -> None:
    cluster.moments = [END]
    with pytest.raises(ClusterError, match="its output is not in s3://models"):
        make(9)


def test_step_whose_job_another_run_finished_and_deleted_takes_the_output(
    cluster: FakeCluster, make: Callable[..., tuple[Reference, bool]]
) -> None:
    cluster.moments = [running(1), Moment({}, happens="deleted")]
    assert make(1) == (REFERENCE, False)


def test_step_that_fails_and_has_no_output_says_so(
    cluster: FakeCluster, make: Callable[..., tuple[Reference, bool]]
) -> None:
    cluster.moments = [failed("DeadlineExceeded")]
    with pytest.raises(MintError, match="DeadlineExceeded"):
        make(9)


@pytest.mark.parametrize(("namespace", "num_owners"), [("clinic", 1), ("kubeflow", 0)])
def test_job_belongs_to_the_step_s_pod_where_they_share_a_namespace(
    cluster: FakeCluster, make: Callable[..., tuple[Reference, bool]], namespace: str, num_owners: int
) -> None:
    cluster.moments = [END]
    make(1, MINT_POD_NAME="step-1", MINT_POD_UID="u-1", MINT_POD_NAMESPACE=namespace)
    owners = cluster.created[0]["metadata"]["ownerReferences"]
    assert owners == [{"apiVersion": "v1", "kind": "Pod", "name": "step-1", "uid": "u-1"}][:num_owners]
