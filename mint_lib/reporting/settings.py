"""The `evaluation` section of a recipe: what is measured, and what a student must reach.

Goes in: a recipe's values. Comes out: `EvaluationConfig`. It loads without torch and knows no task.
"""

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from mint_lib.records import Name
from mint_lib.reporting.findings import GateRule
from mint_lib.reporting.grounding import GroundingConfig
from mint_lib.reporting.injections import InjectionsConfig
from mint_lib.reporting.perturbations import PerturbationsConfig
from mint_lib.student import StudentConfig


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
    """Attributes of the cases by which results are shown apart, beside label, family and photo."""
    max_refused_share: float = Field(default=0.05, ge=0.0, lt=1.0)
    """Share of the test cases whose prompt may exceed the student's window before the evaluation is refused."""
    calibration_cases: int = Field(default=64, ge=0)
    """Labelled validation cases, drawn with the seed, on which the main student is calibrated; 0: it is not."""
    grounding: GroundingConfig | None = None
    """Image-grounding probe of the main student. An image student is probed unless this is null, and without a passed
    probe it cannot be registered; a text student has none."""
    perturbations: PerturbationsConfig | None = None
    """Stain, blur and compression of the main image student's test images; null: not measured."""
    injections: InjectionsConfig | None = None
    """Text that asks for a certain answer, put into the main text student's test notes; null: not measured."""
    examples: Literal["synthetic", "with_observed_images"] = "synthetic"
    """Which cases the report shows. Images of observed patients only where their licence and consent allow it; their
    text never."""

    @model_validator(mode="before")
    @classmethod
    def _probe_image_students(cls, values: Any) -> Any:
        student = values.get("student") if isinstance(values, dict) else None
        reads = student.get("reads") if isinstance(student, dict) else getattr(student, "reads", None)
        return {"grounding": {}} | values if reads == "image" else values

    @model_validator(mode="after")
    def _has_what_is_altered(self) -> Self:
        if self.student.reads == "text" and (self.grounding or self.perturbations):
            raise ValueError("grounding and perturbations alter images, and the student reads text: leave them out")
        if self.student.reads == "image" and self.injections:
            raise ValueError("injections alter notes, and the student reads images: leave them out")
        return self
