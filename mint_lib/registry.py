"""The registry: publishes a student with its report and card as one model, and moves `champion` past a passed gate.

Goes in: a student and the report that measured it. Comes out: a version of `model`, to which the alias `candidate`
points. Promotion and rollback only move the alias `champion`, with who and why; nothing is ever deleted. It trains and
measures nothing.
"""

import logging
import pathlib
import tempfile
from typing import TYPE_CHECKING, Any, cast

from pydantic import BaseModel, ConfigDict, Field

from mint_lib.code_version import code_version
from mint_lib.errors import Conflict, GateFailed, InvalidInput, NotFound
from mint_lib.records import Name, Reference, StageRecord
from mint_lib.report_records import Calibration, EvaluationReport, ModelCard
from mint_lib.reporting.card import render_card
from mint_lib.reporting.sentences import describe_rule

if TYPE_CHECKING:
    from mint_lib.storage.aliases import Alias
    from mint_lib.store import Store

logger = logging.getLogger(__name__)
CANDIDATE, CHAMPION = "candidate", "champion"
CALIBRATION = "calibration.json"
_ATTEMPTS = 5
_NO_DEVICE = "Not a medical device: no answer is a diagnosis or a reason to treat or not to treat."
_READS_LIMITS = {
    "text": "It reads text in the wording it was trained with; other wordings and languages were not measured.",
    "image": "It sees images of the kind it was trained on; other stains, scanners, magnifications and organs were not "
    "measured, and an image that shows no tissue at all is answered as if it did.",
}


class RegistryConfig(BaseModel):
    """What a model is published as."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: Name
    """Name of the model in the store."""
    licence: str = Field(min_length=1)
    """Licence of the weights; it follows from the base model's, for instance `Apache-2.0`."""
    intended_use: str = Field(
        default="Research on transferring a teacher's knowledge to a student that sees less. No clinical use.",
        min_length=1,
    )
    """What the model may be used for."""


def register_model(config: RegistryConfig, *, store: "Store", student: Reference, report: Reference) -> Reference:
    """A version of `model` with the student's files, the report and a card; `candidate` is moved to it.

    Raises:
        InvalidInput: the report is not about this student.
        GateFailed: it is an image student that the report does not show to look at the image.
        Conflict: others kept moving `candidate`.
    """
    findings = read_report(store, report)
    check_report(findings, student, report)
    facts = cast(dict[str, Any], store.read_json(student, "student.json"))
    check_grounding(findings, student, reads=facts["student"].get("reads", "text"))
    card = write_card(config, store, findings, student=student, report=report)
    is_calibrated = has_calibration(store, student, report)
    with tempfile.TemporaryDirectory() as folder_name, store.write("model", config.name) as version:
        folder = store.download(student, pathlib.Path(folder_name))
        for path in sorted(store.files(student)):
            if path != "record.json":
                version.add_file(path, folder / path)
        for path in ("report.html", "report.json"):
            version.add_bytes(path, store.read_bytes(report, path))
        if is_calibrated:
            version.add_bytes(CALIBRATION, store.read_bytes(report, CALIBRATION))
        version.add_json("card.json", card.model_dump(mode="json"))
        version.add_bytes("card.md", render_card(card, findings).encode())
        reference = version.commit(
            StageRecord(
                stage="registry",
                config=config.model_dump(mode="json"),
                inputs={"student": str(student), "report": str(report)},
                code_version=code_version(),
                metrics={name: item.value for name, item in card.metrics.items() if item.value is not None},
                notes=(findings.headline, f"gate {'passed' if findings.gate.passed else 'not passed'}"),
            )
        )
    _move_candidate(store, reference)
    return reference


def promote_model(store: "Store", model: str, *, who: str, why: str) -> "Alias":
    """Move `champion` to `model` (a reference, `model/name@...` or a model's name for its candidate).

    Raises:
        GateFailed: its report did not pass the gate; names the rules that failed.
        InvalidInput: who or why is empty, or `model` is no model.
        Conflict: somebody else moved `champion` meanwhile.
    """
    _check_reason(who, why)
    reference = resolve_model(store, model)
    findings = read_report(store, reference)
    if not findings.gate.passed:
        failed = [describe_rule(findings, rule) for rule in findings.gate.rules if not rule.passed]
        raise GateFailed(
            f"{reference} did not pass its gate: "
            f"{'; '.join(failed) or 'its recipe declares no rule under evaluation.gate'}. `champion` was not moved. "
            "Train a better student; a gate is never lowered to let a model through."
        )
    current = store.alias("model", reference.name, CHAMPION)
    if current is not None and current.reference == reference:
        return current
    return store.move_alias(
        CHAMPION, reference, who=who, why=why, expected=current.reference if current is not None else None
    )


def rollback_model(store: "Store", name: str, *, who: str, why: str) -> "Alias":
    """Move `champion` of the model `name` back to the version that was champion before the present one.

    Rolling back again goes one version further back. The gate of that version was passed when it was promoted.

    Raises:
        NotFound: there is no champion, or none before it.
        Conflict: somebody else moved `champion` meanwhile.
    """
    _check_reason(who, why)
    current = store.alias("model", name, CHAMPION)
    if current is None:
        raise NotFound(f"model/{name} has no champion to roll back from. Promote one with `mint promote`.")
    trail = current.trail
    if len(trail) < 2:
        raise NotFound(f"{current.reference} is the first champion of model/{name}: there is none to go back to.")
    return store.move_alias(CHAMPION, Reference.parse(trail[-2]), who=who, why=why, expected=current.reference)


