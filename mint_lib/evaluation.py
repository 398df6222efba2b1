"""Evaluation: measures every system on the same test cases, with the same prompt and the same decoding.

Goes in: cases, the teacher's rankings, the preferences (for the template and its k and q), students, and further
rankings as baselines. Comes out: a version of `report` with the page, `report.json`, every prediction, and the main
student's calibration on validation cases. What is asked and how it is scored is a plug-in; intervals, comparisons,
slices and the gate are the same for all of them.
"""

import abc
import logging
import pathlib
import tempfile
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from mint_lib.calibration import calibrate_student
from mint_lib.errors import InvalidInput
from mint_lib.plugins import load_plugin, parse_plugin_config
from mint_lib.progress import Progress
from mint_lib.reading import TextReader
from mint_lib.records import (
    Calibration,
    Case,
    EvaluationReport,
    Metric,
    Name,
    Prediction,
    Ranking,
    Reference,
    StageRecord,
    code_version,
)
from mint_lib.reporting.exhibits import collect_exhibits
from mint_lib.reporting.findings import (
    GateRule,
    Measured,
    PairedTest,
    Resampling,
    compare_systems,
    decide_gate,
    estimate_slices,
    estimate_systems,
)
from mint_lib.reporting.material import Material, check_rankings, draw_validation_cases, read_material
from mint_lib.reporting.page import render_report
from mint_lib.reporting.sentences import describe_findings, describe_headline
from mint_lib.rows import prediction_schema
from mint_lib.statistics import Measurement
from mint_lib.student import (
    StudentConfig,
    load_student,
    load_tokenizer,
    rank_labels,
)
from mint_lib.template import Template

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from mint_lib.store import Store

logger = logging.getLogger(__name__)
BASE, TEACHER, CHANCE, MAJORITY = "base", "teacher", "chance", "majority"


class EvaluationConfig(BaseModel):
    """What is measured, and what a student must reach."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: Name
    """Name of the report in the store."""
    seed: int = Field(ge=0, lt=2**32)
    """Seed of the bootstrap, the permutation tests and every draw of cases."""
    student: StudentConfig
    """The model that all students were made from, which is measured as `base`."""
    main: Name
    """The student that the report is about; with several seeds, the name of the arm."""
    task: str = "rare_disease_ranking"
    """File of `mint_lib/evaluation_tasks`."""
    config: dict[str, Any] = {}
    """The task's own config."""
    gate: tuple[GateRule, ...] = ()
    """All must hold. Without a rule the gate is not passed."""
    bootstrap_draws: int = Field(default=2000, ge=100, le=100_000)
    """Resamples of the patients behind every interval."""
    confidence: float = Field(default=0.95, gt=0.5, lt=1.0)
    """Level of the intervals."""
    slice_attributes: tuple[str, ...] = ("sex",)
    """Attributes of the cases by which results are shown apart, beside family, photo and label."""
    max_refused_share: float = Field(default=0.05, ge=0.0, lt=1.0)
    """Share of the test cases whose prompt may exceed the student's window before the evaluation is refused."""
    calibration_cases: int = Field(default=64, ge=0)
    """Labelled validation cases, drawn with the seed, on which the main student is calibrated; 0: it is not."""


class EvaluationTask(abc.ABC):
    """Base of the plug-ins in `mint_lib/evaluation_tasks`: what is asked and how answers are scored."""

    Config: ClassVar[type[BaseModel]]
    metrics: ClassVar[Mapping[str, Metric]]
    """Every metric that `measure` may give; the first is the one that sentences lead with."""
    tests: ClassVar[Mapping[str, PairedTest]]
    """Metrics that are means over cases and are compared by a paired test."""

    def __init__(self, config: Any, material: Material):
        self.config = config
        self.material = material

    @abc.abstractmethod
    def answer(
        self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", *, system: str
    ) -> list[Prediction]:
        """The model's answer to every case, in their order."""

    @abc.abstractmethod
    def adopt(self, rankings: Mapping[str, Ranking], *, system: str) -> list[Prediction]:
        """Rankings that were made elsewhere, as answers."""

    @abc.abstractmethod
    def guess(self) -> dict[str, list[Prediction]]:
        """Systems that do not look at the case, by name."""

    @abc.abstractmethod
    def measure(self, predictions: Sequence[Prediction]) -> dict[str, Measurement]:
        """Metric to measurement, with a row for every case. A metric that does not apply is left out."""

    @abc.abstractmethod
    def describe(self) -> tuple[str, ...]:
        """Sentences on what was asked and of how many cases, for the report."""


