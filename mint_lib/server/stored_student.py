"""A student as the store holds it: the small files of a `model` or `student` version, validated strictly.

Goes in: a reference. Comes out: a `StoredStudent`, whose parts were found to belong together. The adapter's files are
another module's; nothing here is loaded into a model.
"""

from typing import TYPE_CHECKING, Literal, NamedTuple, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError

from mint_lib.errors import InvalidInput
from mint_lib.records import Label, Record, Reference
from mint_lib.report_records import Calibration, ModelCard
from mint_lib.student import StudentConfig
from mint_lib.template import Template

if TYPE_CHECKING:
    from mint_lib.store import Store

M = TypeVar("M", bound=BaseModel)
_NO_CARD = "It was not registered: no report, gate or card stands behind it."
_NO_CARD_USE = "Trying out a student that was not registered. No clinical use."
_GATE_FAILED = "It did not pass its gate."
_NOT_CALIBRATED = "Its probabilities are not calibrated."
_LABELS = TypeAdapter(tuple[Label, ...])


class StudentFacts(Record):
    """`student.json`: what was trained on what and how."""

    student: StudentConfig
    tuning: Literal["adapter", "full"] = "adapter"
    """`full`: all weights were trained, and the version holds them instead of an adapter."""
    quantisation: Literal["none", "nf4"] = "none"
    """How the base was held in training; the adapter is served on the base as it is."""
    base_digest: str
    template_digest: str
    method: str
    method_config: dict[str, object]
    lora: dict[str, object]
    best_step: int
    keep_best: str
    num_trainable_parameters: int


class StoredStudent(NamedTuple):
    """Everything but the weights."""

    reference: Reference
    facts: StudentFacts
    template: Template
    labels: tuple[Label, ...]
    calibration: Calibration | None
    intended_use: str
    limits: tuple[str, ...]


def read_student(store: "Store", reference: Reference) -> StoredStudent:
    """The student of the version `reference`.

    Raises:
        InvalidInput: it is no model or student, or one of its files is not what it must be.
        StoreError: a file is missing, or not what was committed.
    """
    if reference.kind not in ("model", "student"):
        raise InvalidInput(f"{reference} is a version of {reference.kind}. Serve a model, or a student to try it out.")
    facts = _read(store, reference, "student.json", StudentFacts)
    template = Template.from_bytes(store.read_bytes(reference, "template.yaml"))
    if template.digest != facts.template_digest:
        raise InvalidInput(f"{reference} holds another template than the one that it was trained with. Align it again.")
    calibration = None
    if "calibration.json" in store.files(reference):
        calibration = _read(store, reference, "calibration.json", Calibration)
    intended_use = _NO_CARD_USE
    limits: tuple[str, ...] = (_NO_CARD,)
    if reference.kind == "model":
        card = _read(store, reference, "card.json", ModelCard)
        if (card.base_digest, card.base_model) != (facts.base_digest, facts.student.model):
            raise InvalidInput(f"The card of {reference} names another base than its student.json. Register it again.")
        intended_use, limits = card.intended_use, card.limits
        if not card.gate_passed:
            limits += (_GATE_FAILED,)
    if calibration is None:
        limits += (_NOT_CALIBRATED,)
    return StoredStudent(reference, facts, template, _read_labels(store, reference), calibration, intended_use, limits)


def find_cases(store: "Store", reference: Reference) -> Reference:
    """The cases that the student was trained, validated and tested on, by its lineage.

    Raises:
        InvalidInput: its records do not name them.
    """
    if reference.kind == "model":
        inputs = _read(store, reference, "card.json", ModelCard).inputs
    else:
        preferences = store.record(reference).inputs.get("preferences", "")
        inputs = store.record(Reference.parse(preferences)).inputs
    if "cases" not in inputs:
        raise InvalidInput(f"{reference} does not say which cases it was made from. Align it again on known cases.")
    return Reference.parse(inputs["cases"])


def _read_labels(store: "Store", reference: Reference) -> tuple[Label, ...]:
    try:
        labels = _LABELS.validate_json(store.read_bytes(reference, "labels.json"))
    except ValidationError as error:
        raise _explain(error, "labels.json", reference) from None
    if len(labels) < 2 or any(len({getattr(label, key) for label in labels}) != len(labels) for key in ("id", "name")):
        raise InvalidInput(f"labels.json of {reference} needs two labels or more, each with its own id and name.")
    return labels


def _read(store: "Store", reference: Reference, path: str, model: type[M]) -> M:
    try:
        return model.model_validate_json(store.read_bytes(reference, path))
    except ValidationError as error:
        raise _explain(error, path, reference) from None


def _explain(error: ValidationError, path: str, reference: Reference) -> InvalidInput:
    return InvalidInput(
        f"{path} of {reference} has {error.error_count()} fields that are missing, unknown or not allowed. Make the "
        "version again with this platform."
    )
