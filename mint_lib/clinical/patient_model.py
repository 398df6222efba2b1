"""A model of patients: who has which finding, and what a note would say of it.

Goes in: diseases with the frequency of each finding. Comes out: patients and the findings a note states, each drawn
anew. What a photo of the face can show is mostly not said. Knows neither words nor pixels.
"""

import bisect
import collections
import itertools
from typing import TYPE_CHECKING, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from mint_lib.clinical.clinical_text import Sex
from mint_lib.clinical.face_photo import find_axes
from mint_lib.clinical.ontology import PHENOTYPIC_ABNORMALITY, Disease, Ontology
from mint_lib.records import Finding

if TYPE_CHECKING:
    import numpy as np

_ONE_SEX_ONLY: tuple[tuple[str, Sex], ...] = (("HP:0010461", "male"), ("HP:0010460", "female"))  # genital findings


class PatientConfig(BaseModel):
    """How much a note tells. The defaults leave a linear text model of 14 similar diseases at .7 to .9 top-1."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    reporting_rate: float = Field(default=0.45, gt=0, le=1)
    """Probability that a note states a finding which the patient has and a photo cannot show."""
    facial_reporting_rate: float = Field(default=0.15, ge=0, le=1)
    """Probability that a note states a finding which the patient has and a photo can show."""
    generalised_share: float = Field(default=0.25, ge=0, le=1)
    """Share of stated findings given as the broader parent term."""
    mean_background_terms: float = Field(default=1.5, ge=0, le=20)
    """Mean of the Poisson number of findings that have nothing to do with the disease."""
    mean_excluded_terms: float = Field(default=1.0, ge=0, le=20)
    """Mean of the Poisson number of findings that a note denies."""


class Patient(NamedTuple):
    """One person with a disease."""

    sex: Sex
    age_years: float
    """At the first visit."""
    has: tuple[str, ...]
    """Ids of the findings, the disease's own and others."""
    disease: Disease


class PatientModel:
    """Patients of one set of diseases."""

    def __init__(self, ontology: Ontology, diseases: list[Disease], config: PatientConfig):
        self.ontology = ontology
        self._config = config
        self._visible = find_visible(ontology)
        self._only_in: dict[Sex, frozenset[str]] = {
            sex: frozenset(t.id for t in ontology.terms.values() if not t.obsolete and root in ontology.ancestors(t.id))
            for root, sex in _ONE_SEX_ONLY
        }
        # Anyone may have what many diseases have; an examiner asks about what these diseases have.
        background: collections.Counter[str] = collections.Counter()
        for disease in ontology.diseases.values():
            background.update(disease.annotations.keys())
        self._background = _Urn(background)
        deniable: dict[str, float] = collections.defaultdict(float)
        for disease in diseases:
            for term_id, frequency in disease.annotations.items():
                deniable[term_id] += frequency
        self._deniable = _Urn(deniable)

    def draw_patient(self, disease: Disease, rng: "np.random.Generator") -> Patient:
        """A patient: each finding with its frequency, some findings that have nothing to do with the disease."""
        sex: Sex = "female" if rng.random() < 0.5 else "male"
        # Our choice: half of the patients are under 8 years, few are over 40.
        age_years = float(min(75.0, rng.lognormal(2.05, 0.95)))
        chances = sorted(disease.annotations.items())
        draws = rng.random(len(chances))
        own = [term_id for (term_id, chance), draw in zip(chances, draws, strict=True) if draw < chance]
        others = [self._background.draw(rng) for _ in range(rng.poisson(self._config.mean_background_terms))]
        impossible = self._list_impossible(sex)
        has = tuple(term_id for term_id in dict.fromkeys(own + others) if term_id not in impossible)
        return Patient(sex, age_years, has, disease)

    def list_visible(self, patient: Patient) -> list[dict[str, int]]:
        """The axes that each finding moves, for the patient's findings that a photo shows."""
        return [self._visible[term_id] for term_id in patient.has if term_id in self._visible]

    def state_findings(self, patient: Patient, rng: "np.random.Generator") -> list[Finding]:
        """What one note says of a patient: at least one finding, some of them broader, some denied."""
        config, terms = self._config, self.ontology.terms
        stated = [
            term_id
            for term_id in patient.has
            if rng.random() < (config.facial_reporting_rate if term_id in self._visible else config.reporting_rate)
        ]
        if not stated:
            frequency = patient.disease.annotations
            stated = [max(patient.has or sorted(frequency), key=lambda term_id: frequency.get(term_id, 0.0))]
        said = []
        for term_id in stated:
            parents = [parent for parent in terms[term_id].parents if parent != PHENOTYPIC_ABNORMALITY]
            is_general = rng.random() < config.generalised_share and bool(parents)
            said.append(parents[rng.integers(len(parents))] if is_general else term_id)
        implied = self._list_impossible(patient.sex).union(*(self.ontology.ancestors(item) for item in patient.has))
        denied = [self._deniable.draw(rng) for _ in range(rng.poisson(config.mean_excluded_terms))]
        return [Finding(id=term_id, label=terms[term_id].name) for term_id in dict.fromkeys(said)] + [
            Finding(id=term_id, label=terms[term_id].name, excluded=True)
            for term_id in dict.fromkeys(denied)
            if term_id not in implied and term_id not in said
        ]

    def _list_impossible(self, sex: Sex) -> frozenset[str]:
        return self._only_in["male" if sex == "female" else "female"]


class _Urn:
    """Draws keys in proportion to their weights."""

    def __init__(self, weights: dict[str, float] | collections.Counter[str]):
        self._keys = list(weights)
        self._cumulated = list(itertools.accumulate(weights.values()))

    def draw(self, rng: "np.random.Generator") -> str:
        return self._keys[bisect.bisect_right(self._cumulated, rng.random() * self._cumulated[-1])]


def find_visible(ontology: Ontology) -> dict[str, dict[str, int]]:
    """Term id to the axes of a face that it moves, for the terms that a photo shows."""
    moved = {term.id: find_axes(ontology.ancestors(term.id)) for term in ontology.terms.values() if not term.obsolete}
    return {term_id: axes for term_id, axes in moved.items() if axes}
