"""Records as rows of Parquet files: their Arrow schemas, writing and reading.

Goes in: records of `mint_lib.records`. Comes out: the bytes of a Parquet file, and the validated records again. It does
not know where files lie.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, TypeVar

from mint_lib.records import Record

if TYPE_CHECKING:
    import pyarrow

R = TypeVar("R", bound=Record)


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
    """`rows` as one Parquet file. The same rows give the same bytes."""
    import io

    import pyarrow as pa
    import pyarrow.parquet

    table = pa.Table.from_pylist([row.model_dump() for row in rows], schema=schema)
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def parquet_to_rows(data: bytes, row_type: type[R]) -> list[R]:
    """The validated rows of one Parquet file written by `rows_to_parquet`."""
    import io

    import pyarrow.parquet

    rows = pyarrow.parquet.read_table(io.BytesIO(data), use_threads=False).to_pylist(maps_as_pydicts="strict")
    return [row_type.model_validate(row) for row in rows]
