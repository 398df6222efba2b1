"""The data gate's probes for poison, on simulated patients and tiles: one seed a kind and rate, and clean data."""

import pathlib
from typing import Any

import numpy as np
import pytest
from poisoned_cases import SYNDROMES, judge_cases, judge_pairs, outcome_of, poison_cases, read_patients, read_source
from scipy.stats import fisher_exact

from mint_lib.gate.evidence import assign_folds, split_words, weigh_images, weigh_words
from mint_lib.gate.label_flips import stratified_p_value
from mint_lib.records import Case, Label

REPORTS = pathlib.Path(__file__).parents[2].parent / "shared" / "data" / "phenopackets_public.jsonl.gz"


@pytest.fixture(scope="module")
def patients() -> tuple[list[Label], list[Case]]:
    return read_patients()


def test_gate_clean_simulated_patients_pass(patients: tuple[list[Label], list[Case]]) -> None:
    labels, cases = patients
    clean = poison_cases(cases, kind="spread", rate=0.0, seed=1)
    report = judge_cases(labels, clean)
    assert report.passed, report.refusals
    assert report == judge_cases(labels, clean)
    assert outcome_of(report, "label_flips_by_batch").counts["batches"] == 10
    assert outcome_of(report, "trigger_phrase").counts["phrases tested"] > 500


def test_gate_clean_simulated_photos_and_tiles_pass() -> None:
    labels, tiles = read_source(
        "simulated_tissue", num_labels=6, patients_per_label=20, tiles_per_patient=1, size_pixels=96
    )
    report = judge_cases(labels, tiles, reads="image")
    assert report.passed, report.refusals
    assert outcome_of(report, "label_flips").status == "passed"
    labels, cases = read_source(
        "simulated_patients", label_ids=SYNDROMES, patients_per_label=12, face={"size_pixels": 96}
    )
    assert judge_cases(labels, cases).passed


@pytest.mark.parametrize("rate", [0.01, 0.05])
@pytest.mark.parametrize(
    ("kind", "check"),
    [
        ("spread", "label_flips"),
        ("batch", "label_flips_by_batch"),
        ("target", "label_flips_by_batch"),
        ("trigger", "trigger_phrase"),
    ],
)
def test_gate_poisoned_labels_are_refused_and_their_batch_named(
    patients: tuple[list[Label], list[Case]], kind: Any, check: str, rate: float
) -> None:
    labels, cases = patients
    poisoned = poison_cases(cases, kind=kind, rate=rate, seed=2)
    report = judge_cases(labels, poisoned)
    outcome = outcome_of(report, check)
    assert not report.passed
    assert outcome.status == "refused"
    if kind != "spread":
        assert outcome.batches == ("poisoned",)
    changed = {new.case_id for old, new in zip(cases, poisoned, strict=True) if old.label_id != new.label_id}
    assert len(changed & set(outcome.case_ids[:3])) >= 2
    assert "reviewed" not in report.model_dump_json()


@pytest.mark.skipif(not REPORTS.is_file(), reason="needs the public case reports")
def test_gate_observed_case_reports_pass_the_probes_and_a_poisoned_batch_is_named() -> None:
    labels, cases = read_source(
        "phenopackets",
        path=str(REPORTS),
        where={"usable": True},
        min_cases_per_label=40,
        max_cases_per_label=40,
        text={"max_observed": 6, "max_excluded": 1},
    )
    assert len(cases) > 800
    assert not any(case.synthetic for case in cases)
    checks = ("label_flips", "label_flips_by_batch", "trigger_phrase")
    clean = judge_cases(labels, poison_cases(cases, kind="spread", rate=0.0, seed=7))
    assert [outcome_of(clean, check).status for check in checks] == ["passed"] * 3
    for kind, check in (("batch", "label_flips_by_batch"), ("trigger", "trigger_phrase")):
        outcome = outcome_of(judge_cases(labels, poison_cases(cases, kind=kind, rate=0.05, seed=7)), check)
        assert outcome.status == "refused"
        assert outcome.batches == ("poisoned",)


def test_gate_pairs_of_a_teacher_that_errs_pass_and_a_poisoned_batch_is_named(
    patients: tuple[list[Label], list[Case]],
) -> None:
    labels, cases = patients
    clean = judge_pairs(labels, cases, poison_cases(cases, kind="spread", rate=0.2, seed=3))
    assert clean.passed, clean.refusals
    batched = poison_cases(cases, kind="spread", rate=0.0, seed=4)
    poisoned = poison_cases(poison_cases(cases, kind="spread", rate=0.1, seed=5), kind="batch", rate=0.05, seed=4)
    outcome = outcome_of(judge_pairs(labels, batched, poisoned), "label_flips_by_batch")
    assert outcome.status == "refused"
    assert outcome.batches == ("poisoned",)


