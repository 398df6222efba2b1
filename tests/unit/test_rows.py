"""Rows one after another: what is written is read back, little is held at a time, and nothing is left on the disk."""

import pathlib
import tempfile
from typing import Any

import pyarrow.parquet
import pytest
from tiny_preferences import make_pair

from mint_lib.errors import IntegrityError, NotFound
from mint_lib.records import Case, PreferencePair, Reference, StageRecord
from mint_lib.rows import case_schema, iterate_parquet, pair_schema, write_shards
from mint_lib.store import Store

PAIRS = [make_pair(f"c{number}", f"Text {number}.", "yes", "no") for number in range(150)]


def write_pairs(store: Store) -> Reference:
    with store.write("preferences", "tiny") as version:
        version.add_rows("train", PAIRS, pair_schema())
        return version.commit(StageRecord(stage="preferences", config={}, inputs={}, code_version="test"))


@pytest.fixture
def temporary_folder(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """The folder in which temporary files of this test lie."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def write_one(rows: list[Any], schema: Any, folder: pathlib.Path) -> pathlib.Path:
    """The only shard of `rows`."""
    (path,) = write_shards(rows, schema, folder)
    return path


def test_iterate_parquet_gives_the_rows_in_their_order(tmp_path: pathlib.Path) -> None:
    cases = [
        Case(case_id="1", group_id="g", text="t", attributes={"sex": "f", "age": "3"}, source="s", synthetic=True),
        Case(case_id="2", group_id="g", image=b"png\x00", label_id="OMIM:1", source="s", synthetic=False),
    ] * 100
    assert list(iterate_parquet(write_one(cases, case_schema(), tmp_path), Case)) == cases


def test_iterate_parquet_row_of_another_shape_is_refused(tmp_path: pathlib.Path) -> None:
    path = write_one(PAIRS, pair_schema(), tmp_path)
    with pytest.raises(ValueError, match="group_id"):
        next(iterate_parquet(path, Case))


@pytest.mark.parametrize(("num_rows", "image_bytes", "largest"), [(2500, 0, 1024), (120, 2**20, 31), (1, 2**26, 1)])
def test_write_shards_row_groups_hold_few_rows_and_bytes(
    num_rows: int, image_bytes: int, largest: int, tmp_path: pathlib.Path
) -> None:
    image = b"i" * image_bytes or None
    rows = [
        Case(case_id=f"{number}", group_id="g", text="t", image=image, source="s", synthetic=True)
        for number in range(num_rows)
    ]
    path = write_one(rows, case_schema(), tmp_path)
    metadata = pyarrow.parquet.read_metadata(path)
    sizes = [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)]
    assert sum(sizes) == num_rows
    assert max(sizes) == largest
    assert list(iterate_parquet(path, Case)) == rows


def test_write_shards_no_rows_is_a_file_without_rows(tmp_path: pathlib.Path) -> None:
    assert list(iterate_parquet(write_one([], pair_schema(), tmp_path), PreferencePair)) == []


@pytest.mark.parametrize("limits", [{"max_rows": 2048}, {"max_bytes": 200_000}])
def test_write_shards_above_a_limit_begins_a_new_file(limits: dict[str, int], tmp_path: pathlib.Path) -> None:
    rows = PAIRS * 40
    paths = list(write_shards(rows, pair_schema(), tmp_path, **limits))
    assert len(paths) > 2
    assert [path.name for path in paths] == sorted(path.name for path in tmp_path.iterdir())
    assert [row for path in paths for row in iterate_parquet(path, PreferencePair)] == rows


def test_write_shards_of_rows_that_only_grew_begin_with_the_same_files(tmp_path: pathlib.Path) -> None:
    found = []
    for name, rows in (("before", PAIRS * 40), ("after", [*PAIRS * 40, *PAIRS])):
        (tmp_path / name).mkdir()
        found.append([path.read_bytes() for path in write_shards(rows, pair_schema(), tmp_path / name, max_rows=2048)])
    before, after = found
    assert before[:-1] == after[: len(before) - 1]
    assert before[-1] != after[len(before) - 1]


def test_iterate_rows_exhausted_leaves_no_file(store: Store, temporary_folder: pathlib.Path) -> None:
    reference = write_pairs(store)
    rows = store.iterate_rows(reference, "train", PreferencePair)
    assert next(rows) == PAIRS[0]
    assert list(temporary_folder.rglob("*.parquet"))
    assert list(rows) == PAIRS[1:]
    assert not list(temporary_folder.iterdir())


def test_iterate_rows_closed_early_leaves_no_file(store: Store, temporary_folder: pathlib.Path) -> None:
    rows = store.iterate_rows(write_pairs(store), "train", PreferencePair)
    next(rows)
    rows.close()
    assert not list(temporary_folder.iterdir())


def test_iterate_rows_damaged_file_gives_no_row(store: Store, temporary_folder: pathlib.Path) -> None:
    reference = write_pairs(store)
    settings = store.settings
    key = f"{settings.prefix}/preferences/tiny/{reference.version}/train/000000.parquet"
    data = bytearray(store.read_bytes(reference, "train/000000.parquet"))
    data[len(data) // 2] ^= 1
    store._s3.client.put_object(Bucket=settings.bucket, Key=key, Body=bytes(data))
    with pytest.raises(IntegrityError, match="damaged"):
        next(store.iterate_rows(reference, "train", PreferencePair))
    assert not list(temporary_folder.iterdir())


def test_iterate_rows_table_that_is_not_there_names_the_files_that_are(store: Store) -> None:
    with pytest.raises(NotFound, match=r"no table 'test'. It has: .*train/000000.parquet"):
        next(store.iterate_rows(write_pairs(store), "test", PreferencePair))