def resolve_model(store: "Store", model: str) -> Reference:
    """The reference that `model` means; a bare name means its candidate. Raises InvalidInput and NotFound."""
    reference = store.resolve(model if "/" in model else f"model/{model}@{CANDIDATE}")
    if reference.kind != "model":
        raise InvalidInput(f"{reference} is not a model. Give a model's name, or model/name@version.")
    return reference


def read_report(store: "Store", reference: Reference) -> EvaluationReport:
    """The findings in a version of `report` or `model`."""
    return EvaluationReport.model_validate(store.read_json(reference, "report.json"))


def check_report(findings: EvaluationReport, student: Reference, report: Reference) -> None:
    """Refuse a report whose main student is not `student`. Raises InvalidInput."""
    mains = {
        reference
        for name, reference in findings.inputs.items()
        if name.startswith("students.") and name.removeprefix("students.").partition("/")[0] == findings.main
    }
    if str(student) not in mains:
        raise InvalidInput(
            f"{report} is about {', '.join(sorted(mains)) or 'no student'}, not about {student}. Register the student "
            "that the report measured as its main one, or evaluate this one."
        )


def check_grounding(findings: EvaluationReport, student: Reference, *, reads: str) -> None:
    """Refuse an image student that may answer without looking. Raises GateFailed."""
    if reads == "text":
        return
    probed = findings.grounding
    if probed is None or probed.student != str(student):
        which = f"probed {probed.student}" if probed else "probed none"
        raise GateFailed(
            f"{student} sees images, and its report {which}: nothing shows that it looks at them. Evaluate it with "
            "evaluation.grounding, which probes the first run of the main student, and register that one."
        )
    if not probed.passed:
        failed = ", ".join(variant.kind for variant in probed.variants if variant.passed is False)
        raise GateFailed(
            f"{student} is not shown to look at the image: it failed the grounding probe with {failed}. See the report "
            "for the numbers. Train a student that passes, or probe more test cases if the intervals are too wide."
        )


def has_calibration(store: "Store", student: Reference, report: Reference) -> bool:
    """Whether the report calibrated this very student; another seed of the same arm has another temperature."""
    if CALIBRATION not in store.files(report):
        return False
    return Calibration.model_validate(store.read_json(report, CALIBRATION)).student == str(student)


def write_card(
    config: RegistryConfig, store: "Store", findings: EvaluationReport, *, student: Reference, report: Reference
) -> ModelCard:
    """What somebody must know before using the model, from its records."""
    facts = cast(dict[str, Any], store.read_json(student, "student.json"))
    qualification = cast(
        dict[str, Any], store.read_json(Reference.parse(findings.inputs["rankings"]), "qualification.json")
    )
    return ModelCard(
        name=config.name,
        base_model=facts["student"]["model"],
        base_digest=facts["base_digest"],
        method=facts["method"],
        student=str(student),
        inputs={"report": str(report), **findings.inputs},
        teacher_digest=qualification["teacher_digest"],
        headline=findings.headline,
        metrics=findings.systems[findings.main],
        gate_passed=findings.gate.passed,
        synthetic=findings.synthetic,
        licence=config.licence,
        intended_use=config.intended_use,
        limits=(
            _NO_DEVICE,
            findings.wording.closed,
            _READS_LIMITS[findings.reads],
            *_find_limits(facts, findings),
        ),
        grounding=findings.grounding,
    )


def _find_limits(facts: dict[str, Any], findings: EvaluationReport) -> list[str]:
    """Limits that follow from how this model was made and measured."""
    limits = []
    if facts["student"]["num_layers"] is not None:
        limits.append(f"The base model was cut to its first {facts['student']['num_layers']} layers.")
    if findings.synthetic != "none":
        which = {"all": "All", "some": "Some"}[findings.synthetic]
        real = "images" if findings.reads == "image" else "patients"
        limits.append(f"{which} of its test cases were simulated; its worth on real {real} is not shown by them.")
    limits += [f"Its test is not fair, for the splits leak: {leak}" for leak in findings.leaks]
    runs = findings.runs[findings.main]
    if runs > 1:
        limits.append(f"The figures are the mean of {runs} seeds; the weights are those of one of them.")
    return limits


def _move_candidate(store: "Store", reference: Reference) -> None:
    """Point `candidate` at `reference`, against others who do the same."""
    for attempt in range(1, _ATTEMPTS + 1):
        current = store.alias("model", reference.name, CANDIDATE)
        try:
            expected = current.reference if current is not None else None
            store.move_alias(CANDIDATE, reference, who="registry", why="registered", expected=expected)
            return
        except Conflict:
            if attempt == _ATTEMPTS:
                raise
            logger.info("registry: candidate of %s was moved by somebody else; trying again", reference.name)


def _check_reason(who: str, why: str) -> None:
    if not who.strip() or not why.strip():
        raise InvalidInput("Say who moves the champion and why: both stand in its log for good.")
