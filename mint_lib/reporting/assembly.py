"""Assembly of a report: from every system's answers to the whole `EvaluationReport`.

Goes in: the config, the task, answers, and what was probed. Comes out: estimates, paired comparisons with the main
student, slices, the gate's decision, and sentences, in one record. It knows neither models nor the store.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from mint_lib.report_records import EvaluationReport, Grounding, Perturbation, Prediction
from mint_lib.reporting.findings import (
    Measured,
    Resampling,
    compare_systems,
    decide_gate,
    estimate_slices,
    estimate_systems,
)
from mint_lib.reporting.injections import Injections
from mint_lib.reporting.material import Material
from mint_lib.reporting.sentences import describe_findings, describe_headline, describe_injections
from mint_lib.reporting.settings import EvaluationConfig
from mint_lib.reporting.task import BASE, CHANCE, MAJORITY, TEACHER, EvaluationTask


def build_report(
    config: EvaluationConfig,
    task: EvaluationTask,
    answers: Mapping[str, Sequence[Prediction]],
    *,
    baselines: Sequence[str],
    inputs: dict[str, str],
    counts: dict[str, int],
    notes: Sequence[str],
    leaks: Sequence[str] = (),
    grounding: Grounding | None = None,
    perturbations: Sequence[Perturbation] = (),
    injections: Injections | None = None,
) -> EvaluationReport:
    """The findings: estimates, paired comparisons with the main student, slices, gate, and sentences."""
    cases = task.material.cases
    groups = [case.group_id for case in cases]
    measured: Measured = {}
    for name in _order(config.main, answers, baselines):
        measured.setdefault(name.partition("/")[0], []).append(task.measure(answers[name]))
    roles: dict[str, Any] = dict.fromkeys(measured, "student") | dict.fromkeys(baselines, "baseline")
    roles |= {BASE: "base", TEACHER: "teacher"} | dict.fromkeys({CHANCE, MAJORITY} & set(measured), "reference")
    resampling = resampling_of(config)
    synthetic = {case.synthetic for case in cases}
    report = EvaluationReport(
        name=config.name,
        task=config.task,
        main=config.main,
        headline="",
        statements=(),
        lead=next(iter(task.metrics)),
        order=tuple(measured),
        metrics=dict(task.metrics),
        systems=estimate_systems(measured, groups, resampling),
        roles=roles,
        runs={name: len(runs) for name, runs in measured.items()},
        comparisons=tuple(compare_systems(config.main, task.tests, measured, groups, resampling)),
        slices=estimate_slices(slice_cases(config, task.material), tuple(task.tests), measured, groups, resampling),
        gate=decide_gate(config.gate, config.main, measured, groups, resampling),
        inputs=inputs,
        counts=counts,
        synthetic="some" if len(synthetic) == 2 else "all" if synthetic == {True} else "none",
        seed=config.seed,
        bootstrap_draws=config.bootstrap_draws,
        confidence=config.confidence,
        notes=tuple(notes),
        reads=task.material.template.reads,
        wording=task.wording,
        leaks=tuple(leaks),
        grounding=grounding,
        perturbations=tuple(perturbations),
    )
    statements = describe_findings(report)
    if injections:
        statements += (describe_injections(report, injections),)
    return report.model_copy(update={"headline": describe_headline(report), "statements": statements})


def resampling_of(config: EvaluationConfig) -> Resampling:
    """How the intervals of a report are made."""
    return Resampling(config.bootstrap_draws, config.seed, config.confidence)


def slice_cases(config: EvaluationConfig, material: Material) -> dict[str, list[str | None]]:
    """Slice to the value of every case: family, photo where students read text, label, and attributes asked for."""
    family_of = {label.id: label.family for label in material.labels}
    slices: dict[str, list[str | None]] = {"family": [family_of[str(case.label_id)] for case in material.cases]}
    if material.template.reads == "text":
        slices["photo"] = ["without photo" if case.image is None else "with photo" for case in material.cases]
    slices["label"] = [case.label_id for case in material.cases]
    return slices | {key: [case.attributes.get(key) for case in material.cases] for key in config.slice_attributes}


def flatten_metrics(report: EvaluationReport) -> dict[str, float]:
    """`system.metric` to value, for the record."""
    return {
        f"{name}.{metric}": estimate.value
        for name, estimates in report.systems.items()
        for metric, estimate in estimates.items()
        if estimate.value is not None
    }


def _order(main: str, answers: Mapping[str, Sequence[Prediction]], baselines: Sequence[str]) -> list[str]:
    """Runs as tables show them: the main student, other students, base, teacher, baselines, guesses."""
    last = [BASE, TEACHER, *baselines, MAJORITY, CHANCE]
    students = [name for name in answers if name not in last]
    mains = [name for name in students if name.partition("/")[0] == main]
    return [*mains, *(name for name in students if name not in mains), *(name for name in last if name in answers)]
