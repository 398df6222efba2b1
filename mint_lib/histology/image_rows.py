"""Rows of a table of images: a CSV beside image files, or an .npz in MedMNIST's layout.

Goes in: `TileFiles` and the name of the table. Comes out: one `ImageRow` for each image, with its cells and a function
that gives its encoded bytes: of a CSV, one row and one image are in memory. Knows neither labels nor patients.
MedMNIST's layout: arrays `<split>_images` (images x height x width, or x 3) and `<split>_labels` (images x 1).
"""

import csv
import functools
import io
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from mint_lib.errors import InvalidInput
from mint_lib.histology.tile_files import TileFiles, encode_image

if TYPE_CHECKING:
    import numpy as np


class ImageRow(NamedTuple):
    """One row: where it stands, its cells by column, and its image (None: not found)."""

    place: str
    cells: dict[str, str]
    load: Callable[[], bytes | None]


def read_csv(files: TileFiles, table: str, *, image_column: str, needed: dict[str, str]) -> Iterator[ImageRow]:
    """Rows of a CSV in UTF-8 whose first line names the columns.

    Args:
        files: where table and images lie; images are given relative to it.
        table: name of the CSV.
        image_column: column with the name of the image.
        needed: config key to the column that it names.

    Raises:
        InvalidInput: the table or a column is missing, or a line does not have the columns of the first.
    """
    file = files.open(table)
    if file is None:
        raise InvalidInput(f"data.config.table: there is no {table!r} below {files.path!r}. Name a .csv or .npz there.")
    try:
        with io.TextIOWrapper(file, "utf-8-sig", newline="") as lines:
            reader = csv.reader(lines, strict=True)
            columns = next(reader, [])
            missing = {key: name for key, name in needed.items() if name not in columns}
            if missing:
                named = ", ".join(f"{name!r} (data.config.{key})" for key, name in missing.items())
                raise InvalidInput(f"{table}: there is no column {named}. It has: {', '.join(columns)}.")
            twice = sorted({name for name in columns if columns.count(name) > 1})
            if twice:
                raise InvalidInput(f"{table}: the column {', '.join(twice)} stands twice. Rename one.")
            for number, values in enumerate(reader, start=2):
                if not values:
                    continue
                if len(values) != len(columns):
                    raise InvalidInput(
                        f"{table}, row {number}: {len(values)} cells where the first row names {len(columns)} columns. "
                        "Quote cells that hold a comma."
                    )
                cells = dict(zip(columns, values, strict=True))
                name = cells[image_column]
                yield ImageRow(f"row {number}", cells, lambda name=name: files.read(name))  # type: ignore[misc]
    except UnicodeDecodeError:
        raise InvalidInput(f"{table} is not UTF-8. Save it as UTF-8.") from None
    except csv.Error:
        raise InvalidInput(f"{table} is not a CSV: a quoted cell does not end, or a line holds a NUL.") from None


def read_npz(files: TileFiles, table: str, *, splits: tuple[str, ...]) -> Iterator[ImageRow]:
    """Rows of an .npz in MedMNIST's layout; the cells are `image`, `label` and `split`. Pickled arrays are refused.

    Raises:
        InvalidInput: the file or an array is missing, or is not of that layout.
    """
    import numpy as np

    file = files.open(table)
    if file is None:
        raise InvalidInput(f"data.config.table: there is no {table!r} below {files.path!r}. Name a .csv or .npz there.")
    with file:
        try:
            arrays = np.load(file, allow_pickle=False)
        except (ValueError, OSError, zipfile.BadZipFile):
            raise InvalidInput(f"{table} is not an .npz of plain arrays.") from None
        for split in splits:
            missing = [name for name in (f"{split}_images", f"{split}_labels") if name not in arrays.files]
            if missing:
                raise InvalidInput(
                    f"{table} has no {' and '.join(missing)} (data.config.splits). It holds: {', '.join(arrays.files)}."
                )
            labels = _read_array(arrays, f"{split}_labels", table)
            load = functools.cache(functools.partial(_read_images, arrays, split, labels.size, table))
            for index, label in enumerate(labels.reshape(-1)):
                name = f"{split}-{index:06d}"
                cells = {"image": name, "label": str(label), "split": split}
                yield ImageRow(name, cells, lambda load=load, index=index: _encode(load()[index]))  # type: ignore[misc]


def _read_array(arrays: Any, name: str, table: str) -> "np.ndarray":
    try:
        return arrays[name]
    except (ValueError, OSError, zipfile.BadZipFile, zlib.error):
        raise InvalidInput(f"{table}: {name} is damaged, or holds pickled objects, which are not read.") from None


def _read_images(arrays: Any, split: str, num_labels: int, table: str) -> "np.ndarray":
    """The images of a split, all of them: they lie compressed, and cannot be read singly."""
    images = _read_array(arrays, f"{split}_images", table)
    if images.dtype != "uint8" or not (images.ndim == 3 or images.shape[3:] == (3,)) or num_labels != len(images):
        raise InvalidInput(
            f"{table}: {split}_images is {images.dtype} of shape {images.shape} with {num_labels} labels. "
            "Wanted are uint8 images x height x width (x 3), and one label each."
        )
    return images


def _encode(pixels: "np.ndarray") -> bytes:
    from PIL import Image

    return encode_image(Image.fromarray(pixels).convert("RGB"), size_pixels=None)
