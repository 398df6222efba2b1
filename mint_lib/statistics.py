"""Intervals, paired tests and calibration for measurements on cases that come in groups (patients).

Goes in: per-case columns of numbers and the group of every case. Comes out: `Estimate`s with percentile intervals,
p-values and reliability bins. Everything is seeded. It knows neither systems nor tasks.

Shapes: N cases, M columns, G groups, D bootstrap draws, R runs of one system.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mint_lib.report_records import Estimate

Array = NDArray[np.float64]
PERMUTATIONS = 10_000
"""Smallest p-value 1e-4, and a standard error of 0.2 points at p = 0.05."""
_CHUNK = 500


class Measurement(NamedTuple):
    """One metric of one system: a function of sums over cases, so that a resampled set costs one matrix product."""

    columns: Array
    """[N, M]; the last column counts what the value rests on: cases or listed names."""
    statistic: Callable[[Array], Array]
    """From sums [D, M] to values [D]."""

    @property
    def n(self) -> int:
        """How much the value rests on."""
        return round(float(self.columns[:, -1].sum()))

    def take(self, mask_N: NDArray[np.bool_]) -> "Measurement":
        """The same metric on some of the cases only."""
        return self._replace(columns=self.columns[mask_N])


class ReliabilityBin(NamedTuple):
    """Cases whose confidence falls in one of the equal-width bins."""

    low: float
    high: float
    confidence: float
    accuracy: float
    num_cases: int


def measure_mean(values_N: Array) -> Measurement:
    """The mean over cases; a NaN marks a case that does not count."""
    counted_N = ~np.isnan(values_N)
    return measure_ratio(np.where(counted_N, values_N, 0.0), counted_N.astype(np.float64))


def measure_ratio(numerators_N: Array, denominators_N: Array) -> Measurement:
    """Sum of numerators over sum of denominators, for instance names that resolve over names listed."""
    columns_NM = np.stack([numerators_N, denominators_N], axis=1).astype(np.float64)
    return Measurement(columns_NM, _ratio)


def measure_harmonic(firsts_N: Array, seconds_N: Array, *, weight: float) -> Measurement:
    """(1 + w) a b / (w a + b) of the means a and b over cases; NaN in both marks a case that does not count.

    With coverage and avoidance this is MINT's CAR. It is 0 where both means are.
    """
    counted_N = ~np.isnan(firsts_N)
    columns_NM = np.stack([np.nan_to_num(firsts_N), np.nan_to_num(seconds_N), counted_N], axis=1).astype(np.float64)

    def statistic(sums_DM: Array) -> Array:
        firsts_D, seconds_D = (_ratio(sums_DM[:, [column, 2]]) for column in (0, 1))
        below_D = weight * firsts_D + seconds_D
        whole_D = (1 + weight) * firsts_D * seconds_D
        return np.divide(whole_D, below_D, out=np.where(np.isnan(below_D), np.nan, 0.0), where=below_D > 0)

    return Measurement(columns_NM, statistic)


def measure_macro_mean(values_N: Array, classes_N: Sequence[str]) -> Measurement:
    """The mean over classes of the mean within each class, over the classes that are present."""
    _, class_N = np.unique(np.asarray(classes_N), return_inverse=True)
    member_NC = np.eye(int(class_N.max()) + 1 if len(class_N) else 1)[class_N]
    num_classes = member_NC.shape[1]

    def statistic(sums_DM: Array) -> Array:
        counts_DC = sums_DM[:, num_classes : 2 * num_classes]
        present_DC = counts_DC > 0
        means_DC = np.divide(sums_DM[:, :num_classes], counts_DC, out=np.zeros_like(counts_DC), where=present_DC)
        return means_DC.sum(axis=1) / present_DC.sum(axis=1)

    ones_N1 = np.ones((len(values_N), 1))
    return Measurement(np.concatenate([member_NC * values_N[:, None], member_NC, ones_N1], axis=1), statistic)


def measure_macro_f1(answers_N: Sequence[Mapping[str, float]], classes_N: Sequence[str]) -> Measurement:
    """The mean over classes of F1 = 2 TP / (answered + present), over the classes that are present.

    `answers_N` holds for each case the classes answered and their shares, which sum to 1: an answer that is a draw
    counts by expectation. Classes that are never present count only as false answers, as in scikit-learn's
    `f1_score(average="macro", labels=<those present>)`.
    """
    names, class_N = np.unique(np.asarray(classes_N, dtype=str), return_inverse=True)
    num_classes = len(names)
    member_NC = np.eye(num_classes)[class_N]
    answered_NC = np.array([[answer.get(str(name), 0.0) for name in names] for answer in answers_N])

    def statistic(sums_DM: Array) -> Array:
        right_DC, answered_DC, counts_DC = (
            sums_DM[:, part * num_classes : (part + 1) * num_classes] for part in range(3)
        )
        present_DC = counts_DC > 0
        scores_DC = np.divide(2 * right_DC, answered_DC + counts_DC, out=np.zeros_like(right_DC), where=present_DC)
        return scores_DC.sum(axis=1) / present_DC.sum(axis=1)

    columns = [answered_NC * member_NC, answered_NC, member_NC, np.ones((len(class_N), 1))]
    return Measurement(np.concatenate(columns, axis=1), statistic)


def measure_calibration_error(confidences_N: Array, correct_N: Array, *, num_bins: int = 10) -> Measurement:
    """Expected calibration error over equal-width bins. Naeini et al., AAAI 2015."""
    member_NB = np.eye(num_bins)[_bin_index(confidences_N, num_bins)]
    gaps_NB = member_NB * (confidences_N - correct_N)[:, None]

    def statistic(sums_DM: Array) -> Array:
        return np.abs(sums_DM[:, :num_bins]).sum(axis=1) / sums_DM[:, num_bins]

    ones_N1 = np.ones((len(confidences_N), 1))
    return Measurement(np.concatenate([gaps_NB, ones_N1], axis=1), statistic)


def reliability_bins(confidences_N: Array, correct_N: Array, *, num_bins: int = 10) -> list[ReliabilityBin]:
    """The non-empty bins of a reliability diagram."""
    index_N = _bin_index(confidences_N, num_bins)
    bins = []
    for index in range(num_bins):
        inside_N = index_N == index
        if inside_N.any():
            edges = (index / num_bins, (index + 1) / num_bins)
            means = (float(confidences_N[inside_N].mean()), float(correct_N[inside_N].mean()))
            bins.append(ReliabilityBin(*edges, *means, int(inside_N.sum())))
    return bins


class GroupBootstrap:
    """Resamples whole groups (patients) with replacement; every measurement sees the same draws, so all are paired.

    A system may have several runs (seeds of one arm). Its value is their mean, and the runs are resampled too; arms
    with equally many runs are paired run by run in their order. Percentile intervals: Efron & Tibshirani 1993, ch. 13.
    """

    def __init__(self, groups: Sequence[str], *, draws: int, seed: int, confidence: float):
        names, self._group_N = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
        self.num_groups = len(names)
        self._draws = draws
        self._seed = seed
        self._tail = 100 * (1 - confidence) / 2
        rng = np.random.default_rng(seed)
        shares = np.full(self.num_groups, 1 / max(1, self.num_groups))
        self._weights_DG = rng.multinomial(self.num_groups, shares, size=draws).astype(np.float64)

    def estimate(self, runs: Sequence[Measurement]) -> Estimate:
        """The mean of the runs' values with its interval."""
        return self._interval(_value(runs), self._resample(runs), runs[0].n)

    def difference(self, runs: Sequence[Measurement], others: Sequence[Measurement]) -> Estimate:
        """Value of `runs` minus value of `others`, with the interval of the paired difference."""
        draws_D = self._resample(runs) - self._resample(others)
        return self._interval(_value(runs) - _value(others), draws_D, min(runs[0].n, others[0].n))

    def _resample(self, runs: Sequence[Measurement]) -> Array:
        values_DR = np.stack(
            [run.statistic(self._weights_DG @ self._sum_by_group(run.columns)) for run in runs], axis=1
        )
        if len(runs) == 1:
            return values_DR[:, 0]
        rng = np.random.default_rng([self._seed, len(runs)])
        shares_DR = rng.multinomial(len(runs), [1 / len(runs)] * len(runs), size=self._draws) / len(runs)
        return np.sum(shares_DR * values_DR, axis=1)

    def _sum_by_group(self, columns_NM: Array) -> Array:
        sums_GM = np.zeros((self.num_groups, columns_NM.shape[1]))
        np.add.at(sums_GM, self._group_N, columns_NM)
        return sums_GM

    def _interval(self, value: float, draws_D: Array, n: int) -> Estimate:
        usable_D = draws_D[np.isfinite(draws_D)]
        if not math.isfinite(value):
            return Estimate(value=None, low=None, high=None, n=n)
        if self.num_groups < 2 or not len(usable_D):
            return Estimate(value=value, low=None, high=None, n=n)
        low, high = np.percentile(usable_D, [self._tail, 100 - self._tail])
        return Estimate(value=value, low=float(low), high=float(high), n=n)


