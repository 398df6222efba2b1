"""What differs between two versions of cases, of rankings or of preferences: rows, classes, teachers and settings.

Goes in: two references of one kind. Comes out: a `DataDifference`: numbers and case ids, no content. Files of rows that
both versions have, by their sha256, are not read unless asked for: then the figures of a split are those that the
versions state themselves. Of a row that is read its hashes and its case id are held, however long the row is: about
100 bytes, 160 while rows are matched. It prints nothing.
"""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from mint_lib.data_difference.difference import Affected, Agreement, DataDifference, FileCounts, SplitDifference
from mint_lib.data_difference.figures import (
    Figures,
    agree_on_unread,
    compute_shift_p_value,
    count_figures,
    describe_lengths,
    measure_shift,
    read_statement,
)
from mint_lib.data_difference.matching import MatchedRows, read_rows, sort_shards
from mint_lib.data_difference.row_digests import FIELDS, ROW_TYPES, RowDigests, TableKind, join_column, measure_overlap
from mint_lib.errors import InvalidInput
from mint_lib.records import SPLITS, Reference, Split, StageRecord

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from mint_lib.store import Store

SHOWN_IDS = 10


def compare_versions(
    before: Reference,
    after: Reference,
    *,
    store: "Store",
    read_shared: bool = False,
    max_ids: int | None = SHOWN_IDS,
) -> DataDifference:
    """Compare two versions of one kind.

    Args:
        before: What to start from.
        after: What may have rows that `before` has not.
        store: Where both are.
        read_shared: Read also the files that both have, once, so that patients and lengths of all rows are seen.
        max_ids: Most case ids of each entry; None: all.

    Raises:
        InvalidInput: the kinds differ, or are not of rows.
        NotFound: a version has no table of rows.
        IntegrityError: a file that was read is not what was committed.
    """
    kind = _check_kinds(before, after)
    shards = sort_shards(before, after, store)
    rows = read_rows(kind, before, after, shards, store, read_shared=read_shared)
    records = store.record(before), store.record(after)
    stated = [
        read_statement(kind, reference, record, store=store)
        for reference, record in zip((before, after), records, strict=True)
    ]
    unread = [] if read_shared else shards.shared
    read = rows.common, rows.before, rows.after
    num_rows = sum(map(len, read))
    row_changes = _describe_changes(rows, max_ids)
    labels = _compare_maps(*(_read_labels(reference, store) for reference in (before, after)))
    tables = (rows.common, rows.before), (rows.common, rows.after)
    lengths = [describe_lengths(kind, pair) for pair in tables]
    return DataDifference(
        before=before,
        after=after,
        is_same_data=not labels and not any(row_changes[name] for name in ("added", "removed", "changes")),
        num_unread_files=len(unread),
        **row_changes,
        splits=_compare_splits(rows, {split for split, *_ in unread}, *stated),
        lengths={part: (lengths[0][part], lengths[1][part]) for part in lengths[0]},
        labels=labels,
        teachers=(_count_teachers(*tables[0]), _count_teachers(*tables[1])),
        agreement=_measure_agreement(rows),
        settings=_compare_maps(*(_flatten_record(record) for record in records)),
        files=FileCounts(
            num_shared=len(shards.shared),
            num_gone=len(shards.gone),
            num_new=len(shards.new),
            shared_bytes=shards.count_bytes("shared"),
            gone_bytes=shards.count_bytes("gone"),
            new_bytes=shards.count_bytes("new"),
        ),
        bytes_per_row=sum(table.num_bytes for table in read) / num_rows if num_rows else 0.0,
    )


def _check_kinds(before: Reference, after: Reference) -> TableKind:
    for reference in (before, after):
        if reference.kind not in ROW_TYPES:
            raise InvalidInput(
                f"{reference} has no rows to compare. Give two versions of one kind among {', '.join(ROW_TYPES)}."
            )
    if before.kind != after.kind:
        raise InvalidInput(f"{before} and {after} are of different kinds. Give two versions of one kind.")
    return cast(TableKind, before.kind)


def _describe_changes(rows: MatchedRows, max_ids: int | None) -> dict[str, Any]:
    """What happened to rows, as the fields of a `DataDifference`."""
    old_splits = rows.before.rows["split"][rows.places_before]
    new_splits = rows.after.rows["split"][rows.places_after]

    def affect(table: RowDigests, places: "NDArray[np.intp]") -> Affected:
        _, firsts = np.unique(table.rows["case"][places], return_index=True)
        shown = places[np.sort(firsts)][:max_ids].tolist()
        return Affected(num_rows=len(places), num_cases=len(firsts), case_ids=table.case_ids(shown))

    def affect_matched(chosen: "NDArray[np.bool_]") -> Affected:
        return affect(rows.after, rows.places_after[chosen])

    def affect_unmatched(table: RowDigests, matched: "NDArray[np.intp]") -> dict[Split, Affected]:
        places = np.setdiff1d(np.arange(len(table)), matched, assume_unique=True)
        splits = table.rows["split"][places]
        found = {split: affect(table, places[splits == number]) for number, split in enumerate(SPLITS)}
        return {split: affected for split, affected in found.items() if affected.num_rows}

    causes = {
        name: rows.before.field(name)[rows.places_before] != rows.after.field(name)[rows.places_after]
        for name in FIELDS[rows.kind]
    }
    causes["split"] = old_splits != new_splits
    moves = {
        f"{source} -> {target}": affect_matched((old_splits == number) & (new_splits == other))
        for number, source in enumerate(SPLITS)
        for other, target in enumerate(SPLITS)
        if source != target
    }
    return {
        "added": affect_unmatched(rows.after, rows.places_after),
        "removed": affect_unmatched(rows.before, rows.places_before),
        "changed": affect_matched(np.any(list(causes.values()), axis=0)),
        "changes": {name: affect_matched(chosen) for name, chosen in causes.items() if chosen.any()},
        "moves": {name: affected for name, affected in moves.items() if affected.num_rows},
        "leaked": affect(rows.after, _find_leaked(rows)),
    }


