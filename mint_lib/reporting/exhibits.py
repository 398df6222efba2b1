"""Report exhibits: what a report shows beside its numbers.

Goes in: findings, predictions, cases and training histories. Comes out: curves, reliability bins, confusions of the
worst families, and example cases. A case is shown only if it is synthetic. It knows nothing of pages or pictures.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from mint_lib.records import Case, EvaluationReport, Label, Prediction
from mint_lib.statistics import ReliabilityBin, reliability_bins

Histories = Mapping[str, Sequence[Mapping[str, float | str]]]
_CURVES = {
    "loss": "Loss of chosen answers (nats per token)",
    "reward_accuracy": "Pairs with the chosen answer ahead",
    "reward_margin": "Margin, chosen over rejected (nats per token)",
    "agreement_mrr": "Agreement with the teacher's first (MRR)",
}
_WORST_FAMILIES = 2
_CONFUSED_LABELS = 6
_EXAMPLES_EACH = 2
_SHOWN_ANSWERS = 5


class Curve(NamedTuple):
    """One validation figure over training."""

    title: str
    series: dict[str, list[tuple[float, float]]]
    """Run of a student to (step, value)."""


class Confusion(NamedTuple):
    """What the main student ranks first for the diagnoses of one family."""

    family: str
    names: tuple[str, ...]
    """Diagnoses, as rows; the columns are the same and last `another`."""
    counts: tuple[tuple[float, ...], ...]


class Answers(NamedTuple):
    """The first names of one system for one case."""

    system: str
    rows: tuple[tuple[str, float, bool], ...]
    """Name, probability, and whether it is the diagnosis."""
    rank: int
    """Rank of the diagnosis."""


class Example(NamedTuple):
    """One synthetic test case with what systems answered."""

    case_id: str
    text: str
    image: bytes | None
    diagnosis: str
    outcome: str
    answers: tuple[Answers, ...]


class Exhibits(NamedTuple):
    """Everything a report shows beside its numbers."""

    curves: tuple[Curve, ...] = ()
    reliability: Mapping[str, Sequence[ReliabilityBin]] = {}
    confusions: tuple[Confusion, ...] = ()
    examples: tuple[Example, ...] = ()
    label_names: Mapping[str, str] = {}


def collect_exhibits(
    report: EvaluationReport,
    predictions: Mapping[str, Sequence[Prediction]],
    cases: Sequence[Case],
    labels: Sequence[Label],
    histories: Histories,
) -> Exhibits:
    """The exhibits of `report`. Where a system has several runs, its first stands for it; curves show all."""
    first: dict[str, Sequence[Prediction]] = {}
    for run, rows in predictions.items():
        first.setdefault(run.partition("/")[0], rows)
    shown = [name for name in report.order if name == report.main or report.roles[name] in ("base", "teacher")]
    return Exhibits(
        curves=collect_curves(histories),
        reliability={name: _bins(first[name]) for name in shown},
        confusions=collect_confusions(first[report.main], labels),
        examples=draw_examples(report, {name: first[name] for name in shown}, cases, labels),
        label_names={label.id: label.name for label in labels},
    )


def collect_curves(histories: Histories) -> tuple[Curve, ...]:
    """The validation figures of every run, each in one curve; a figure that no run has is left out."""
    curves = []
    for key, title in _CURVES.items():
        series = {
            run: [
                (float(row["step"]), float(row[key])) for row in rows if row.get("kind") == "validation" and key in row
            ]
            for run, rows in histories.items()
        }
        if any(len(points) > 1 for points in series.values()):
            curves.append(Curve(title, {run: points for run, points in series.items() if points}))
    return tuple(curves)


def collect_confusions(predictions: Sequence[Prediction], labels: Sequence[Label]) -> tuple[Confusion, ...]:
    """Confusions of the families with the lowest top-1, worst first, over the labels that have cases."""
    label_of = {label.id: label for label in labels}
    families: dict[str, list[Prediction]] = {}
    for prediction in predictions:
        families.setdefault(label_of[prediction.label_id].family or "", []).append(prediction)
    confusable = {
        family: rows for family, rows in families.items() if family and len({row.label_id for row in rows}) > 1
    }
    scores = {
        family: float(np.mean([row.ranked_ids[0] == row.label_id for row in rows]))
        for family, rows in confusable.items()
    }
    confusions = []
    for family in sorted(scores, key=lambda family: (scores[family], family))[:_WORST_FAMILIES]:
        rows = confusable[family]
        common = Counter(row.label_id for row in rows).most_common(_CONFUSED_LABELS)
        ids = sorted(label_id for label_id, _ in common)
        counts = np.zeros((len(ids), len(ids) + 1))
        for row in rows:
            if row.label_id in ids:
                answer = row.ranked_ids[0]
                counts[ids.index(row.label_id), ids.index(answer) if answer in ids else len(ids)] += 1
        names = tuple(label_of[label_id].name for label_id in ids)
        confusions.append(Confusion(family, names, tuple(tuple(map(float, line)) for line in counts)))
    return tuple(confusions)


def draw_examples(
    report: EvaluationReport,
    predictions: Mapping[str, Sequence[Prediction]],
    cases: Sequence[Case],
    labels: Sequence[Label],
) -> tuple[Example, ...]:
    """Synthetic cases drawn by lot with the report's seed: as many that the main student ranks first as others."""
    name_of = {label.id: label.name for label in labels}
    order = np.random.default_rng(report.seed).permutation(len(cases))
    drawn: dict[bool, list[int]] = {True: [], False: []}
    for index in map(int, order):
        prediction = predictions[report.main][index]
        group = drawn[prediction.ranked_ids[0] == prediction.label_id]
        if cases[index].synthetic and len(group) < _EXAMPLES_EACH:
            group.append(index)
    examples = []
    for is_right, indices in drawn.items():
        for index in indices:
            answers = tuple(_answers(system, rows[index], name_of) for system, rows in predictions.items())
            case = cases[index]
            examples.append(
                Example(
                    case_id=case.case_id,
                    text=case.text or "",
                    image=case.image,
                    diagnosis=name_of[str(case.label_id)],
                    outcome="ranked first" if is_right else "not ranked first",
                    answers=answers,
                )
            )
    return tuple(examples)


def _answers(system: str, prediction: Prediction, name_of: Mapping[str, str]) -> Answers:
    ranked = list(zip(prediction.ranked_ids, prediction.probabilities, strict=True))[:_SHOWN_ANSWERS]
    rows = tuple((name_of[key], value, key == prediction.label_id) for key, value in ranked)
    return Answers(system, rows, prediction.ranked_ids.index(prediction.label_id) + 1)


def _bins(predictions: Sequence[Prediction]) -> list[ReliabilityBin]:
    confidences_N = np.array([prediction.probabilities[0] for prediction in predictions])
    correct_N = np.array([float(prediction.ranked_ids[0] == prediction.label_id) for prediction in predictions])
    return reliability_bins(confidences_N, correct_N)
