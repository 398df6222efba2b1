"""Records as rows of Parquet files: their Arrow schemas, writing and reading.

Goes in: records of `mint_lib.records`. Comes out: Parquet files of bounded size, and the validated records again. It
knows no server.
"""

import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Generic, TypeVar

from mint_lib.records import Record

if TYPE_CHECKING:
    import pyarrow

R = TypeVar("R", bound=Record)
_GROUP_ROWS = 1024
_GROUP_BYTES = 32 * 2**20
"""Most rows, and bytes before compression, of a row group: a reader holds one at a time, images included."""
SHARD_ROWS = 65_536
SHARD_BYTES = 128 * 2**20
"""Most rows, and bytes before compression, of a file: what a version that adds rows has to write anew at the least."""
_BATCH_ROWS = 64
"""Rows that become Python objects at a time."""


def case_schema() -> "pyarrow.Schema":
    """Arrow schema of `cases` rows; `image` is encoded bytes as Hugging Face `datasets` reads them.

    `attributes` is a list of its entries, because `datasets` reads no map.
    """
    import pyarrow as pa

    finding = pa.struct([("id", pa.string()), ("label", pa.string()), ("excluded", pa.bool_())])
    return pa.schema(
        [
            pa.field("case_id", pa.string(), nullable=False),
            pa.field("group_id", pa.string(), nullable=False),
            ("text", pa.string()),
            ("image", pa.binary()),
            ("findings", pa.list_(finding)),
            ("label_id", pa.string()),
            ("attributes", pa.list_(pa.struct([("key", pa.string()), ("value", pa.string())]))),
            pa.field("source", pa.string(), nullable=False),
            pa.field("synthetic", pa.bool_(), nullable=False),
        ]
    )


def ranking_schema() -> "pyarrow.Schema":
    """Arrow schema of `rankings` rows."""
    import pyarrow as pa

    return pa.schema(
        [
            pa.field("case_id", pa.string(), nullable=False),
            pa.field("label_ids", pa.list_(pa.string()), nullable=False),
            pa.field("probabilities", pa.list_(pa.float64()), nullable=False),
            pa.field("teacher_digest", pa.string(), nullable=False),
        ]
    )


def pair_schema() -> "pyarrow.Schema":
    """Arrow schema of `preferences` rows."""
    import pyarrow as pa

    turn = pa.struct([("role", pa.string()), ("content", pa.string())])
    return pa.schema(
        [
            pa.field("case_id", pa.string(), nullable=False),
            pa.field("prompt", pa.list_(turn), nullable=False),
            pa.field("images", pa.list_(pa.binary()), nullable=False),
            pa.field("chosen", pa.string(), nullable=False),
            pa.field("rejected", pa.string(), nullable=False),
            pa.field("chosen_label_ids", pa.list_(pa.string()), nullable=False),
            pa.field("rejected_label_ids", pa.list_(pa.string()), nullable=False),
            pa.field("teacher_digest", pa.string(), nullable=False),
            pa.field("template_digest", pa.string(), nullable=False),
            pa.field("policy", pa.string(), nullable=False),
        ]
    )


def prediction_schema() -> "pyarrow.Schema":
    """Arrow schema of `predictions` rows."""
    import pyarrow as pa

    strings, floats = pa.list_(pa.string()), pa.list_(pa.float64())
    required = [("system", pa.string()), ("case_id", pa.string()), ("label_id", pa.string())]
    required += [("ranked_ids", strings), ("probabilities", floats)]
    return pa.schema([*(pa.field(*field, nullable=False) for field in required), ("generated", strings)])


def write_shards(
    rows: Iterable[Record],
    schema: "pyarrow.Schema",
    folder: pathlib.Path,
    *,
    max_rows: int = SHARD_ROWS,
    max_bytes: int = SHARD_BYTES,
) -> Iterator[pathlib.Path]:
    """`rows` as Parquet files in `folder`, each given when it is whole; it may be removed before the next is asked for.

    One row group is in memory at a time, and the same rows give the same bytes. No rows give one file without any.

    Args:
        rows: Records of one type.
        schema: Their Arrow schema.
        folder: Where the files are written.
        max_rows: Most rows of a file.
        max_bytes: Most bytes of a file before compression; a single row group may be larger.
    """
    import pyarrow.parquet

    groups = _group_rows(rows, schema)
    group = next(groups, None)
    number = 0
    while number == 0 or group is not None:
        path = folder / f"{number:06d}.parquet"
        num_rows = num_bytes = 0
        with pyarrow.parquet.ParquetWriter(path, schema, compression="zstd") as writer:
            while group is not None:
                num_rows += len(group)
                num_bytes += group.nbytes
                if num_rows > len(group) and (num_rows > max_rows or num_bytes > max_bytes):
                    break
                writer.write_table(group, row_group_size=max(1, len(group)))
                group = next(groups, None)
        yield path
        number += 1


def _group_rows(rows: Iterable[Record], schema: "pyarrow.Schema") -> Iterator["pyarrow.Table"]:
    """Row groups, small ones, so that `iterate_parquet` holds little at a time."""
    import pyarrow as pa

    group: list[dict[str, object]] = []
    num_bytes = 0
    for row in rows:
        values = {name: _list_entries(value) for name, value in row.model_dump().items()}
        size = _count_bytes(values)
        if group and (len(group) == _GROUP_ROWS or num_bytes + size > _GROUP_BYTES):
            yield pa.Table.from_pylist(group, schema=schema)
            group, num_bytes = [], 0
        group.append(values)
        num_bytes += size
    if group:
        yield pa.Table.from_pylist(group, schema=schema)


def _list_entries(value: object) -> object:
    """A map as the list of its entries; any other value as it is."""
    return [{"key": key, "value": item} for key, item in value.items()] if isinstance(value, dict) else value


def _count_bytes(values: Mapping[str, object]) -> int:
    """About how many bytes a row takes in memory: its texts and images."""
    total = 0
    for value in values.values():
        for item in value if isinstance(value, list | tuple) else (value,):
            total += len(item) if isinstance(item, str | bytes) else 64
    return total


def iterate_parquet(path: pathlib.Path, row_type: type[R]) -> Iterator[R]:
    """The validated rows of a file written by `write_shards`, of which one row group is in memory at a time.

    The file is open until the iterator is exhausted or closed.
    """
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path, pre_buffer=False) as file:
        entries = [field.name for field in file.schema_arrow if _holds_entries(field.type)]
        for batch in file.iter_batches(batch_size=_BATCH_ROWS, use_threads=False):
            for row in batch.to_pylist(maps_as_pydicts="strict"):
                for name in entries:
                    row[name] = {item["key"]: item["value"] for item in row[name]}
                yield row_type.model_validate(row)


def _holds_entries(kind: "pyarrow.DataType") -> bool:
    """Whether a column is a map written as the list of its entries."""
    import pyarrow as pa

    return (
        pa.types.is_list(kind)
        and pa.types.is_struct(kind.value_type)
        and [field.name for field in kind.value_type] == ["key", "value"]
    )


class StoredShards(Generic[R]):
    """The rows of Parquet files on this machine, read anew each time."""

    def __init__(self, paths: Sequence[pathlib.Path], row_type: type[R]):
        self._paths = paths
        self._row_type = row_type

    def __iter__(self) -> Iterator[R]:
        """Every row in its order."""
        for path in self._paths:
            yield from iterate_parquet(path, self._row_type)
