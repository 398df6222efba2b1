"""The records that cross a boundary between stages: frozen and validated.

Goes in: values. Comes out: `Reference`, `Label`, `Case`, `Ranking`, `PreferencePair`, `StageRecord` and the records of
a report and a model. This module knows neither files, the store nor any stage; `rows` writes records as Parquet.
"""

import functools
import hashlib
import pathlib
import re
import typing
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

import mint_lib
from mint_lib.errors import InvalidInput

Kind = Literal["cases", "rankings", "preferences", "student", "report", "model", "base", "quarantine"]
KINDS: tuple[Kind, ...] = typing.get_args(Kind)
Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]
_REFERENCE = re.compile(
    r"(?P<kind>[a-z]+)/(?P<name>[a-z0-9][a-z0-9-]{0,62})@(?P<version>v\d{6,})#(?P<digest>sha256:[0-9a-f]{64})"
)

_NO_STAGE_READS = frozenset(
    (
        *("engine", "server", "serving.py", "inference_service.py"),
        *("cluster.py", "placement.py", "pods.py", "ray_job.py"),
        *("data_difference", "export.py", "exported_rows.py"),
    )
)


class Record(BaseModel):
    """Base of everything that crosses a boundary: immutable, no unknown field."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Reference(Record):
    """One immutable version in the store: `kind/name@version#sha256:digest`."""

    kind: Kind
    name: Name
    version: Annotated[str, StringConstraints(pattern=r"^v\d{6,}$")]
    digest: Annotated[str, StringConstraints(pattern=r"^sha256:[0-9a-f]{64}$")]

    @classmethod
    def parse(cls, text: str) -> Self:
        """The reference that `text` spells.

        Raises:
            InvalidInput: `text` is not `kind/name@v000000#sha256:...` with a known kind.
        """
        match = _REFERENCE.fullmatch(text.strip())
        if match is None or match["kind"] not in KINDS:
            raise InvalidInput(
                f"{text[:200]!r} is not a reference. Write kind/name@v000001#sha256:<64 hex digits> with kind one of "
                f"{', '.join(KINDS)}; `mint ls` prints them."
            )
        return cls.model_validate(match.groupdict())

    def __str__(self) -> str:
        return f"{self.kind}/{self.name}@{self.version}#{self.digest}"


class Label(Record):
    """One answer of the closed label set."""

    id: str
    """Ontology id, for instance `OMIM:163950`."""
    name: str
    """The name that students answer with."""
    synonyms: tuple[str, ...] = ()
    """Other names that resolve to the same id."""
    family: str | None = None
    """Name of the group of labels that are easily confused with one another."""


class Finding(Record):
    """A coded observation as the clinical text states it."""

    id: str
    """Ontology id, for instance `HP:0001250`; empty where the source knows only a label."""
    label: str
    excluded: bool = False
    """The text says that the patient does not have it."""


class Case(Record):
    """One patient as one stage hands it to the next. It has a text, an image, or both."""

    case_id: str
    group_id: str
    """The patient (or family): all cases of a group are in one split."""
    text: str | None = None
    image: bytes | None = Field(default=None, repr=False)
    """Encoded PNG or JPEG."""
    findings: tuple[Finding, ...] = ()
    """What the text says, coded. Nothing that only the image shows."""
    label_id: str | None = None
    """None: the diagnosis is not known to the platform (few-label mode)."""
    attributes: dict[str, str] = {}
    """Sex, age in years, site and the like, for slices of the evaluation."""
    source: str
    """Where the case comes from, for instance `simulated_patients` or a paper's id."""
    synthetic: bool
    """Generated, not observed."""

    @model_validator(mode="after")
    def _has_content(self) -> Self:
        if not (self.text and self.text.strip()) and not self.image:
            raise ValueError("a case needs a text, an image, or both")
        return self


class Ranking(Record):
    """A teacher's ranked answers for one case; probabilities are calibrated and fall monotonically."""

    case_id: str
    label_ids: tuple[str, ...]
    """The whole label set, most probable first."""
    probabilities: tuple[float, ...]
    teacher_digest: str
    """sha256 of the teacher's weights or of the annotation files it reads."""

    @model_validator(mode="after")
    def _is_ranked(self) -> Self:
        if len(self.label_ids) != len(self.probabilities):
            raise ValueError("label_ids and probabilities differ in length")
        if len(set(self.label_ids)) != len(self.label_ids):
            raise ValueError("a label is ranked twice")
        if any(a < b for a, b in zip(self.probabilities, self.probabilities[1:], strict=False)):
            raise ValueError("probabilities do not fall with the rank")
        return self


