"""Export: a version of cases or preferences as a folder that others read, with its card and its Croissant file.

Goes in: a reference and the name of a folder that is empty or not there. Comes out: the folder, whole or not at all.
`hf` is Parquet that `datasets.load_dataset(folder)` reads with its splits and with images as images; `jsonl` is one
object per line, with images as files named by their sha256. Pairs have TRL's conversational preference format. Rows
stream, one row group in memory at a time, and every byte read is checked. It does not know what the rows mean.
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import logging
import os
import pathlib
import secrets
import shutil
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

from mint_lib.dataset_card.beside import STORE_PATTERN, render_beside
from mint_lib.dataset_card.description import (
    Description,
    check_kind,
    describe_dataset,
    list_tables,
    read_batches,
    read_file_batches,
)
from mint_lib.dataset_card.figures import CardKind, FigureCounter, SplitFigures
from mint_lib.errors import InvalidInput, StoreError
from mint_lib.exported_rows import convert_batch, export_schema, flat_schema, has_pair_images, move_images_to_files
from mint_lib.records import Reference
from mint_lib.storage.manifest import FileEntry

if TYPE_CHECKING:
    import pyarrow

    from mint_lib.store import Store

logger = logging.getLogger(__name__)
ExportFormat = Literal["hf", "jsonl"]
_PATTERNS: dict[ExportFormat, str] = {"hf": STORE_PATTERN, "jsonl": "{split}.jsonl"}
_SPACE_FACTOR = 1.1
"""Room asked for beside the bytes of the version: indices, card, and pages that compress a little worse."""
_JSON_ROW_BYTES = 512
"""Room asked for beside the values of a row: its keys and quotes."""


@dataclasses.dataclass(slots=True)
class _Progress:
    """What was written so far."""

    files: dict[str, FileEntry] = dataclasses.field(default_factory=dict)
    figures: dict[str, SplitFigures] = dataclasses.field(default_factory=dict)


def export_dataset(
    store: "Store", reference: Reference, folder: pathlib.Path, *, to: ExportFormat, splits: Sequence[str] = ()
) -> Description:
    """Write a version to `folder`; returns the description of what lies there.

    Args:
        store: Where the version lies.
        reference: A version of `cases` or `preferences`.
        folder: The target. It appears under its name when it is complete; until then a hidden folder stands beside it.
        to: `hf` or `jsonl`.
        splits: Only these; none: all.

    Raises:
        InvalidInput: the kind has no export, a split is not in the version, or the target is not empty.
        IntegrityError: a file is not what was committed.
        StoreError: the disk is full, or the folder cannot be written.
    """
    kind = check_kind(reference)
    files = store.files(reference)
    tables = list_tables(files)
    unknown = sorted(set(splits) - set(tables))
    if unknown:
        raise InvalidInput(f"{reference} has no split {', '.join(unknown)}. It has: {', '.join(tables)}.")
    wanted = [split for split in tables if not splits or split in splits]
    paths = [path for split in wanted for path in store.shards(reference, split)]
    with _make_folder(folder, num_bytes=sum(files[path].size for path in paths)) as scratch:
        has_images = kind == "cases" or any(_starts_with_images(store, reference, split) for split in wanted)
        schema = export_schema(kind, has_images=has_images)
        done = _Progress()
        for split in wanted:
            write = _write_parquet_split if to == "hf" else _write_json_split
            write(store, reference, split, kind=kind, schema=schema, scratch=scratch, done=done)
        if "labels.json" in files:
            (scratch / "labels.json").write_bytes(store.read_bytes(reference, "labels.json"))
            done.files["labels.json"] = _describe_file(scratch / "labels.json")
        description = describe_dataset(store, reference, figures=done.figures)
        description = description.model_copy(update={"files": done.files})
        rows = schema if to == "hf" else flat_schema(schema)
        for name, data in render_beside(description, rows, pattern=_PATTERNS[to]).items():
            (scratch / name).write_bytes(data)
    counts = ", ".join(f"{figures.num_rows} {split}" for split, figures in description.splits.items())
    logger.info("exported %s as %s to %s: %s rows", reference, to, folder, counts)
    return description


def _starts_with_images(store: "Store", reference: Reference, split: str) -> bool:
    """Whether the first pairs of a split have images."""
    with contextlib.closing(read_batches(store, reference, split, ["images"])) as batches:
        first = next(batches, None)
        return first is not None and has_pair_images(first)


def _write_parquet_split(
    store: "Store",
    reference: Reference,
    split: str,
    *,
    kind: CardKind,
    schema: "pyarrow.Schema",
    scratch: pathlib.Path,
    done: _Progress,
) -> None:
    """Every shard as a file of the same name."""
    import pyarrow.parquet

    counter = FigureCounter(kind)
    for path in store.shards(reference, split):
        target = scratch / path
        target.parent.mkdir(exist_ok=True)
        with (
            store.fetch_shard(reference, path) as shard,
            pyarrow.parquet.ParquetWriter(target, schema, compression="zstd") as writer,
        ):
            for batch in read_file_batches(shard):
                counter.add(batch)
                writer.write_batch(convert_batch(batch, schema), row_group_size=max(1, batch.num_rows))
        done.files[path] = _describe_file(target)
    done.figures[split] = counter.figures()


def _write_json_split(
    store: "Store",
    reference: Reference,
    split: str,
    *,
    kind: CardKind,
    schema: "pyarrow.Schema",
    scratch: pathlib.Path,
    done: _Progress,
) -> None:
    """All shards as one file of lines; images as files beside it, each once."""
    import pyarrow.parquet

    counter = FigureCounter(kind)
    target = scratch / f"{split}.jsonl"
    with target.open("w", encoding="utf-8") as file:
        for path in store.shards(reference, split):
            with store.fetch_shard(reference, path) as shard:
                metadata = pyarrow.parquet.read_metadata(shard)
                groups = [metadata.row_group(number).total_byte_size for number in range(metadata.num_row_groups)]
                _check_space(scratch, sum(groups) + _JSON_ROW_BYTES * metadata.num_rows)
                for batch in read_file_batches(shard):
                    counter.add(batch)
                    for row in convert_batch(batch, schema).to_pylist():
                        line = json.dumps(move_images_to_files(row, scratch), ensure_ascii=False)
                        file.write(line + "\n")
    done.files[target.name] = _describe_file(target)
    done.figures[split] = counter.figures()


@contextlib.contextmanager
def _make_folder(folder: pathlib.Path, *, num_bytes: int) -> Iterator[pathlib.Path]:
    """A hidden folder that takes the name `folder` at the end, or is removed."""
    folder = folder.absolute()
    if folder.is_symlink() or (folder.exists() and (not folder.is_dir() or any(folder.iterdir()))):
        raise InvalidInput(f"{folder} is there and not an empty folder. Give --out a name that does not exist yet.")
    scratch = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.part")
    try:
        scratch.mkdir(parents=True)
        _check_space(scratch, round(num_bytes * _SPACE_FACTOR))
        yield scratch
        os.replace(scratch, folder)
    except OSError as error:
        if isinstance(error, StoreError):
            raise
        reason = "the disk is full" if error.errno == errno.ENOSPC else error.strerror or str(error)
        raise StoreError(
            f"{folder} cannot be written: {reason}. Nothing was left there; free space, or give --out another place."
        ) from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _check_space(folder: pathlib.Path, num_bytes: int) -> None:
    """Raise StoreError if the disk lacks room for `num_bytes`, before it is full."""
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise StoreError(
            f"{folder.parent} has {free / 2**20:.0f} MiB free and the export needs about {num_bytes / 2**20:.0f} MiB "
            "more. Free space, export fewer splits, or give --out another place."
        )


def _describe_file(path: pathlib.Path) -> FileEntry:
    with path.open("rb") as file:
        sha256: Any = hashlib.file_digest(file, "sha256")
    return FileEntry(size=path.stat().st_size, sha256=sha256.hexdigest())
