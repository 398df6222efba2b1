"""What a run of a recipe would do, found without doing any of it.

Goes in: a recipe and the store. Comes out: per step what is cached, what would be written, and an estimate.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

from mint_lib.flow import Step, is_step, list_steps
from mint_lib.recipe import Recipe
from mint_lib.records import Reference
from mint_lib.stages import output_key
from mint_lib.store import Store
from mint_lib.training.settings import AlignmentConfig


class PlannedStep(NamedTuple):
    """One step and what is known of its output."""

    step: Step
    reference: Reference | None
    """The output where it is in the store already; None if the step would run."""
    estimate: str
    """What it would make, in words; empty where nothing can be said."""


def plan_steps(recipe: Recipe, *, store: Store) -> list[PlannedStep]:
    """The recipe's steps with their cached outputs. A step whose input is not there yet is not cached either."""
    known: dict[str, Reference] = {}
    planned: list[PlannedStep] = []
    for step in list_steps(recipe):
        inputs = _resolve_inputs(step, known)
        reference = store.find_output(output_key(step.stage, step.config, inputs)) if inputs is not None else None
        if reference is not None:
            known[step.id] = reference
        planned.append(PlannedStep(step, reference, _estimate(step, known, store)))
    return planned


def describe_placement(recipe: Recipe, step: Step) -> str:
    """Where a step runs on a cluster, in words; for a Ray job the amounts are each worker pod's."""
    placement = getattr(recipe.cluster, step.stage)
    amounts = [f"{placement.num_cpus} cores", f"{placement.memory_gib} GiB of memory"]
    if placement.num_gpus:
        amounts.append(f"{placement.num_gpus} x {placement.gpu_resource}")
    if placement.ray is None:
        return f"its pod, {', '.join(amounts)}"
    num_workers = step.config.model_dump().get("num_workers", 1)
    num_pods = math.ceil(num_workers / placement.ray.workers_per_pod) if num_workers > 1 else 1
    return f"a Ray job, {num_pods} x ({', '.join(amounts)}), ended after {placement.ray.deadline_hours:g} h"


def _resolve_inputs(
    step: Step, known: Mapping[str, Reference]
) -> dict[str, Reference | Mapping[str, Reference]] | None:
    inputs: dict[str, Reference | Mapping[str, Reference]] = {}
    for name, source in step.inputs.items():
        if isinstance(source, str) and not is_step(source):
            inputs[name] = Reference.parse(source)
            continue
        ids = [source] if isinstance(source, str) else list(source.values())
        if any(step_id not in known for step_id in ids):
            return None
        inputs[name] = known[source] if isinstance(source, str) else {key: known[item] for key, item in source.items()}
    return inputs


def _find_cases(step: Step, known: Mapping[str, Reference]) -> Reference | None:
    source = str(step.inputs["cases"])
    return known.get(source) if is_step(source) else Reference.parse(source)


def _estimate(step: Step, known: Mapping[str, Reference], store: Store) -> str:
    """Pairs and optimizer steps, exact where the input lies in the store."""
    if step.stage == "preferences" and (cases_reference := _find_cases(step, known)) is not None:
        cases = store.record(cases_reference).counts["train/cases"]
        pairs_per_case = getattr(step.config, "pairs_per_case", 1)
        return f"at most {cases * pairs_per_case} training pairs from {cases} cases"
    if step.stage == "alignment" and str(step.inputs["preferences"]) in known:
        counts = store.record(known[str(step.inputs["preferences"])]).counts
        config = AlignmentConfig.model_validate(step.config.model_dump())
        num_steps = math.ceil(counts["train_num_paired_cases"] / config.trees_per_batch) * config.epochs
        return f"at most {num_steps} optimizer steps on {counts['train_num_pairs']} pairs"
    return ""
