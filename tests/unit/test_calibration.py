"""Temperature and likelihood against values known in advance."""

import numpy as np
import pytest

from mint_lib.calibration import calibrate_student, fit_temperature, negative_log_likelihood, normalise_scores
from mint_lib.records import Reference


def draw(num_cases, num_labels, *, seed=0):
    """Scores that are exactly calibrated: the right label is drawn from their own softmax."""
    rng = np.random.default_rng(seed)
    scores = rng.normal(scale=2.0, size=(num_cases, num_labels))
    truth = np.array([rng.choice(num_labels, p=row) for row in normalise_scores(scores)])
    return scores, truth


@pytest.mark.parametrize("factor", [0.02, 0.5, 1.0, 3.0, 50.0])
def test_temperature_of_scaled_calibrated_scores_is_the_scale(factor):
    scores, truth = draw(20_000, 6)
    assert fit_temperature(scores * factor, truth) == pytest.approx(factor, rel=0.05)


def test_temperature_beats_its_neighbours():
    scores, truth = draw(20_000, 5)
    best = fit_temperature(scores * 4, truth)
    losses = [negative_log_likelihood(scores * 4, truth, temperature=best * step) for step in (0.9, 1.0, 1.1)]
    assert losses[1] == min(losses)


@pytest.mark.parametrize("num_cases", [3, 30, 300])
def test_temperature_of_a_faultless_teacher_leaves_doubt_that_shrinks_with_the_cases(num_cases):
    truth = np.arange(num_cases) % 4
    scores = 10.0 * np.eye(4)[truth]
    probabilities = normalise_scores(scores, temperature=fit_temperature(scores, truth))
    assert probabilities.max(axis=1) == pytest.approx(1 - 1 / (num_cases + 2), abs=1e-4)


def test_temperature_keeps_the_order_of_labels():
    scores, truth = draw(200, 7)
    probabilities = normalise_scores(scores, temperature=fit_temperature(scores, truth))
    assert (np.argsort(scores, axis=1) == np.argsort(probabilities, axis=1)).all()


def test_probabilities_of_huge_scores_are_finite_and_sum_to_one():
    probabilities = normalise_scores(np.array([[1e6, 0.0, -1e6], [0.0, 0.0, 0.0]]))
    assert probabilities.sum(axis=1) == pytest.approx([1, 1])
    assert probabilities[1] == pytest.approx([1 / 3] * 3)


def test_likelihood_of_equal_scores_is_the_logarithm_of_the_labels():
    assert negative_log_likelihood(np.zeros((5, 8)), np.arange(5)) == pytest.approx(np.log(8))


def test_calibration_of_an_overconfident_student_halves_its_error_and_names_the_student():
    scores, truth = draw(5_000, 6)
    student = Reference.parse(f"student/s@v000001#sha256:{'0' * 64}")
    found = calibrate_student(scores * 4, truth, student=student)
    assert found.student == str(student)
    assert found.num_cases == 5_000
    assert found.temperature == pytest.approx(4, rel=0.1)
    assert found.nll_after < found.nll_before
    assert found.ece_before == pytest.approx(reference_error(scores * 4, truth), abs=1e-12)
    assert found.ece_after == pytest.approx(reference_error(scores * 4 / found.temperature, truth), abs=1e-12)
    assert found.ece_after < found.ece_before / 2


def reference_error(scores, truth, *, num_bins=10):
    """Naeini et al. 2015, bin by bin."""
    probabilities = normalise_scores(scores)
    confidences, correct = probabilities.max(axis=1), probabilities.argmax(axis=1) == truth
    error = 0.0
    for number in range(num_bins):
        low, high = number / num_bins, (number + 1) / num_bins
        inside = (confidences >= low) & ((confidences < high) | (number == num_bins - 1))
        if inside.any():
            error += inside.mean() * abs(confidences[inside].mean() - correct[inside].mean())
    return error
