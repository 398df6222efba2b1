"""Everything that is told of a version of `cases` or `preferences`, gathered from the store.

Goes in: a committed version, or what its writer knows just before the commit. Comes out: a `Description`, from which
`card` and `croissant` make text. What a draft cannot know, its number, digest and time, is left open, so that the same
content gives the same card.
"""

import contextlib
import pathlib
from collections.abc import Generator, Iterable, Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any, cast

from pydantic import TypeAdapter

from mint_lib.dataset_card.facts import DatasetFacts
from mint_lib.dataset_card.figures import CardKind, FigureCounter, SplitFigures, batch_records, figure_columns
from mint_lib.errors import InvalidInput, NotFound
from mint_lib.records import SPLITS, Label, Record, Reference, StageRecord
from mint_lib.storage.layout import shards_of
from mint_lib.storage.manifest import FileEntry

if TYPE_CHECKING:
    import pyarrow

    from mint_lib.store import Store

GATE = "gate.json"
_DOCUMENTS = ("labels.json", GATE)


class Description(Record):
    """What is known of one version."""

    kind: CardKind
    name: str
    reference: Reference | None
    """None for a draft."""
    created_at: datetime | None
    """None for a draft."""
    record: StageRecord
    facts: DatasetFacts
    files: dict[str, FileEntry]
    splits: dict[str, SplitFigures]
    """Table to its figures, in the order train, validation, test."""
    labels: tuple[Label, ...]
    cases: StageRecord | None
    """The record of the cases: its own, or that of the cases of the pairs; None if it is no longer in the store."""
    teacher: dict[str, Any] | None
    """`qualification.json` of the teacher whose rankings became pairs."""
    gate: dict[str, Any] | None
    """`gate.json`: `passed`, and `outcomes` with `title`, `status` and `sentence`."""
    lineage: dict[str, StageRecord | None]
    """Every version that went in, directly or through others, with its record; None: no longer in the store."""

    @property
    def title(self) -> str:
        """Kind and name, with the version where there is one."""
        return f"{self.kind}/{self.name}" + (f"@{self.reference.version}" if self.reference else "")

    @property
    def synthetic(self) -> tuple[int, int] | None:
        """Generated cases and all cases, in the splits that this version has; None where nobody counted."""
        counts = self.cases.counts if self.cases else {}
        known = [figures.num_synthetic for figures in self.splits.values()]
        if self.kind == "cases":
            return sum(number or 0 for number in known), sum(item.num_rows for item in self.splits.values())
        if not all(f"{split}/synthetic" in counts for split in self.splits):
            return None
        return tuple(sum(counts[f"{split}/{what}"] for split in self.splits) for what in ("synthetic", "cases"))  # type: ignore[return-value]

    @property
    def leaks(self) -> tuple[str, ...]:
        """How splits share what they must not share, as the cases' record says."""
        return tuple(note for note in self.notes if note.startswith("LEAK"))

    @property
    def notes(self) -> tuple[str, ...]:
        """Facts that the stages noted: of this version, and of the cases and rankings that it was made from."""
        records = [self.record, self.cases, *self.lineage.values()]
        return tuple(dict.fromkeys(note for record in records if record for note in record.notes))


def describe_dataset(
    store: "Store", reference: Reference, *, figures: Mapping[str, SplitFigures] | None = None
) -> Description:
    """What is known of a committed version. Its shards are read once, checked, unless their `figures` are given.

    Raises:
        InvalidInput: it is not a version of `cases` or `preferences`.
        NotFound: there is no such version.
        IntegrityError: a file is not what was committed.
    """
    kind = check_kind(reference)
    files = store.files(reference)
    if figures is None:
        figures = {
            split: _count(kind, read_batches(store, reference, split, figure_columns(kind)))
            for split in list_tables(files)
        }
    return _describe(
        store,
        kind=kind,
        name=reference.name,
        record=store.record(reference),
        files=files,
        splits=dict(figures),
        documents={path: store.read_json(reference, path) for path in _DOCUMENTS if path in files},
        reference=reference,
    )


