"""New cases for a version of cases that is there: who they are, which split they belong to, and what is refused.

Goes in: the cases of the version that is to grow, one after another, and keys of the new ones. Comes out: the new cases
by split. Whoever is in a split stays in it: a known patient's new cases, and a known text or image, follow. Only hashes
and names of the known cases are held, some 400 bytes for each. Knows nothing of sources or the store.
"""

import collections
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from mint_lib.case_keys import CaseKey, Content, make_key
from mint_lib.errors import RefusedData
from mint_lib.records import SPLITS, Case, Split
from mint_lib.splits import SplitBy, SplitWeights, describe_case_ids, prove_disjoint, split_cases

if TYPE_CHECKING:
    import numpy as np


class KnownCases:
    """What must be known of the cases that are there, to find the place of new ones."""

    def __init__(self, *, by: SplitBy):
        self._by = by
        self._digests: dict[str, bytes] = {}
        self._split_of_patient: dict[str, Split] = {}
        self._split_of_content: dict[bytes, Split] = {}
        self._labelled: dict[str, set[str]] = collections.defaultdict(set)
        self._patients: dict[Split, set[str]] = {split: set() for split in SPLITS}

    def add(self, case: CaseKey, split: Split) -> None:
        """Take note of a case."""
        self._digests[case.case_id] = case.digest
        self._patients[split].add(case.group_id)
        self._split_of_patient[case.group_id] = split
        for content in case.contents:
            self._split_of_content[content] = split
        if split == "train" and case.label_id is not None:
            self._labelled[case.label_id].add(case.group_id)

    def list_patients(self, split: Split) -> frozenset[str]:
        """Everybody in a split so far."""
        return frozenset(self._patients[split])

    def count_labelled(self) -> dict[str, int]:
        """Label id to the number of training patients whose label is known."""
        return {label_id: len(patients) for label_id, patients in self._labelled.items()}

    def find_place(self, case: CaseKey) -> Split | str | None:
        """The split that a new case must join, None if any will do, or a cause why it is not added.

        `already there` is the cause of a case that the version holds as it is, label aside.
        """
        known = self._digests.get(case.case_id)
        if known is not None:
            return "already there" if known == case.digest else "case id of another case"
        found = [self._split_of_content.get(content) for content in case.contents]
        if self._by == "patient":
            found.append(self._split_of_patient.get(case.group_id))
        places = {split for split in found if split is not None}
        if len(places) > 1:
            return "belongs to several splits"
        return next(iter(places), None)


def add_cases(
    cases: Sequence[CaseKey],
    rows: Mapping[Split, Iterable[Case]],
    weights: SplitWeights,
    *,
    to: str,
    by: SplitBy,
    contents: Sequence[Content],
    labelled_per_label: int | None,
    max_refused_share: float,
    rng: "np.random.Generator",
    counts: collections.Counter[str],
) -> dict[Split, list[CaseKey]]:
    """The new ones of `cases` by split.

    Args:
        cases: keys of the cases to add.
        rows: the cases of the version that grows, each read once.
        weights: proportions in which patients that are new are dealt.
        to: the version's name, for messages.
        by: as the version was split.
        contents: of what makes two cases identical.
        labelled_per_label: few-label mode: training patients per label who keep their label.
        max_refused_share: share of `cases` that may be refused.
        rng: decides which of the new patients goes where.
        counts: what is refused or there already, and what joins a split for its patient or content, is added here.

    Raises:
        RefusedData: too many cases do not fit, none is new, or the new ones share what no two splits may share.
    """
    known = KnownCases(by=by)
    for split, there in rows.items():
        for place, case in enumerate(there):
            known.add(make_key(case, place=place, contents=contents), split)
    already_labelled = known.count_labelled()
    patients = {split: known.list_patients(split) for split in SPLITS}
    splits, refused = _place_cases(known, cases, weights, by=by, rng=rng, counts=counts)
    num_refused = sum(map(len, refused.values()))
    by_cause = {cause: len(ids) for cause, ids in sorted(refused.items())}
    if num_refused > max_refused_share * len(cases):
        raise RefusedData(
            f"{num_refused} of {len(cases)} cases do not fit {to}: {describe_case_ids(refused)}. "
            f"data.max_refused_share = {max_refused_share:g} allows {int(max_refused_share * len(cases))}. Give new "
            "cases ids of their own and leave patients in one split, or allow a larger share.",
            by_cause,
            refused,
        )
    counts.update({f"refused/{cause}": number for cause, number in by_cause.items()})
    if not any(splits.values()):
        raise RefusedData(
            f"None of the {len(cases)} cases is new: {to} holds them already, or they were refused. Nothing was "
            "written.",
            by_cause | {"already there": counts["already there"]},
        )
    prove_disjoint(splits, by=by)
    splits["train"] = _limit_labels(splits["train"], labelled_per_label, known=already_labelled)
    for split in SPLITS:  # whoever is in the version is counted there
        counts[f"{split}/patients"] -= len({case.group_id for case in splits[split]} & patients[split])
    return splits


def _place_cases(
    known: KnownCases,
    cases: Iterable[CaseKey],
    weights: SplitWeights,
    *,
    by: SplitBy,
    rng: "np.random.Generator",
    counts: collections.Counter[str],
) -> tuple[dict[Split, list[CaseKey]], dict[str, list[str]]]:
    """The new cases by split, and the ids of those that are refused, by cause."""
    rest: list[CaseKey] = []
    open_cases: list[CaseKey] = []
    refused: dict[str, list[str]] = collections.defaultdict(list)
    fixed: dict[Split, list[CaseKey]] = {split: [] for split in SPLITS}
    for case in cases:
        place = known.find_place(case)
        if place == "already there":
            counts["already there"] += 1
        elif place is None:
            rest.append(case)
        elif place not in SPLITS:
            refused[place].append(case.case_id)
        elif case.assigned not in (None, place):
            refused["assigned to another split than its patient or content"].append(case.case_id)
        else:
            counts["joined the split of their patient or content"] += 1
            fixed[place].append(case)
            known.add(case, place)
    while len(rest) != len(open_cases):  # a case that shares something with one that has found its place goes there too
        open_cases, rest = rest, []
        for case in open_cases:
            place = known.find_place(case)
            if place in SPLITS:
                fixed[place].append(case)
                known.add(case, place)
            else:
                rest.append(case)
    splits = split_cases(rest, weights, by=by, has_own_test=False, rng=rng, counts=counts)
    return {split: fixed[split] + splits[split] for split in SPLITS}, dict(refused)


def _limit_labels(cases: list[CaseKey], labelled_per_label: int | None, *, known: Mapping[str, int]) -> list[CaseKey]:
    """Few-label mode: new training cases keep their label while their label has fewer patients than allowed."""
    if labelled_per_label is None:
        return cases
    patients: dict[str, set[str]] = collections.defaultdict(set)
    kept = []
    for case in cases:
        if case.label_id is not None:
            members = patients[case.label_id]
            if case.group_id not in members and known.get(case.label_id, 0) + len(members) >= labelled_per_label:
                kept.append(case._replace(label_id=None))
                continue
            members.add(case.group_id)
        kept.append(case)
    return kept


def add_counts(added: Mapping[str, int], before: Mapping[str, int]) -> collections.Counter[str]:
    """Counts of the whole version, and what this addition brought as `added/...`."""
    total = collections.Counter({key: count for key, count in before.items() if not key.startswith("added/")})
    total.update({key: count for key, count in added.items() if key.partition("/")[0] in SPLITS})
    total.update({f"added/{key}": count for key, count in added.items()})
    return total
