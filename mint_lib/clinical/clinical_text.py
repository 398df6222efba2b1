"""Words for a coded case: one short note in English, the same way for simulated and for real patients.

Goes in: sex, age and findings coded in the Human Phenotype Ontology. Comes out: a note of about 40 to 70 tokens, the
findings it states, and how many it had to leave out. The wording varies with the generator it is given (term name,
professional synonym, layperson's words; phrases of negation), never with anything else. Knows nothing of diagnoses.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from mint_lib.clinical.ontology import Ontology
from mint_lib.records import Finding

if TYPE_CHECKING:
    import numpy as np

Sex = Literal["female", "male", "unknown"]
_MAX_EXTRA_CHARACTERS = 12
_OPENINGS = (" with ", ": ", " presenting with ")
_NEGATIONS = ("No {}.", "Without {}.", "There is no {}.", "Absent: {}.")
_ADULT_YEARS = 18
_INFANT_YEARS = 2


class TextConfig(BaseModel):
    """How a note is worded."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    max_observed: int = Field(default=8, ge=1)
    """Findings that one note states at most; the least informative ones are left out first, and counted."""
    max_excluded: int = Field(default=2, ge=0)
    """Findings that one note denies at most; the others are left out, and counted."""
    synonym_share: float = Field(default=0.2, ge=0, le=1)
    """Share of findings worded by a professional synonym where there is one."""
    lay_share: float = Field(default=0.25, ge=0, le=1)
    """Share of findings worded as a layperson would where such words exist."""


class CaseText(NamedTuple):
    """A note and what it says."""

    text: str
    findings: tuple[Finding, ...]
    """The findings that the note states, in its order, with the ontology's own names."""
    num_left_out: int
    """Findings that did not fit under the caps."""


def render_case_text(
    findings: Sequence[Finding],
    *,
    ontology: Ontology,
    sex: Sex,
    age_years: float | None,
    rng: "np.random.Generator",
    config: TextConfig,
) -> CaseText:
    """The note of one patient; it is empty if there are no findings.

    Args:
        findings: observed and excluded findings. One with an id must have the id of a current term; one without is
            worded by its label.
        ontology: where names and synonyms come from.
        sex: of the patient.
        age_years: at the examination; None if unknown.
        rng: decides wording and order.
        config: caps and shares.
    """
    if not findings:
        return CaseText("", (), 0)
    observed = _choose([item for item in findings if not item.excluded], config.max_observed, ontology, rng)
    excluded = _choose([item for item in findings if item.excluded], config.max_excluded, ontology, rng)
    sentences = []
    person = describe_person(sex, age_years)
    if observed:
        words = [_word(item, ontology, rng, config) for item in observed]
        separator = "; " if any("," in word for word in words) else ", "
        sentences.append(f"{person}{_OPENINGS[rng.integers(len(_OPENINGS))]}{separator.join(words)}.")
    else:
        sentences.append(f"{person}.")
    if excluded:
        *first, last = [_word(item, ontology, rng, config) for item in excluded]
        phrase = _NEGATIONS[rng.integers(len(_NEGATIONS))]
        sentences.append(phrase.format(f"{', '.join(first)} or {last}" if first else last))
    stated = tuple(
        Finding(id=item.id, label=ontology.terms[item.id].name if item.id else item.label, excluded=item.excluded)
        for item in (*observed, *excluded)
    )
    return CaseText(" ".join(sentences), stated, len(findings) - len(stated))


def describe_person(sex: Sex, age_years: float | None) -> str:
    """For instance `4-year-old girl`, `7-month-old boy`, `Female patient`."""
    if age_years is None:
        return "Patient" if sex == "unknown" else f"{sex.capitalize()} patient"
    is_adult = age_years >= _ADULT_YEARS
    noun = {"female": ("girl", "woman"), "male": ("boy", "man"), "unknown": ("child", "adult")}[sex][is_adult]
    months = int(age_years * 12)
    if months < 1:
        return f"Newborn {noun}"
    return f"{months}-month-old {noun}" if age_years < _INFANT_YEARS else f"{int(age_years)}-year-old {noun}"


def _choose(findings: list[Finding], most: int, ontology: Ontology, rng: "np.random.Generator") -> list[Finding]:
    """At most `most` findings in random order: the most informative ones, ties by chance."""
    shuffled = [findings[index] for index in rng.permutation(len(findings))]
    if len(shuffled) <= most:
        return shuffled
    content = ontology.information_content
    ranked = sorted(range(len(shuffled)), key=lambda index: -content.get(shuffled[index].id, 0.0))
    return [shuffled[index] for index in sorted(ranked[:most])]


def _word(finding: Finding, ontology: Ontology, rng: "np.random.Generator", config: TextConfig) -> str:
    """One wording of a finding, without a capital where English has none."""
    draw = rng.random()
    pick = rng.random()
    if not finding.id:
        return _uncapitalise(finding.label)
    term = ontology.terms[finding.id]
    if draw < config.lay_share:
        spellings = term.lay_synonyms
    elif draw < config.lay_share + config.synonym_share:
        spellings = term.exact_synonyms
    else:
        spellings = ()
    # A synonym much longer than the name costs tokens and says no more.
    short = [text for text in spellings if len(text) <= len(term.name) + _MAX_EXTRA_CHARACTERS]
    return _uncapitalise(short[int(pick * len(short))] if short else term.name)


def _uncapitalise(text: str) -> str:
    """`Short stature` to `short stature`; abbreviations such as `EEG with ...` stay."""
    first_word = text.split(" ", 1)[0]
    return text[:1].lower() + text[1:] if first_word[1:] == first_word[1:].lower() else text
