"""Ranking scores: measurements of ranked and of freely generated lists of labels.

Goes in: predictions of one system, and the teacher's chosen and rejected labels of every case. Comes out: measurements
with a row for every case. It knows neither models nor names. N is the number of cases.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mint_lib.clinical.disease_names import FUZZY, OUTSIDE, UNKNOWN
from mint_lib.report_records import Prediction
from mint_lib.statistics import (
    Array,
    Measurement,
    measure_calibration_error,
    measure_harmonic,
    measure_macro_f1,
    measure_macro_mean,
    measure_mean,
    measure_ratio,
)


class TeacherSides(NamedTuple):
    """What the teacher would choose and reject for one case."""

    chosen: frozenset[str]
    rejected: frozenset[str]


def measure_ranking(predictions: Sequence[Prediction], *, tops: Sequence[int]) -> dict[str, Measurement]:
    """Top-k for each k of `tops` below the number of labels, MRR, macro top-1 and F1, calibration of the first answer.

    Labels of equal probability share their ranks, so the order of the label set never decides a hit. `tops` holds 1.
    """
    better_N, tied_N = np.array([_find_rank(prediction) for prediction in predictions], dtype=np.float64).T
    hits = {k: np.clip((k - better_N) / tied_N, 0.0, 1.0) for k in tops if k < len(predictions[0].ranked_ids)}
    reciprocal_N = np.array(
        [np.mean(1 / np.arange(better + 1, better + tied + 1)) for better, tied in zip(better_N, tied_N, strict=True)]
    )
    confidences_N = np.array([prediction.probabilities[0] for prediction in predictions])
    truth = [prediction.label_id for prediction in predictions]
    return {f"top_{k}": measure_mean(values_N) for k, values_N in hits.items()} | {
        "mrr": measure_mean(reciprocal_N),
        "macro_top_1": measure_macro_mean(hits[1], truth),
        "macro_f1": measure_macro_f1([_share_first(prediction) for prediction in predictions], truth),
        "ece": measure_calibration_error(confidences_N, hits[1]),
    }


def measure_agreement(
    lists: Sequence[Sequence[str] | None], sides: Sequence[TeacherSides], *, car_lambda: float
) -> dict[str, Measurement]:
    """Coverage, avoidance and CAR of what a system lists; None: the case was not asked.

    Coverage is the share of the chosen labels among the system's first names, as many as were chosen; avoidance is 1
    minus the share of rejected ones among all its names. An empty list covers and avoids nothing.
    """
    coverage_N, avoidance_N = np.full((2, len(lists)), np.nan)
    for index, (names, (chosen, rejected)) in enumerate(zip(lists, sides, strict=True)):
        if names is not None:
            coverage_N[index] = len(chosen & set(names[: len(chosen)])) / len(chosen)
            avoidance_N[index] = 1 - sum(name in rejected for name in names) / len(names) if names else 0.0
    return {
        "coverage": measure_mean(coverage_N),
        "avoidance": measure_mean(avoidance_N),
        "car": measure_harmonic(coverage_N, avoidance_N, weight=car_lambda),
    }


def measure_generation(predictions: Sequence[Prediction], *, top_k: int) -> dict[str, Measurement]:
    """Metrics of the free answers. An answer that names nothing counts as wrong; a case not asked does not count."""
    places_N, fuzzy_N, complete_N = np.full((3, len(predictions)), np.nan)
    listed_N, invented_N, outside_N = np.zeros((3, len(predictions)))
    for index, prediction in enumerate(predictions):
        names, truth = prediction.generated, prediction.label_id
        if names is None:
            continue
        places_N[index] = names.index(truth) + 1 if truth in names else np.inf
        fuzzy_N[index] = bool(names) and names[0] in (truth, FUZZY + truth)
        complete_N[index] = len(names) == len(set(names)) == top_k
        listed_N[index] = len(names)
        invented_N[index] = sum(name == UNKNOWN or name.startswith(FUZZY) for name in names)
        outside_N[index] = sum(name.startswith(OUTSIDE) for name in names)
    asked_N: Array = np.where(np.isnan(places_N), np.nan, 1.0)
    return {
        "top_1": measure_mean((places_N == 1) * asked_N),
        "top_k": measure_mean((places_N <= top_k) * asked_N),
        "mrr": measure_mean(np.where(places_N <= top_k, 1 / places_N, 0.0) * asked_N),
        "complete": measure_mean(complete_N),
        "fuzzy_top_1": measure_mean(fuzzy_N),
        "invented": measure_ratio(invented_N, listed_N),
        "outside": measure_ratio(outside_N, listed_N),
    }


def _share_first(prediction: Prediction) -> dict[str, float]:
    """The first answer as shares of one; labels that are exactly as probable as the first share it."""
    first = prediction.probabilities[0]
    tied = [key for key, value in zip(prediction.ranked_ids, prediction.probabilities, strict=True) if value == first]
    return dict.fromkeys(tied, 1 / len(tied))


def _find_rank(prediction: Prediction) -> tuple[int, int]:
    """How many labels are more probable than the diagnosis, and how many are exactly as probable, itself included."""
    own = prediction.probabilities[prediction.ranked_ids.index(prediction.label_id)]
    better = sum(value > own for value in prediction.probabilities)
    return better, sum(value == own for value in prediction.probabilities)
