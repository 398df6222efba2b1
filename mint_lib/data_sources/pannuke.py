"""PanNuke: tiles of nuclei from 19 tissues with masks, in the three folds of its publication.

Goes in: a folder with `images.npy`, `masks.npy` and `types.npy` for each fold. Comes out: rows with a PNG and, from the
masks, a description of the nuclei for the teacher. The arrays are memory-mapped and read one tile at a time. PanNuke
publishes no patient ids, so that its folds serve as splits. Knows nothing else of splits.
Layout (Gamper et al. 2020, arXiv:2003.10778): images N x 256 x 256 x 3 and masks N x 256 x 256 x 6 as float64 or uint8,
instance ids in a mask channel for each of five kinds of cells, then the background; types N names of tissues.
"""

import functools
import hashlib
import pathlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from mint_lib.case_rows import LeftOut, Row
from mint_lib.data import DataSource
from mint_lib.errors import InvalidInput
from mint_lib.histology.nuclei import Wording, describe_nuclei, measure_nuclei
from mint_lib.histology.tile_files import encode_image
from mint_lib.progress import Progress
from mint_lib.records import SPLITS, Label, Split

if TYPE_CHECKING:
    import numpy as np

# Names of MINT's label set, in its order; `types.npy` writes some in other ways.
TISSUES = (
    *("Adrenal Glands", "Bile Duct", "Bladder", "Breast", "Cervix", "Colon", "Esophagus", "Head & Neck", "Kidney"),
    *("Liver", "Lung", "Ovarian", "Pancreatic", "Prostate", "Skin", "Stomach", "Testis", "Thyroid", "Uterus"),
)
_CELLS = ("neoplastic", "inflammatory", "connective", "dead", "epithelial")
_MICRONS_PER_PIXEL = 0.25  # 40x


