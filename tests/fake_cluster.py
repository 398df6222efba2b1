"""A Kubernetes API server in this process, over real HTTP, that plays a Ray job's life from a script.

Goes in: moments, each a status of the job with its pods and its log. Comes out: what was created, what is left, and
what was asked. Objects, conflicts and deletion are kmock's emulator; label selectors, logs, finalizers and troubles of
the server are added here. It knows only the requests that our code makes.
"""

import asyncio
import contextlib
import datetime
import json
import re
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import aiohttp.web
import kmock

RAY_JOBS = kmock.resource("ray.io", "v1", "rayjobs")
_FINALIZER = "ray.io/rayjob-finalizer"


class Moment(NamedTuple):
    """What is to be seen at one look at the job; the last one stays."""

    status: dict[str, Any]
    pods: tuple[dict[str, Any], ...] = ()
    log: tuple[str, ...] = ()
    """Lines of the newest submitter from its beginning; each second line has the same second."""
    happens: str | None = None
    """`deleted` or `replaced`: what somebody else does to the job just before."""


class Fault(NamedTuple):
    """An answer that goes wrong: `times` times, for requests whose method and path match."""

    matches: str
    """Regular expression on `METHOD path`."""
    status: int
    """0 cuts the connection; -1 does what was asked and cuts it then."""
    times: int = 1
    message: str = "try later"
    retry_after: str | None = None


class FakeCluster(kmock.KubernetesEmulator):
    """The server. Set `moments`, `faults` and `num_looks_until_deleted` before it is asked."""

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        self.moments: list[Moment] = [Moment({})]
        self.faults: list[Fault] = []
        self.created: list[dict[str, Any]] = []
        self.deleted: list[str] = []
        self.asked: list[str] = []
        self.num_looks_until_deleted: int | None = 0
        """Looks at a deleted job until KubeRay takes its finalizer off; None: never."""
        self.has_kuberay = True
        self._num_looks = 0
        self._num_uids = 0
        self._moment = self.moments[0]

    @property
    def jobs(self) -> list[str]:
        """Names of the Ray jobs that there are."""
        return sorted(name for (resource, _, name), job in self.objects.items() if job and not job.deleted)

    def play(self, *moments: Moment) -> None:
        """Go on with other moments."""
        self.moments, self._num_looks = list(moments), 0

    def put_job(self, job: dict[str, Any], **status: Any) -> dict[str, Any]:
        """A job that was there before anybody asked."""
        made = self._complete(json.loads(json.dumps(job))) | {"status": status}
        self.objects[RAY_JOBS, made["metadata"]["namespace"], made["metadata"]["name"]] = made
        return made

    async def _handle(self, request: Any) -> aiohttp.web.StreamResponse:
        path = request.url.path
        self.asked.append(f"{request.method.value} {path}")
        fault = self._take_fault(self.asked[-1])
        if fault is not None and fault.status != -1:
            if fault.status == 0:
                request._raw_request.transport.abort()
            return _refuse(fault.status or 500, fault.message, fault.retry_after)
        answer = await self._answer(request, path)
        if fault is not None:
            request._raw_request.transport.abort()
        return answer

    async def _answer(self, request: Any, path: str) -> aiohttp.web.StreamResponse:
        if "/pods" in path:
            return self._read_log(request) if path.endswith("/log") else self._list_pods(request)
        if not self.has_kuberay:
            return aiohttp.web.Response(status=404, text="404 page not found\n")
        if request.method.value == "POST":
            self._complete(request.data)
            answer = await super()._handle(request)
            if answer.status < 300:
                self.created.append(request.data)
            return answer
        if request.name is None:
            return aiohttp.web.json_response({"items": self._select(request, self._list_jobs())})
        if request.method.value == "DELETE":
            self.deleted.append(request.name)
        else:
            self._play(request)
        return await super()._handle(request)

    def _complete(self, job: dict[str, Any]) -> dict[str, Any]:
        self._num_uids += 1
        finalizers = [_FINALIZER] if self.num_looks_until_deleted != 0 else []
        job["metadata"] |= {"uid": f"uid-{self._num_uids}", "finalizers": finalizers}
        return job

    def _list_jobs(self) -> list[dict[str, Any]]:
        return [dict(job.raw) for job in self.objects.values() if job and not job.deleted]

    def _play(self, request: Any) -> None:
        """The next moment, where the job is there and is not about to go."""
        key = (RAY_JOBS, request.namespace, request.name)
        job = self.objects[key] if key in self.objects else None  # noqa: SIM401 - it has no working `get`
        if job is None or job.deleted:
            return
        if job.get("metadata", {}).get("deletionTimestamp"):
            if self.num_looks_until_deleted is not None:
                self.num_looks_until_deleted -= 1
                if self.num_looks_until_deleted <= 0:
                    job.delete()
            return
        self._moment = self.moments[min(self._num_looks, len(self.moments) - 1)]
        self._num_looks += 1
        if self._moment.happens == "deleted":
            job.delete()
            return
        changes: dict[str, Any] = {"status": self._moment.status}
        if self._moment.happens == "replaced":
            changes["metadata"] = {"uid": "somebody-else-s"}
        job.patch(changes)

    def _take_fault(self, asked: str) -> Fault | None:
        for index, fault in enumerate(self.faults):
            if fault.times and re.search(fault.matches, asked):
                self.faults[index] = fault._replace(times=fault.times - 1)
                return fault
        return None

    def _list_pods(self, request: Any) -> aiohttp.web.StreamResponse:
        return aiohttp.web.json_response({"items": self._select(request, list(self._moment.pods))})

    @staticmethod
    def _select(request: Any, items: list[dict[str, Any]]) -> list[dict[str, Any]]:
        wanted = dict(pair.split("=") for pair in request.params.get("labelSelector", "").split(",") if pair)
        return [item for item in items if wanted.items() <= item["metadata"].get("labels", {}).items()]

    def _read_log(self, request: Any) -> aiohttp.web.StreamResponse:
        pod = next((pod for pod in self._moment.pods if pod["metadata"]["name"] == request.name), None)
        if pod is None:
            return _refuse(404, f'pods "{request.name}" not found')
        if pod["status"]["phase"] == "Pending":
            return _refuse(400, "container is waiting to start: ContainerCreating")
        since = request.params.get("sinceTime", "")[:19]  # the server knows whole seconds
        lines = [f"{_stamp(index)} {line}\n" for index, line in enumerate(self._moment.log)]
        text = "".join(line for line in lines if line[:19] >= since)
        return aiohttp.web.Response(text=text[: int(request.params["limitBytes"])])


def _stamp(index: int) -> str:
    moment = datetime.datetime(2030, 1, 1) + datetime.timedelta(seconds=index // 2)
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{index % 2:09d}Z"


def _refuse(status: int, message: str, retry_after: str | None = None) -> aiohttp.web.StreamResponse:
    headers = {"Retry-After": retry_after} if retry_after else None
    return aiohttp.web.json_response(
        {"kind": "Status", "status": "Failure", "message": message, "code": status}, status=status, headers=headers
    )


@contextlib.contextmanager
def serve(cluster: FakeCluster) -> Iterator[str]:
    """The server's address, for the block."""
    ready, loop, address = threading.Event(), asyncio.new_event_loop(), [""]
    stop = asyncio.Event()

    async def run() -> None:
        async with cluster, kmock.Server(cluster) as server:
            address[0] = str(server.url).rstrip("/")
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(run(),), daemon=True)
    thread.start()
    assert ready.wait(30)
    try:
        yield address[0]
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(30)
        loop.close()
