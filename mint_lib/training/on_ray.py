"""Runs a training loop inside Ray Train, here on one machine or on the cluster that is connected already.

Goes in: a loop, what it needs, how many workers, and the store. Comes out: the folder of files of its last checkpoint.
Dead workers are replaced and go on from the last checkpoint, and so does a driver that is started again with the same
run id. This module knows nothing of what is trained.
"""

import contextlib
import logging
import os
import pathlib
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from mint_lib.errors import MintError
from mint_lib.progress import Progress

if TYPE_CHECKING:
    from ray.util.queue import Queue

    from mint_lib.store import Store

logger = logging.getLogger(__name__)
_POLL_SECONDS = 0.5


class WorkerResources(NamedTuple):
    """How many workers there are and what each gets."""

    num_workers: int
    cpus_per_worker: int
    use_gpu: bool
    max_failures: int


class ProgressReporter:
    """A worker's end of the line to the driver: positions, figures, and the error that ends the run. It pickles."""

    def __init__(self, queue: "Queue"):
        self._queue = queue

    def tell(self, done: int, total: int, figures: dict[str, float], *, activity: str = "") -> None:
        """Say that `done` of `total` steps are done, of training itself or of another activity."""
        self._queue.put(("progress", activity, done, total, figures))

    def fail(self, error: MintError) -> None:
        """End the run with an error that a new attempt would meet again; the driver raises it."""
        self._queue.put(("error", error))


def train_on_ray(
    loop: Callable[[dict[str, Any]], None],
    payload: dict[str, Any],
    *,
    resources: WorkerResources,
    store: "Store",
    run_id: str,
    description: str,
    target: pathlib.Path,
) -> pathlib.Path:
    """Run `loop(payload | {"progress": ProgressReporter})` on every worker; copy its last checkpoint to `target`.

    The loop reports its checkpoints with `ray.train.report`; the last one holds the results. `run_id` names the folder
    of running work in the store: an interrupted run with the same id is taken up. The progress says `description`.

    Raises:
        MintError: what a worker handed to `ProgressReporter.fail`.
        ray.train.TrainingFailedError: workers died more often than `resources.max_failures`.
    """
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.util.queue import Queue

    filesystem, runs_path = store.arrow_filesystem(), store.runs_path(run_id)
    num_cpus = resources.num_workers * resources.cpus_per_worker
    with ray_session(num_cpus):
        queue = Queue(actor_options={"num_cpus": 0})
        trainer = TorchTrainer(
            loop,
            train_loop_config=payload | {"progress": ProgressReporter(queue)},
            torch_config=TorchConfig(backend="nccl" if resources.use_gpu else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=resources.num_workers,
                use_gpu=resources.use_gpu,
                resources_per_worker={"CPU": resources.cpus_per_worker} | ({"GPU": 1} if resources.use_gpu else {}),
            ),
            run_config=RunConfig(
                name=run_id,
                storage_path=str(pathlib.PurePosixPath(runs_path).parent),
                storage_filesystem=filesystem,
                failure_config=FailureConfig(max_failures=resources.max_failures),
                checkpoint_config=CheckpointConfig(num_to_keep=1),
            ),
        )
        with _follow(queue, description) as errors:
            result = trainer.fit()
        if errors:
            raise errors[0]
        if result.checkpoint is None:
            raise RuntimeError(f"the training loop of {description} reported no checkpoint")
        result.checkpoint.to_directory(str(target))
    filesystem.delete_dir(runs_path)
    return target


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
def _follow(queue: "Queue", description: str) -> Iterator[list[MintError]]:
    """Tell the progress that arrives in `queue`; the list that is yielded collects the workers' errors."""
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
                activity, done, total, figures = values
                if activity not in bars:
                    title = ", ".join(part for part in (description, activity) if part)
                    bars[activity] = stack.enter_context(Progress(title, total=total))
                bars[activity].advance(done - bars[activity].done, **figures)

    thread = threading.Thread(target=listen, name="training-progress", daemon=True)
    thread.start()
    try:
        yield errors
    finally:
        finished.set()
        thread.join()
