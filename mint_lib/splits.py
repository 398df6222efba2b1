"""Splits of cases by patient, and the proof that they are disjoint.

Goes in: cases, some with a split that their source assigned. Comes out: train, validation and test that share neither
a patient nor an identical text or image; where images are dealt singly, a patient may stand in several. Knows nothing
of sources or the store.
"""

import collections
import hashlib
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field

from mint_lib.errors import RefusedData
from mint_lib.records import SPLITS, Case, Split

if TYPE_CHECKING:
    import numpy as np

SplitBy = Literal["patient", "image"]
Content = Literal["text", "image"]
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
    by: SplitBy,
    contents: Sequence[Content],
    has_own_test: bool,
    rng: "np.random.Generator",
    counts: collections.Counter[str],
) -> dict[Split, list[Case]]:
    """Deal whole patients to the splits, label by label, in proportion to `weights`.

    Those with an identical content are dealt together. A split that the source assigned is kept.

    Args:
        rows: cases, and the split that the source assigned or None.
        weights: proportions of the splits.
        by: `image` deals the cases singly, whosever they are.
        contents: of what makes two cases identical.
        has_own_test: the test split comes from elsewhere.
        rng: decides who goes where.
        counts: what is left out, and what was dealt together, is added here.
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
    clusters = _cluster_cases(unassigned, by, contents)
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


def _cluster_cases(cases: list[Case], by: SplitBy, contents: Sequence[Content]) -> list[list[Case]]:
    """Cases grouped by patient, or single; those that share an identical content are one cluster."""
    parent: dict[str, str] = {}

    def find(key: str) -> str:
        while parent.setdefault(key, key) != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    def name_owner(case: Case) -> str:
        return f"patient {case.group_id}" if by == "patient" else f"case {case.case_id}"

    for case in cases:
        for key in content_keys(case, contents):
            parent[find(key)] = find(name_owner(case))
    clusters: dict[str, list[Case]] = collections.defaultdict(list)
    for case in cases:
        clusters[find(name_owner(case))].append(case)
    return list(clusters.values())


def content_keys(case: Case, contents: Sequence[Content]) -> Iterator[str]:
    """Hashes of the text without case and spacing, and of the image's pixels, as far as `contents` wants them."""
    if case.text and "text" in contents:
        yield "text " + hashlib.sha256(" ".join(case.text.casefold().split()).encode()).hexdigest()
    if case.image and "image" in contents:
        from PIL import Image

        with Image.open(io.BytesIO(case.image)) as image:
            yield f"image {image.size} " + hashlib.sha256(image.convert("RGB").tobytes()).hexdigest()


def prove_disjoint(splits: Mapping[Split, Iterable[Case]], *, by: SplitBy, contents: Sequence[Content]) -> None:
    """Raise RefusedData, with counts and case ids, if two splits share a case id, a patient or an identical content.

    Patients are not looked at where the split is `by` image.
    """
    first_split: dict[str, Split] = {}
    shared: dict[str, list[str]] = collections.defaultdict(list)
    for split, cases in splits.items():
        for case in cases:
            owner = (f"patient {case.group_id}",) if by == "patient" else ()
            for key in (f"case-id {case.case_id}", *owner, *content_keys(case, contents)):
                if first_split.setdefault(key, split) != split:
                    shared[f"{key.split()[0]} in {first_split[key]} and {split}"].append(case.case_id)
    if shared:
        raise RefusedData(
            f"The splits are not disjoint: {describe_case_ids(shared)}. "
            "A patient, a text and an image may stand in one split only. Correct the assignment in the source, or "
            "remove these cases.",
            {cause: len(ids) for cause, ids in shared.items()},
            dict(shared),
        )


def check_assigned(rows: list[tuple[Case, Split | None]], source_name: str) -> None:
    """Raise RefusedData if a row of a source that knows no patients has no split assigned."""
    num_open = sum(split is None for _, split in rows)
    if num_open:
        raise RefusedData(
            f"Source {source_name!r} does not say which patient an image is from, so {num_open} of {len(rows)} cases "
            "cannot be split by patient. Name the patients' column, use splits that the source assigns, or set "
            "data.split_by: image, which lets images of one patient stand in several splits and is reported as a leak.",
            {"no patient": num_open},
        )


def describe_leak(splits: Mapping[Split, list[Case]], *, knows_patients: bool) -> str:
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
