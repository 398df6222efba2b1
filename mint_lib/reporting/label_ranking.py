"""Label ranking: which label of a closed set a case has, asked in two ways. What the ranking tasks share.

Ranking: the exact probability that each label is named first, over the whole label set. Generation: a free greedy
answer whose names are resolved to ids; a name resolves by id, by normalised name or by synonym, and a near miss is
reported apart and never counts. What cannot be read stays in the denominator as wrong. A task that is built on this
says its words, its metrics and its further names.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from mint_lib.clinical.disease_names import NameTable
from mint_lib.progress import Progress
from mint_lib.reading import Reader, encode_answer
from mint_lib.records import Ranking
from mint_lib.report_records import Metric, Prediction, Wording
from mint_lib.reporting.findings import PairedTest
from mint_lib.reporting.material import Material
from mint_lib.reporting.ranking_scores import TeacherSides, measure_agreement, measure_generation, measure_ranking
from mint_lib.reporting.task import CHANCE, MAJORITY, TEACHER, EvaluationTask
from mint_lib.statistics import Array, Measurement
from mint_lib.student import generate_answers, rank_labels

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_GENERATION_BATCH = 16


class LabelRankingConfig(BaseModel):
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


class LabelRanking(EvaluationTask):
    """Ranking and free answers over the label set of the cases."""

    Config = LabelRankingConfig
    tops: ClassVar[tuple[int, ...]]
    """Each k of a top-k; one that the label set does not exceed is left out."""
    tests: ClassVar[Mapping[str, PairedTest]] = {"top_1": "sign", "mrr": "permutation"}

    def __init__(self, config: LabelRankingConfig, material: Material):
        super().__init__(config, material)
        drawn = np.random.default_rng(material.seed).permutation(len(material.cases))[: config.generation_cases]
        self._generated = sorted(int(index) for index in drawn)
        self._sides = [
            TeacherSides(frozenset(ids[: material.top_k]), frozenset(ids[-material.bottom_q :]))
            for ids in (material.teacher[case.case_id].label_ids for case in material.cases)
        ]
        self.outside_names = self.load_outside_names() if self._generated else {}
        self._names = NameTable(material.labels, diseases=self.outside_names, fuzzy_ratio=config.fuzzy_ratio)

    def load_outside_names(self) -> Mapping[str, Sequence[str]]:
        """Id to names of what a free answer may name beyond the label set. None, unless a task knows some."""
        return {}

    def answer(self, model: "PreTrainedModel", reader: Reader, *, system: str) -> list[Prediction]:
        """The exact ranking of every case, and free answers to the drawn ones."""
        material, labels = self.material, self.material.labels
        questions = [material.template.question(case) for case in material.cases]
        with Progress(f"evaluation: {system}", total=len(questions) + len(self._generated)) as progress:
            log_probabilities_NL = rank_labels(
                model,
                reader,
                material.template,
                labels,
                [question.turns for question in questions],
                images=[question.images for question in questions],
                batch_tokens=self.config.batch_tokens,
                progress=progress.advance,
            )
            longest = sorted((label.name for label in labels), key=len)[-material.top_k :]
            room = len(encode_answer(reader.tokenizer, material.template.answer(longest)))
            texts: dict[int, str] = {}
            for start in range(0, len(self._generated), _GENERATION_BATCH):
                chunk = self._generated[start : start + _GENERATION_BATCH]
                turns = [questions[index].turns for index in chunk]
                images = [questions[index].images for index in chunk]
                found = generate_answers(model, reader, turns, images=images, max_new_tokens=room)
                texts |= zip(chunk, found, strict=True)
                progress.advance(len(chunk))
        predictions = self._predict(np.exp(log_probabilities_NL), system)
        for index, text in texts.items():
            names = tuple(self._names.resolve(name) for name in material.template.parse(text))
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
        measured = measure_ranking(predictions, tops=self.tops)
        if system not in (TEACHER, CHANCE, MAJORITY):
            listed = [prediction.ranked_ids[:top_k] for prediction in predictions]
            measured |= measure_agreement(listed, self._sides, car_lambda=self.config.car_lambda)
        generated = [prediction.generated for prediction in predictions]
        if any(names is not None for names in generated):
            free = measure_generation(predictions, top_k=top_k)
            free |= measure_agreement(generated, self._sides, car_lambda=self.config.car_lambda)
            measured |= {f"generated_{metric}": measurement for metric, measurement in free.items()}
        return {metric: measured[metric] for metric in self.metrics if metric in measured}

    def describe(self) -> tuple[str, ...]:
        """What was asked of how many cases."""
        material = self.material
        asked = (
            f"Every system ranks the same {len(material.labels)} {self.wording.labels} for the same "
            f"{len(material.cases)} cases; coverage and avoidance compare with the teacher's first {material.top_k} "
            f"and last {material.bottom_q}."
        )
        freely = f"Free answers were generated greedily for {len(self._generated)} of these cases, drawn with the seed."
        return (asked, freely) if self._generated else (asked,)

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


def list_metrics(wording: Wording, *, tops: Sequence[int], further: Mapping[str, Metric]) -> dict[str, Metric]:
    """The metrics of a ranking task in its words; `further` ones of its ranking stand behind those of single cases."""
    label, labels = wording.label, wording.labels
    later = {
        f"top_{k}": describe_metric(f"Top-{k}", f"Share of cases whose {label} is among the first {k}.")
        for k in tops
        if k > 1
    }
    return {
        "top_1": describe_metric("Top-1", f"Share of cases whose {label} is ranked first."),
        "mrr": describe_metric("MRR", f"Mean of 1 / rank of the {label}.", unit="score"),
        **later,
        "macro_top_1": describe_metric("Macro top-1", f"Top-1 within each {label}, averaged over the {labels}."),
        **further,
        "coverage": describe_metric("Coverage", "Share of the teacher's top k that is in the system's top k."),
        "avoidance": describe_metric(
            "Avoidance", "1 minus the share of the system's top k that is in the teacher's bottom q."
        ),
        "car": describe_metric("CAR", "Weighted harmonic mean of coverage and avoidance.", unit="score"),
        "ece": describe_metric(
            "ECE", "Expected gap between stated and observed certainty.", unit="score", better="lower"
        ),
        "generated_top_1": describe_metric("Top-1", f"Share of free answers that name the {label} first."),
        "generated_top_k": describe_metric("Any named", f"Share of free answers that name the {label} at all."),
        "generated_mrr": describe_metric(
            "MRR", f"Mean of 1 / position of the {label}, 0 where it is not named.", unit="score"
        ),
        "generated_coverage": describe_metric("Coverage", "Share of the teacher's top k that the free answer names."),
        "generated_avoidance": describe_metric(
            "Avoidance", "1 minus the share of the names that are in the teacher's bottom q."
        ),
        "generated_car": describe_metric("CAR", "Weighted harmonic mean of coverage and avoidance.", unit="score"),
        "generated_complete": describe_metric("Complete", "Share of free answers with exactly k different names."),
        "generated_fuzzy_top_1": describe_metric(
            "Top-1 with near misses", "Top-1 if near misses counted; reported only."
        ),
    }


def describe_metric(title: str, meaning: str, *, unit: str = "percent", better: str = "higher") -> Metric:
    """How a metric is read."""
    return Metric.model_validate({"title": title, "meaning": meaning, "unit": unit, "better": better})
