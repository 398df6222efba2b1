"""What is found while the pairs of a split are made: who is left out and why, class balance, lengths in tokens.

Goes in: pairs with their lengths, one after another, and causes with case ids. Comes out: the figures that
`checks.json` holds and the gate judges. It knows no content of a case.
"""

import array
from collections import Counter
from typing import Any

import numpy as np

from mint_lib.pairing.checks import PairLengths
from mint_lib.records import PreferencePair

NUM_SHOWN_CASES = 20
"""Most case ids that a report or an error names for one cause."""
_TRUTH_COUNTS = ("num_pairs_without_diagnosis", "num_chosen_with_diagnosis", "num_rejected_with_diagnosis")


class SplitFacts:
    """What is found while the pairs of one split are made."""

    def __init__(self) -> None:
        self.num_cases = 0
        self.dropped: Counter[str] = Counter()
        self.refused: dict[str, list[str]] = {}
        """Cause to case ids."""
        self.statistics = PairStatistics()

    def describe(self) -> dict[str, Any]:
        """What `checks.json` says of the split."""
        return {
            "num_cases": self.num_cases,
            "dropped": {cause: count for cause, count in sorted(self.dropped.items()) if count},
            "refused": self.count_refused(),
            "refused_case_ids": {cause: ids[:NUM_SHOWN_CASES] for cause, ids in sorted(self.refused.items())},
            **self.statistics.describe(),
        }

    def count_refused(self) -> dict[str, int]:
        """Cause to number of cases."""
        return {cause: len(case_ids) for cause, case_ids in sorted(self.refused.items())}


class PairStatistics:
    """Counts, class balance and lengths in tokens of pairs, which are added one by one; 12 bytes of each are held."""

    def __init__(self) -> None:
        self.num_pairs = 0
        self._lengths = array.array("i")
        self._counts = dict.fromkeys(("num_paired_cases", *_TRUTH_COUNTS), 0)
        self._first_chosen: Counter[str] = Counter()
        self._rejected: Counter[str] = Counter()
        self._last_case_id: str | None = None

    def add(self, pair: PreferencePair, lengths: PairLengths, *, truth: str | None) -> None:
        """Take note of a pair; those of one case come one after another.

        Args:
            pair: the pair.
            lengths: its lengths.
            truth: the label id of its case, where one is known.
        """
        self.num_pairs += 1
        self._lengths.extend(lengths)
        self._counts["num_paired_cases"] += pair.case_id != self._last_case_id
        self._last_case_id = pair.case_id
        self._counts["num_pairs_without_diagnosis"] += truth is None
        self._counts["num_chosen_with_diagnosis"] += truth in pair.chosen_label_ids
        self._counts["num_rejected_with_diagnosis"] += truth in pair.rejected_label_ids
        self._first_chosen.update(pair.chosen_label_ids[:1])
        self._rejected.update(pair.rejected_label_ids)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of prompt, chosen and rejected answer, `[pair, 3]`."""
        return np.array(self._lengths, dtype=np.int32).reshape(-1, 3)

    def describe(self) -> dict[str, Any]:
        """Everything that is known of at least one pair."""
        prompt, chosen, rejected = self.lengths.T
        return {
            "num_pairs": self.num_pairs,
            **self._counts,
            "first_chosen_label": dict(sorted(self._first_chosen.items())),
            "rejected_labels": dict(sorted(self._rejected.items())),
            "prompt_tokens": _summarise(prompt),
            "chosen_tokens": _summarise(chosen),
            "rejected_tokens": _summarise(rejected),
            "chosen_minus_rejected_tokens": _summarise(chosen - rejected),
            "share_chosen_longer": float(np.mean(chosen > rejected)),
        }


def _summarise(lengths: np.ndarray) -> dict[str, float]:
    p5, median, p95 = np.percentile(lengths, [5, 50, 95])
    figures = {"min": lengths.min(), "p5": p5, "median": median, "p95": p95, "max": lengths.max()}
    return {"mean": float(lengths.mean())} | {name: float(value) for name, value in figures.items()}
