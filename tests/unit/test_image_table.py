"""Tables of images become cases without metadata; what is not one is counted by cause."""

import io
import pathlib
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from pydantic import ValidationError

from mint_lib.case_rows import LeftOut, Row
from mint_lib.data import DataConfig, digest_sources, prepare_cases
from mint_lib.data_sources.image_table import ImageTable
from mint_lib.errors import InvalidInput, RefusedData
from mint_lib.records import SPLITS, Case, Label
from mint_lib.storage.client import S3
from mint_lib.storage.settings import S3Settings
from mint_lib.store import Store

IMAGES = pathlib.Path(__file__).parents[2].parent / "shared" / "data" / "images"
MONUSEG: dict[str, Any] = {
    "path": str(IMAGES / "monuseg_tissue"),
    "table": "public.csv",
    "columns": {"image": "file", "patient": "patient", "label": "tissue"},
    "where": {"split": "public"},
    "nuclei": {
        "count": "n_nuclei",
        "area": "mean_area",
        "area_deviation": "sd_area",
        "eccentricity": "mean_ecc",
        "solidity": "mean_solidity",
        "nuclear_fraction": "nuc_frac",
    },
}


def encode(color: int = 90, size: tuple[int, int] = (8, 8), image_format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (color, 2 * color % 256, 30)).save(buffer, image_format, **options)
    return buffer.getvalue()


def write(folder: pathlib.Path, lines: list[str], images: dict[str, bytes] | None = None) -> pathlib.Path:
    (folder / "table.csv").write_text("\n".join(["image,patient,label,site,note,n", *lines]) + "\n")
    for name, content in (images or {}).items():
        (folder / name).write_bytes(content)
    return folder


def open_source(path: pathlib.Path | str, wanted: tuple[Label, ...] | None = None, **config: Any) -> ImageTable:
    return ImageTable(
        ImageTable.Config.model_validate({"path": str(path), "table": "table.csv"} | config), wanted=wanted
    )


def read(source: ImageTable) -> tuple[list[Row], list[str]]:
    rows = list(source.read(np.random.default_rng(0)))
    return [row for row in rows if isinstance(row, Row)], [row.cause for row in rows if isinstance(row, LeftOut)]


def decode(data: bytes | None) -> Image.Image:
    return Image.open(io.BytesIO(data or b""))


def test_read_csv_gives_image_patient_label_and_attributes(tmp_path: pathlib.Path) -> None:
    write(tmp_path, ["a.png,p1,Head & Neck,north,many nuclei,3", "b.jpg,p2,Colon,,,"], {"a.png": encode()})
    (tmp_path / "b.jpg").write_bytes(encode(image_format="JPEG"))
    source = open_source(tmp_path, attributes={"site": "site"}, columns={"description": "note"})
    assert [(label.id, label.name) for label in source.labels()] == [("colon", "Colon"), ("head-neck", "Head & Neck")]
    (first, second), causes = read(source)
    assert (first.case_id, first.group_id, first.label_id, first.text) == ("a.png", "p1", "head-neck", "many nuclei")
    assert (first.attributes, second.attributes, second.text) == ({"site": "north"}, {}, None)
    assert decode(second.image).format == "PNG"
    assert not causes


def test_read_images_lose_every_metadata_and_keep_their_pixels(tmp_path: pathlib.Path) -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("Patient", "Jane Roe")
    exif = Image.Exif()
    exif[0x010E] = "Jane Roe"
    images = {
        "a.png": encode(pnginfo=text, exif=exif, icc_profile=b"Jane Roe"),
        "b.jpg": encode(image_format="JPEG", exif=exif, comment=b"Jane Roe", quality=95),
    }
    assert all(b"Jane Roe" in content for content in images.values())
    write(tmp_path, ["a.png,p1,x,,,", "b.jpg,p2,y,,,"], images)
    rows, _ = read(open_source(tmp_path))
    for row in rows:
        image = decode(row.image)
        image.load()
        assert b"Jane Roe" not in (row.image or b"")
        assert (dict(image.getexif()), image.info) == ({}, {})
        assert (np.asarray(image) == np.asarray(decode(images[row.case_id]))).all()