def evaluate_students(
    config: EvaluationConfig,
    *,
    store: "Store",
    cases: Reference,
    rankings: Reference,
    preferences: Reference,
    students: Mapping[str, Reference],
    baselines: Mapping[str, Reference],
) -> Reference:
    """A version of `report`. `students` of one arm are called `arm/run`; `baselines` are further rankings.

    Raises:
        InvalidInput: names clash, the main student is missing, or a student or ranking belongs to other labels.
        RefusedData: no test case can be measured, or too many prompts exceed the student's window.
    """
    check_names(config, students, baselines)
    plugin = load_plugin("evaluation_tasks", config.task, base=EvaluationTask)
    plugin_config = parse_plugin_config(plugin, config.config, where="evaluation.config")
    tokenizer = load_tokenizer(config.student)
    material, counts = read_material(
        store,
        tokenizer,
        cases=cases,
        rankings=rankings,
        preferences=preferences,
        window_tokens=config.student.window_tokens,
        max_refused_share=config.max_refused_share,
        seed=config.seed,
    )
    task = plugin(plugin_config, material)
    logger.info("evaluation: %d cases, %d students", len(material.cases), len(students))
    answers = {TEACHER: task.adopt(material.teacher, system=TEACHER)}
    for name, reference in baselines.items():
        ranked = {ranking.case_id: ranking for ranking in store.read_rows(reference, "test.parquet", Ranking)}
        check_rankings(material, ranked, where=str(reference))
        answers[name] = task.adopt(ranked, system=name)
    answers |= task.guess()
    answers[BASE] = task.answer(_place(load_student(config.student)), tokenizer, system=BASE)
    histories: dict[str, list[dict[str, float]]] = {}
    notes = list(task.describe())
    calibration: Calibration | None = None
    # The first run of the main arm is the one that is registered.
    registered = next(name for name in students if name.partition("/")[0] == config.main)
    for name, reference in students.items():
        notes += check_student(config, material, store, name, reference)
        histories[name] = cast(list[dict[str, float]], store.read_json(reference, "history.json"))
        with tempfile.TemporaryDirectory() as folder:
            # What was trained: an adapter, or all weights, with which the version then holds no adapter.
            is_full = any(path.startswith("weights/") for path in store.files(reference))
            tuned = store.download(reference, pathlib.Path(folder), prefix="weights" if is_full else "adapter")
            model = _place(load_student(config.student, tuned))
            answers[name] = task.answer(model, tokenizer, system=name)
            if name == registered:
                calibration = calibrate_main(config, material, store, model, tokenizer, student=reference, cases=cases)
    named = {"cases": cases, "rankings": rankings, "preferences": preferences} | {
        f"{kind}.{name}": reference
        for kind, references in (("students", students), ("baselines", baselines))
        for name, reference in references.items()
    }
    inputs = {name: str(reference) for name, reference in named.items()}
    report = build_report(config, task, answers, baselines=tuple(baselines), inputs=inputs, counts=counts, notes=notes)
    exhibits = collect_exhibits(report, answers, material.cases, material.labels, histories)
    with store.write("report", config.name) as version:
        version.add_bytes("report.html", render_report(report, exhibits).encode())
        version.add_json("report.json", report.model_dump(mode="json"))
        version.add_rows("predictions.parquet", [row for rows in answers.values() for row in rows], prediction_schema())
        if calibration is not None:
            version.add_json("calibration.json", calibration.model_dump(mode="json"))
        return version.commit(
            StageRecord(
                stage="evaluation",
                config=config.model_dump(mode="json"),
                inputs=inputs,
                code_version=code_version(),
                counts=dict(report.counts),
                metrics=flatten_metrics(report),
                notes=(report.headline, *report.notes),
            )
        )


def check_names(
    config: EvaluationConfig, students: Mapping[str, Reference], baselines: Mapping[str, Reference]
) -> None:
    """Refuse names that would be mistaken for one another. Raises InvalidInput."""
    arms = {name.partition("/")[0] for name in students}
    reserved = {BASE, TEACHER, CHANCE, MAJORITY}
    clashes = (arms & reserved) | (set(baselines) & (reserved | arms))
    if clashes:
        raise InvalidInput(f"The names {', '.join(sorted(clashes))} stand for two systems each. Rename these students.")
    if config.main not in arms:
        raise InvalidInput(
            f"The main student {config.main!r} is not among the students {', '.join(sorted(arms)) or '(none)'}. "
            "Set evaluation.main to one of them."
        )


