import numpy as np
import pytest
import scipy.stats
from sklearn.calibration import calibration_curve
from sklearn.metrics import balanced_accuracy_score

from mint_lib.statistics import (
    GroupBootstrap,
    correct_holm,
    measure_calibration_error,
    measure_harmonic,
    measure_macro_mean,
    measure_mean,
    measure_ratio,
    permutation_test,
    reliability_bins,
    sign_test,
)


def make_hits(num_cases: int = 200, share: float = 0.4, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).random(num_cases) < share).astype(float)


def make_bootstrap(groups: list[str], draws: int = 4000) -> GroupBootstrap:
    return GroupBootstrap(groups, draws=draws, seed=1, confidence=0.95)


def name_groups(num_cases: int) -> list[str]:
    return [f"patient-{index}" for index in range(num_cases)]


def test_bootstrap_of_a_mean_agrees_with_scipy() -> None:
    hits = make_hits()
    found = make_bootstrap(name_groups(200)).estimate([measure_mean(hits)])
    reference = scipy.stats.bootstrap(
        (hits,), np.mean, method="percentile", n_resamples=9999, rng=1
    ).confidence_interval
    assert found.value == pytest.approx(hits.mean())
    # Both ends are Monte Carlo quantiles on a grid of 1/200; two grid steps cover their error.
    assert found.low == pytest.approx(reference.low, abs=0.01)
    assert found.high == pytest.approx(reference.high, abs=0.01)


def test_bootstrap_with_repeated_cases_of_a_patient_is_not_narrower() -> None:
    hits = make_hits(50)
    once = make_bootstrap(name_groups(50)).estimate([measure_mean(hits)])
    repeated = make_bootstrap([name for name in name_groups(50) for _ in range(4)]).estimate(
        [measure_mean(hits.repeat(4))]
    )
    assert (repeated.low, repeated.high) == pytest.approx((once.low, once.high))
    assert repeated.n == 200


def test_bootstrap_with_the_same_seed_gives_the_same_interval() -> None:
    hits = make_hits()
    first, second = (make_bootstrap(name_groups(200)).estimate([measure_mean(hits)]) for _ in range(2))
    assert first == second


def test_bootstrap_of_one_patient_has_no_interval() -> None:
    found = make_bootstrap(["a", "a"]).estimate([measure_mean(np.array([1.0, 0.0]))])
    assert (found.value, found.low, found.high) == (0.5, None, None)


def test_difference_of_a_system_to_itself_is_exactly_zero() -> None:
    hits = measure_mean(make_hits())
    found = make_bootstrap(name_groups(200)).difference([hits], [hits])
    assert (found.value, found.low, found.high) == (0.0, 0.0, 0.0)


def test_difference_is_paired_and_so_narrower_than_two_independent_systems() -> None:
    first = make_hits(seed=0)
    second = first.copy()
    second[:20] = 1 - second[:20]
    bootstrap = make_bootstrap(name_groups(200))
    paired = bootstrap.difference([measure_mean(first)], [measure_mean(second)])
    unrelated = bootstrap.difference([measure_mean(first)], [measure_mean(make_hits(seed=9))])
    assert paired.high - paired.low < 0.6 * (unrelated.high - unrelated.low)


def test_estimate_of_several_runs_is_their_mean_and_resamples_them() -> None:
    hits = make_hits()
    bootstrap = make_bootstrap(name_groups(200))
    alike = bootstrap.estimate([measure_mean(hits)] * 3)
    apart = bootstrap.estimate([measure_mean(hits), measure_mean(np.zeros(200)), measure_mean(np.ones(200))])
    assert alike.model_dump() == pytest.approx(bootstrap.estimate([measure_mean(hits)]).model_dump())
    assert apart.value == pytest.approx((hits.mean() + 1) / 3)
    assert apart.high - apart.low > 2 * (alike.high - alike.low)


def test_mean_leaves_out_cases_that_do_not_count() -> None:
    found = make_bootstrap(name_groups(4)).estimate([measure_mean(np.array([1.0, np.nan, 0.0, np.nan]))])
    assert (found.value, found.n) == (0.5, 2)


