"""Images with a table: a CSV beside image files, or an .npz in MedMNIST's layout, in a folder or in S3.

Goes in: `path` and the name of a table below it; images are PNG, JPEG or DICOM. Comes out: rows with a PNG that holds
pixels only and, where the table has nucleus statistics or a description, a text for the teacher. A description that
names the row's label is refused. Knows nothing of splits but what a column says.
"""

import functools
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from mint_lib.case_rows import ImageLimits, LeftOut, Row, read_picture
from mint_lib.data import DataSource
from mint_lib.errors import InvalidInput
from mint_lib.histology.image_rows import ImageRow, read_csv, read_npz
from mint_lib.histology.nuclei import Wording, describe_nuclei
from mint_lib.histology.nucleus_columns import NucleusColumns, read_statistics
from mint_lib.histology.tile_files import TileFiles, clean_image, read_header
from mint_lib.progress import track_progress
from mint_lib.records import Label, Split

if TYPE_CHECKING:
    import numpy as np

_LIMITS = ImageLimits(max_pixels=2**26, max_bytes=2**26)  # the stage's own, lower ones apply to what these let through


class TableColumns(BaseModel):
    """Names of the columns of a CSV. An .npz has `image`, `label` and `split`, and no patients."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    image: str = "image"
    """PNG, JPEG or DICOM file of the image, relative to `path`; its name is the case's id."""
    patient: str | None = "patient"
    """Patient. None: not known, which only assigned splits or data.split_by: image allow."""
    label: str = "label"
    """Value that `labels` are made from."""
    split: str | None = None
    """Split, as `splits` maps it. None: the stage splits."""
    label_family: str | None = None
    """Group of labels that are easily confused."""
    description: str | None = None
    """What the teacher reads about the image; must not name the label."""