def sign_test(differences_N: Array, groups: Sequence[str]) -> float:
    """Two-sided exact sign test over groups that differ; with one case per group it is McNemar's exact test."""
    sums_G = _group_sums(differences_N, groups)
    wins, losses = int((sums_G > 1e-12).sum()), int((sums_G < -1e-12).sum())
    total = wins + losses
    tail = sum(math.comb(total, count) for count in range(min(wins, losses) + 1))
    return min(1.0, 2 * tail / 2**total)


def permutation_test(differences_N: Array, groups: Sequence[str], *, seed: int) -> float:
    """Two-sided paired permutation test of a mean difference: the sign of a whole group's difference is flipped.

    Monte Carlo with the observed arrangement counted (Phipson & Smyth 2010), so the p-value is never 0.
    """
    sums_G = _group_sums(differences_N, groups)
    observed = abs(float(sums_G.sum()))
    rng = np.random.default_rng(seed)
    as_extreme = 0
    for start in range(0, PERMUTATIONS, _CHUNK):
        signs_DG = 2.0 * rng.integers(0, 2, size=(min(_CHUNK, PERMUTATIONS - start), len(sums_G))) - 1
        as_extreme += int((np.abs(signs_DG @ sums_G) >= observed - 1e-9).sum())
    return (1 + as_extreme) / (1 + PERMUTATIONS)


def correct_holm(p_values: Sequence[float]) -> list[float]:
    """Step-down adjusted p-values that keep the family-wise error rate. Holm, Scand. J. Statist. 1979."""
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def _value(runs: Sequence[Measurement]) -> float:
    return float(np.mean([run.statistic(run.columns.sum(axis=0, keepdims=True))[0] for run in runs]))


def _ratio(sums_DM: Array) -> Array:
    known_D = sums_DM[:, 1] > 0
    return np.divide(sums_DM[:, 0], sums_DM[:, 1], out=np.full(len(sums_DM), np.nan), where=known_D)


def _bin_index(confidences_N: Array, num_bins: int) -> NDArray[np.int64]:
    return np.clip((confidences_N * num_bins).astype(np.int64), 0, num_bins - 1)


def _group_sums(values_N: Array, groups: Sequence[str]) -> Array:
    names, group_N = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    sums_G = np.zeros(len(names))
    np.add.at(sums_G, group_N, np.nan_to_num(values_N))
    return sums_G
