"""Splits of cases by patient, the proof that they are disjoint, and what is said of them.

Goes in: keys of cases, some with a split that their source assigned. Comes out: train, validation and test that share
neither a patient nor an identical text or image; where images are dealt singly, a patient may stand in several. Knows
nothing of sources or the store.
"""

import collections
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field

from mint_lib.case_keys import CaseKey
from mint_lib.errors import RefusedData
from mint_lib.records import SPLITS, Split

if TYPE_CHECKING:
    import numpy as np

SplitBy = Literal["patient", "image"]
_SHOWN_IDS = 5


class SplitWeights(BaseModel):
    """How the patients of each label are dealt to the splits: in proportion to these numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    train: float = Field(default=0.7, gt=0)
    """Weight of the training split; patients per label, or a share."""
    validation: float = Field(default=0.15, ge=0)
    """Weight of the validation split."""
    test: float = Field(default=0.15, ge=0)
    """Weight of the test split; without effect where `test_source` is given."""


def make_splits(
    cases: list[CaseKey],
    test_cases: list[CaseKey] | None,
    weights: SplitWeights,
    *,
    by: SplitBy,
    labelled_per_label: int | None,
    rng: "np.random.Generator",
    counts: collections.Counter[str],
) -> dict[Split, list[CaseKey]]:
    """The splits of `cases`: none is empty, they share nothing, and few-label mode has withheld its labels.

    Args:
        cases: what is dealt.
        test_cases: the whole test split where it has a source of its own; None: it is dealt.
        weights: proportions of the splits.
        by: what stands in one split only.
        labelled_per_label: training patients per label who keep their label; None: all of them.
        rng: decides who goes where.
        counts: as for `split_cases`.

    Raises:
        RefusedData: a split is empty, or two share what they must not.
    """
    splits = split_cases(cases, weights, by=by, has_own_test=test_cases is not None, rng=rng, counts=counts)
    splits["test"] += test_cases or []
    prove_disjoint(splits, by=by)
    for split in SPLITS:
        if not splits[split]:
            raise RefusedData(
                f"The {split} split is empty: {len(cases)} cases were read. Read more patients per label, or give "
                f"data.split.{split} a larger weight."
            )
    splits["train"] = withhold_labels(splits["train"], labelled_per_label, rng=rng)
    return splits


def split_cases(
    cases: Iterable[CaseKey],
    weights: SplitWeights,
    *,
    by: SplitBy,
    has_own_test: bool,
    rng: "np.random.Generator",
    counts: collections.Counter[str],
) -> dict[Split, list[CaseKey]]:
    """Deal whole patients to the splits, label by label, in proportion to `weights`.

    Those with an identical content are dealt together. A split that the source assigned is kept.

    Args:
        cases: their keys.
        weights: proportions of the splits.
        by: `image` deals the cases singly, whosever they are.
        has_own_test: the test split comes from elsewhere.
        rng: decides who goes where.
        counts: what is left out, and what was dealt together, is added here.
    """
    splits: dict[Split, list[CaseKey]] = {split: [] for split in SPLITS}
    unassigned: list[CaseKey] = []
    for case in cases:
        if case.assigned is None:
            unassigned.append(case)
        elif case.assigned == "test" and has_own_test:
            counts["assigned to test and not used: test_source replaces it"] += 1
        else:
            splits[case.assigned].append(case)
    clusters = _cluster_cases(unassigned, by)
    counts["patients dealt with others of identical content"] += sum(
        len(patients) - 1 for patients in ({case.group_id for case in cluster} for cluster in clusters)
    )
    by_label: dict[str, list[list[CaseKey]]] = collections.defaultdict(list)
    for cluster in clusters:
        by_label[min(case.label_id or "" for case in cluster)].append(cluster)
    names: tuple[Split, ...] = ("train", "validation") if has_own_test else SPLITS
    total_weight = sum(getattr(weights, name) for name in names)
    owed = dict.fromkeys(names, 0.0)
    for label_id in sorted(by_label):
        members = by_label[label_id]
        for name in names:
            owed[name] += len(members) * getattr(weights, name) / total_weight
        for index in rng.permutation(len(members)):
            # The split that is owed most; what rounding denies one label is made good at the next.
            name = max(names, key=lambda item: (round(owed[item], 9), -names.index(item)))
            owed[name] -= 1
            splits[name] += members[index]
    return splits


def _cluster_cases(cases: list[CaseKey], by: SplitBy) -> list[list[CaseKey]]:
    """Cases grouped by patient, or single; those that share an identical content are one cluster."""
    parent: dict[str | bytes, str | bytes] = {}

    def find(key: str | bytes) -> str | bytes:
        while parent.setdefault(key, key) != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    def name_owner(case: CaseKey) -> str:
        return case.group_id if by == "patient" else case.case_id

    for case in cases:
        for content in case.contents:
            parent[find(content)] = find(name_owner(case))
    clusters: dict[str | bytes, list[CaseKey]] = collections.defaultdict(list)
    for case in cases:
        clusters[find(name_owner(case))].append(case)
    return list(clusters.values())


def prove_disjoint(splits: Mapping[Split, Iterable[CaseKey]], *, by: SplitBy) -> None:
    """Raise RefusedData, with counts and case ids, if two splits share a case id, a patient or an identical content.

    Patients are not looked at where the split is `by` image.
    """
    first_split: dict[str, dict[str | bytes, Split]] = collections.defaultdict(dict)
    shared: dict[str, list[str]] = collections.defaultdict(list)
    for split, cases in splits.items():
        for case in cases:
            patient = case.group_id if by == "patient" else None
            found = (("case-id", case.case_id), ("patient", patient), ("text", case.text), ("image", case.image))
            for what, value in found:
                if value is not None and (first := first_split[what].setdefault(value, split)) != split:
                    shared[f"{what} in {first} and {split}"].append(case.case_id)
    if shared:
        raise RefusedData(
            f"The splits are not disjoint: {describe_case_ids(shared)}. "
            "A patient, a text and an image may stand in one split only. Correct the assignment in the source, or "
            "remove these cases.",
            {cause: len(ids) for cause, ids in shared.items()},
            dict(shared),
        )


def check_assigned(cases: list[CaseKey], source_name: str) -> None:
    """Raise RefusedData if a case of a source that knows no patients has no split assigned."""
    num_open = sum(case.assigned is None for case in cases)
    if num_open:
        raise RefusedData(
            f"Source {source_name!r} does not say which patient an image is from, so {num_open} of {len(cases)} cases "
            "cannot be split by patient. Name the patients' column, use splits that the source assigns, or set "
            "data.split_by: image, which lets images of one patient stand in several splits and is reported as a leak.",
            {"no patient": num_open},
        )


def withhold_labels(
    cases: list[CaseKey], labelled_per_label: int | None, *, rng: "np.random.Generator"
) -> list[CaseKey]:
    """Few-label mode: `cases` with the label kept for that many patients of each label, drawn by chance."""
    if labelled_per_label is None:
        return cases
    patients: dict[str, dict[str, None]] = collections.defaultdict(dict)
    for case in cases:
        if case.label_id is not None:
            patients[case.label_id].setdefault(case.group_id)
    kept: set[tuple[str | None, str]] = set()
    for label_id, found in sorted(patients.items()):
        members = list(found)
        kept.update((label_id, members[index]) for index in rng.permutation(len(members))[:labelled_per_label])
    return [case if (case.label_id, case.group_id) in kept else case._replace(label_id=None) for case in cases]


def count_cases(splits: Mapping[Split, list[CaseKey]]) -> dict[str, int]:
    """Cases, patients, labels, images and generated cases of each split."""
    counts: collections.Counter[str] = collections.Counter()
    for split, cases in splits.items():
        counts[f"{split}/cases"] = len(cases)
        counts[f"{split}/patients"] = len({case.group_id for case in cases})
        counts[f"{split}/without label"] = sum(case.label_id is None for case in cases)
        counts[f"{split}/with image"] = sum(case.has_image for case in cases)
        counts[f"{split}/synthetic"] = sum(case.synthetic for case in cases)
        counts.update(f"{split}/label/{case.label_id}" for case in cases if case.label_id is not None)
    return dict(counts)


def describe_origin(splits: Mapping[Split, list[CaseKey]]) -> list[str]:
    """One note for each split that has generated cases."""
    notes = []
    for split, cases in splits.items():
        num_synthetic = sum(case.synthetic for case in cases)
        if num_synthetic:
            notes.append(f"{split}: {num_synthetic} of {len(cases)} cases are synthetic (generated, not observed)")
    return notes


def describe_leak(splits: Mapping[Split, list[CaseKey]], *, knows_patients: bool) -> str:
    """The note that tells every reader of a split by image what it is."""
    places: dict[str, set[Split]] = collections.defaultdict(set)
    for split, cases in splits.items():
        for case in cases:
            places[case.group_id].add(split)
    if not knows_patients:
        found = "the patients are not known, and any of them may stand in several splits"
    else:
        found = f"{sum(len(found) > 1 for found in places.values())} of {len(places)} patients stand in several splits"
    return f"LEAK: split by image (data.split_by), not by patient: {found}. Scores on this test set are too high."


def describe_case_ids(ids_by_cause: Mapping[str, list[str]]) -> str:
    """`cause: 3 (a, b, ...)` for each cause, with the first few case ids."""
    shown = []
    for cause, ids in sorted(ids_by_cause.items()):
        names = ", ".join(ascii(item[:80])[1:-1] for item in ids[:_SHOWN_IDS])  # no line breaks into a log
        more = ", ..." if len(ids) > _SHOWN_IDS else ""
        shown.append(f"{cause}: {len(ids)} ({names}{more})")
    return "; ".join(shown)
