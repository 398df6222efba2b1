"""Figures of the splits of a version: how many rows, patients, images and labels, and whether classes shifted.

Goes in: the row digests of a version, or what its record states. Comes out: `Figures` for every split, and distances
between class balances. It reads no rows.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mint_lib.data_difference.row_digests import LENGTHS, RowDigests, TableKind, join_column
from mint_lib.records import SPLITS, Record, Reference, Split, StageRecord

if TYPE_CHECKING:
    from mint_lib.store import Store

_LEAST_EXPECTED = 1.0
_USUAL_EXPECTED = 5.0
_USUAL_SHARE = 0.8
"""The chi-square approximation holds if no expected count is below 1 and at most a fifth below 5 (Cochran 1954)."""


class Figures(Record):
    """What one split of one version holds. None: not known of rows of this kind, or not without reading all of them."""

    num_rows: int
    num_cases: int | None = None
    num_patients: int | None = None
    num_labelled: int | None = None
    num_with_image: int | None = None
    num_synthetic: int | None = None
    classes: dict[str, int] | None = None
    """Rows by label; of a ranking or a pair by its first one, the teacher's first choice."""


class Lengths(Record):
    """Characters of one part of the rows."""

    num_rows: int
    mean: float
    median: float
    p95: float
    max: int


def count_figures(kind: TableKind, tables: Sequence[RowDigests]) -> dict[Split, Figures]:
    """The figures of all rows of `tables`, which belong to one version."""
    splits = join_column(tables, "split")
    figures: dict[Split, Figures] = {}
    for number, split in enumerate(SPLITS):
        chosen = splits == number
        classes: Counter[str] = Counter()
        for table in tables:
            classes += table.count_labels(table.rows["split"] == number)
        found: dict[str, Any] = {"num_rows": int(chosen.sum()), "classes": dict(sorted(classes.items()))}
        if kind != "rankings":
            found |= {"num_with_image": int(join_column(tables, "has_image")[chosen].sum())}
        if kind == "cases":
            patients = np.concatenate([table.field("patient") for table in tables])[chosen]
            found |= {"num_patients": len(np.unique(patients)), "num_labelled": classes.total()}
            found |= {"num_synthetic": int(join_column(tables, "is_synthetic")[chosen].sum())}
        if kind == "preferences":
            found |= {"num_cases": len(np.unique(join_column(tables, "case")[chosen]))}
        figures[split] = Figures(**found)
    return figures


def read_statement(
    kind: TableKind, reference: Reference, record: StageRecord, *, store: "Store"
) -> dict[Split, Figures]:
    """The figures that a version states of itself: in its record, or, of pairs, in `checks.json`."""
    if kind == "preferences":
        checks: Any = store.read_json(reference, "checks.json") if "checks.json" in store.files(reference) else {}
        return {
            split: Figures(
                num_rows=checks[split]["num_pairs"],
                num_cases=checks[split].get("num_paired_cases"),
                classes=checks[split].get("first_chosen_label"),
            )
            for split in SPLITS
            if "num_pairs" in checks.get(split, ())
        }
    counts = record.counts
    if kind == "rankings":
        return {split: Figures(num_rows=counts[split]) for split in SPLITS if split in counts}
    return {split: _read_counts(counts, split) for split in SPLITS if f"{split}/cases" in counts}


def _read_counts(counts: Mapping[str, int], split: Split) -> Figures:
    """The figures of one split of cases, as the stage `data` counts them."""
    without_label = counts.get(f"{split}/without label")
    prefix = f"{split}/label/"
    return Figures(
        num_rows=counts[f"{split}/cases"],
        num_patients=counts.get(f"{split}/patients"),
        num_labelled=None if without_label is None else counts[f"{split}/cases"] - without_label,
        num_with_image=counts.get(f"{split}/with image"),
        num_synthetic=counts.get(f"{split}/synthetic"),
        classes={key.removeprefix(prefix): number for key, number in counts.items() if key.startswith(prefix)},
    )


def agree_on_unread(stated_before: Figures, read_before: Figures, stated_after: Figures, read_after: Figures) -> bool:
    """Whether both statements leave the same rows for the files that both versions have and that were not read."""
    left = stated_before.num_rows - read_before.num_rows, stated_after.num_rows - read_after.num_rows
    if left[0] != left[1] or left[0] < 0:
        return False
    if stated_before.classes is None or stated_after.classes is None:
        return True
    classes = [
        _subtract(stated.classes or {}, read.classes or {})
        for stated, read in ((stated_before, read_before), (stated_after, read_after))
    ]
    return classes[0] == classes[1]


def _subtract(counts: Mapping[str, int], other: Mapping[str, int]) -> dict[str, int]:
    found = {label: counts.get(label, 0) - other.get(label, 0) for label in {*counts, *other}}
    return {label: number for label, number in found.items() if number}


def measure_shift(before: Mapping[str, int], after: Mapping[str, int]) -> float | None:
    """Total variation distance of the class shares, 0 to 1; None where one side has no row."""
    totals = sum(before.values()), sum(after.values())
    if not all(totals):
        return None
    return (
        sum(abs(before.get(label, 0) / totals[0] - after.get(label, 0) / totals[1]) for label in {*before, *after}) / 2
    )


def compute_shift_p_value(before: Mapping[str, int], fresh: Mapping[str, int]) -> float | None:
    """p-value of Pearson's chi-square test that rows that came in have classes as frequent as those of before.

    The rows that both versions have are on one side only, so the two samples are independent, which the versions
    themselves are not. None where the expected counts are too small for the test.
    """
    from scipy.special import chdtrc

    labels = sorted({label for counts in (before, fresh) for label, number in counts.items() if number})
    table = np.array([[counts.get(label, 0) for label in labels] for counts in (before, fresh)], dtype=np.float64)
    if len(labels) < 2 or not table.sum(axis=1).all():
        return None
    expected = np.outer(table.sum(axis=1), table.sum(axis=0)) / table.sum()
    if expected.min() < _LEAST_EXPECTED or (expected >= _USUAL_EXPECTED).mean() < _USUAL_SHARE:
        return None
    statistic = ((table - expected) ** 2 / expected).sum()
    return float(chdtrc(len(labels) - 1, statistic))


def describe_lengths(kind: TableKind, tables: Sequence[RowDigests]) -> dict[str, Lengths | None]:
    """Characters of each part of the rows of `tables`; None where there are no rows."""
    lengths = join_column(tables, "lengths")
    found: dict[str, Lengths | None] = {}
    for column, part in enumerate(LENGTHS[kind]):
        values = lengths[:, column]
        found[part] = None
        if len(values):
            median, p95 = np.percentile(values, [50, 95])
            mean, most = float(values.mean()), int(values.max())
            found[part] = Lengths(num_rows=len(values), mean=mean, median=median, p95=p95, max=most)
    return found
