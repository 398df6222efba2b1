"""Every setting of the preferences stage."""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from mint_lib.gate.settings import GateConfig
from mint_lib.records import Name, Split
from mint_lib.student import StudentConfig

PAIRED_SPLITS: tuple[Split, ...] = ("train", "validation")
"""Splits that give pairs. Their places are part of the seeds, so a new one goes to the end."""


class PreferencesConfig(BaseModel):
    """How a ranking becomes pairs."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: Name
    """Name of the version in the store."""
    seed: int = Field(ge=0, lt=2**32)
    """Seed of every draw. A case's draws do not depend on which other cases there are."""
    student: StudentConfig
    """The student whose tokenizer and window the pairs are checked with."""
    template: str = "rare_disease"
    """File of `mint_lib/templates`."""
    pairs: Literal["ranking", "captions"] = "ranking"
    """`captions` prefers a case's own text to another case's as the description of its image, and looks at no ranking:
    what an image student's projector is trained on before the alignment (PeFoMed's first stage)."""
    top_k: int = Field(default=10, ge=1, le=99)
    """Names in a chosen answer, the teacher's most probable first; the prompt asks for as many. MINT: 10."""
    bottom_q: int = Field(default=15, ge=1, le=99)
    """Names in a rejected answer. MINT's published ORPO script: 15."""
    rejected: Literal["bottom", "next", "sampled"] = "bottom"
    """Which ranks are rejected: the last `bottom_q` (MINT), the `bottom_q` right after the chosen ones, or a draw."""
    sample_from_ranks: int | None = Field(default=None, ge=1)
    """`sampled` draws from this many ranks after the chosen ones; none: from all of them."""
    pairs_per_case: int = Field(default=1, ge=1, le=16)
    """Rejected answers drawn for one prompt (a prompt tree). More than 1 needs `rejected: sampled`."""
    ground_truth: Literal["none", "first", "drop"] = "none"
    """`none`: the teacher alone decides, labelled or not. `first`: a known diagnosis is moved to the front of the
    chosen names, replacing the last one where the teacher missed it; cases without one follow the teacher. `drop`:
    only cases whose diagnosis is known and among the chosen names give pairs."""
    confidence_floor: float = Field(default=0.0, ge=0.0, le=1.0)
    """Least probability of the teacher's first label; cases below it give no pair, in every control alike."""
    control: Literal["none", "shuffled_teacher", "ground_truth_only"] = "none"
    """Control of a transfer study. `shuffled_teacher`: every case gets the ranking of another one.
    `ground_truth_only`: the diagnosis comes first and all other names are drawn at random; cases without a
    diagnosis give no pair."""
    max_train_cases: int | None = Field(default=None, ge=1)
    """Draw at most this many training cases; none: all."""
    max_validation_cases: int | None = Field(default=None, ge=1)
    """Draw at most this many validation cases; none: all."""
    max_refused_share: float = Field(default=0.05, ge=0.0, lt=1.0)
    """Share of cases that may be refused by a check (prompt too long, control tokens) before the set is refused."""
    gate: GateConfig = GateConfig()
    """What the pairs, and the cases behind them, must satisfy before anything is trained on them. The controls of a
    study contradict the truth by design, which then does not decide."""

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if self.rejected != "sampled" and (self.pairs_per_case > 1 or self.sample_from_ranks is not None):
            raise ValueError("pairs_per_case above 1 and sample_from_ranks need rejected: sampled")
        if self.sample_from_ranks is not None and self.sample_from_ranks < self.bottom_q:
            raise ValueError(f"sample_from_ranks {self.sample_from_ranks} is less than bottom_q {self.bottom_q}")
        if self.pairs == "captions" and (self.student.reads != "image" or self.control != "none"):
            raise ValueError("pairs: captions is for image students (student.reads: image), without a control")
        if self.control == "shuffled_teacher" and self.ground_truth == "drop":
            raise ValueError("ground_truth: drop would undo shuffled_teacher, as it keeps only the right rankings")
        return self