def _find_leaked(rows: MatchedRows) -> "NDArray[np.intp]":
    """Places of the rows of train in `after` whose patients were in test, and not in train, before."""
    if rows.kind != "cases":
        return np.array([], dtype=np.intp)
    known = rows.common, rows.before
    patients, splits = np.concatenate([table.field("patient") for table in known]), join_column(known, "split")
    train, test = SPLITS.index("train"), SPLITS.index("test")
    tested = np.setdiff1d(patients[splits == test], patients[splits == train])
    return np.flatnonzero((rows.after.rows["split"] == train) & np.isin(rows.after.field("patient"), tested))


def _compare_splits(
    rows: MatchedRows, unread: set[Split], stated_before: Mapping[Split, Figures], stated_after: Mapping[Split, Figures]
) -> dict[Split, SplitDifference]:
    """The figures of every split: counted where all rows were read, as stated elsewhere."""
    counted_before = count_figures(rows.kind, (rows.common, rows.before))
    counted_after = count_figures(rows.kind, (rows.common, rows.after))
    old, new = rows.before.rows, rows.after.rows
    is_fresh = np.ones(len(new), dtype=bool)
    is_fresh[rows.places_after] = (old["split"][rows.places_before] != new["split"][rows.places_after]) | (
        old["label"][rows.places_before] != new["label"][rows.places_after]
    )
    found: dict[Split, SplitDifference] = {}
    for number, split in enumerate(SPLITS):
        before: Figures | None = counted_before[split]
        after: Figures | None = counted_after[split]
        if split in unread:
            read = counted_before[split], counted_after[split]
            before, after = stated_before.get(split), stated_after.get(split)
            if before and after and not agree_on_unread(before, read[0], after, read[1]):
                before = after = None
        shift = p_value = None
        if not counted_before[split].num_rows and not counted_after[split].num_rows and split in unread:
            shift = 0.0  # every file of the split is in both versions
        if before and after and before.classes is not None and after.classes is not None:
            shift = measure_shift(before.classes, after.classes)
            fresh = rows.after.count_labels(is_fresh & (new["split"] == number))
            p_value = compute_shift_p_value(before.classes, fresh)
        found[split] = SplitDifference(before=before, after=after, shift=shift, p_value=p_value)
    return found


def _measure_agreement(rows: MatchedRows) -> Agreement | None:
    """Whether the teachers of both versions choose alike; None of cases, or where no row is in both."""
    if rows.kind == "cases" or not len(rows.places_after):
        return None
    old, new = rows.before.rows, rows.after.rows
    is_other = old["label"][rows.places_before] != new["label"][rows.places_after]
    overlap = None
    if rows.kind == "rankings":
        overlap = measure_overlap(old["first_labels"][rows.places_before], new["first_labels"][rows.places_after])
    return Agreement(num_rows=len(is_other), first_label_changed=float(is_other.mean()), overlap=overlap)


def _count_teachers(*tables: RowDigests) -> dict[str, int]:
    return {
        digest: sum(table.teachers[digest] for table in tables)
        for digest in sorted({*tables[0].teachers, *tables[1].teachers})
    }


def _read_labels(reference: Reference, store: "Store") -> dict[str, str]:
    """The names of a version's labels by their ids."""
    if "labels.json" not in store.files(reference):
        return {}
    labels: Any = store.read_json(reference, "labels.json")
    return {label["id"]: label["name"] for label in labels}


def _flatten_record(record: StageRecord) -> dict[str, str]:
    """Config, inputs and code of a record: one JSON value a key."""
    found = {f"input {name}": json.dumps(value) for name, value in record.inputs.items()}
    found["code"] = json.dumps(record.code_version)

    def flatten(value: object, path: str) -> None:
        if isinstance(value, dict) and value:
            for key, item in value.items():
                flatten(item, f"{path}.{key}" if path else str(key))
        else:
            found[path] = json.dumps(value, sort_keys=True, ensure_ascii=False)

    flatten(record.config, "")
    return found


def _compare_maps(before: Mapping[str, str], after: Mapping[str, str]) -> dict[str, tuple[str | None, str | None]]:
    """The keys whose values differ, with both values."""
    keys = sorted({*before, *after})
    return {key: (before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)}
