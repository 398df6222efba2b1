"""Will it fit? What the alignment steps of a recipe need on a type of GPU, estimated before anything runs.

Goes in: planned steps and the store. Comes out: an `AlignmentForecast` of each alignment step, and tables of it. The
arithmetic is `mint_lib/training/estimate.py`'s; here a recipe's values and the lengths of its pairs are found for it.
"""

import dataclasses
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from mint_lib.attention import choose_attention
from mint_lib.flow import Step
from mint_lib.plugins import load_plugin
from mint_lib.records import Reference
from mint_lib.store import Store
from mint_lib.student import StudentConfig
from mint_lib.student_weights import fetch_student_folder
from mint_lib.training import estimate
from mint_lib.training.accelerators import Accelerator, choose_accelerators
from mint_lib.training.architecture import Architecture, read_architecture
from mint_lib.training.estimate_setting import Setting, count_trained
from mint_lib.training.method import AlignmentMethod
from mint_lib.training.settings import AlignmentConfig
from pipelines.planning import PlannedStep

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_TIGHT_SHARE = 0.9
"""Of a device's memory. An estimate above it may fail at a batch that is more ragged than most."""


class Fit(NamedTuple):
    """What an alignment step needs on one type of device."""

    terms: list[estimate.Term]
    """Bytes by cause."""
    verdict: str
    """`fits`, `tight`, `does not fit`, or empty where the device's memory is not known."""
    largest_batch: int | None
    """The largest `batch_tokens` that fits; None if none does, or the memory is not known."""
    step_seconds: float | None
    """Of an optimiser step; None where the device's speed is not known."""
    run_hours: float | None
    """Of all optimiser steps, validation left out; None where either number is not known."""

    @property
    def num_bytes(self) -> float:
        """Of one worker's device."""
        return sum(term.num_bytes for term in self.terms)


@dataclasses.dataclass(frozen=True)
class AlignmentForecast:
    """What an alignment step would train."""

    config: AlignmentConfig
    student: Architecture
    lengths: Setting
    """The setting on a GPU."""
    source: str
    """Where the lengths of its prompt trees come from, in words."""
    num_steps: int | None
    """Optimiser steps; None where the number of pairs is not known."""

    @property
    def num_trained(self) -> int:
        """Trained parameters."""
        return count_trained(self.student, self.lengths).num_parameters

    def fit(self, accelerator: Accelerator) -> Fit:
        """What it needs on workers of this type."""
        setting = _place(self.lengths, self.config, on_gpu=accelerator.memory_bytes is not None)
        terms = estimate.estimate_memory(self.student, setting)
        needed, memory = sum(term.num_bytes for term in terms), accelerator.memory_bytes
        largest, verdict = None, ""
        if memory is not None:
            verdict = "does not fit" if needed > memory else "tight" if needed > _TIGHT_SHARE * memory else "fits"
            largest = estimate.find_largest_batch(self.student, setting, memory_bytes=_TIGHT_SHARE * memory)
        peak = accelerator.bfloat16_flops if setting.dtype == "bfloat16" else accelerator.float32_flops
        seconds = None
        if peak is not None:
            speed = peak * estimate.UTILISATION * self.config.num_workers
            seconds = estimate.estimate_flops(self.student, setting) / speed
        hours = seconds * self.num_steps / 3600 if seconds is not None and self.num_steps is not None else None
        return Fit(terms, verdict, largest, seconds, hours)


