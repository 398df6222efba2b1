"""Runs a Ray job on the cluster: creates it or takes it up, follows it to its end, and never leaves it behind.

Goes in: a RayJob as a dictionary and an `ApiServer`. Comes out: nothing, or an error that says in words why the job
failed; its log and its states go to `tell`, line by line. The job is deleted whatever happens: what stays of it is its
output in the store and the log that was told. A follower that is killed leaves its job to the next attempt, which finds
it by its name; `delete_ray_jobs` ends what no attempt takes up.
"""

import contextlib
import json
import logging
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from components.api_server import ApiServer, NoSuchObject, ObjectExists, connect
from components.job_log import JobLog
from components.pod_trouble import describe_trouble
from mint_lib.errors import ClusterError, InvalidInput, MintError
from mint_lib.pods import RUN_LABEL
from mint_lib.ray_job import CONTENT_ANNOTATION, JOB_LABEL

logger = logging.getLogger(__name__)
Tell = Callable[[str], None]
_COMPONENT = "app.kubernetes.io/component"
_ENDS = ("Complete", "Failed", "ValidationFailed")
_STATES = {
    "": "waiting for KubeRay to see it",
    "Initializing": "its pods are starting",
    "Waiting": "its pods are starting",
    "Running": "running",
    "Suspending": "its pods are being taken away by the queue",
    "Retrying": "failed, and is begun anew from its last checkpoint",
}
_REASONS = {
    "AppFailed": "the stage failed; its log stands above",
    "DeadlineExceeded": "it ran longer than cluster.<stage>.ray.deadline_hours. Allow more, or give it more workers",
    "SubmissionFailed": "Ray did not get it. See whether the submitter's pod may reach port 8265 of the head's",
    "ValidationFailed": "KubeRay refuses the job; its version may be older than this code expects",
    "PreRunningDeadlineExceeded": "its pods were not up in time",
    "JobStatusCheckTimeoutExceeded": "Ray's head stopped answering; it may have run out of memory",
}
_HURRIED_SECONDS = 20.0
"""Kubernetes kills a pod 30 seconds after it told it to stop."""


def run_ray_job(
    manifest: dict[str, Any],
    *,
    api: ApiServer,
    tell: Tell,
    deadline_seconds: float,
    poll_seconds: float = 3.0,
    stuck_seconds: float = 600.0,
    delete_seconds: float = 120.0,
) -> None:
    """Run the job of `manifest` to its end. One that runs already and does the same work is taken up instead.

    Args:
        manifest: As `mint_lib.ray_job.render_ray_job` makes it.
        api: Where.
        tell: Gets the job's states and the lines of its log.
        deadline_seconds: From now on until the job is given up, its time in a queue counted in.
        poll_seconds: Between two looks at it.
        stuck_seconds: How long pods may be unable to start for a reason that does not pass by itself.
        delete_seconds: How long its deletion is waited for.

    Raises:
        MintError: the stage's own error, or a ClusterError: the job failed, was deleted, or cannot be followed.
        SystemExit: this process was told to stop; the job was deleted.
    """
    job = _Job(manifest, api, tell, delete_seconds=delete_seconds)
    with _exit_on_sigterm():
        try:
            job.create()
            _follow(job, deadline_seconds=deadline_seconds, poll_seconds=poll_seconds, stuck_seconds=stuck_seconds)
        except (SystemExit, KeyboardInterrupt):
            job.hurry()
            raise
        finally:
            with _ignore_sigterm():
                job.clean_up()


def delete_ray_jobs(namespace: str, run_id: str, *, api: ApiServer | None = None) -> int:
    """Delete the Ray jobs that a Kubeflow run has left, and say how many there were.

    Raises:
        InvalidInput: `run_id` is empty.
        ClusterError: the cluster cannot be asked, or refuses.
    """
    if not run_id:
        raise InvalidInput("The run id is empty. Give that of the run whose Ray jobs are to end.")
    api = api or connect(patience_seconds=60.0)
    path = _path(namespace)
    try:
        jobs = api.get(path, labelSelector=f"{RUN_LABEL}={run_id}")["items"]
    except NoSuchObject:  # no KubeRay, no jobs
        return 0
    for job in jobs:
        _delete(api, namespace, job["metadata"]["name"])
    return len(jobs)


