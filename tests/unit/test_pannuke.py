"""PanNuke's arrays as they are published become cases; its folds are the splits."""

import pathlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mint_lib.case_rows import LeftOut, Row
from mint_lib.data import DataConfig, prepare_cases
from mint_lib.data_sources.pannuke import TISSUES, PanNuke
from mint_lib.errors import InvalidInput, RefusedData
from mint_lib.records import SPLITS, Case
from mint_lib.store import Store

PUBLISHED = ("Adrenal_gland", "Bile-duct", "HeadNeck", "Uterus", "Breast", "Ovarian")


def write_folds(folder: pathlib.Path, *, tiles: int = 6, dtype: Any = np.float64, side: int = 32) -> pathlib.Path:
    """Three folds in the published layout, at a smaller size."""
    rng = np.random.default_rng(0)
    for fold in (1, 2, 3):
        inner = folder / f"fold{fold}" / "images" / f"fold{fold}"
        inner.mkdir(parents=True)
        masks = np.zeros((tiles, side, side, 6), dtype=dtype)
        masks[:, 2:10, 2:10, 0] = 1  # neoplastic, 64 pixels
        masks[:, 20:24, 4:8, 0] = 2  # neoplastic, 16 pixels
        masks[:, 12:18, 20:26, 2] = 1  # connective: its id repeats one of another channel
        masks[..., 5] = masks[..., :5].max(axis=-1) == 0
        np.save(inner / "images.npy", rng.integers(0, 256, (tiles, side, side, 3)).astype(dtype))
        np.save(folder / f"fold{fold}" / "masks.npy", masks)
        np.save(inner / "types.npy", np.array([PUBLISHED[n % len(PUBLISHED)] for n in range(tiles)]))
    return folder


def open_source(folder: pathlib.Path, **config: Any) -> PanNuke:
    return PanNuke(PanNuke.Config.model_validate({"path": folder} | config))


def read(source: PanNuke) -> list[Row | LeftOut]:
    return list(source.read(np.random.default_rng(0)))


@pytest.mark.parametrize("dtype", [np.float64, np.uint8])
def test_read_published_arrays_give_pixels_tissue_fold_and_description(tmp_path: pathlib.Path, dtype: Any) -> None:
    import io

    rows = read(open_source(write_folds(tmp_path, dtype=dtype)))
    assert [row.split for row in rows if isinstance(row, Row)] == [split for split in SPLITS for _ in range(6)]
    row = rows[2]
    assert isinstance(row, Row)
    assert row.label_id == "PANNUKE:7"
    assert not row.synthetic
    stored = np.load(tmp_path / "fold1/images/fold1/images.npy")[2]
    assert (np.asarray(Image.open(io.BytesIO(row.image or b""))) == stored).all()
    # Three nuclei of 64, 16 and 36 pixels of 0.0625 square micrometres in 1,024 pixels.
    assert f"({3 / (1024 * 0.0625e-6):.0f} nuclei/mm2)" in (row.text or "")
    assert f"({116 / 3 * 0.0625:.0f} um2)" in (row.text or "")
    assert "67% neoplastic, 33% connective" in (row.text or "")
    assert "11% of the area" in (row.text or "")


def test_labels_are_mints_nineteen_in_order_and_can_be_chosen(tmp_path: pathlib.Path) -> None:
    labels = open_source(tmp_path).labels()
    assert [label.name for label in labels] == list(TISSUES)
    assert (labels[0].id, labels[18].id, len(labels)) == ("PANNUKE:0", "PANNUKE:18", 19)
    source = open_source(write_folds(tmp_path), tissues=["Breast", "Bile Duct"])
    assert [label.name for label in source.labels()] == ["Bile Duct", "Breast"]
    assert len([row for row in read(source) if isinstance(row, Row)]) == 6


def test_read_is_memory_mapped_and_streams(tmp_path: pathlib.Path) -> None:
    images, masks, _ = open_source(write_folds(tmp_path))._open_fold("fold1")
    assert isinstance(images, np.memmap)
    assert isinstance(masks, np.memmap)


def test_read_bad_tiles_are_left_out_by_cause(tmp_path: pathlib.Path) -> None:
    write_folds(tmp_path)
    images = np.load(tmp_path / "fold1/images/fold1/images.npy")
    images[0, 0, 0, 0] = 300
    images[1, 0, 0, 0] = np.nan
    np.save(tmp_path / "fold1/images/fold1/images.npy", images)
    second = np.load(tmp_path / "fold2/images/fold2/images.npy")
    second[0] = images[2]
    np.save(tmp_path / "fold2/images/fold2/images.npy", second)
    types = np.load(tmp_path / "fold3/images/fold3/types.npy")
    types[0] = "Moon"
    np.save(tmp_path / "fold3/images/fold3/types.npy", types)
    causes = [(row.cause, row.refused) for row in read(open_source(tmp_path)) if isinstance(row, LeftOut)]
    assert causes == [
        ("pixels outside 0 to 255", True),
        ("pixels outside 0 to 255", True),
        ("identical to an earlier tile", False),
        ("unknown tissue", True),
    ]


def test_read_pickled_or_misshapen_arrays_are_refused(tmp_path: pathlib.Path) -> None:
    write_folds(tmp_path)
    np.save(tmp_path / "fold2/images/fold2/types.npy", np.array(["Breast"] * 5))
    with pytest.raises(InvalidInput, match="fold2: images"):
        read(open_source(tmp_path))
    np.save(tmp_path / "fold1/images/fold1/types.npy", np.array([{}] * 6, dtype=object), allow_pickle=True)
    with pytest.raises(InvalidInput, match="pickled"):
        read(open_source(tmp_path))
    (tmp_path / "fold1/masks.npy").unlink()
    with pytest.raises(InvalidInput, match=r"0 files masks\.npy"):
        read(open_source(tmp_path))


def test_digest_follows_the_files(tmp_path: pathlib.Path) -> None:
    source = open_source(write_folds(tmp_path))
    before = source.digest()
    np.save(tmp_path / "fold3/masks.npy", np.zeros((6, 32, 32, 6)))
    assert source.digest() != before


def test_prepare_cases_random_split_of_pannuke_needs_split_by_image(tmp_path: pathlib.Path, store: Store) -> None:
    write_folds(tmp_path, tiles=24)
    values: dict[str, Any] = {"name": "p", "seed": 1, "source": "pannuke", "config": {"path": str(tmp_path)}}
    values["gate"] = {"label_flips": None}  # the tiles hold noise
    reference = prepare_cases(DataConfig.model_validate(values), store=store)
    assert [len(store.read_rows(reference, split, Case)) for split in SPLITS] == [24, 24, 24]
    assert any("no patient ids" in note for note in store.record(reference).notes)
    assert not any("LEAK" in note for note in store.record(reference).notes)
    values["config"]["splits"] = None
    with pytest.raises(RefusedData, match="split_by: image"):
        prepare_cases(DataConfig.model_validate(values), store=store)
    reference = prepare_cases(DataConfig.model_validate(values | {"split_by": "image"}), store=store)
    assert store.record(reference).notes[0].startswith("LEAK: ")