class TableLabel(BaseModel):
    """One answer, and the value of the label column that stands for it."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    name: str = Field(min_length=1)
    """The name that students answer with."""
    id: str | None = None
    """None: made from the name."""
    value: str | None = None
    """What the label column holds. None: the name."""
    synonyms: tuple[str, ...] = ()
    """Other names."""
    family: str | None = None
    """Group of labels that are easily confused."""


class ImageTable(DataSource):
    """Cases from a table of images."""

    class Config(BaseModel):
        """Where the table lies and what its columns mean."""

        model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

        path: str = Field(min_length=1)
        """Folder on this machine, or s3://bucket/prefix."""
        table: str = Field(pattern=r"(?i)\.(csv|npz)$")
        """Name of the .csv or .npz, relative to `path`."""
        columns: TableColumns = TableColumns()
        """Names of the columns."""
        attributes: dict[str, str] = {}
        """Attribute of a case to the column that holds it, for instance site: hospital."""
        where: dict[str, str] = {}
        """Columns and the value that each must have."""
        labels: tuple[TableLabel, ...] = ()
        """The label set; rows of other labels are not wanted. Empty: every value of the label column."""
        splits: dict[str, Split | None] = {}
        """Value of the split column to the split; None leaves its rows to the stage. An .npz: which splits are read."""
        nuclei: NucleusColumns | None = None
        """Columns with nucleus statistics, from which the teacher's text is made."""
        wording: Wording = "words_and_figures"
        """How nucleus statistics are worded."""
        size_pixels: int | None = Field(default=None, ge=8, le=4096)
        """Side of the square that images are brought to. None: as they are."""

        @model_validator(mode="after")
        def _fits_together(self) -> Self:
            is_npz = self.table.lower().endswith(".npz")
            if is_npz and not self.splits:
                raise ValueError("an .npz needs splits, for instance {train: null, val: test}")
            if self.nuclei is not None and self.columns.description is not None:
                raise ValueError("give nuclei or columns.description, not both")
            return self

    config: Config
    describes_images = True

    def labels(self) -> list[Label]:
        """The label set of the config, else the values of the label column in their order."""
        return list(self.wanted) if self.wanted is not None else [label for _, label in self._labels]

    def read(self, rng: "np.random.Generator") -> Iterator[Row | LeftOut]:
        """One row for each image of a wanted label, in the order of the table."""
        labels = dict(self._labels)
        total = sum(1 for _ in self._read_table())
        for row in track_progress(self._read_table(), "data: image table", total=total):
            yield self._make_row(row, labels)

    def digest(self) -> str:
        """Digest of the table and of the images that it names."""
        names = [self.config.table]
        if not self._is_npz:
            names += [row.cells[self.config.columns.image] for row in self._read_table()]
        return self._files.digest(names)

    @property
    def knows_patients(self) -> bool:
        """Whether a column names patients."""
        return not self._is_npz and self.config.columns.patient is not None

    def notes(self) -> tuple[str, ...]:
        """That the images were encoded anew, and what is not known of the patients."""
        notes = ["image_table: images are encoded anew without metadata; their text is for the teacher only."]
        if not self.knows_patients:
            notes.append("image_table: patients are not known, so images of one patient may stand in several splits.")
        return tuple(notes)

    @property
    def _is_npz(self) -> bool:
        return self.config.table.lower().endswith(".npz")

    @functools.cached_property
    def _files(self) -> TileFiles:
        return TileFiles(self.config.path)

    @functools.cached_property
    def _labels(self) -> list[tuple[str, Label]]:
        """Value of the label column and the label that it stands for."""
        config = self.config
        if self.wanted is not None and not config.labels:
            return [(label.name, label) for label in self.wanted]
        if config.labels:
            return [
                (
                    item.value if item.value is not None else item.name,
                    Label(id=item.id or make_id(item.name), name=item.name, synonyms=item.synonyms, family=item.family),
                )
                for item in config.labels
            ]
        family_column = config.columns.label_family
        families: dict[str, str | None] = {}
        for row in self._read_table():
            value = row.cells["label" if self._is_npz else config.columns.label]
            if value.strip() and self._find_unwanted(row) is None:
                families.setdefault(value, (row.cells[family_column] or None) if family_column else None)
        return [(value, Label(id=make_id(value), name=value, family=families[value])) for value in sorted(families)]

    def _read_table(self) -> Iterator[ImageRow]:
        config = self.config
        if self._is_npz:
            return read_npz(self._files, config.table, splits=tuple(config.splits))
        needed = {f"columns.{key}": name for key, name in config.columns.model_dump().items() if name is not None}
        needed |= {f"attributes.{key}": name for key, name in config.attributes.items()}
        needed |= {f"where.{name}": name for name in config.where}
        needed |= {} if config.nuclei is None else {f"nuclei.{key}": name for key, name in config.nuclei.list_columns()}
        return read_csv(self._files, config.table, image_column=config.columns.image, needed=needed)

    def _find_unwanted(self, row: ImageRow) -> str | None:
        """Why a row is not wanted, or None."""
        wrong = [name for name, value in self.config.where.items() if row.cells.get(name) != value]
        return f"{wrong[0]} is not {self.config.where[wrong[0]]}" if wrong else None

    def _make_row(self, row: ImageRow, labels: dict[str, Label]) -> Row | LeftOut:
        config, columns = self.config, self.config.columns
        case_id = (row.cells["image"] if self._is_npz else row.cells[columns.image]) or row.place
        cause = self._find_unwanted(row)
        if cause is not None:
            return LeftOut(case_id, cause, refused=False)
        label = labels.get(row.cells["label" if self._is_npz else columns.label])
        if label is None or (self.wanted is not None and label.id not in {item.id for item in self.wanted}):
            return LeftOut(case_id, "label not among the labels", refused=False)
        patient = row.cells[columns.patient or ""] if self.knows_patients else case_id
        split_column = "split" if self._is_npz else columns.split
        value = row.cells[split_column] if split_column is not None else ""
        if split_column is not None and value not in config.splits:
            return LeftOut(case_id, "split not among data.config.splits", refused=True)
        content = row.load()
        if content is None:
            return LeftOut(case_id, "image not found", refused=True)
        image = read_picture(content, _LIMITS)
        if isinstance(image, str):
            return LeftOut(case_id, image, refused=True)
        size, has_8_bits = read_header(image)
        if not has_8_bits:  # brought to 8 bits, it would be clipped to white
            return LeftOut(case_id, "more than 8 bits a channel", refused=True)
        text = row.cells[columns.description] if columns.description is not None else ""
        if config.nuclei is not None:
            statistics = read_statistics(config.nuclei, row.cells, size=size, where=f"{config.table}, {row.place}")
            text = describe_nuclei(statistics, wording=config.wording)
        if any(_names(text, name) for name in (label.name, *label.synonyms)):
            return LeftOut(case_id, "description names the label", refused=True)
        return Row(
            case_id=case_id,
            group_id=patient.strip(),
            source="image_table",
            synthetic=False,
            text=text or None,
            image=clean_image(image, size_pixels=config.size_pixels),
            label_id=label.id,
            attributes={key: row.cells[name] for key, name in config.attributes.items() if row.cells[name]},
            split=config.splits.get(value),
        )


def make_id(name: str) -> str:
    """An id made from a name: lower case, with hyphens. Raises InvalidInput if nothing is left of it."""
    made = re.sub(r"[^a-z0-9]+", "-", name.casefold()).strip("-")
    if not made:
        raise InvalidInput(
            "A label's name has no letter or digit to make an id from. Give data.config.labels with ids."
        )
    return made


def _names(text: str, name: str) -> bool:
    """Whether `text` holds `name` as words of its own."""
    return re.search(rf"(?<!\w){re.escape(name.casefold())}(?!\w)", text.casefold()) is not None