class _Job:
    """One RayJob on the API server."""

    def __init__(self, manifest: dict[str, Any], api: ApiServer, tell: Tell, *, delete_seconds: float):
        metadata = manifest["metadata"]
        self.manifest = manifest
        self.api = api
        self.name: str = metadata["name"]
        self.namespace: str = metadata["namespace"]
        self.log = JobLog(api, self.namespace)
        self._path = f"{_path(self.namespace)}/{self.name}"
        self._delete_seconds = delete_seconds
        self.tell = tell
        self._uid = ""
        self._last_told = ""

    def tell_state(self, text: str) -> None:
        """Tell the job's state if it is another than the one told last."""
        if text != self._last_told:
            self._last_told = text
            self.tell(f"Ray job {self.name}: {text}")

    def create(self) -> None:
        """Create the job, or take up the one of its name that does the same work."""
        while not self._uid:
            try:
                self._uid = self._post()["metadata"]["uid"]
                self.tell_state("created")
            except ObjectExists:
                self._take_up_or_delete()

    def _post(self) -> Any:
        try:
            return json.loads(self.api.request("POST", _path(self.namespace), body=self.manifest))
        except NoSuchObject as error:
            raise ClusterError(
                f"{error}. Either KubeRay is not installed (its CRD rayjobs.ray.io is missing; see k8s/README.md), or "
                f"there is no namespace {self.namespace}."
            ) from None

    def _take_up_or_delete(self) -> None:
        try:
            found = self.api.get(self._path)
        except NoSuchObject:
            return
        metadata, state = found["metadata"], found.get("status", {}).get("jobDeploymentStatus", "")
        content = metadata.get("annotations", {}).get(CONTENT_ANNOTATION)
        is_same = content == self.manifest["metadata"]["annotations"][CONTENT_ANNOTATION]
        if is_same and state not in _ENDS and "deletionTimestamp" not in metadata:
            self._uid = metadata["uid"]
            self.tell_state("runs already, and is taken up")
            return
        self.tell_state("an older one of this name is deleted first")
        self._delete_and_wait(metadata["uid"], self._delete_seconds)

    def read(self) -> dict[str, Any]:
        """The job as it is now.

        Raises:
            ClusterError: it was deleted.
        """
        try:
            found: dict[str, Any] = self.api.get(self._path)
        except NoSuchObject:
            found = {"metadata": {"uid": ""}}
        if found["metadata"]["uid"] != self._uid or "deletionTimestamp" in found["metadata"]:
            raise ClusterError(
                f"Ray job {self.name} was deleted while it ran, by somebody else or with the pod that began it. Start "
                "the step again: training goes on from its last checkpoint."
            )
        return found

    def list_pods(self) -> list[dict[str, Any]]:
        """All pods of the job."""
        path = f"/api/v1/namespaces/{self.namespace}/pods"
        pods: list[dict[str, Any]] = self.api.get(path, labelSelector=f"{JOB_LABEL}={self.name}")["items"]
        return pods

    def hurry(self) -> None:
        """Keep what follows within the time that a pod has after it was told to stop."""
        self._delete_seconds = min(self._delete_seconds, _HURRIED_SECONDS / 2)
        self.api = ApiServer(self.api.client, patience_seconds=_HURRIED_SECONDS / 2)

    def clean_up(self) -> None:
        """Delete the job unless it belongs to another run. What cannot be cleaned up is told, and hides no error."""
        try:
            metadata = self.api.get(self._path)["metadata"]
            if metadata.get("labels", {}).get(RUN_LABEL) != self.manifest["metadata"]["labels"].get(RUN_LABEL):
                return
            self._delete_and_wait(metadata["uid"], self._delete_seconds)
        except NoSuchObject:
            return
        except MintError as error:
            logger.warning("%s", error)
            self.tell_state(f"may still be there: kubectl delete rayjob {self.name} -n {self.namespace}")

    def _delete_and_wait(self, uid: str, wait_seconds: float) -> None:
        _delete(self.api, self.namespace, self.name)
        give_up = time.monotonic() + wait_seconds
        while True:
            try:
                if self.api.get(self._path)["metadata"]["uid"] != uid:
                    return
            except NoSuchObject:
                return
            if time.monotonic() > give_up:
                raise ClusterError(
                    f"Ray job {self.name} was told to go and is still there after {wait_seconds:.0f} s. See whether "
                    "KubeRay's operator runs: it has to take its finalizer off."
                )
            time.sleep(min(1.0, wait_seconds / 10))


