"""The records that cross a boundary between stages: frozen and validated.

Goes in: values. Comes out: `Reference`, `Label`, `Case`, `Ranking`, `PreferencePair` and `StageRecord`; those of a
report and a model are in `report_records`. This module knows neither files, the store nor any stage; `rows` writes
records as Parquet.
"""

import re
import typing
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from mint_lib.errors import InvalidInput

Kind = Literal["cases", "rankings", "preferences", "student", "report", "model", "base", "quarantine"]
KINDS: tuple[Kind, ...] = typing.get_args(Kind)
Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]
_REFERENCE = re.compile(
    r"(?P<kind>[a-z]+)/(?P<name>[a-z0-9][a-z0-9-]{0,62})@(?P<version>v\d{6,})#(?P<digest>sha256:[0-9a-f]{64})"
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