def check_student(
    config: EvaluationConfig, material: Material, store: "Store", name: str, reference: Reference
) -> list[str]:
    """Refuse a student that is not of this base or these labels; returns what the report must say about it."""
    facts = cast(dict[str, Any], store.read_json(reference, "student.json"))
    made_from = StudentConfig.model_validate(facts["student"])
    if made_from != config.student:
        raise InvalidInput(
            f"{name} ({reference}) was made from {made_from.model_dump()}, and the evaluation measures "
            f"{config.student.model_dump()} as its base. Give both the same student."
        )
    label_ids = [label["id"] for label in cast(list[Any], store.read_json(reference, "labels.json"))]
    if set(label_ids) != {label.id for label in material.labels}:
        raise InvalidInput(
            f"{name} ({reference}) was trained on other labels. Align it on these cases, or leave it out."
        )
    if store.read_bytes(reference, "template.yaml") != material.template.data:
        return [f"{name} was trained with another prompt than the one that every system is asked with here."]
    return []


def calibrate_main(
    config: EvaluationConfig,
    material: Material,
    store: "Store",
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    *,
    student: Reference,
    cases: Reference,
) -> Calibration | None:
    """The main student's calibration on validation cases, asked as it is served: with the prompt it was trained on.

    None if no validation case has a diagnosis of the label set and a prompt that fits the window.
    """
    if not config.calibration_cases:
        return None
    template = Template.from_bytes(store.read_bytes(student, "template.yaml"))
    drawn = draw_validation_cases(
        store.read_rows(cases, "validation.parquet", Case),
        material.labels,
        template,
        tokenizer,
        window_tokens=config.student.window_tokens,
        num_cases=config.calibration_cases,
        seed=config.seed,
    )
    if not drawn:
        logger.warning("evaluation: no labelled validation case; %s is not calibrated", config.main)
        return None
    prompts = [template.prompt(case.text or "") for case in drawn]
    with Progress(f"evaluation: calibration of {config.main}", total=len(prompts)) as progress:
        scores_NL = rank_labels(
            model, TextReader(tokenizer), template, material.labels, prompts, progress=progress.advance
        )
    columns = {label.id: column for column, label in enumerate(material.labels)}
    truth_N = np.array([columns[str(case.label_id)] for case in drawn])
    return calibrate_student(scores_NL, truth_N, student=student)


def build_report(
    config: EvaluationConfig,
    task: EvaluationTask,
    answers: Mapping[str, Sequence[Prediction]],
    *,
    baselines: Sequence[str],
    inputs: dict[str, str],
    counts: dict[str, int],
    notes: Sequence[str],
) -> EvaluationReport:
    """The findings: estimates, paired comparisons with the main student, slices, gate, and sentences."""
    cases = task.material.cases
    groups = [case.group_id for case in cases]
    measured: Measured = {}
    for name in _order(config.main, answers, baselines):
        measured.setdefault(name.partition("/")[0], []).append(task.measure(answers[name]))
    roles: dict[str, Any] = dict.fromkeys(measured, "student") | dict.fromkeys(baselines, "baseline")
    roles |= {BASE: "base", TEACHER: "teacher"} | dict.fromkeys({CHANCE, MAJORITY} & set(measured), "reference")
    resampling = Resampling(config.bootstrap_draws, config.seed, config.confidence)
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
    )
    return report.model_copy(update={"headline": describe_headline(report), "statements": describe_findings(report)})


def slice_cases(config: EvaluationConfig, material: Material) -> dict[str, list[str | None]]:
    """Slice to the value of every case: family, photo, label, and the attributes that were asked for."""
    family_of = {label.id: label.family for label in material.labels}
    slices: dict[str, list[str | None]] = {
        "family": [family_of[str(case.label_id)] for case in material.cases],
        "photo": ["without photo" if case.image is None else "with photo" for case in material.cases],
        "label": [case.label_id for case in material.cases],
    }
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


def _place(model: "PreTrainedModel") -> "PreTrainedModel":
    """`model` on the accelerator, if this machine has one."""
    import torch

    return model.to("cuda") if torch.cuda.is_available() else model
