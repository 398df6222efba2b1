"""Splits of cases by patient, and the proof that they are disjoint.

Goes in: cases, some with a split that their source assigned. Comes out: train, validation and test that share neither
a patient nor an identical text or photo. Knows nothing of sources or the store.
"""

import collections
import hashlib
import io
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

from mint_lib.errors import RefusedData
from mint_lib.records import SPLITS, Case, Split

if TYPE_CHECKING:
    import numpy as np

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


def split_cases(
    rows: list[tuple[Case, Split | None]],
    weights: SplitWeights,
    *,
    has_own_test: bool,
    rng: "np.random.Generator",
    counts: collections.Counter[str],
) -> dict[Split, list[Case]]:
    """Deal whole patients to the splits, label by label, in proportion to `weights`.

    Patients with an identical text or photo are dealt together. A split that the source assigned is kept.
    """
    splits: dict[Split, list[Case]] = {split: [] for split in SPLITS}
    unassigned: list[Case] = []
    for case, split in rows:
        if split is None:
            unassigned.append(case)
        elif split == "test" and has_own_test:
            counts["assigned to test and not used: test_source replaces it"] += 1
        else:
            splits[split].append(case)
    clusters = _cluster_patients(unassigned)
    counts["patients dealt with others of identical content"] += sum(
        len(patients) - 1 for patients in ({case.group_id for case in cluster} for cluster in clusters)
    )
    by_label: dict[str, list[list[Case]]] = collections.defaultdict(list)
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


def _cluster_patients(cases: list[Case]) -> list[list[Case]]:
    """Cases grouped by patient; patients who share an identical content are one cluster."""
    parent: dict[str, str] = {}

    def find(key: str) -> str:
        while parent.setdefault(key, key) != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    for case in cases:
        for key in _content_keys(case):
            parent[find(key)] = find(f"patient {case.group_id}")
    clusters: dict[str, list[Case]] = collections.defaultdict(list)
    for case in cases:
        clusters[find(f"patient {case.group_id}")].append(case)
    return list(clusters.values())


def _content_keys(case: Case) -> Iterator[str]:
    """Hashes of the text without case and spacing, and of the photo's pixels."""
    if case.text:
        yield "text " + hashlib.sha256(" ".join(case.text.casefold().split()).encode()).hexdigest()
    if case.image:
        from PIL import Image

        with Image.open(io.BytesIO(case.image)) as image:
            yield f"photo {image.size} " + hashlib.sha256(image.convert("RGB").tobytes()).hexdigest()


def prove_disjoint(splits: Mapping[Split, Iterable[Case]]) -> None:
    """Raise RefusedData, with counts and case ids, if two splits share a case id, a patient or an identical content."""
    first_split: dict[str, Split] = {}
    shared: dict[str, list[str]] = collections.defaultdict(list)
    for split, cases in splits.items():
        for case in cases:
            for key in (f"case-id {case.case_id}", f"patient {case.group_id}", *_content_keys(case)):
                if first_split.setdefault(key, split) != split:
                    shared[f"{key.split()[0]} in {first_split[key]} and {split}"].append(case.case_id)
    if shared:
        raise RefusedData(
            f"The splits are not disjoint: {describe_case_ids(shared)}. "
            "A patient, a text and a photo may stand in one split only. Correct the assignment in the source, or "
            "remove these cases.",
            {cause: len(ids) for cause, ids in shared.items()},
            dict(shared),
        )


def withhold_labels(cases: list[Case], labelled_per_label: int | None, *, rng: "np.random.Generator") -> list[Case]:
    """Few-label mode: `cases` with the label kept for that many patients of each label, drawn by chance."""
    if labelled_per_label is None:
        return cases
    patients: dict[str, list[str]] = collections.defaultdict(list)
    for case in cases:
        if case.label_id is not None and case.group_id not in patients[case.label_id]:
            patients[case.label_id].append(case.group_id)
    kept = {
        (label_id, members[index])
        for label_id, members in sorted(patients.items())
        for index in rng.permutation(len(members))[:labelled_per_label]
    }
    return [
        case if (case.label_id, case.group_id) in kept else case.model_copy(update={"label_id": None}) for case in cases
    ]


def describe_case_ids(ids_by_cause: Mapping[str, list[str]]) -> str:
    """`cause: 3 (a, b, ...)` for each cause, with the first few case ids."""
    shown = []
    for cause, ids in sorted(ids_by_cause.items()):
        names = ", ".join(
            ascii(item[:80])[1:-1] for item in ids[:_SHOWN_IDS]
        )  # no line breaks into a log + (", ..." if len(ids) > _SHOWN_IDS else "")
        shown.append(f"{cause}: {len(ids)} ({names})")
    return "; ".join(shown)
