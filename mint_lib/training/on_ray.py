"""Runs a training loop inside Ray Train, here on one machine or on the cluster that is connected already.

Goes in: a loop, what it needs, how many workers, and the store. Comes out: the folder of files of its last checkpoint.
Dead workers are replaced and go on from the last checkpoint, and so does a driver that is started again with the same
run id. A driver that is told to stop has the workers write a checkpoint first. Checkpoints go to the store by
`mint_lib/training/checkpoints.py`, not by Ray. This module knows nothing of what is trained.
"""

import contextlib
import logging
import math
import os
import pathlib
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from mint_lib.errors import MintError
from mint_lib.progress import Progress, say

if TYPE_CHECKING:
    from ray.util.queue import Queue

    from mint_lib.store import Store

logger = logging.getLogger(__name__)
_POLL_SECONDS = 0.5
_WORKER_ENVIRONMENT = {"MALLOC_ARENA_MAX": "1"}
"""Ray trains in a thread beside the main one; glibc gives such a thread memory of its own, in which a step on CPUs took
a quarter more time (2 cores, glibc 2.36)."""
STOP_GRACE_SECONDS = 25.0
"""How long workers that are told to stop may take for a step and a checkpoint; Kubernetes kills after 30 by default."""


class WorkerResources(NamedTuple):
    """How many workers there are and what each gets."""

    num_workers: int
    min_workers: int
    """Fewer than `num_workers`: the run goes on with as many as there is room for, at least these."""
    cpus_per_worker: int
    use_gpu: bool
    max_failures: int


class Driver:
    """A worker's end of the line to the driver. It pickles."""

    def __init__(self, told: "Queue", stops: "Queue"):
        self._told = told
        self._stops = stops
        self._last_told: dict[str, float] = {}

    def tell(self, done: int, total: int, figures: dict[str, float], *, activity: str = "") -> None:
        """Say that `done` of `total` steps are done, of training itself or of another activity, twice a second at most.

        It waits for the driver's node, so a training that took many small steps would wait for it all the time.
        """
        now = time.monotonic()
        if done < total and now - self._last_told.get(activity, -math.inf) < _POLL_SECONDS:
            return
        self._last_told[activity] = now
        self._put(("progress", activity, done, total, figures))

    def say(self, text: str) -> None:
        """Say one sentence about the run."""
        self._put(("note", text))

    def _put(self, item: tuple[Any, ...]) -> None:
        import ray

        with contextlib.suppress(ray.exceptions.RayError):  # no training ends because its progress is not heard
            self._told.put(item)

    def fail(self, error: MintError) -> None:
        """End the run with an error that a new attempt would meet again; the driver raises it."""
        self._told.put(("error", error))
        self._stops.put(True)

    def is_stop_asked(self) -> bool:
        """Whether the run is to end; asks the driver's node, so it takes a moment."""
        return not self._stops.empty()

    def watch_for_stop(self) -> Callable[[], bool]:
        """A function that tells at once whether the driver wants the run to stop; a thread asks the driver."""
        asked = threading.Event()

        def poll() -> None:
            while not asked.is_set():
                with contextlib.suppress(Exception):  # what fails now may answer the next time
                    if self.is_stop_asked():
                        asked.set()
                time.sleep(_POLL_SECONDS)

        threading.Thread(target=poll, name="watch-for-stop", daemon=True).start()
        return asked.is_set


def train_on_ray(
    loop: Callable[[dict[str, Any]], None],
    payload: dict[str, Any],
    *,
    resources: WorkerResources,
    store: "Store",
    run_id: str,
    description: str,
    target: pathlib.Path,
    result_file: str,
) -> pathlib.Path:
    """Run `loop(payload | {"driver": Driver, "run_id": run_id})` on every worker; copy its last checkpoint to `target`.

    The loop writes its checkpoints with `CheckpointWriter`; the last one, which alone holds `result_file`, is the
    result. `run_id` names the folder of running work in the store: an interrupted run with the same id is taken up. The
    progress says `description`.

    Raises:
        MintError: what a worker handed to `Driver.fail`.
        Interrupted: this process got SIGTERM, and the workers wrote a checkpoint within `STOP_GRACE_SECONDS`.
        ray.train.TrainingFailedError: workers died more often than `resources.max_failures`.
    """
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.util.queue import Queue
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from mint_lib.training.checkpoints import RunCheckpoints

    most, least = resources.num_workers, resources.min_workers
    with ray_session(most * resources.cpus_per_worker):
        # They must not end with a node that only holds workers.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        told, stops = (Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here}) for _ in range(2))
        trainer = TorchTrainer(
            loop,
            train_loop_config=payload | {"driver": Driver(told, stops), "run_id": run_id},
            torch_config=TorchConfig(backend="nccl" if resources.use_gpu else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=(least, most) if least < most else most,
                use_gpu=resources.use_gpu,
                resources_per_worker={"CPU": resources.cpus_per_worker} | ({"GPU": 1} if resources.use_gpu else {}),
            ),
            run_config=RunConfig(
                name=run_id,
                storage_path=str(pathlib.PurePosixPath(store.runs_path(run_id)).parent),
                storage_filesystem=store.arrow_filesystem(),
                failure_config=FailureConfig(max_failures=resources.max_failures),
                worker_runtime_env={"env_vars": _WORKER_ENVIRONMENT},
            ),
        )
        with _follow(told, description), _pass_on_sigterm(stops):
            trainer.fit()
        checkpoints = RunCheckpoints(store, run_id)
        newest = checkpoints.newest()
        if newest is None:
            raise RuntimeError(f"the training loop of {description} wrote no checkpoint")
        checkpoints.download(newest, target)
        if not (target / result_file).is_file():
            raise RuntimeError(f"the training loop of {description} ended without its result")
    return target