def _follow(job: _Job, *, deadline_seconds: float, poll_seconds: float, stuck_seconds: float) -> None:
    give_up = time.monotonic() + deadline_seconds
    submission, told_trouble, stuck_since = "", set[str](), None
    while True:
        found = job.read()
        status = found.get("status", {})
        state = status.get("jobDeploymentStatus", "")
        if status.get("jobId", "") != submission:
            if job.log.error is not None and job.log.has_final_error:
                raise job.log.error  # the same would happen on a new Ray cluster
            submission = status.get("jobId", "")
            job.log.forget()
        job.tell_state(_describe_state(found, state))
        pods = job.list_pods()
        submitters = [pod for pod in pods if pod["metadata"]["labels"].get(_COMPONENT) == "ray-submitter"]
        for line in job.log.read_new_lines(submitters):
            job.tell(line)
        if state in _ENDS:
            if state == "Complete" and status.get("jobStatus") == "SUCCEEDED":
                return
            raise job.log.error or _describe_failure(job.name, status)
        if job.log.error is not None and job.log.has_final_error and status.get("jobStatus") == "FAILED":
            raise job.log.error
        troubles = [trouble for pod in pods for trouble in describe_trouble(pod)]
        for trouble in troubles:
            if trouble.text not in told_trouble:
                told_trouble.add(trouble.text)
                job.tell(f"Ray job {job.name}: {trouble.text}")
        lasting = next((trouble for trouble in troubles if not trouble.passes), None)
        stuck_since = (stuck_since or time.monotonic()) if lasting else None
        if lasting and stuck_since and time.monotonic() - stuck_since >= stuck_seconds:
            raise ClusterError(f"Ray job {job.name} cannot start, for {stuck_seconds:.0f} s: {lasting.text}")
        if time.monotonic() > give_up:
            raise ClusterError(
                f"Ray job {job.name} did not end within {deadline_seconds:.0f} s and was given up; it is "
                f"{_describe_state(found, state)}{f'; {troubles[0].text}' if troubles else ''}. Allow more in "
                "cluster.<stage>.timeout_hours, or look at what it waits for."
            )
        time.sleep(poll_seconds * random.uniform(0.8, 1.2))  # noqa: S311 - spreads followers, guards nothing


def _describe_state(job: dict[str, Any], state: str) -> str:
    if state == "Suspended" or (state == "" and job["spec"].get("suspend")):
        queue = job["metadata"].get("labels", {}).get("kueue.x-k8s.io/queue-name", "")
        return f"waiting in queue {queue}".strip()
    return _STATES.get(state, state)


def _describe_failure(name: str, status: dict[str, Any]) -> ClusterError:
    state, reason = status.get("jobDeploymentStatus", ""), status.get("reason", "")
    if state == "Complete":
        what = f"ended as {status.get('jobStatus') or 'unknown'}: it was stopped from outside"
    else:
        what = f"failed ({reason or state}): {_REASONS.get(reason, 'see the log above')}"
    # Ray appends the end of the log, where a traceback may quote a case.
    message = str(status.get("message", "")).split(", last available logs")[0].splitlines()
    return ClusterError(f"Ray job {name} {what}.{f' KubeRay says: {message[0][:300]}' if message else ''}")


def _path(namespace: str) -> str:
    return f"/apis/ray.io/v1/namespaces/{namespace}/rayjobs"


def _delete(api: ApiServer, namespace: str, name: str) -> None:
    # In the foreground, so that the job is gone only when its pods' owners are: a new one of its name needs that.
    with contextlib.suppress(NoSuchObject):
        api.request("DELETE", f"{_path(namespace)}/{name}", body={"propagationPolicy": "Foreground"})


@contextlib.contextmanager
def _exit_on_sigterm() -> Iterator[None]:
    """SIGTERM as SystemExit, so that what was begun is cleaned up."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    with _handle_sigterm(stop):
        yield


@contextlib.contextmanager
def _ignore_sigterm() -> Iterator[None]:
    with _handle_sigterm(signal.SIG_IGN):
        yield


@contextlib.contextmanager
def _handle_sigterm(handler: Any) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # only there are signals handled
        yield
        return
    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
