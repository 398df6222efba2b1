"""Rare-disease ranking: which label of a closed set a case has, by ontology id.

Two ways of answering are measured. Ranking: the exact probability that each label is named first, over the whole label
set. Generation: a free greedy answer whose names are resolved to ids; a name resolves by id, by normalised name or by
synonym, and a near miss is reported apart and never counts. What cannot be read stays in the denominator as wrong.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from mint_lib.clinical.disease_names import NameTable
from mint_lib.clinical.ontology import load_ontology
from mint_lib.errors import MissingDependency
from mint_lib.evaluation import CHANCE, MAJORITY, TEACHER, EvaluationTask
from mint_lib.progress import Progress
from mint_lib.reading import TextReader, encode_answer
from mint_lib.records import Metric, Prediction, Ranking
from mint_lib.reporting.findings import PairedTest
from mint_lib.reporting.material import Material
from mint_lib.reporting.ranking_scores import TeacherSides, measure_agreement, measure_generation, measure_ranking
from mint_lib.statistics import Array, Measurement
from mint_lib.student import generate_answers, rank_labels

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)
_GENERATION_BATCH = 16


def _metric(title: str, meaning: str, *, unit: str = "percent", better: str = "higher") -> Metric:
    return Metric.model_validate({"title": title, "meaning": meaning, "unit": unit, "better": better})


class RareDiseaseRanking(EvaluationTask):
    """Ranking and free answers over the label set of the cases."""

    class Config(BaseModel):
        """What is asked."""

        model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

        generation_cases: int = Field(default=0, ge=0)
        """Cases that are also answered freely, drawn with the seed; 0: none. On a CPU this is the costly part."""
        batch_tokens: int = Field(default=2048, ge=64)
        """Tokens of one forward pass in ranking."""
        car_lambda: float = Field(default=0.5, gt=0.0)
        """Weight of coverage against avoidance in CAR; MINT's default is 0.5."""
        fuzzy_ratio: float = Field(default=0.9, gt=0.0, le=1.0)
        """Least similarity (difflib ratio of normalised names) of a near miss, which is only reported. MINT accepted
        0.8 as a hit, at which a third of GestaltMML's 528 names match another disease."""

    metrics: ClassVar[Mapping[str, Metric]] = {
        "top_1": _metric("Top-1", "Share of cases whose diagnosis is ranked first."),
        "mrr": _metric("MRR", "Mean of 1 / rank of the diagnosis.", unit="score"),
        "top_3": _metric("Top-3", "Share of cases whose diagnosis is among the first 3."),
        "top_10": _metric("Top-10", "Share of cases whose diagnosis is among the first 10."),
        "macro_top_1": _metric("Macro top-1", "Top-1 within each diagnosis, averaged over the diagnoses."),
        "coverage": _metric("Coverage", "Share of the teacher's top k that is in the system's top k."),
        "avoidance": _metric("Avoidance", "1 minus the share of the system's top k that is in the teacher's bottom q."),
        "car": _metric("CAR", "Weighted harmonic mean of coverage and avoidance.", unit="score"),
        "ece": _metric("ECE", "Expected gap between stated and observed certainty.", unit="score", better="lower"),
        "generated_top_1": _metric("Top-1", "Share of free answers that name the diagnosis first."),
        "generated_top_k": _metric("Any named", "Share of free answers that name the diagnosis at all."),
        "generated_mrr": _metric(
            "MRR", "Mean of 1 / position of the diagnosis, 0 where it is not named.", unit="score"
        ),
        "generated_coverage": _metric("Coverage", "Share of the teacher's top k that the free answer names."),
        "generated_avoidance": _metric(
            "Avoidance", "1 minus the share of the names that are in the teacher's bottom q."
        ),
        "generated_car": _metric("CAR", "Weighted harmonic mean of coverage and avoidance.", unit="score"),
        "generated_complete": _metric("Complete", "Share of free answers with exactly k different names."),
        "generated_fuzzy_top_1": _metric("Top-1 with near misses", "Top-1 if near misses counted; reported only."),
        "generated_invented": _metric("Invented", "Share of the names that are no disease at all.", better="lower"),
        "generated_outside": _metric(
            "Outside the set", "Share of the names that are a disease outside the label set.", better="lower"
        ),
    }
    tests: ClassVar[Mapping[str, PairedTest]] = {"top_1": "sign", "mrr": "permutation"}

    def __init__(self, config: "RareDiseaseRanking.Config", material: Material):
        super().__init__(config, material)
        cases = len(material.cases)
        drawn = np.random.default_rng(material.seed).permutation(cases)[: config.generation_cases]
        self._generated = sorted(int(index) for index in drawn)
        self._sides = [
            TeacherSides(frozenset(ids[: material.top_k]), frozenset(ids[-material.bottom_q :]))
            for ids in (material.teacher[case.case_id].label_ids for case in material.cases)
        ]
        diseases = _load_disease_names() if self._generated else {}
        self._knows_diseases = bool(diseases)
        self._names = NameTable(material.labels, diseases=diseases, fuzzy_ratio=config.fuzzy_ratio)

    def answer(
        self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", *, system: str
    ) -> list[Prediction]:
        """The exact ranking of every case, and free answers to the drawn ones."""
        material, labels = self.material, self.material.labels
        prompts = [material.template.prompt(case.text or "") for case in material.cases]
        with Progress(f"evaluation: {system}", total=len(prompts) + len(self._generated)) as progress:
            log_probabilities_NL = rank_labels(
                model,
                TextReader(tokenizer),
                material.template,
                labels,
                prompts,
                batch_tokens=self.config.batch_tokens,
                progress=progress.advance,
            )
            longest = sorted((label.name for label in labels), key=len)[-material.top_k :]
            room = len(encode_answer(tokenizer, material.template.answer(longest)))
            texts: dict[int, str] = {}
            for start in range(0, len(self._generated), _GENERATION_BATCH):
                chunk = self._generated[start : start + _GENERATION_BATCH]
                asked = [prompts[index] for index in chunk]
                texts |= zip(chunk, generate_answers(model, tokenizer, asked, max_new_tokens=room), strict=True)
                progress.advance(len(chunk))
        predictions = self._predict(np.exp(log_probabilities_NL), system)
        resolve = self._names.resolve
        for index, text in texts.items():
            names = tuple(resolve(name) for name in material.template.parse(text))
            predictions[index] = predictions[index].model_copy(update={"generated": names})
        return predictions

    def adopt(self, rankings: Mapping[str, Ranking], *, system: str) -> list[Prediction]:
        """Rankings that were made elsewhere, as answers."""
        return [
            Prediction(
                system=system,
                case_id=case.case_id,
                label_id=str(case.label_id),
                ranked_ids=rankings[case.case_id].label_ids,
                probabilities=rankings[case.case_id].probabilities,
            )
            for case in self.material.cases
        ]

    def guess(self) -> dict[str, list[Prediction]]:
        """Every label alike, and each as often as the training cases have it."""
        counts_L = np.array([self.material.label_counts[label.id] for label in self.material.labels], dtype=np.float64)
        guesses = {CHANCE: np.ones_like(counts_L)} | ({MAJORITY: counts_L} if counts_L.any() else {})
        num_cases = len(self.material.cases)
        return {name: self._predict(np.tile(row / row.sum(), (num_cases, 1)), name) for name, row in guesses.items()}

    def measure(self, predictions: Sequence[Prediction]) -> dict[str, Measurement]:
        """Ranking, agreement with the teacher for systems that look at the case, and free answers if there are any."""
        top_k, system = self.material.top_k, predictions[0].system
        measured = measure_ranking(predictions)
        if system not in (TEACHER, CHANCE, MAJORITY):
            listed = [prediction.ranked_ids[:top_k] for prediction in predictions]
            measured |= measure_agreement(listed, self._sides, car_lambda=self.config.car_lambda)
        generated = [prediction.generated for prediction in predictions]
        if any(names is not None for names in generated):
            free = measure_generation(predictions, top_k=top_k)
            free |= measure_agreement(generated, self._sides, car_lambda=self.config.car_lambda)
            measured |= {f"generated_{metric}": measurement for metric, measurement in free.items()}
        return measured

    def describe(self) -> tuple[str, ...]:
        """What was asked of how many cases."""
        material = self.material
        sentences = [
            f"Every system ranks the same {len(material.labels)} diagnoses for the same {len(material.cases)} cases; "
            f"coverage and avoidance compare with the teacher's first {material.top_k} and last {material.bottom_q}."
        ]
        if self._generated:
            sentences.append(
                f"Free answers were generated greedily for {len(self._generated)} of these cases, drawn with the seed."
            )
            if not self._knows_diseases:
                sentences.append(
                    "No wider list of diseases was at hand: real diseases outside the label set count as invented."
                )
        return tuple(sentences)

    def _predict(self, probabilities_NL: Array, system: str) -> list[Prediction]:
        order_NL = np.argsort(-probabilities_NL, axis=1, kind="stable")
        return [
            Prediction(
                system=system,
                case_id=case.case_id,
                label_id=str(case.label_id),
                ranked_ids=tuple(self.material.labels[column].id for column in order_L),
                probabilities=tuple(float(row_L[column]) for column in order_L),
            )
            for case, row_L, order_L in zip(self.material.cases, probabilities_NL, order_NL, strict=True)
        ]


def _load_disease_names() -> dict[str, tuple[str, ...]]:
    """The names of every disease of the ontology; none where it is not installed, which the report says."""
    try:
        return {disease.id: disease.names for disease in load_ontology().diseases.values()}
    except MissingDependency as error:
        logger.warning("evaluation: %s", error)
        return {}
