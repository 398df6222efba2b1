"""Report exhibits: what a report shows beside its numbers.

Goes in: findings, predictions, cases, training histories and what was probed. Comes out: curves, reliability bins,
confusions, example cases, and what probes showed. An observed case is shown only where the recipe allows it, and its
text never. It knows nothing of pages or plots.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

from mint_lib.records import Case, Label
from mint_lib.report_records import EvaluationReport, Prediction
from mint_lib.reporting.altered_images import shrink
from mint_lib.reporting.grounding import Probe
from mint_lib.reporting.injections import Injections
from mint_lib.reporting.perturbations import perturb
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
_EXAMPLES_EACH = {"text": 2, "image": 3}
_SHOWN_ANSWERS = 5
_LONGEST_PIXELS = 256
"""Of an image in a report; it is shown at half of it, so that a dense screen has all it can show."""
Shows = Literal["synthetic", "with_observed_images"]


class Curve(NamedTuple):
    """One validation figure over training."""

    title: str
    series: dict[str, list[tuple[float, float]]]
    """Run of a student to (step, value)."""


class Confusion(NamedTuple):
    """What the main student ranks first for the labels of one family, or for all."""

    family: str
    names: tuple[str, ...]
    """Labels, as rows; the columns are the same, and last `another` where there is any other."""
    counts: tuple[tuple[float, ...], ...]


class Answers(NamedTuple):
    """The first names of one system for one case."""

    system: str
    rows: tuple[tuple[str, float, bool], ...]
    """Name, probability, and whether it is the case's label."""
    rank: int
    """Rank of the case's label."""


class Example(NamedTuple):
    """One test case with what systems answered."""

    case_id: str
    text: str
    """Empty for an observed case."""
    image: bytes | None
    label: str
    outcome: str
    answers: tuple[Answers, ...]


class Altered(NamedTuple):
    """What a probe showed instead of a case's image, and what the student answered."""

    kind: str
    """`own` for the case's own image."""
    image: bytes
    answer: str
    is_own_label: bool


class Strip(NamedTuple):
    """One case in all variants of the grounding probe."""

    case_id: str
    label: str
    altered: tuple[Altered, ...]


class Worse(NamedTuple):
    """One image in a worse state."""

    kind: str
    level: float
    image: bytes


class Exhibits(NamedTuple):
    """Everything a report shows beside its numbers."""

    curves: tuple[Curve, ...] = ()
    reliability: Mapping[str, Sequence[ReliabilityBin]] = {}
    confusions: tuple[Confusion, ...] = ()
    examples: tuple[Example, ...] = ()
    strip: Strip | None = None
    worse: tuple[Worse, ...] = ()
    """One case's image in the states that were measured, by kind and from weak to strong."""
    injections: Injections | None = None
    label_names: Mapping[str, str] = {}