def describe_draft(
    store: "Store",
    *,
    kind: CardKind,
    name: str,
    record: StageRecord,
    files: Mapping[str, FileEntry],
    tables: Mapping[str, Iterable[Record]],
    documents: Mapping[str, object],
) -> Description:
    """What is known of a version before it is committed.

    Args:
        store: Where the versions of `record.inputs` lie.
        kind: Kind of the version.
        name: Name of the version.
        record: What will be committed with it.
        files: The files written so far.
        tables: Split to its rows, `Case` or `PreferencePair`; they are read once.
        documents: Path to the content of the JSON files that matter here: `labels.json` and, if there is one,
            `gate.json`.
    """
    return _describe(
        store,
        kind=kind,
        name=name,
        record=record,
        files=dict(files),
        splits={split: _count(kind, batch_records(kind, rows)) for split, rows in tables.items()},
        documents=documents,
        reference=None,
    )


def check_kind(reference: Reference) -> CardKind:
    """The kind of a version that has a card. Raises InvalidInput for every other one."""
    if reference.kind not in ("cases", "preferences"):
        raise InvalidInput(
            f"{reference} is of kind {reference.kind}. Only cases and preferences have a data set card and are "
            "exported; `mint ls cases` and `mint ls preferences` list them."
        )
    return reference.kind


def list_tables(files: Iterable[str]) -> list[str]:
    """The splits that have shards among `files`."""
    paths = list(files)
    return [split for split in SPLITS if shards_of(split, paths)]


def read_batches(
    store: "Store", reference: Reference, table: str, columns: list[str] | None = None
) -> Generator["pyarrow.RecordBatch", None, None]:
    """The row groups of a table, one in memory at a time; raises as `Store.iterate_rows`."""
    for path in store.shards(reference, table):
        with store.fetch_shard(reference, path) as local_path:
            yield from read_file_batches(local_path, columns)


def read_file_batches(
    path: pathlib.Path, columns: list[str] | None = None
) -> Generator["pyarrow.RecordBatch", None, None]:
    """The row groups of a Parquet file, one in memory at a time."""
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path, pre_buffer=False) as file:
        for number in range(file.num_row_groups):
            yield from file.read_row_group(number, columns=columns, use_threads=False).to_batches()


def _count(kind: CardKind, batches: Iterable["pyarrow.RecordBatch"]) -> SplitFigures:
    counter = FigureCounter(kind)
    for batch in batches:
        counter.add(batch)
    return counter.figures()


def _describe(
    store: "Store",
    *,
    kind: CardKind,
    name: str,
    record: StageRecord,
    files: dict[str, FileEntry],
    splits: dict[str, SplitFigures],
    documents: Mapping[str, object],
    reference: Reference | None,
) -> Description:
    lineage: dict[str, StageRecord | None] = {}
    _walk_lineage(store, record, lineage)
    cases = record if kind == "cases" else lineage.get(record.inputs.get("cases", ""))
    stated = (cases.config.get("card") if cases else None) or {}
    return Description(
        kind=kind,
        name=name,
        reference=reference,
        created_at=store.created_at(reference) if reference else None,
        record=record,
        facts=DatasetFacts.model_validate(stated),
        files=files,
        splits={split: splits[split] for split in SPLITS if split in splits},
        labels=tuple(TypeAdapter(list[Label]).validate_python(documents.get("labels.json", []))),
        cases=cases,
        teacher=_read_teacher(store, record),
        gate=cast("dict[str, Any] | None", documents.get(GATE)),
        lineage=lineage,
    )


def _walk_lineage(store: "Store", record: StageRecord, found: dict[str, StageRecord | None]) -> None:
    """Add the versions that `record` was made from to `found`, and theirs."""
    for text in record.inputs.values():
        if "@" not in text or text in found:
            continue
        found[text] = None
        with contextlib.suppress(NotFound):
            found[text] = before = store.record(Reference.parse(text))
            _walk_lineage(store, before, found)


def _read_teacher(store: "Store", record: StageRecord) -> dict[str, Any] | None:
    """What the teacher stage measured of the teacher behind these pairs."""
    if "rankings" not in record.inputs:
        return None
    with contextlib.suppress(NotFound):
        return cast("dict[str, Any]", store.read_json(Reference.parse(record.inputs["rankings"]), "qualification.json"))
    return None