def forecast_alignment(step: Step, planned: Sequence[PlannedStep], *, store: Store) -> AlignmentForecast | str:
    """What an alignment step would train, or why that cannot be said. Nothing is downloaded.

    Raises:
        InvalidInput: the student's family is none that can be estimated.
    """
    config = AlignmentConfig.model_validate(step.config.model_dump())
    method = load_plugin("alignment_methods", config.method, base=AlignmentMethod)
    if not method.splits_by_tokens:
        return (
            f"not estimated: {config.method} runs in TRL's trainer, whose memory follows other rules; methods on "
            "prompt trees are estimated"
        )
    folder = _find_config(config.student)
    if isinstance(folder, str):
        return folder
    student = read_architecture(folder, reads=config.student.reads, num_layers=config.student.num_layers)
    reference = next((item.reference for item in planned if item.step.id == step.inputs["preferences"]), None)
    tree = _TreeLengths.assume(config.student)
    if reference is not None:
        checks: Any = store.read_json(reference, "checks.json")
        tree = _TreeLengths.read(checks["train"], reference)
    with_prompt = config.method_config.get("nll") == "prompt_and_answer"
    deepspeed = config.deepspeed
    zero = deepspeed.settings.get("zero_optimization", {}) if deepspeed else {}
    bucket = zero.get("reduce_bucket_size")
    setting = Setting(
        tuning=config.tuning,
        lora=config.lora,
        quantisation=config.quantisation,
        dtype=config.student.dtype,
        activations=config.activations,
        batch_tokens=config.batch_tokens,
        row_tokens=tree.longest,
        mean_row_tokens=tree.mean,
        edge_share=1.0 if with_prompt else tree.answer_share,
        trees_per_batch=config.trees_per_batch,
        num_workers=config.num_workers,
        images_per_tree=1 if config.student.reads == "image" else 0,
        deepspeed_stage=deepspeed.stage if deepspeed else None,
        offload=deepspeed.offload if deepspeed else "none",
        cached_tokens=round(tree.mean * (tree.num_trees or 0)) if config.frozen_layers == "cache" else 0,
    )
    if isinstance(bucket, int):
        setting = dataclasses.replace(setting, bucket_elements=bucket)
    num_steps = math.ceil(tree.num_trees / config.trees_per_batch) * config.epochs if tree.num_trees else None
    setting = _place(setting, config, on_gpu=True)
    return AlignmentForecast(config, student, setting, tree.source, num_steps)


def make_fit_table(forecast: AlignmentForecast, accelerators: Mapping[str, Accelerator]) -> "Table":
    """One row for each type of device."""
    from rich.table import Table

    table = Table(
        "each worker on", "memory", "needed", "verdict", "largest batch_tokens", "a step", "the run", box=None
    )
    for name, accelerator in accelerators.items():
        fit = forecast.fit(accelerator)
        memory = accelerator.memory_bytes
        table.add_row(
            name,
            f"{memory / 1e9:.0f} GB" if memory else "this machine's",
            f"{fit.num_bytes / 1e9:.1f} GB",
            fit.verdict or "-",
            f"{fit.largest_batch:,}" if fit.largest_batch else ("none" if memory else "-"),
            f"{fit.step_seconds:.2g} s" if fit.step_seconds is not None else "not estimated",
            f"{fit.run_hours:.2g} h" if fit.run_hours is not None else "-",
        )
    return table


def make_memory_table(fit: Fit) -> "Table":
    """One row for each cause of memory, with its formula in words."""
    from rich.table import Table

    table = Table("memory for", "GB", "computed as", box=None)
    for term in fit.terms:
        table.add_row(term.name, f"{term.num_bytes / 1e9:.2f}", term.formula)
    return table


def describe_forecast(forecast: AlignmentForecast) -> Iterator[str]:
    """What the tables rest on, in sentences."""
    setting = forecast.lengths
    share = forecast.num_trained / (forecast.student.num_parameters + forecast.num_trained)
    if setting.tuning == "full":
        share = 1.0
    yield f"trains {forecast.num_trained:,} parameters ({share:.2%} of all)"
    yield f"lengths: {forecast.source}; a pass has at most {setting.num_places:,} places"
    tight = f"tight: above {_TIGHT_SHARE:.0%} of the memory; the largest batch_tokens stays below that"
    yield f"{tight}. The estimate was held against counted tensors, not against a GPU"
    yield (
        f"time: {estimate.estimate_flops(forecast.student, setting):.2e} operations of a step at "
        f"{estimate.UTILISATION:.0%} of the dense peak (assumed), divided by {forecast.config.num_workers}; without "
        "padding, communication and validation"
    )


