"""The records of a report and a model: frozen and validated.

Goes in: values. Comes out: `Prediction`, `EvaluationReport` with its parts, `Calibration` and `ModelCard`. This module
knows neither how a number is found nor how it is shown.
"""

from typing import Literal

from pydantic import Field

from mint_lib.records import Name, Record


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
