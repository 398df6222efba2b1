"""Rows as others expect them: images as `datasets` holds them, pairs as TRL's trainers take them.

Goes in: record batches of `cases` or `preferences` as the store holds them. Comes out: the same rows in the exported
schema, which carries the features of Hugging Face `datasets` in its metadata. The answers of a pair become lists of
messages (TRL's conversational preference format); pairs without images have no such column, because TRL takes a data
set with one for a vision data set. It knows no store.
"""

import hashlib
import json
import pathlib
from typing import TYPE_CHECKING, Any

from mint_lib.dataset_card.figures import CardKind
from mint_lib.errors import InvalidInput
from mint_lib.rows import case_schema, pair_schema

if TYPE_CHECKING:
    import pyarrow

_SUFFIXES = {b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg"}
IMAGES = "images"
"""Folder of the image files of an export as lines of JSON, and the column of a pair's images."""


def export_schema(kind: CardKind, *, has_images: bool) -> "pyarrow.Schema":
    """The Arrow schema of exported rows with the features that `datasets` reads from its metadata.

    An image is a struct of `bytes` and `path`, which is how `datasets.Image` is stored. Without `has_images`, pairs
    have no column for them.
    """
    import pyarrow as pa

    turns = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    entries = pa.list_(pa.struct([("key", pa.string()), ("value", pa.string())]))
    changed = {"attributes": entries, "chosen": turns, "rejected": turns}
    changed |= {"image": _image_type(), IMAGES: pa.list_(_image_type())}
    stored = case_schema() if kind == "cases" else pair_schema()
    fields = [
        pa.field(field.name, changed.get(field.name, field.type))
        for field in stored
        if has_images or field.name != IMAGES
    ]
    features = {field.name: _describe_feature(field.type) for field in fields}
    return pa.schema(fields, metadata={"huggingface": json.dumps({"info": {"features": features}})})


def flat_schema(schema: "pyarrow.Schema") -> "pyarrow.Schema":
    """`schema` with the path of a file in the place of every image."""
    import pyarrow as pa

    paths = {"image": pa.string(), IMAGES: pa.list_(pa.string())}
    return pa.schema([pa.field(field.name, paths.get(field.name, field.type)) for field in schema])


def convert_batch(batch: "pyarrow.RecordBatch", schema: "pyarrow.Schema") -> "pyarrow.RecordBatch":
    """The rows of `batch` in the exported schema.

    Raises:
        InvalidInput: they have images, and the schema has no column for them.
    """
    import pyarrow as pa

    if IMAGES in batch.schema.names and IMAGES not in schema.names and has_pair_images(batch):
        raise InvalidInput(
            "Some pairs have images and the first ones of every split have none. Make the preferences for one kind of "
            "student: student.reads is either text or image."
        )
    columns = [_convert_column(batch.column(field.name), field.type) for field in schema]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def has_pair_images(batch: "pyarrow.RecordBatch") -> bool:
    """Whether any of these pairs has an image."""
    return len(batch.column(IMAGES).flatten()) > 0 if IMAGES in batch.schema.names else False


def move_images_to_files(row: dict[str, Any], folder: pathlib.Path) -> dict[str, Any]:
    """An exported row whose images are written below `folder`, each once, and named by their paths in it."""
    if row.get("image"):
        row["image"] = _write_image(row["image"]["bytes"], folder)
    if IMAGES in row:
        row[IMAGES] = [_write_image(image["bytes"], folder) for image in row[IMAGES]]
    return row


def _write_image(data: bytes, folder: pathlib.Path) -> str:
    """The path of the image in `folder`: `images/<two digits>/<sha256>` with the suffix of its format."""
    digest = hashlib.sha256(data).hexdigest()
    suffix = next((suffix for magic, suffix in _SUFFIXES.items() if data.startswith(magic)), ".bin")
    path = f"{IMAGES}/{digest[:2]}/{digest}{suffix}"
    target = folder / path
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
    return path


def _convert_column(column: "pyarrow.Array", kind: "pyarrow.DataType") -> "pyarrow.Array":
    import pyarrow as pa
    import pyarrow.compute as pc

    if kind == _image_type():
        return _wrap_images(column)
    if pa.types.is_list(kind) and kind.value_type == _image_type():
        return pa.ListArray.from_arrays(_offsets(pc.list_value_length(column)), _wrap_images(column.flatten()))
    if pa.types.is_list(kind) and pa.types.is_string(column.type):
        roles = pa.repeat(pa.scalar("assistant"), len(column))
        messages = pa.StructArray.from_arrays([roles, column], names=["role", "content"])
        return pa.ListArray.from_arrays(_offsets(pa.repeat(pa.scalar(1, pa.int32()), len(column))), messages)
    return column.cast(kind)  # a map becomes the list of its entries


def _offsets(lengths: "pyarrow.Array") -> "pyarrow.Array":
    """Where each list begins, and where the last one ends."""
    import pyarrow as pa
    import pyarrow.compute as pc

    return pa.concat_arrays([pa.array([0], pa.int32()), pc.cumulative_sum(lengths).cast(pa.int32())])


def _wrap_images(column: "pyarrow.Array") -> "pyarrow.Array":
    """Encoded images as structs of `bytes` and `path`."""
    import pyarrow as pa

    paths = pa.nulls(len(column), pa.string())
    return pa.StructArray.from_arrays([column, paths], fields=list(_image_type()), mask=column.is_null())


def _image_type() -> "pyarrow.StructType":
    import pyarrow as pa

    return pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def _describe_feature(kind: "pyarrow.DataType") -> Any:
    """A type in the words of `datasets.Features`."""
    import pyarrow as pa

    if kind == _image_type():
        return {"_type": "Image"}
    if pa.types.is_list(kind):
        return {"feature": _describe_feature(kind.value_type), "_type": "List"}
    if pa.types.is_struct(kind):
        return {field.name: _describe_feature(field.type) for field in kind}
    return {"dtype": str(kind), "_type": "Value"}