def print_forecasts(planned: Sequence[PlannedStep], names: Sequence[str], *, store: Store, console: "Console") -> None:
    """Print what each alignment step needs on the device types `names`; without any, how to ask for that.

    Raises:
        InvalidInput: a type is not known, or the student's family is none that can be estimated.
    """
    accelerators = choose_accelerators(names)
    for item in planned:
        if item.step.stage != "alignment":
            continue
        if not names:
            if item.step.config.model_dump()["use_gpu"]:
                console.print("\nWill it fit? --gpu a100-80gb, or --gpu all, estimates memory and time of alignment.")
                return
            continue
        console.print(f"\n[bold]{item.step.id}[/bold]  will it fit?", highlight=False)
        forecast = forecast_alignment(item.step, planned, store=store)
        if isinstance(forecast, str):
            console.print(f"  {forecast}", highlight=False, markup=False)
            continue
        for sentence in describe_forecast(forecast):
            console.print(f"  {sentence}", highlight=False, markup=False)
        console.print(make_fit_table(forecast, accelerators))
        console.print(make_memory_table(forecast.fit(next(iter(accelerators.values())))))


class _TreeLengths(NamedTuple):
    """Places of the training set's prompt trees."""

    longest: int
    mean: float
    answer_share: float
    num_trees: int | None
    source: str

    @classmethod
    def assume(cls, student: StudentConfig) -> "_TreeLengths":
        window = student.window_tokens
        return cls(window, window, 1.0, None, f"no pairs yet: each tree taken at student.window_tokens, {window}")

    @classmethod
    def read(cls, checks: Mapping[str, Any], reference: Reference) -> "_TreeLengths":
        """At most: equal answers and equal beginnings of answers, which a tree holds once, are counted each time."""
        per_tree = checks["num_pairs"] / checks["num_paired_cases"]
        sides = [checks["chosen_tokens"], checks["rejected_tokens"]]
        answers = per_tree * sum(side["mean"] for side in sides)
        longest = checks["prompt_tokens"]["max"] + math.ceil(per_tree) * sum(side["max"] for side in sides)
        mean = checks["prompt_tokens"]["mean"] + answers
        version = f"{reference.kind}/{reference.name}@{reference.version}"
        source = f"{version}: {mean:.0f} places on average, at most {longest:.0f}"
        return cls(round(longest), mean, answers / mean, checks["num_paired_cases"], source)


def _place(setting: Setting, config: AlignmentConfig, *, on_gpu: bool) -> Setting:
    """The setting on a GPU or a CPU, which differ in attention and, as nothing casts on a CPU, in precision."""
    if not on_gpu:
        return dataclasses.replace(setting, attention="sdpa", dtype="float32", device="cpu")
    implementation = choose_attention(config.attention, use_gpu=config.student.reads == "text")
    attention: Literal["sdpa", "flex"] = "flex" if implementation == "flex_attention" else "sdpa"
    return dataclasses.replace(setting, attention=attention, dtype=config.student.dtype, device="cuda")


def _find_config(student: StudentConfig) -> pathlib.Path | str:
    """The folder of the student's `config.json`, or where to get it."""
    kind, _, place = student.model.partition(":")
    if kind != "hub":
        return fetch_student_folder(student.model)
    import huggingface_hub

    found = huggingface_hub.try_to_load_from_cache(place, "config.json", revision=student.revision)
    if isinstance(found, str):
        return pathlib.Path(found).parent
    revision = f" --revision {student.revision}" if student.revision else ""
    return (
        f"not estimated: the config of {student.model} is not on this machine, and a plan downloads nothing. Fetch "
        f"that one file with: hf download {place} config.json{revision}"
    )