def test_read_rotated_photo_stands_upright_after_its_orientation_is_gone(tmp_path: pathlib.Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    write(tmp_path, ["a.jpg,p,x,,,"], {"a.jpg": encode(size=(8, 4), image_format="JPEG", exif=exif)})
    (row,), _ = read(open_source(tmp_path))
    assert decode(row.image).size == (4, 8)


def test_read_size_pixels_averages_areas(tmp_path: pathlib.Path) -> None:
    pixels = np.zeros((16, 16, 3), dtype=np.uint8)
    pixels[::2] = 200
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    write(tmp_path, ["a.png,p,x,,,"], {"a.png": buffer.getvalue()})
    (row,), _ = read(open_source(tmp_path, size_pixels=8))
    assert (np.asarray(decode(row.image)) == 100).all()


def test_read_never_leaves_the_folder(tmp_path: pathlib.Path) -> None:
    (tmp_path / "secret.png").write_bytes(encode())
    inner = tmp_path / "inner"
    inner.mkdir()
    names = [
        "../secret.png",
        str(tmp_path / "secret.png"),
        "link.png",
        "a/../../secret.png",
        "missing.png",
        "circle.png",
        "n" * 300,
        "",
    ]
    (inner / "link.png").symlink_to(tmp_path / "secret.png")
    (inner / "circle.png").symlink_to(inner / "circle.png")
    write(inner, [f"{name},p,x,,," for name in names])
    rows, causes = read(open_source(inner))
    assert rows == []
    assert causes == ["image not found"] * len(names)


def test_read_bad_rows_are_refused_by_cause(tmp_path: pathlib.Path) -> None:
    deep = io.BytesIO()
    Image.fromarray(np.full((4, 4), 40_000, dtype=np.uint16)).save(deep, "PNG")
    images = {"torn.png": encode()[:-14], "text.png": b"hello", "deep.png": deep.getvalue(), "a.png": encode()}
    lines = ["torn.png,p,x,,,", "text.png,p,x,,,", "deep.png,p,x,,,", "a.png,p,Liver,,a LIVER tile,"]
    rows, causes = read(open_source(write(tmp_path, lines, images), columns={"description": "note"}))
    assert rows == []
    assert causes == ["corrupt image", "corrupt image", "more than 8 bits a channel", "description names the label"]


def test_read_labels_of_the_config_choose_name_and_leave_others_out(tmp_path: pathlib.Path) -> None:
    write(tmp_path, ["a.png,p,LUAD,,,", "b.png,q,COAD,,,"], {"a.png": encode(), "b.png": encode(91)})
    labels = [{"name": "lung", "value": "LUAD", "synonyms": ["pulmonary"], "family": "chest"}]
    source = open_source(tmp_path, labels=labels)
    assert source.labels() == [Label(id="lung", name="lung", synonyms=("pulmonary",), family="chest")]
    rows, causes = read(source)
    assert [row.label_id for row in rows] == ["lung"]
    assert causes == ["label not among the labels"]


def test_read_as_test_source_gives_the_wanted_labels_only(tmp_path: pathlib.Path) -> None:
    write(tmp_path, ["a.png,p,x,,,", "b.png,q,y,,,"], {"a.png": encode(), "b.png": encode(91)})
    rows, causes = read(open_source(tmp_path, wanted=(Label(id="T:1", name="y"),)))
    assert [row.label_id for row in rows] == ["T:1"]
    assert causes == ["label not among the labels"]


def test_read_label_family_and_split_columns(tmp_path: pathlib.Path) -> None:
    write(tmp_path, ["a.png,p,x,north,fam,1", "b.png,q,y,south,fam,2"], {"a.png": encode(), "b.png": encode(91)})
    source = open_source(
        tmp_path, columns={"label_family": "note", "split": "site"}, splits={"north": "train", "south": None}
    )
    assert {label.family for label in source.labels()} == {"fam"}
    assert [row.split for row in read(source)[0]] == ["train", None]
    narrow = open_source(tmp_path, columns={"split": "site"}, splits={"north": "train"})
    assert read(narrow)[1] == ["split not among data.config.splits"]


@pytest.mark.parametrize(
    ("content", "changes", "message"),
    [
        ("image,label\na.png,x\n", {}, r"no column 'patient' \(data\.config\.columns\.patient\)"),
        ("image,patient,label\na.png,secret\n", {}, r"table\.csv, row 2: 2 cells where the first row names 3"),
        ("image,patient,label,label\n", {}, "label stands twice"),
        ('image,patient,label\na.png,"secret,x\n', {}, "not a CSV"),
        ("image,patient,label,n\na.png,p,x,secret\n", {"nuclei": {"count": "n"}}, "row 2, column 'n'"),
    ],
)
def test_read_broken_table_is_named_without_its_content(
    tmp_path: pathlib.Path, content: str, changes: dict[str, Any], message: str
) -> None:
    (tmp_path / "table.csv").write_text(content)
    (tmp_path / "a.png").write_bytes(encode())
    with pytest.raises(InvalidInput, match=message) as caught:
        read(open_source(tmp_path, **changes))
    assert "secret" not in str(caught.value)


def test_read_missing_table_and_other_encoding_are_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(InvalidInput, match=r"there is no 'table\.csv'"):
        read(open_source(tmp_path))
    (tmp_path / "table.csv").write_bytes("image,patient,label\nä,p,x\n".encode("latin-1"))
    with pytest.raises(InvalidInput, match="not UTF-8"):
        read(open_source(tmp_path))


def write_npz(folder: pathlib.Path, **arrays: Any) -> pathlib.Path:
    rng = np.random.default_rng(0)
    known = {
        f"{split}_{what}": rng.integers(0, 256, (12, 9, 9)).astype(np.uint8)
        if what == "images"
        else np.arange(12).reshape(-1, 1) % 2
        for split in ("train", "val")
        for what in ("images", "labels")
    }
    np.savez(folder / "set.npz", **known | arrays)
    return folder


NPZ: dict[str, Any] = {
    "table": "set.npz",
    "splits": {"train": None, "val": "test"},
    "labels": [{"name": "normal", "value": "0"}, {"name": "pneumonia", "value": "1"}],
}


def test_read_npz_in_medmnists_layout(tmp_path: pathlib.Path) -> None:
    rows, causes = read(open_source(write_npz(tmp_path), **NPZ))
    assert not causes
    assert [(row.case_id, row.label_id, row.split) for row in rows[11:13]] == [
        ("train-000011", "pneumonia", None),
        ("val-000000", "normal", "test"),
    ]
    stored = np.load(tmp_path / "set.npz")["train_images"][3]
    assert (np.asarray(decode(rows[3].image))[..., 1] == stored).all()


@pytest.mark.parametrize(
    ("arrays", "changes", "message"),
    [
        ({}, {"splits": {"dev": "test"}}, "has no dev_images and dev_labels"),
        ({"val_images": np.zeros((12, 9, 9))}, {}, "val_images is float64"),
        ({"val_labels": np.zeros(3, dtype=int)}, {}, "with 3 labels"),
        ({"val_labels": np.array([{}] * 12, dtype=object)}, {}, "pickled"),
    ],
)
def test_read_npz_of_another_layout_is_refused(
    tmp_path: pathlib.Path, arrays: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidInput, match=message):
        read(open_source(write_npz(tmp_path, **arrays), **NPZ | changes))


def test_config_npz_without_splits_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"an \.npz needs splits"):
        ImageTable.Config(path="x", table="set.npz")