class Turn(Record):
    """One message of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


class PreferencePair(Record):
    """One prompt with a chosen and a rejected answer. Pairs of one case share their prompt to the byte."""

    case_id: str
    prompt: tuple[Turn, ...]
    images: tuple[bytes, ...] = Field(default=(), repr=False)
    """Encoded PNG or JPEG; they stand before the text of the first user turn. Empty for students that read text."""
    chosen: str
    """Assistant text."""
    rejected: str
    """Assistant text."""
    chosen_label_ids: tuple[str, ...]
    rejected_label_ids: tuple[str, ...]
    teacher_digest: str
    template_digest: str
    policy: str
    """How the two sides were drawn, for instance `top3-bottom3/ground-truth=none`."""

    @model_validator(mode="after")
    def _is_a_preference(self) -> Self:
        if self.chosen == self.rejected:
            raise ValueError("chosen equals rejected")
        if set(self.chosen_label_ids) & set(self.rejected_label_ids):
            raise ValueError("a label stands on both sides")
        return self


class StageRecord(Record):
    """What stands beside every output as `record.json`: enough to make it again."""

    stage: str
    config: dict[str, object]
    """The resolved config."""
    inputs: dict[str, str]
    """Input name to reference."""
    code_version: str
    counts: dict[str, int] = {}
    metrics: dict[str, float] = {}
    notes: tuple[str, ...] = ()
    """Facts a reader must know, for instance that the data are synthetic."""


@functools.cache
def code_version() -> str:
    """The package's version and a hash of the stages' sources and templates: a cached output never outlives its code.

    What only serves models or places work on a cluster is left out: no output of a stage depends on it.
    """
    folder = pathlib.Path(__file__).parent
    sources = sorted(
        path
        for suffix in ("*.py", "*.yaml", "*.html", "*.css")
        for path in folder.rglob(suffix)
        if path.relative_to(folder).parts[0] not in _NO_STAGE_READS
    )
    hasher = hashlib.sha256()
    for path in sources:
        hasher.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return f"{mint_lib.__version__}+{hasher.hexdigest()[:16]}"


class Prediction(Record):
    """What one system answered for one test case: ids and probabilities, never text."""

    system: str
    """Name of the system; the runs of an arm are called `arm/run`."""
    case_id: str
    label_id: str
    ranked_ids: tuple[str, ...]
    """The whole label set, most probable first."""
    probabilities: tuple[float, ...]
    generated: tuple[str, ...] | None = None
    """The names of the free answer in their order: a label's id, `outside:<id>` for a disease that is not in the label
    set, `fuzzy:<id>` for a near miss, or `unknown`. None: no answer was generated for this case."""


class Estimate(Record):
    """A number with its interval. None stands for what cannot be computed."""

    value: float | None
    low: float | None
    high: float | None
    n: int
    """Cases, or listed names, that the number rests on."""


class Metric(Record):
    """How a metric is read."""

    title: str
    meaning: str
    unit: Literal["percent", "score"]
    better: Literal["higher", "lower"]


class Comparison(Record):
    """`system` minus `other` on the same cases."""

    metric: str
    system: str
    other: str
    difference: Estimate
    test: str
    p_value: float
    p_adjusted: float
    """After Holm's correction over the comparisons of this metric."""


class GateOutcome(Record):
    """One declared threshold and what was observed: a system's own value, or its lead over another one."""

    metric: str
    system: str
    over: str | None
    bound: Literal["lower", "value"]
    at_least: float
    observed: float | None
    passed: bool


class Gate(Record):
    """Whether every declared threshold was met. Without a rule no gate is passed."""

    passed: bool
    rules: tuple[GateOutcome, ...]


class Wording(Record):
    """What the report of a task calls things. The defaults are the words of a rare-disease report."""

    label: str = "diagnosis"
    labels: str = "diagnoses"
    subjects: str = "patients"
    """What is simulated or observed."""
    picture: str = "photo"
    question: str = "from the written description alone, which of {num_labels} diagnoses does the patient have?"
    """What is asked, with `{num_labels}`."""
    closed: str = "The list of diagnoses is closed: a patient with any other disease is always answered wrongly."
    simulation: str = (
        "test patients are simulated from ontology frequencies. That shows whether the method transfers what a teacher "
        "knows; it does not show performance on real patients, and differences between groups of patients are those of "
        "the simulation."
    )
    """Goes on after `All` or `Some`."""


