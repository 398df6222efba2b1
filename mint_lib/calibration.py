"""Calibration: makes a classifier's confidence mean what it says.

Goes in: log-scores `[case, label]` and the index of the right label. Comes out: a temperature, probabilities, negative
log-likelihood and calibration error. Knows neither cases nor teachers. Source: Guo et al., ICML 2017.
"""

import math

import numpy as np

from mint_lib.records import Reference
from mint_lib.report_records import Calibration
from mint_lib.statistics import measure_calibration_error

_RANGE = (-7.0, 7.0)
"""Natural logarithm of the temperatures searched, about 0.001 to 1,000: similarity scores are not in nats."""
_GOLDEN = (math.sqrt(5) - 1) / 2


def normalise_scores(scores: np.ndarray, *, temperature: float = 1.0) -> np.ndarray:
    """Probabilities `[case, label]`: softmax of `scores` divided by `temperature`."""
    scaled = np.asarray(scores, dtype=np.float64) / temperature
    weights = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    probabilities: np.ndarray = weights / weights.sum(axis=1, keepdims=True)
    return probabilities


def negative_log_likelihood(scores: np.ndarray, truth: np.ndarray, *, temperature: float = 1.0) -> float:
    """Mean of -ln P(right label) in nats, for right labels `truth` as column indices."""
    scaled = np.asarray(scores, dtype=np.float64) / temperature
    top = scaled.max(axis=1)
    log_totals = top + np.log(np.exp(scaled - top[:, None]).sum(axis=1))
    return float(np.mean(log_totals - scaled[np.arange(len(truth)), truth]))


def fit_temperature(scores: np.ndarray, truth: np.ndarray) -> float:
    """The temperature with the least negative log-likelihood (Guo et al. 2017, section 4.2).

    One case in n + 2 is taken to be wrong (Platt 1999, section 2.2), so that a teacher without an error on n cases does
    not become certain. The loss has one optimum in the temperature; a golden-section search finds it.
    """
    num_cases, num_labels = scores.shape
    share_wrong = 1 / (num_cases + 2)
    targets = np.full(scores.shape, share_wrong / max(1, num_labels - 1))
    targets[np.arange(num_cases), truth] = 1 - share_wrong

    def loss(log_temperature: float) -> float:
        scaled = np.asarray(scores, dtype=np.float64) / math.exp(log_temperature)
        scaled = scaled - scaled.max(axis=1, keepdims=True)
        return float(np.mean(np.log(np.exp(scaled).sum(axis=1)) - (targets * scaled).sum(axis=1)))

    low, high = _RANGE
    while high - low > 1e-6:
        left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
        low, high = (low, right) if loss(left) <= loss(right) else (left, high)
    return math.exp((low + high) / 2)


def calibrate_student(scores: np.ndarray, truth: np.ndarray, *, student: Reference) -> Calibration:
    """The temperature for a student's log-scores of labelled validation cases, with what it changes on these cases.

    The temperature has one parameter and is fitted on the same cases that the figures are about.
    """
    temperature = fit_temperature(scores, truth)
    return Calibration(
        student=str(student),
        split="validation",
        num_cases=len(truth),
        temperature=temperature,
        nll_before=negative_log_likelihood(scores, truth),
        nll_after=negative_log_likelihood(scores, truth, temperature=temperature),
        ece_before=_calibration_error(normalise_scores(scores), truth),
        ece_after=_calibration_error(normalise_scores(scores, temperature=temperature), truth),
    )


def _calibration_error(probabilities: np.ndarray, truth: np.ndarray) -> float:
    """Expected calibration error of the first label's probability."""
    correct = (probabilities.argmax(axis=1) == truth).astype(np.float64)
    measured = measure_calibration_error(probabilities.max(axis=1), correct)
    return float(measured.statistic(measured.columns.sum(axis=0, keepdims=True))[0])