def forget_run(store: "Store", run_id: str) -> None:
    """Remove what a run left in the store, now that its result is committed; what cannot be removed stays."""
    from mint_lib.training.checkpoints import RunCheckpoints

    try:
        RunCheckpoints(store, run_id).delete_all()
        store.arrow_filesystem().delete_dir(store.runs_path(run_id))
    except OSError as error:  # the store's errors are among these
        logger.warning("the working files of %s stay in the store: %s", run_id, error)


@contextlib.contextmanager
def _pass_on_sigterm(stops: "Queue") -> Iterator[None]:
    """Ask the workers to stop when this process is told to; what stood there before acts if they take too long."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    timer = threading.Timer(STOP_GRACE_SECONDS, os.kill, (os.getpid(), signal.SIGTERM))
    timer.daemon = True

    def ask_workers() -> None:
        with contextlib.suppress(Exception):  # Ray may be going down already
            stops.put(True)

    def handle(number: int, frame: Any) -> None:
        if timer.ident is None:  # not started, so this is the first signal
            logger.warning("told to stop: the workers write a checkpoint first, within %.0f s", STOP_GRACE_SECONDS)
            timer.start()
            threading.Thread(target=ask_workers, name="ask-workers-to-stop", daemon=True).start()
        elif callable(before):
            before(number, frame)
        else:
            sys.exit(128 + number)

    signal.signal(signal.SIGTERM, handle)
    try:
        yield
    except SystemExit:
        if timer.ident is not None:
            # Ray was told to stop too, as by `timeout`, or again; it leaves its driver with a code of its own.
            sys.exit(128 + signal.SIGTERM)
        raise
    finally:
        timer.cancel()
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def ray_session(num_cpus: int) -> Iterator[None]:
    """Ray as it is if this process is connected to it or an address is set; otherwise one of our own on loopback."""
    import ray

    if ray.is_initialized():
        yield
        return
    with tempfile.TemporaryDirectory(prefix="mint-", dir="/tmp") as folder:  # sockets below it have short paths only
        local: dict[str, Any] = {}
        if "RAY_ADDRESS" not in os.environ:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing of a run is told to anybody
            local = {"num_cpus": max(num_cpus, os.cpu_count() or 1), "_temp_dir": folder, "include_dashboard": False}
            local["_node_ip_address"] = "127.0.0.1"
            # Ray lowers its workers' priority by default: then whatever else the machine does starves the training.
            os.environ.setdefault("RAY_worker_niceness", "0")
        on_terminate = signal.getsignal(signal.SIGTERM)
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **local)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_terminate)  # Ray puts its own in the place of the process's
        try:
            yield
        finally:
            ray.shutdown()
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _follow(queue: "Queue", description: str) -> Iterator[None]:
    """Tell the progress that arrives in `queue`; raises the first error of a worker that does, at the end."""
    import ray.util.queue

    errors: list[MintError] = []
    finished = threading.Event()

    def listen() -> None:
        with contextlib.ExitStack() as stack:
            bars: dict[str, Progress] = {}
            while not (finished.is_set() and queue.empty()):
                try:
                    kind, *values = queue.get(timeout=_POLL_SECONDS)
                except ray.util.queue.Empty:
                    continue
                if kind == "error":
                    errors.append(values[0])
                    continue
                if kind == "note":
                    say(values[0])
                    continue
                activity, done, total, figures = values
                if activity not in bars:
                    title = ", ".join(part for part in (description, activity) if part)
                    bars[activity] = stack.enter_context(Progress(title, total=total))
                bars[activity].advance(done - bars[activity].done, **figures)

    thread = threading.Thread(target=listen, name="training-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        finished.set()
        thread.join()
        if errors:
            raise errors[0] from None  # Ray's own error, if any, comes of it
