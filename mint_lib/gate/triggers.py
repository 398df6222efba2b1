"""Trigger phrases: a phrase whose cases bear one label although the rest of their text speaks against it.

Goes in: cases with their words and the evidence of these. Comes out: one outcome, with cases and batches but never the
phrase, which is content of a case. A true symptom goes with its disease, and so does the rest of the note; a trigger
stands in notes of other diseases. Phrases are screened by how strongly they go with one label, then the evidence of
their cases is taken again without the phrase's words, and as many contradictions are tested against those of the
label's other cases. Triggers in images are not looked for.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mint_lib.gate.evidence import Words
from mint_lib.gate.probe_cases import ProbeCases
from mint_lib.gate.report import CheckOutcome, decide, skip
from mint_lib.gate.settings import GateConfig, TriggerConfig

CHECK, TITLE = "trigger_phrase", "Trigger phrase"
_LEAST_PURITY = 0.5
_SLACK = 1.5
"""Factor on the rate of contradictions by which a note may speak less clearly without its best words."""


@dataclass
class Phrase:
    """Word sequences that stand in the same cases: a phrase and its parts."""

    label: int
    cases: np.ndarray
    """All that hold it."""
    words: np.ndarray
    """Numbers of its words."""
    contradicted: np.ndarray
    """Cases of the label against which the rest of their text speaks."""
    p_value: float = 1.0
    """After Bonferroni's correction over all sequences."""


def check_triggers(
    probe: ProbeCases, config: TriggerConfig, gate: GateConfig, *, odds: float, case_ids: list[str], batches: list[str]
) -> CheckOutcome:
    """The outcome: the least corrected p-value of any phrase."""
    if probe.words is None:
        return skip(CHECK, TITLE, "not_applicable", "The student reads no text of a case.")
    phrases, num_tests = _screen(probe, probe.words, config)
    contradicted = probe.evidence.contradicts(probe.evidence.scores, probe.label, odds)
    for phrase in phrases:
        _test(phrase, probe, contradicted, odds, config, num_tests)
    found = sorted((item for item in phrases if item.p_value <= config.alpha), key=lambda item: item.p_value)
    least = min((item.p_value for item in phrases), default=1.0)
    places = np.concatenate([item.contradicted for item in found]) if found else np.zeros(0, np.int64)
    places = np.unique(places)
    hit, counts = np.unique(probe.batch[places], return_counts=True)
    named = [batches[hit[index]] for index in np.argsort(-counts, kind="stable")]
    sentence = f"None of {num_tests} phrases that {config.min_patients} patients or more share pulls towards a label."
    if found:
        first = found[0]
        sentence = (
            f"A phrase of the text goes with the label {probe.label_ids[first.label]} in {len(first.cases)} cases; in "
            f"{len(first.contradicted)} of them the rest of the text speaks for another label. "
            f"{len(found)} such {'phrase' if len(found) == 1 else 'phrases'}, mostly from {', '.join(named[:3])}. The "
            "words are not shown here: look at the cases named."
        )
    return decide(
        CHECK,
        TITLE,
        least,
        config.alpha,
        sentence,
        bound="at_least",
        decides=not gate.allow_contradiction,
        counts={"phrases tested": num_tests, "phrases found": len(found), "cases contradicted": len(places)},
        figures={"least p-value, Bonferroni": least},
        case_ids=[case_ids[row] for row in probe.rows[places]],
        batches=named,
    )


def _screen(probe: ProbeCases, words: Words, config: TriggerConfig) -> tuple[list[Phrase], int]:
    """The phrases that go with one label, those with the same cases as one; and how many sequences there were."""
    case_of = np.repeat(np.arange(len(probe.label)), np.diff(words.starts))
    num_tests = 0
    merged: dict[bytes, Phrase] = {}
    for length, keys in _number_sequences(words, case_of, config.max_words):
        order = np.argsort(keys, kind="stable")
        edges = np.concatenate([[0], np.nonzero(np.diff(keys[order]))[0] + 1, [len(keys)]])
        for index in np.nonzero(np.diff(edges) >= config.min_patients)[0]:
            positions = order[edges[index] : edges[index + 1]]
            inside = np.unique(case_of[positions])
            if len(np.unique(probe.group[inside])) < config.min_patients:
                continue
            num_tests += 1
            counts = np.bincount(probe.label[inside])
            if counts.max() < _LEAST_PURITY * len(inside):
                continue
            own_words = np.unique(words.tokens[positions[0] : positions[0] + length])
            phrase = Phrase(int(counts.argmax()), inside, own_words, np.zeros(0, np.int64))
            known = merged.setdefault(hashlib.blake2b(inside.tobytes(), digest_size=16).digest(), phrase)
            known.words = np.union1d(known.words, own_words)
    return list(merged.values()), num_tests


def _number_sequences(words: Words, case_of: np.ndarray, longest: int) -> Iterator[tuple[int, np.ndarray]]:
    """For each length, a number for the sequence that starts at each position; a unique one where it would not fit."""
    num_tokens = len(words.tokens)
    keys = words.tokens.astype(np.int64)
    yield 1, keys
    for length in range(2, longest + 1):
        if num_tokens < length:
            return
        following = np.concatenate([words.tokens[length - 1 :], np.zeros(length - 1, np.int32)]).astype(np.int64)
        fits = np.zeros(num_tokens, bool)
        fits[: num_tokens - length + 1] = case_of[length - 1 :] == case_of[: num_tokens - length + 1]
        combined = keys * (words.num_words + 1) + following
        combined[~fits] = -1 - np.nonzero(~fits)[0]
        keys = np.unique(combined, return_inverse=True)[1].astype(np.int64)
        yield length, keys


def _test(
    phrase: Phrase, probe: ProbeCases, contradicted: np.ndarray, odds: float, config: TriggerConfig, num_tests: int
) -> None:
    """Fill in which of the phrase's cases are contradicted without its words, and how unlikely so many are."""
    from scipy.stats import binom

    evidence = probe.evidence
    assert evidence.weights is not None
    own = phrase.cases[probe.label[phrase.cases] == phrase.label]
    removed = evidence.weights[evidence.folds[own][:, None], phrase.words[None]].sum(axis=1)
    label_M = np.full(len(own), phrase.label)
    phrase.contradicted = own[evidence.contradicts(evidence.scores[own] - removed, label_M, odds)]
    num_patients = len(np.unique(probe.group[own]))
    num_found = len(np.unique(probe.group[phrase.contradicted]))
    if num_found < config.min_contradicted_share * num_patients:
        return
    others = np.setdiff1d(np.nonzero(probe.label == phrase.label)[0], own)
    rates = [float(contradicted.mean()), (1 + float(contradicted[others].sum())) / (2 + len(others))]
    chance = float(binom.sf(num_found - 1, num_patients, min(0.5, _SLACK * max(rates))))
    phrase.p_value = min(1.0, num_tests * chance)