def collect_exhibits(
    report: EvaluationReport,
    predictions: Mapping[str, Sequence[Prediction]],
    cases: Sequence[Case],
    labels: Sequence[Label],
    histories: Histories,
    *,
    confusion: Literal["families", "labels"],
    probe: Probe | None = None,
    injections: Injections | None = None,
    shows: Shows = "synthetic",
) -> Exhibits:
    """The exhibits of `report`. Where a system has several runs, its first stands for it; curves show all."""
    first: dict[str, Sequence[Prediction]] = {}
    for run, rows in predictions.items():
        first.setdefault(run.partition("/")[0], rows)
    shown = [name for name in report.order if name == report.main or report.roles[name] in ("base", "teacher")]
    return Exhibits(
        curves=collect_curves(histories),
        reliability={name: _bins(first[name]) for name in shown},
        confusions=collect_confusions(first[report.main], labels)
        if confusion == "families"
        else (confuse_all(first[report.main], labels, family=f"All {report.wording.labels}"),),
        examples=draw_examples(report, {name: first[name] for name in shown}, cases, labels, shows=shows),
        strip=choose_strip(probe, labels, shows=shows) if probe else None,
        worse=worsen_example(report, cases, shows=shows),
        injections=injections,
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


def confuse_all(predictions: Sequence[Prediction], labels: Sequence[Label], *, family: str) -> Confusion:
    """The confusions of all labels in their order, those without a test case too."""
    ids = [label.id for label in labels]
    counts = np.zeros((len(ids), len(ids)))
    for row in predictions:
        counts[ids.index(row.label_id), ids.index(row.ranked_ids[0])] += 1
    return Confusion(family, tuple(label.name for label in labels), tuple(tuple(map(float, line)) for line in counts))


def draw_examples(
    report: EvaluationReport,
    predictions: Mapping[str, Sequence[Prediction]],
    cases: Sequence[Case],
    labels: Sequence[Label],
    *,
    shows: Shows,
) -> tuple[Example, ...]:
    """Cases drawn by lot with the report's seed: as many that the main student ranks first as others.

    Of images, each of the first and each of the others is of another label, as far as there are any.
    """
    name_of = {label.id: label.name for label in labels}
    order = np.random.default_rng(report.seed).permutation(len(cases))
    drawn: dict[bool, list[int]] = {True: [], False: []}
    for index in map(int, order):
        prediction = predictions[report.main][index]
        group = drawn[prediction.ranked_ids[0] == prediction.label_id]
        is_new = report.reads == "text" or all(cases[other].label_id != cases[index].label_id for other in group)
        if _may_be_shown(cases[index], shows) and is_new and len(group) < _EXAMPLES_EACH[report.reads]:
            group.append(index)
    examples = []
    for is_right, indices in drawn.items():
        for index in indices:
            answers = tuple(_answers(system, rows[index], name_of) for system, rows in predictions.items())
            case = cases[index]
            examples.append(
                Example(
                    case_id=case.case_id,
                    text=(case.text or "") if case.synthetic else "",
                    image=shrink(case.image, longest_pixels=_LONGEST_PIXELS) if case.image else None,
                    label=name_of[str(case.label_id)],
                    outcome="ranked first" if is_right else "not ranked first",
                    answers=answers,
                )
            )
    return tuple(examples)


def choose_strip(probe: Probe, labels: Sequence[Label], *, shows: Shows) -> Strip | None:
    """The first probed case that may be shown in all variants, one that is answered rightly if there is any."""
    allowed = [
        place
        for place, case in enumerate(probe.cases)
        if all(
            _may_be_shown(item, shows)
            for item in (case, probe.donors["permuted"][place], probe.donors["swapped"][place])
        )
    ]
    if not allowed:
        return None
    right = [place for place in allowed if probe.own.answers[place] == probe.cases[place].label_id]
    place = (right or allowed)[0]
    case, name_of = probe.cases[place], {label.id: label.name for label in labels}
    altered = tuple(
        Altered(
            kind=kind,
            image=shrink(shown.images[place], longest_pixels=_LONGEST_PIXELS),
            answer=name_of[shown.answers[place]],
            is_own_label=shown.answers[place] == case.label_id,
        )
        for kind, shown in (("own", probe.own), *probe.shown.items())
    )
    return Strip(case.case_id, name_of[str(case.label_id)], altered)


def worsen_example(report: EvaluationReport, cases: Sequence[Case], *, shows: Shows) -> tuple[Worse, ...]:
    """The image of the first case that may be shown, at every level that was measured."""
    images = [case.image for case in cases if case.image and _may_be_shown(case, shows)]
    return tuple(
        Worse(
            item.kind,
            found.level,
            shrink(perturb(images[0], item.kind, found.level, seed=report.seed), longest_pixels=_LONGEST_PIXELS),
        )
        for item in report.perturbations
        for found in item.levels
        if images
    )


def _may_be_shown(case: Case, shows: Shows) -> bool:
    return case.synthetic or (shows == "with_observed_images" and case.image is not None)


def _answers(system: str, prediction: Prediction, name_of: Mapping[str, str]) -> Answers:
    ranked = list(zip(prediction.ranked_ids, prediction.probabilities, strict=True))[:_SHOWN_ANSWERS]
    rows = tuple((name_of[key], value, key == prediction.label_id) for key, value in ranked)
    return Answers(system, rows, prediction.ranked_ids.index(prediction.label_id) + 1)


def _bins(predictions: Sequence[Prediction]) -> list[ReliabilityBin]:
    confidences_N = np.array([prediction.probabilities[0] for prediction in predictions])
    correct_N = np.array([float(prediction.ranked_ids[0] == prediction.label_id) for prediction in predictions])
    return reliability_bins(confidences_N, correct_N)
