"""What tests of interrupted trainings share: the run, a method that breaks in mid-step, and what a run left behind.

A method that breaks is a class made in a function, so it travels to Ray's workers by value.
"""

import json
import os
import pathlib
import signal
import time
from typing import Any, Literal

import psutil
import pyarrow.fs
import pytest
from tiny_alignment import LABELS, TEMPLATE, config_of, make_pairs
from tiny_preferences import add_passed_gate

import mint_lib.alignment
from mint_lib.alignment_methods.orpo import Orpo
from mint_lib.errors import OutOfMemory
from mint_lib.records import Reference, StageRecord
from mint_lib.rows import pair_schema
from mint_lib.store import Store
from mint_lib.training.checkpoints import RunCheckpoints
from mint_lib.training.method import AlignmentMethod
from mint_lib.training.settings import AlignmentConfig

NUM_TRAIN_CASES = 24
NUM_STEPS = 30
BREAK_STEP = 6
"""Between the checkpoints of steps 4 and 8."""


def make_config(**values: Any) -> AlignmentConfig:
    """`NUM_STEPS` steps of 5 prompts in passes of 2 or 3, so that two workers have unlike parts of a step."""
    defaults: dict[str, Any] = {
        "method_config": {"nll": "answer"},
        "epochs": 6,
        "trees_per_batch": 5,
        "batch_tokens": 160,
        "validate_every_steps": 9,
        "checkpoint_every_steps": 4,
        "early_stop_patience": 99,
        "cpus_per_worker": 1,
    }
    return config_of(**(defaults | values))


def write_preferences(store: Store) -> Reference:
    """Pairs of `NUM_TRAIN_CASES` cases to train on and of 9 more for validation."""
    pairs = make_pairs(NUM_TRAIN_CASES + 9)
    num_train = 2 * NUM_TRAIN_CASES
    with store.write("preferences", "test") as version:
        version.add_rows("train", pairs[:num_train], pair_schema())
        version.add_rows("validation", pairs[num_train:], pair_schema())
        version.add_json("labels.json", [label.model_dump(mode="json") for label in LABELS])
        version.add_bytes("template.yaml", TEMPLATE.data)
        add_passed_gate(version)
        return version.commit(StageRecord(stage="preferences", config={}, inputs={}, code_version="test"))


def run_alignment(store: Store, **values: Any) -> Reference:
    """The student of a whole run in this process."""
    return mint_lib.alignment.align_student(make_config(**values), store=store, preferences=write_preferences(store))


def hash_files(store: Store, reference: Reference) -> dict[str, str]:
    """The digest of every file that must not depend on how often a run was interrupted."""
    return {path: entry.sha256 for path, entry in store.files(reference).items() if path != "record.json"}


def read_history(store: Store, reference: Reference, kind: str) -> list[dict[str, Any]]:
    """The history's rows of one kind."""
    rows = json.loads(store.read_bytes(reference, "history.json"))
    return [row for row in rows if row["kind"] == kind]


def list_run_files(store: Store) -> list[str]:
    """Every file that running work has in `store`, as `bucket/prefix/runs/...`."""
    folder = store.runs_path("x").rpartition("/")[0]
    selector = pyarrow.fs.FileSelector(folder, recursive=True, allow_not_found=True)
    return [item.path for item in store.arrow_filesystem().get_file_info(selector) if item.is_file]


def open_checkpoints(store: Store) -> RunCheckpoints:
    """Those of the one run that `store` holds files of."""
    (run_id,) = {path.partition("/runs/")[2].partition("/")[0] for path in list_run_files(store)}
    return RunCheckpoints(store, run_id)


def find_ray_workers(pid: int) -> list[psutil.Process]:
    """The training workers below the driver `pid`: other sessions on this machine are none of its business."""
    found = []
    for process in psutil.Process(pid).children(recursive=True):
        try:
            found += [process] if "RayTrainWorker" in " ".join(process.cmdline()) else []
        except psutil.Error:
            continue
    return found


def break_training(
    patch: pytest.MonkeyPatch, how: Literal["kill", "out_of_memory", "wait"], marker: pathlib.Path, *, rank: int = 0
) -> None:
    """Break the worker `rank` in the middle of step `BREAK_STEP`, after its backward pass.

    Only the first attempt breaks, and leaves the file `marker`; `wait` lasts until the content is "go on".
    """

    class BreakingOrpo(Orpo):
        """ORPO until the step."""

        def build_trainer(self, model: Any, *, trees: Any, setup: Any) -> Any:
            trainer = super().build_trainer(model, trees=trees, setup=setup)
            run_step = trainer.training_step

            def step_and_break(*arguments: Any, **options: Any) -> Any:
                loss = run_step(*arguments, **options)
                is_now = setup.rank == rank and trainer.state.global_step == BREAK_STEP - 1
                if is_now and not marker.exists():
                    marker.touch()
                    if how == "kill":
                        os.kill(os.getpid(), signal.SIGKILL)
                    elif how == "out_of_memory":
                        raise OutOfMemory("too much")
                    while marker.read_text() != "go on":
                        time.sleep(0.05)
                return loss

            trainer.training_step = step_and_break
            return trainer

    def load(*_: Any, **__: Any) -> type[AlignmentMethod]:
        return BreakingOrpo

    patch.setattr(mint_lib.alignment, "load_plugin", load)