class GroundingVariant(Record):
    """What a student answers when it is shown something else than the image."""

    kind: Literal["blank", "noise", "permuted", "swapped", "colour"]
    changed: Estimate
    """Share of the cases whose first answer is another one than with their own image."""
    top_1: Estimate
    """Share of the cases whose first answer is still their own label."""
    drop: Estimate
    """Top-1 with the own images minus `top_1`, on the same cases."""
    follows: Estimate | None
    """Share of the first answers that are the label of the image shown; None where what is shown has none."""
    passed: bool | None
    """None: this variant is reported and does not decide."""


class Grounding(Record):
    """Whether a student looks at the image: what becomes of its answers without it."""

    student: str
    """Reference of the student that was probed."""
    passed: bool
    """Every variant that decides passed."""
    ceiling: float
    """What an answer that does not depend on the image can reach: chance, or the most frequent label's share of the
    probed cases if that is more."""
    top_1: Estimate
    """With the cases' own images."""
    variants: tuple[GroundingVariant, ...]


class PerturbationLevel(Record):
    """One strength of one perturbation."""

    level: float
    top_1: Estimate
    change: Estimate
    """`top_1` minus that of the images as they are, on the same cases."""


class Perturbation(Record):
    """What becomes of the main student's top-1 as images get worse in one way."""

    kind: Literal["stain", "blur", "compression"]
    top_1: Estimate
    """With the images as they are."""
    levels: tuple[PerturbationLevel, ...]
    """From the weakest to the strongest."""


class EvaluationReport(Record):
    """What an evaluation found, complete enough to decide on."""

    name: Name
    task: str
    main: str
    """The system that the report is about."""
    headline: str
    statements: tuple[str, ...]
    """Plain sentences drawn from the numbers."""
    lead: str
    """The metric that sentences lead with."""
    order: tuple[str, ...]
    """The systems as tables show them, the main one first."""
    metrics: dict[str, Metric]
    systems: dict[str, dict[str, Estimate]]
    roles: dict[str, Literal["student", "base", "teacher", "baseline", "reference"]]
    runs: dict[str, int]
    """Seeds that a system stands for."""
    comparisons: tuple[Comparison, ...]
    slices: dict[str, dict[str, dict[str, dict[str, Estimate]]]]
    """Slice (such as `family`) to its value to system to metric to estimate."""
    gate: Gate
    inputs: dict[str, str]
    counts: dict[str, int]
    synthetic: Literal["all", "some", "none"]
    """Which test cases are generated, not observed."""
    seed: int
    bootstrap_draws: int
    confidence: float
    """Level of every interval."""
    notes: tuple[str, ...] = ()
    reads: Literal["text", "image"] = "text"
    """What students were shown of a case."""
    wording: Wording = Wording()
    leaks: tuple[str, ...] = ()
    """How training and test share what they must not share, as the cases' record says; empty: they do not."""
    grounding: Grounding | None = None
    """None: the main student was not probed, as no student that reads text is."""
    perturbations: tuple[Perturbation, ...] = ()


class Calibration(Record):
    """How a student's log-probabilities become calibrated ones: a softmax of them divided by `temperature`."""

    student: str
    """Reference of the student that was asked."""
    split: Literal["validation"]
    """Never the test cases, which the report is about."""
    num_cases: int = Field(ge=1)
    temperature: float = Field(gt=0.0, allow_inf_nan=False)
    nll_before: float
    """Mean negative log-likelihood of the right label in nats, at temperature 1."""
    nll_after: float
    """The same at `temperature`, on the same cases."""
    ece_before: float
    """Expected calibration error over ten bins, at temperature 1."""
    ece_after: float


class ModelCard(Record):
    """What somebody must know before using a model version."""

    name: Name
    base_model: str
    base_digest: str
    method: str
    student: str
    inputs: dict[str, str]
    teacher_digest: str
    headline: str
    metrics: dict[str, Estimate]
    gate_passed: bool
    synthetic: Literal["all", "some", "none"]
    licence: str
    intended_use: str
    limits: tuple[str, ...]
    grounding: Grounding | None = None
    """Whether it looks at the image; None for students that read text."""