def test_ratio_with_nothing_listed_cannot_be_computed() -> None:
    found = make_bootstrap(name_groups(3)).estimate([measure_ratio(np.zeros(3), np.zeros(3))])
    assert (found.value, found.low, found.high, found.n) == (None, None, None, 0)


def test_macro_mean_agrees_with_balanced_accuracy() -> None:
    rng = np.random.default_rng(2)
    truth, answer = rng.integers(0, 5, 120), rng.integers(0, 5, 120)
    measured = measure_macro_mean((truth == answer).astype(float), [str(value) for value in truth])
    found = make_bootstrap(name_groups(120)).estimate([measured])
    assert found.value == pytest.approx(balanced_accuracy_score(truth, answer))
    assert found.n == 120


def test_calibration_error_agrees_with_bins_of_sklearn() -> None:
    rng = np.random.default_rng(3)
    confidences = rng.random(500)
    correct = (rng.random(500) < confidences**2).astype(float)
    bins = reliability_bins(confidences, correct)
    accuracy, confidence = calibration_curve(correct, confidences, n_bins=10)
    assert [item.accuracy for item in bins] == pytest.approx(list(accuracy))
    assert [item.confidence for item in bins] == pytest.approx(list(confidence))
    naive = sum(item.num_cases * abs(item.accuracy - item.confidence) for item in bins) / 500
    found = make_bootstrap(name_groups(500)).estimate([measure_calibration_error(confidences, correct)])
    assert found.value == pytest.approx(naive)


def test_calibration_error_counts_a_certainty_of_one() -> None:
    found = make_bootstrap(name_groups(2)).estimate([measure_calibration_error(np.ones(2), np.array([1.0, 0.0]))])
    assert found.value == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("coverage", "avoidance", "expected"),
    [(1.0, 1.0, 1.0), (0.0, 1.0, 0.0), (1.0, 0.0, 0.0), (0.0, 0.0, 0.0), (0.5, 1.0, 0.6)],
)
def test_harmonic_is_the_weighted_mean_of_coverage_and_avoidance(
    coverage: float, avoidance: float, expected: float
) -> None:
    measured = measure_harmonic(np.full(6, coverage), np.full(6, avoidance), weight=0.5)
    assert make_bootstrap(name_groups(6)).estimate([measured]).value == pytest.approx(expected)


def test_take_measures_only_the_cases_of_the_slice() -> None:
    hits, mask = make_hits(), np.arange(200) < 30
    assert measure_mean(hits).take(mask).n == 30
    found = make_bootstrap(name_groups(30)).estimate([measure_mean(hits).take(mask)])
    assert found.value == pytest.approx(hits[:30].mean())


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (8, 1), (5, 5), (1, 30)])
def test_sign_test_with_one_case_a_patient_is_mcnemars_exact_test(wins: int, losses: int) -> None:
    differences = np.array([1.0] * wins + [-1.0] * losses + [0.0] * 10)
    expected = scipy.stats.binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
    assert sign_test(differences, name_groups(len(differences))) == pytest.approx(expected)


def test_sign_test_counts_a_patient_once() -> None:
    differences, groups = np.ones(20), ["a"] * 10 + ["b"] * 10
    assert sign_test(differences, groups) == pytest.approx(0.5)


def test_permutation_test_agrees_with_scipy() -> None:
    differences = np.random.default_rng(4).normal(0.15, 1.0, 60)
    reference = scipy.stats.permutation_test(
        (differences,), np.mean, permutation_type="samples", n_resamples=20_000, rng=1
    ).pvalue
    found = permutation_test(differences, name_groups(60), seed=1)
    assert found == pytest.approx(reference, abs=0.015)  # three standard errors of both at p near 0.3


def test_permutation_test_of_equal_systems_is_one_and_never_zero_otherwise() -> None:
    assert permutation_test(np.zeros(30), name_groups(30), seed=1) == 1.0
    assert 0 < permutation_test(np.ones(60), name_groups(60), seed=1) < 0.001


def test_holm_steps_down_and_stays_monotone() -> None:
    assert correct_holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert correct_holm([0.9, 0.8]) == [1.0, 1.0]
    assert correct_holm([]) == []