class PanNuke(DataSource):
    """Tiles of the three folds."""

    class Config(BaseModel):
        """Where the folds lie and which split each one is."""

        model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

        path: pathlib.Path
        """Folder that holds the folds."""
        folds: tuple[str, str, str] = ("fold1", "fold2", "fold3")
        """Folder of each fold, relative to `path`: three arrays somewhere below it."""
        splits: tuple[Split, Split, Split] | None = ("train", "validation", "test")
        """Split of each fold. None: the stage deals the tiles, which needs data.split_by: image."""
        tissues: tuple[str, ...] = Field(default=TISSUES, min_length=2)
        """Tissues wanted, by their names in the label set."""
        size_pixels: int | None = Field(default=None, ge=8, le=4096)
        """Side of the square that tiles are brought to. None: 256."""
        wording: Wording = "words_and_figures"
        """How nucleus statistics are worded."""

        @model_validator(mode="after")
        def _is_known(self) -> Self:
            unknown = [name for name in self.tissues if name not in TISSUES]
            if unknown or len(set(self.tissues)) != len(self.tissues):
                raise ValueError(f"tissues must be different ones of {', '.join(TISSUES)}")
            if self.splits is not None and set(self.splits) != set(SPLITS):
                raise ValueError("splits must name train, validation and test, once each")
            return self

    config: Config
    describes_images = True

    def labels(self) -> list[Label]:
        """The tissues wanted; an id is `PANNUKE:` and the number in MINT's label set."""
        if self.wanted is not None:
            return list(self.wanted)
        return [_make_label(name) for name in TISSUES if name in self.config.tissues]

    def read(self, rng: "np.random.Generator") -> Iterator[Row | LeftOut]:
        """Every tile of the folds, in their order."""
        wanted = {label.id for label in self.labels()}
        ids = {_fold_name(name): _make_label(name).id for name in TISSUES}
        seen: set[bytes] = set()
        folds = [self._open_fold(fold) for fold in self.config.folds]
        with Progress("data: PanNuke", total=sum(len(types) for _, _, types in folds)) as progress:
            for number, (images, masks, types) in enumerate(folds):
                split = self.config.splits[number] if self.config.splits is not None else None
                for index in range(len(types)):
                    yield self._make_row(
                        f"fold{number + 1}-{index:05d}", images, masks, index, ids.get(_fold_name(types[index])),
                        wanted, seen, split,
                    )  # fmt: skip
                    progress.advance()

    def digest(self) -> str:
        """Digest of the nine files."""
        hasher = hashlib.sha256()
        for fold in self.config.folds:
            for name in ("images", "masks", "types"):
                with self._find_file(fold, name).open("rb") as file:
                    hasher.update(hashlib.file_digest(file, "sha256").digest())
        return f"sha256:{hasher.hexdigest()}"

    @property
    def knows_patients(self) -> bool:
        """PanNuke publishes none."""
        return False

    def notes(self) -> tuple[str, ...]:
        """What the splits are worth."""
        return (
            "pannuke: the data set publishes no patient ids, so each tile counts as its own patient, and intervals are "
            "too narrow."
            + (
                f" Its published folds are the splits ({', '.join(self.config.splits)}); whether a patient stands in "
                "several is not known."
                if self.config.splits is not None
                else ""
            ),
            "pannuke: images and masks are licensed CC BY-NC-SA 4.0; masks were made half automatically.",
        )

    def _find_file(self, fold: str, name: str) -> pathlib.Path:
        """The one file `<name>.npy` below a fold's folder; the published archives nest it, in ways that differ."""
        found = sorted((self.config.path / fold).rglob(f"{name}.npy"))
        if len(found) != 1:
            raise InvalidInput(
                f"data.config.path: {len(found)} files {name}.npy below {str(self.config.path / fold)!r}, and one is "
                "wanted. Unpack each fold of PanNuke into a folder of its own and name these in data.config.folds."
            )
        return found[0]

    def _open_fold(self, fold: str) -> "tuple[np.ndarray, np.ndarray, np.ndarray]":
        """Images and masks, memory-mapped, and types."""
        import numpy as np

        arrays = []
        for name in ("images", "masks", "types"):
            file = self._find_file(fold, name)
            try:
                arrays.append(np.load(file, mmap_mode="r", allow_pickle=False))
            except (ValueError, OSError):
                raise InvalidInput(
                    f"{fold}: {name}.npy is not a plain array (pickled objects are not read). Save it again with "
                    "numpy.save(..., allow_pickle=False)."
                ) from None
        images, masks, types = arrays
        if (
            (images.ndim, masks.ndim, types.ndim) != (4, 4, 1)
            or (images.shape[3], masks.shape[3]) != (3, 1 + len(_CELLS))
            or images.shape[:3] != masks.shape[:3]
            or len(types) != len(images)
            or types.dtype.kind != "U"
        ):
            raise InvalidInput(
                f"{fold}: images {images.shape}, masks {masks.shape} and types {types.shape} ({types.dtype}) are not "
                "N x height x width x 3, N x height x width x 6 and N names."
            )
        return images, masks, types

    def _make_row(
        self,
        case_id: str,
        images: "np.ndarray",
        masks: "np.ndarray",
        index: int,
        label_id: str | None,
        wanted: set[str],
        seen: set[bytes],
        split: Split | None,
    ) -> Row | LeftOut:
        import numpy as np
        from PIL import Image

        if label_id is None:
            return LeftOut(case_id, "unknown tissue", refused=True)
        if label_id not in wanted:
            return LeftOut(case_id, "tissue not wanted", refused=False)
        pixels_HWC = np.asarray(images[index])
        if not np.isfinite(pixels_HWC).all() or pixels_HWC.min() < 0 or pixels_HWC.max() > 255:
            return LeftOut(case_id, "pixels outside 0 to 255", refused=True)
        pixels_HWC = np.ascontiguousarray(pixels_HWC, dtype=np.uint8)
        content = hashlib.sha256(pixels_HWC.tobytes()).digest()
        if content in seen:
            return LeftOut(case_id, "identical to an earlier tile", refused=False)
        seen.add(content)
        return Row(
            case_id=case_id,
            group_id=case_id,
            source="pannuke",
            synthetic=False,
            text=describe_mask(np.asarray(masks[index]), wording=self.config.wording) or None,
            image=encode_image(Image.fromarray(pixels_HWC), size_pixels=self.config.size_pixels),
            label_id=label_id,
            split=split,
        )


def describe_mask(mask_HWC: "np.ndarray", *, wording: Wording) -> str:
    """The sentence about a tile's nuclei that its mask allows: statistics, and shares of the five kinds of cells."""
    import numpy as np

    cells_HWC = mask_HWC[..., : len(_CELLS)].astype(np.int64)
    counts = [len(np.unique(cells_HWC[..., kind][cells_HWC[..., kind] > 0])) for kind in range(len(_CELLS))]
    kind_HW = cells_HWC.argmax(axis=-1)
    # Ids are unique within a channel; together with the channel's number they are so in the tile.
    instances_HW = np.where(cells_HWC.max(axis=-1) > 0, cells_HWC.max(axis=-1) * len(_CELLS) + kind_HW, 0)
    statistics = measure_nuclei(instances_HW, microns_per_pixel=_MICRONS_PER_PIXEL)
    total = max(1, sum(counts))
    shares = tuple((name, count / total) for name, count in zip(_CELLS, counts, strict=True))
    return describe_nuclei(statistics._replace(cell_shares=shares), wording=wording)


@functools.cache
def _make_label(name: str) -> Label:
    return Label(id=f"PANNUKE:{TISSUES.index(name)}", name=name)


def _fold_name(name: object) -> str:
    """`types.npy` writes "Adrenal_gland", "Bile-duct", "HeadNeck" and the like."""
    letters = "".join(letter for letter in str(name).casefold() if letter.isalpha())
    return letters.rstrip("s")
