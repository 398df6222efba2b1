"""Records as rows of Parquet files: their Arrow schemas, writing and reading.

Goes in: records of `mint_lib.records`. Comes out: the bytes of a Parquet file, and the validated records again. It does
not know where files lie.
"""

import pathlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, TypeVar

from mint_lib.records import Record

if TYPE_CHECKING:
    import pyarrow

R = TypeVar("R", bound=Record)
_GROUP_ROWS = 1024
_GROUP_BYTES = 32 * 2**20
"""Most rows, and bytes before compression, of a row group: a reader holds one at a time, images included."""
_BATCH_ROWS = 64
"""Rows that become Python objects at a time."""


def case_schema() -> "pyarrow.Schema":
    """Arrow schema of `cases` rows; `image` is encoded bytes as Hugging Face `datasets` reads them."""
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
            ("attributes", pa.map_(pa.string(), pa.string())),
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


def rows_to_parquet(rows: Iterable[Record], schema: "pyarrow.Schema") -> bytes:
    """`rows` as one Parquet file. The same rows give the same bytes.

    Its row groups are small, so that `iterate_parquet` holds little at a time.
    """
    import io

    import pyarrow as pa
    import pyarrow.parquet

    table = pa.Table.from_pylist([row.model_dump() for row in rows], schema=schema)
    num_fitting = _GROUP_BYTES * len(table) // max(1, table.nbytes)
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(table, buffer, compression="zstd", row_group_size=max(1, min(_GROUP_ROWS, num_fitting)))
    return buffer.getvalue()


def parquet_to_rows(data: bytes, row_type: type[R]) -> list[R]:
    """The validated rows of one Parquet file written by `rows_to_parquet`."""
    import io

    import pyarrow.parquet

    rows = pyarrow.parquet.read_table(io.BytesIO(data), use_threads=False).to_pylist(maps_as_pydicts="strict")
    return [row_type.model_validate(row) for row in rows]


def iterate_parquet(path: pathlib.Path, row_type: type[R]) -> Iterator[R]:
    """The validated rows of the Parquet file at `path`, of which one row group is in memory at a time.

    The file is open until the iterator is exhausted or closed.
    """
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path, pre_buffer=False) as file:
        for batch in file.iter_batches(batch_size=_BATCH_ROWS, use_threads=False):
            for row in batch.to_pylist(maps_as_pydicts="strict"):
                yield row_type.model_validate(row)