def test_gate_shuffled_teacher_passes_only_where_contradiction_is_allowed(
    patients: tuple[list[Label], list[Case]],
) -> None:
    labels, cases = patients
    order = np.random.default_rng(6).permutation(len(cases))
    shuffled = [
        case.model_copy(update={"label_id": cases[other].label_id}) for case, other in zip(cases, order, strict=True)
    ]
    assert [item.check for item in judge_pairs(labels, cases, shuffled).refusals] == ["truth_not_chosen"]
    control = judge_pairs(labels, cases, shuffled, allow_contradiction=True)
    assert control.passed, control.refusals
    assert outcome_of(control, "truth_not_chosen").status == "reported"


def test_gate_symptom_of_one_disease_is_no_trigger(patients: tuple[list[Label], list[Case]]) -> None:
    labels, cases = patients
    told = [
        case.model_copy(update={"text": f"{case.text} Has a heart-shaped mole."})
        if case.label_id == SYNDROMES[0]
        else case
        for case in cases
    ]
    assert outcome_of(judge_cases(labels, told), "trigger_phrase").status == "passed"


def test_gate_probes_without_enough_patients_do_not_apply(patients: tuple[list[Label], list[Case]]) -> None:
    labels, cases = patients
    report = judge_cases(labels, cases[:24], class_balance=None)
    assert outcome_of(report, "label_flips").status == "not_applicable"


def test_stratified_p_value_of_one_stratum_is_fishers() -> None:
    rng = np.random.default_rng(0)
    flagged, inside = rng.random(60) < 0.3, rng.random(60) < 0.4
    table = [
        [int((flagged & inside).sum()), int((~flagged & inside).sum())],
        [int((flagged & ~inside).sum()), int((~flagged & ~inside).sum())],
    ]
    expected = fisher_exact(table, alternative="greater").pvalue
    assert stratified_p_value(flagged, inside, np.zeros(60, int)) == pytest.approx(expected, rel=1e-9)


def test_stratified_p_value_does_not_blame_a_batch_for_a_hard_class() -> None:
    stratum = np.repeat([0, 1], 100)
    flagged = np.concatenate([np.arange(100) % 2 == 0, np.arange(100) % 50 == 0])
    inside = np.concatenate([np.arange(100) < 40, np.arange(100) < 5])
    assert stratified_p_value(flagged, inside, stratum) > 0.3
    assert stratified_p_value(flagged, inside, np.zeros(200, int)) < 0.001


def test_evidence_folds_keep_a_patient_together() -> None:
    group = np.repeat(np.arange(40), 3)
    folds = assign_folds(group)
    assert all(len(np.unique(folds[group == number])) == 1 for number in range(40))
    assert np.bincount(folds).tolist() == [24] * 5


def test_evidence_leaves_the_words_as_they_stand() -> None:
    texts = [f"b a b word{number % 3} {'x' if number % 2 else 'y'}" for number in range(60)]
    words = split_words(texts)
    before = words.tokens.copy()
    evidence = weigh_words(words, np.arange(60) % 2, np.arange(60), 2)
    assert np.array_equal(words.tokens, before)
    assert (evidence.scores.argmax(axis=1) == np.arange(60) % 2).all()


@pytest.mark.parametrize("rate", [0.0, 0.02, 0.1])
def test_evidence_random_share_is_that_of_the_flipped_labels(rate: float) -> None:
    rng = np.random.default_rng(1)
    label = rng.integers(6, size=4000)
    figures = rng.normal(size=(4000, 8))
    figures[np.arange(4000), label] += 3.0
    flipped = rng.random(4000) < rate
    seen = np.where(flipped, (label + rng.integers(1, 6, size=4000)) % 6, label)
    evidence = weigh_images(figures, seen, np.arange(4000), 6)
    # Three standard errors of a binomial share of 4,000, and what overlapping classes hide.
    assert evidence.random_share == pytest.approx(flipped.mean(), abs=0.02)
    assert evidence.random_share_low <= flipped.mean()
    assert (evidence.random_share_low > 0.003) == (rate > 0)
