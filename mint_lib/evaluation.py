"""Evaluation: measures every system on the same test cases, with the same prompt and the same decoding.

Goes in: cases, the teacher's rankings, the preferences (for the template and its k and q), students, and further
rankings as baselines. Comes out: a version of `report` with the page, `report.json`, every prediction, and the main
student's calibration on validation cases. What is asked and how it is scored is a plug-in; intervals, comparisons,
slices and the gate are the same for all of them. The main student is also probed: one that reads images whether its
answers rest on them and how they stand worse ones, one that reads notes how far text in them moves it.
"""

import logging
import pathlib
import tempfile
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from mint_lib.calibration import calibrate_student
from mint_lib.code_version import code_version
from mint_lib.errors import InvalidInput
from mint_lib.plugins import load_plugin, parse_plugin_config
from mint_lib.progress import Progress
from mint_lib.reading import Reader
from mint_lib.records import Case, Ranking, Reference, StageRecord
from mint_lib.report_records import Calibration
from mint_lib.reporting.assembly import build_report, flatten_metrics
from mint_lib.reporting.exhibits import collect_exhibits
from mint_lib.reporting.material import Material, check_rankings, draw_validation_cases, read_material
from mint_lib.reporting.page import render_report
from mint_lib.reporting.probes import Probes, probe_student
from mint_lib.reporting.settings import EvaluationConfig
from mint_lib.reporting.task import BASE, CHANCE, MAJORITY, TEACHER, EvaluationTask
from mint_lib.rows import prediction_schema
from mint_lib.student import StudentConfig, load_reader, load_student, rank_labels
from mint_lib.student_weights import TUNED_FOLDERS
from mint_lib.template import Template

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from mint_lib.store import Store

logger = logging.getLogger(__name__)
_LEAK = "LEAK: "
"""Stands in a note of the cases' record that says what the splits share and must not share."""


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
        InvalidInput: names clash, the main student is missing, the preferences ask about what students do not read, or
            a student or ranking belongs to other labels.
        RefusedData: no test case can be measured, or too many prompts exceed the student's window.
    """
    check_names(config, students, baselines)
    plugin = load_plugin("evaluation_tasks", config.task, base=EvaluationTask)
    plugin_config = parse_plugin_config(plugin, config.config, where="evaluation.config")
    reader = load_reader(config.student)
    material, counts = read_material(
        store,
        reader,
        cases=cases,
        rankings=rankings,
        preferences=preferences,
        reads=config.student.reads,
        window_tokens=config.student.window_tokens,
        max_refused_share=config.max_refused_share,
        seed=config.seed,
    )
    task = plugin(plugin_config, material)
    logger.info("evaluation: %d cases, %d students", len(material.cases), len(students))
    answers = {TEACHER: task.adopt(material.teacher, system=TEACHER)}
    for name, reference in baselines.items():
        ranked = {ranking.case_id: ranking for ranking in store.read_rows(reference, "test", Ranking)}
        check_rankings(material, ranked, where=str(reference))
        answers[name] = task.adopt(ranked, system=name)
    answers |= task.guess()
    answers[BASE] = task.answer(_place(load_student(config.student)), reader, system=BASE)
    histories: dict[str, list[dict[str, float]]] = {}
    told = store.record(cases).notes
    notes = [*task.describe(), *(note for note in told if _LEAK not in note)]
    calibration, probes = None, Probes()
    # The first run of the main arm is the one that is registered.
    registered = next(name for name in students if name.partition("/")[0] == config.main)
    for name, reference in students.items():
        notes += check_student(config, material, store, name, reference)
        histories[name] = cast(list[dict[str, float]], store.read_json(reference, "history.json"))
        with tempfile.TemporaryDirectory() as folder:
            # What was trained: an adapter, or all weights, with which the version then holds no adapter.
            is_full = any(path.startswith(f"{TUNED_FOLDERS['full']}/") for path in store.files(reference))
            prefix = TUNED_FOLDERS["full" if is_full else "adapter"]
            tuned = store.download(reference, pathlib.Path(folder), prefix=prefix)
            model = _place(load_student(config.student, tuned))
            answers[name] = task.answer(model, reader, system=name)
            if name == registered:
                calibration = calibrate_main(config, material, store, model, reader, student=reference, cases=cases)
                probes = probe_student(config, material, model, reader, answers[name], student=reference)
    named = {"cases": cases, "rankings": rankings, "preferences": preferences} | {
        f"{kind}.{name}": reference
        for kind, references in (("students", students), ("baselines", baselines))
        for name, reference in references.items()
    }
    inputs = {name: str(reference) for name, reference in named.items()}
    report = build_report(
        config,
        task,
        answers,
        baselines=tuple(baselines),
        inputs=inputs,
        counts=counts,
        notes=notes,
        leaks=[note.replace(_LEAK, "") for note in told if _LEAK in note],
        grounding=probes.grounding.grounding if probes.grounding else None,
        perturbations=probes.perturbations,
        injections=probes.injections,
    )
    exhibits = collect_exhibits(
        report,
        answers,
        material.cases,
        material.labels,
        histories,
        confusion=task.confusion,
        probe=probes.grounding,
        injections=probes.injections,
        shows=config.examples,
    )
    with store.write("report", config.name) as version:
        version.add_bytes("report.html", render_report(report, exhibits).encode())
        version.add_json("report.json", report.model_dump(mode="json"))
        version.add_rows("predictions", [row for rows in answers.values() for row in rows], prediction_schema())
        if calibration is not None:
            version.add_json("calibration.json", calibration.model_dump(mode="json"))
        if probes.injections is not None:
            version.add_json("injections.json", probes.injections.model_dump(mode="json"))
        return version.commit(
            StageRecord(
                stage="evaluation",
                config=config.model_dump(mode="json"),
                inputs=inputs,
                code_version=code_version(),
                counts=dict(report.counts),
                metrics=flatten_metrics(report),
                notes=(report.headline, *report.leaks, *report.notes),
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
    reader: Reader,
    *,
    student: Reference,
    cases: Reference,
) -> Calibration | None:
    """The main student's calibration on validation cases, asked as it is served: with the prompt it was trained on.

    None if no validation case has a label of the set and a prompt that fits the window.
    """
    if not config.calibration_cases:
        return None
    template = Template.from_bytes(store.read_bytes(student, "template.yaml"))
    drawn = draw_validation_cases(
        store.read_rows(cases, "validation", Case),
        material.labels,
        template,
        reader,
        window_tokens=config.student.window_tokens,
        num_cases=config.calibration_cases,
        seed=config.seed,
    )
    if not drawn:
        logger.warning("evaluation: no labelled validation case; %s is not calibrated", config.main)
        return None
    questions = [template.question(case) for case in drawn]
    with Progress(f"evaluation: calibration of {config.main}", total=len(questions)) as progress:
        scores_NL = rank_labels(
            model,
            reader,
            template,
            material.labels,
            [question.turns for question in questions],
            images=[question.images for question in questions],
            progress=progress.advance,
        )
    columns = {label.id: column for column, label in enumerate(material.labels)}
    truth_N = np.array([columns[str(case.label_id)] for case in drawn])
    return calibrate_student(scores_NL, truth_N, student=student)


def _place(model: "PreTrainedModel") -> "PreTrainedModel":
    """`model` on the accelerator, if this machine has one."""
    import torch

    return model.to("cuda") if torch.cuda.is_available() else model
