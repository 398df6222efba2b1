"""New cases for a version of cases that is there: who they are, which split they belong to, and what is refused.

Goes in: the cases of the version that is to grow, one after another, and the new rows. Comes out: the new cases by
split. Whoever is in a split stays in it: a known patient's new cases, and a known text or image, follow. Only hashes
and names of the known cases are held, some 400 bytes for each. Knows nothing of sources or the store.
"""

import collections
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from mint_lib.records import SPLITS, Case, Split
from mint_lib.splits import Content, SplitBy, SplitWeights, content_keys, split_cases

if TYPE_CHECKING:
    import numpy as np


class KnownCases:
    """What must be known of the cases that are there, to find the place of new ones."""

    def __init__(self, *, by: SplitBy, contents: Sequence[Content]):
        self._by = by
        self._contents = contents
        self._digests: dict[str, str] = {}
        self._split_of: dict[str, Split] = {}
        self._labelled: dict[str, set[str]] = collections.defaultdict(set)
        self._patients: dict[Split, set[str]] = {split: set() for split in SPLITS}

    def add(self, case: Case, split: Split) -> None:
        """Take note of a case."""
        self._digests[case.case_id] = _digest(case)
        self._patients[split].add(case.group_id)
        for key in self._keys(case):
            self._split_of[key] = split
        if split == "train" and case.label_id is not None:
            self._labelled[case.label_id].add(case.group_id)

    def list_patients(self, split: Split) -> frozenset[str]:
        """Everybody in a split so far."""
        return frozenset(self._patients[split])

    def count_labelled(self) -> dict[str, int]:
        """Label id to the number of training patients whose label is known."""
        return {label_id: len(patients) for label_id, patients in self._labelled.items()}

    def find_place(self, case: Case) -> Split | str | None:
        """The split that a new case must join, None if any will do, or a cause why it is not added.

        `already there` is the cause of a case that the version holds as it is, label aside.
        """
        known = self._digests.get(case.case_id)
        if known is not None:
            return "already there" if known == _digest(case) else "case id of another case"
        places = {self._split_of[key] for key in self._keys(case) if key in self._split_of}
        if len(places) > 1:
            return "belongs to several splits"
        return next(iter(places), None)

    def _keys(self, case: Case) -> list[str]:
        owner = [f"patient {case.group_id}"] if self._by == "patient" else []
        return owner + list(content_keys(case, self._contents))


def place_additions(
    known: KnownCases,
    rows: Iterable[tuple[Case, Split | None]],
    weights: SplitWeights,
    *,
    by: SplitBy,
    contents: Sequence[Content],
    rng: "np.random.Generator",
    counts: collections.Counter[str],
) -> tuple[dict[Split, list[Case]], dict[str, list[str]]]:
    """The new cases by split, and the ids of those that are refused, by cause.

    Args:
        known: the cases that are there.
        rows: new cases, and the split that their source assigned or None.
        weights: proportions in which patients that are new are dealt.
        by: as the version that grows was split.
        contents: of what makes two cases identical.
        rng: decides which of the new patients goes where.
        counts: what is there already, and what joins a split for its patient or content, is added here.
    """
    placed: list[tuple[Case, Split | None]] = []
    open_cases: list[tuple[Case, Split | None]]
    refused: dict[str, list[str]] = collections.defaultdict(list)
    fixed: dict[Split, list[Case]] = {split: [] for split in SPLITS}
    for case, assigned in rows:
        place = known.find_place(case)
        if place == "already there":
            counts["already there"] += 1
        elif place is None:
            placed.append((case, assigned))
        elif place not in SPLITS:
            refused[place].append(case.case_id)
        elif assigned not in (None, place):
            refused["assigned to another split than its patient or content"].append(case.case_id)
        else:
            counts["joined the split of their patient or content"] += 1
            fixed[place].append(case)
            known.add(case, place)
    rest, open_cases = placed, []
    while len(rest) != len(open_cases):  # a case that shares something with one that has found its place goes there too
        open_cases, rest = rest, []
        for case, assigned in open_cases:
            place = known.find_place(case)
            if place in SPLITS:
                fixed[place].append(case)
                known.add(case, place)
            else:
                rest.append((case, assigned))
    splits = split_cases(rest, weights, by=by, contents=contents, has_own_test=False, rng=rng, counts=counts)
    return {split: fixed[split] + splits[split] for split in SPLITS}, dict(refused)


def limit_labels(cases: list[Case], labelled_per_label: int | None, *, known: Mapping[str, int]) -> list[Case]:
    """Few-label mode: new training cases keep their label while their label has fewer patients than allowed."""
    if labelled_per_label is None:
        return cases
    patients: dict[str, set[str]] = collections.defaultdict(set)
    kept = []
    for case in cases:
        if case.label_id is not None:
            members = patients[case.label_id]
            if case.group_id not in members and known.get(case.label_id, 0) + len(members) >= labelled_per_label:
                kept.append(case.model_copy(update={"label_id": None}))
                continue
            members.add(case.group_id)
        kept.append(case)
    return kept


def _digest(case: Case) -> str:
    """Of everything that a delivery says of a case: its batch and a label that may have been withheld are left out."""
    values = case.model_dump(exclude={"label_id", "image"})
    values["attributes"] = sorted((key, value) for key, value in case.attributes.items() if key != "batch")
    return hashlib.sha256(repr(sorted(values.items())).encode() + b"\0" + (case.image or b"")).hexdigest()
