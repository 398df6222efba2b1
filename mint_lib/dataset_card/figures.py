"""Figures of the rows of one split: how many, of how many patients, of which classes, from where.

Goes in: record batches of `cases` or `preferences` rows, or the records themselves. Comes out: `SplitFigures`. Rows
are not held; what grows is the set of patients or cases, as 8 bytes of a hash each. Knows no store.
"""

import hashlib
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Literal

from mint_lib.records import Record
from mint_lib.rows import case_schema, pair_schema

if TYPE_CHECKING:
    import pyarrow

CardKind = Literal["cases", "preferences"]
_SUBJECT: dict[CardKind, str] = {"cases": "group_id", "preferences": "case_id"}
"""The column that says whom a row is about."""
_FACTS: dict[CardKind, tuple[str, ...]] = {
    "cases": ("source",),
    "preferences": ("policy", "teacher_digest", "template_digest"),
}
_COLUMNS: dict[CardKind, tuple[str, ...]] = {
    "cases": ("group_id", "text", "image", "label_id", "source", "synthetic"),
    "preferences": ("case_id", "images", "chosen_label_ids", "policy", "teacher_digest", "template_digest"),
}
_BATCH_ROWS = 256


class SplitFigures(Record):
    """What one split consists of."""

    num_rows: int
    num_subjects: int
    """Patients of `cases`, cases of `preferences`."""
    num_with_text: int
    num_with_image: int
    num_synthetic: int | None
    """Rows that were generated; None where the rows do not say it."""
    labels: dict[str, int]
    """Label id to rows: the diagnosis of a case, the first chosen label of a pair."""
    facts: dict[str, dict[str, int]]
    """Column to value to rows: sources of cases; policies, teachers and templates of pairs."""

    @property
    def num_without_label(self) -> int:
        """Rows whose label is not known."""
        return self.num_rows - sum(self.labels.values())


class FigureCounter:
    """Counts the rows of one split, batch by batch."""

    def __init__(self, kind: CardKind):
        self._kind = kind
        self._rows: Counter[str] = Counter()
        self._labels: Counter[str] = Counter()
        self._facts: dict[str, Counter[str]] = {column: Counter() for column in _FACTS[kind]}
        self._subjects: set[bytes] = set()

    def add(self, batch: "pyarrow.RecordBatch") -> None:
        """Count the rows of `batch`, which has the columns of its kind's schema, or those of `figure_columns`."""
        import pyarrow.compute as pc

        self._rows["all"] += batch.num_rows
        for subject in batch.column(_SUBJECT[self._kind]).unique().to_pylist():
            self._subjects.add(hashlib.blake2b(subject.encode(), digest_size=8).digest())
        for column, values in self._facts.items():
            values.update(_count_values(batch.column(column)))
        if self._kind == "cases":
            self._labels.update(_count_values(batch.column("label_id")))
            self._rows["text"] += batch.num_rows - batch.column("text").null_count
            self._rows["image"] += batch.num_rows - batch.column("image").null_count
            self._rows["synthetic"] += pc.sum(batch.column("synthetic")).as_py() or 0
        else:
            first = pc.list_flatten(pc.list_slice(batch.column("chosen_label_ids"), 0, 1))
            self._labels.update(_count_values(first))
            self._rows["text"] += batch.num_rows
            self._rows["image"] += pc.sum(pc.greater(pc.list_value_length(batch.column("images")), 0)).as_py() or 0

    def figures(self) -> SplitFigures:
        """What was counted."""
        return SplitFigures(
            num_rows=self._rows["all"],
            num_subjects=len(self._subjects),
            num_with_text=self._rows["text"],
            num_with_image=self._rows["image"],
            num_synthetic=self._rows["synthetic"] if self._kind == "cases" else None,
            labels=dict(sorted(self._labels.items())),
            facts={column: dict(sorted(values.items())) for column, values in self._facts.items()},
        )


def figure_columns(kind: CardKind) -> list[str]:
    """The columns that a `FigureCounter` reads."""
    return list(_COLUMNS[kind])


def batch_records(kind: CardKind, rows: Iterable[Record]) -> Iterator["pyarrow.RecordBatch"]:
    """Records as the record batches that a `FigureCounter` reads."""
    import pyarrow as pa

    whole = case_schema() if kind == "cases" else pair_schema()
    columns = set(_COLUMNS[kind])
    schema = pa.schema([field for field in whole if field.name in columns])
    rest = iter(rows)
    while chunk := list(itertools.islice(rest, _BATCH_ROWS)):
        yield pa.RecordBatch.from_pylist([row.model_dump(include=columns) for row in chunk], schema=schema)


def _count_values(column: "pyarrow.Array") -> dict[str, int]:
    """Value to rows, without nulls."""
    counted = column.drop_null().value_counts()
    return {item["values"]: item["counts"] for item in counted.to_pylist()}