def test_prepare_cases_unknown_patients_need_split_by_image(tmp_path: pathlib.Path, store: Store) -> None:
    values: dict[str, Any] = {"name": "n", "seed": 1, "source": "image_table"}
    values["config"] = {"path": str(write_npz(tmp_path))} | NPZ
    with pytest.raises(RefusedData, match=r"12 of 24 cases cannot be split by patient.*split_by: image"):
        prepare_cases(DataConfig.model_validate(values), store=store)
    values["split_by"] = "image"
    reference = prepare_cases(DataConfig.model_validate(values), store=store)
    assert (
        "LEAK: split by image (data.split_by), not by patient: the patients are not known"
        in (store.record(reference).notes[0])
    )


def test_prepare_cases_of_dicom_files_keep_the_picture_and_nothing_of_the_header(
    tmp_path: pathlib.Path, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("pydicom")
    from dicom_files import CANARY, write_dicom

    rng = np.random.default_rng(0)
    pictures = {f"{number}.dcm": rng.integers(0, 256, (24, 20)).astype(np.uint8) for number in range(24)}
    for pixels in pictures.values():
        pixels[0, :2] = 0, 255  # the whole range, so that stretching to 8 bits changes nothing
    files = {name: write_dicom(pixels) for name, pixels in pictures.items()}
    assert all(content.count(CANARY.encode()) > 3 for content in files.values())
    lines = [f"{name},p{index},{'xy'[index % 2]},,," for index, name in enumerate(files)]
    values = {"name": "dicom", "seed": 1, "source": "image_table", "gate": {"label_flips": None}}
    values["config"] = {"path": str(write(tmp_path, lines, files)), "table": "table.csv"}
    with caplog.at_level(0):
        reference = prepare_cases(DataConfig.model_validate(values), store=store)
    cases = [case for split in SPLITS for case in store.iterate_rows(reference, split, Case)]
    assert len(cases) == 24
    for case in cases:
        image = decode(case.image)
        assert (image.format, image.info) == ("PNG", {})
        assert (np.asarray(image)[..., 1] == pictures[case.case_id]).all()
    found = [case.image or b"" for case in cases] + [case.model_dump_json(exclude={"image"}).encode() for case in cases]
    found += [store.read_bytes(reference, path) for path in store.files(reference)] + [caplog.text.encode()]
    assert not any(word in content for word in CANARY.encode().split() for content in found)


def test_read_dicom_that_may_be_written_on_is_refused_with_its_cause(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("pydicom")
    from dicom_files import write_dicom

    files = {"us.dcm": write_dicom(Modality="US"), "torn.dcm": write_dicom()[:900]}
    rows, causes = read(open_source(write(tmp_path, ["us.dcm,p,x,,,", "torn.dcm,q,y,,,"], files)))
    assert rows == []
    assert causes == ["DICOM: burned-in annotation", "DICOM: corrupt image"]


def test_read_s3_prefix_gives_what_a_folder_gives(tmp_path: pathlib.Path, s3_environment: dict[str, str]) -> None:
    s3 = S3(S3Settings.from_environment())
    write(tmp_path, ["a.png,p,x,,,", "b.png,q,y,,,"], {"a.png": encode(), "b.png": encode(91)})
    for name in ("table.csv", "a.png", "b.png"):
        s3.put(f"tiles/site-1/{name}", (tmp_path / name).read_bytes())
    remote = open_source(f"s3://{s3.settings.bucket}/tiles/site-1")
    assert read(remote) == read(open_source(tmp_path))
    assert remote.digest() == open_source(tmp_path).digest()


def test_digest_follows_table_and_images(tmp_path: pathlib.Path) -> None:
    write(tmp_path, ["a.png,p,x,,,"], {"a.png": encode()})
    config = DataConfig.model_validate(
        {"name": "n", "seed": 1, "source": "image_table", "config": {"path": str(tmp_path), "table": "table.csv"}}
    )
    digests = {digest_sources(config)}
    (tmp_path / "a.png").write_bytes(encode(91))
    digests.add(digest_sources(config))
    write(tmp_path, ["a.png,p,y,,,"])
    digests.add(digest_sources(config))
    assert len(digests) == 3


@pytest.mark.skipif(not IMAGES.exists(), reason="needs the development images beside the checkout")
def test_prepare_cases_monuseg_is_split_by_patient_with_descriptions(store: Store) -> None:
    config = {"name": "m", "seed": 3, "source": "image_table", "config": MONUSEG | {"size_pixels": 128}}
    config |= {"split": {"train": 0.6, "validation": 0.2, "test": 0.2}}
    reference = prepare_cases(DataConfig.model_validate(config), store=store)
    splits = {split: store.read_rows(reference, split, Case) for split in SPLITS}
    cases = [case for split in SPLITS for case in splits[split]]
    assert (len(cases), len({case.group_id for case in cases})) == (384, 24)
    patients = [{case.group_id for case in splits[split]} for split in SPLITS]
    assert not patients[0] & patients[1] | patients[0] & patients[2] | patients[1] & patients[2]
    assert {case.label_id for case in cases} == {"bladder", "breast", "colon", "kidney", "lung", "prostate"}
    assert all("nuclei/mm2" in (case.text or "") and case.label_id not in (case.text or "") for case in cases)
    assert {decode(case.image).size for case in cases[:5]} == {(128, 128)}


@pytest.mark.skipif(not IMAGES.exists(), reason="needs the development images beside the checkout")
def test_read_pneumoniamnist_loads() -> None:
    config = NPZ | {"table": "pneumoniamnist_train_val.npz", "splits": {"val": "test"}}
    rows, causes = read(open_source(IMAGES / "pneumoniamnist", **config))
    assert (len(rows), causes) == (524, [])
    assert {row.split for row in rows} == {"test"}
