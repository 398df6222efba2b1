"""Export to a folder: the rows and images arrive as others read them, whole or not at all."""

import errno
import hashlib
import io
import json
import os
import pathlib
import shutil
from typing import Any

import pyarrow.parquet
import pytest
from mlcroissant import Dataset
from PIL import Image
from tiny_data import LABELS, STATED, case_record, encode_image, make_cases, make_pairs, write_cases, write_preferences
from typer.testing import CliRunner

from mint_lib import export as export_module
from mint_lib.errors import IntegrityError, InvalidInput, StoreError
from mint_lib.export import export_dataset
from mint_lib.exported_rows import export_schema
from mint_lib.records import Case, PreferencePair, Reference
from mint_lib.rows import case_schema, pair_schema
from mint_lib.store import Store
from pipelines import data_commands


def list_files(folder: pathlib.Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_two_shards(store: Store) -> Reference:
    """A version whose train split has two shards."""
    with store.write("cases", "shards") as version:
        version.add_rows("train", make_cases("train", 5), case_schema())
        version.add_rows("train", make_cases("more", 6), case_schema())
        return version.commit(case_record())


def test_exported_folder_is_loaded_by_datasets_with_splits_and_images(store: Store, tmp_path: pathlib.Path):
    import datasets

    reference = write_cases(store, card=STATED)
    export_dataset(store, reference, tmp_path / "out", to="hf")
    loaded = datasets.load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
    assert list(loaded) == ["train", "validation", "test"]
    assert loaded["train"].features["image"] == datasets.Image()
    for split, rows in loaded.items():
        cases = store.read_rows(reference, split, Case)
        assert len(rows) == len(cases)
        for row, case in zip(rows, cases, strict=True):
            assert {entry["key"]: entry["value"] for entry in row.pop("attributes")} == case.attributes
            image = row.pop("image")
            assert (image is None) == (case.image is None)
            if case.image:
                assert image.tobytes() == Image.open(io.BytesIO(case.image)).tobytes()
            assert row == case.model_dump(include=set(row), mode="json")


@pytest.mark.parametrize("kind", ["cases", "preferences"])
def test_schema_spells_the_features_as_datasets_does(kind: Any):
    import datasets

    schema = export_schema(kind, has_images=True)
    features = datasets.Features.from_arrow_schema(schema)
    assert features.arrow_schema.equals(schema)
    assert features["image" if kind == "cases" else "images"] in (datasets.Image(), datasets.List(datasets.Image()))


@pytest.mark.parametrize("with_images", [False, True])
def test_exported_pairs_have_the_conversational_format_of_trl(store: Store, tmp_path: pathlib.Path, with_images: bool):
    from trl.data_utils import is_conversational, maybe_extract_prompt

    export_dataset(store, write_preferences(store, with_images=with_images), tmp_path / "out", to="hf")
    rows = pyarrow.parquet.read_table(tmp_path / "out/train/000000.parquet").to_pylist()
    pairs = list(make_pairs("train", 8, with_images=with_images))
    assert len(rows) == len(pairs)
    for row, pair in zip(rows, pairs, strict=True):
        assert is_conversational(row)
        assert maybe_extract_prompt(row) == row, "the prompt is explicit"
        assert row["prompt"] == [turn.model_dump() for turn in pair.prompt]
        assert row["chosen"] == [{"role": "assistant", "content": pair.chosen}]
        assert row["rejected"] == [{"role": "assistant", "content": pair.rejected}]
        assert [image["bytes"] for image in row.get("images", [])] == list(pair.images)
        assert ("images" in row) == with_images, "TRL takes a set with this column for a vision data set"


def test_exported_lines_name_image_files_each_written_once(store: Store, tmp_path: pathlib.Path):
    reference = write_preferences(store, with_images=True)
    export_dataset(store, reference, tmp_path / "out", to="jsonl")
    rows = read_lines(tmp_path / "out/train.jsonl")
    pairs = store.read_rows(reference, "train", PreferencePair)
    assert [row["images"] for row in rows] == [
        [f"images/{digest[:2]}/{digest}.png" for digest in (hashlib.sha256(image).hexdigest() for image in pair.images)]
        for pair in pairs
    ]
    for row, pair in zip(rows, pairs, strict=True):
        assert (tmp_path / "out" / row["images"][0]).read_bytes() == pair.images[0]
    assert sum(path.startswith("images/") for path in list_files(tmp_path / "out")) == 4


def test_exported_lines_of_cases_hold_text_and_labels(store: Store, tmp_path: pathlib.Path):
    reference = write_cases(store)
    export_dataset(store, reference, tmp_path / "out", to="jsonl", splits=["test"])
    assert [name for name in list_files(tmp_path / "out") if "/" not in name] == [
        "README.md",
        "croissant.json",
        "labels.json",
        "test.jsonl",
    ]
    (first, *_) = read_lines(tmp_path / "out/test.jsonl")
    case = store.read_rows(reference, "test", Case)[0]
    assert (first["text"], first["label_id"]) == (case.text, case.label_id)
    assert read_lines(tmp_path / "out/test.jsonl")[3]["image"] is None
    labels = json.loads((tmp_path / "out/labels.json").read_text())
    assert [label["name"] for label in labels] == [label.name for label in LABELS]


@pytest.mark.parametrize("to", ["hf", "jsonl"])
def test_exported_folder_is_described_by_its_card_and_croissant(store: Store, tmp_path: pathlib.Path, to: Any):
    reference = write_preferences(store, with_images=True, card=STATED)
    folder = tmp_path / "out"
    export_dataset(store, reference, folder, to=to, splits=["validation"])
    dataset = Dataset(jsonld=str(folder / "croissant.json"))
    assert not dataset.metadata.issues.errors
    records = list(dataset.records("validation"))
    assert len(records) == 4
    assert records[0]["validation/chosen"][0]["validation/chosen/role"] == b"assistant"
    if to == "hf":
        assert records[0]["validation/images"][0].size == (16, 16)
    document = json.loads((folder / "croissant.json").read_text())
    for item in document["distribution"]:
        if item["@type"] == "cr:FileObject":
            assert item["sha256"] == hashlib.sha256((folder / item["contentUrl"]).read_bytes()).hexdigest()
    card = (folder / "README.md").read_text()
    assert f"- this version: `{reference}`" in card
    assert "| validation | 4 |" in card
    assert "| train |" not in card


def test_export_keeps_every_shard_and_its_order(store: Store, tmp_path: pathlib.Path):
    reference = write_two_shards(store)
    export_dataset(store, reference, tmp_path / "out", to="hf")
    export_dataset(store, reference, tmp_path / "lines", to="jsonl")
    expected = [case.case_id for case in store.iterate_rows(reference, "train", Case)]
    tables = [pyarrow.parquet.read_table(tmp_path / f"out/train/00000{number}.parquet") for number in (0, 1)]
    assert [case_id for table in tables for case_id in table["case_id"].to_pylist()] == expected
    assert [row["case_id"] for row in read_lines(tmp_path / "lines/train.jsonl")] == expected


def test_export_refuses_a_target_that_holds_something(store: Store, tmp_path: pathlib.Path):
    reference = write_cases(store, sizes=(1, 1, 1))
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("full", "file"):
        with pytest.raises(InvalidInput, match="not an empty folder"):
            export_dataset(store, reference, tmp_path / name, to="hf")
    assert list_files(tmp_path) == ["file", "full/mine.txt"]
    (tmp_path / "empty").mkdir()
    export_dataset(store, reference, tmp_path / "empty", to="hf")
    assert (tmp_path / "empty/train/000000.parquet").is_file()


def test_export_of_a_damaged_shard_leaves_nothing(store: Store, tmp_path: pathlib.Path):
    reference = write_two_shards(store)
    settings = store.settings
    key = f"{settings.prefix}/cases/shards/v000001/train/000001.parquet"
    data = bytearray(store.read_bytes(reference, "train/000001.parquet"))
    data[len(data) // 2] ^= 1
    store._s3.client.put_object(Bucket=settings.bucket, Key=key, Body=bytes(data))
    for to in ("hf", "jsonl"):
        with pytest.raises(IntegrityError, match=r"train/000001\.parquet is damaged"):
            export_dataset(store, reference, tmp_path / "out", to=to)
        assert list(tmp_path.iterdir()) == []


def test_export_without_room_is_refused_before_it_begins(
    store: Store, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    reference = write_cases(store)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(StoreError, match="MiB free and the export needs about"):
        export_dataset(store, reference, tmp_path / "out", to="hf")
    assert list(tmp_path.iterdir()) == []


def test_export_that_fills_the_disk_leaves_nothing(
    store: Store, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    reference = write_cases(store)

    def fill(path: pathlib.Path) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(export_module, "_describe_file", fill)
    with pytest.raises(StoreError, match="the disk is full"):
        export_dataset(store, reference, tmp_path / "out", to="jsonl")
    assert list(tmp_path.iterdir()) == []


def test_export_of_pairs_of_which_some_have_images_is_refused(store: Store, tmp_path: pathlib.Path):
    with store.write("preferences", "mixed") as version:
        version.add_rows("train", make_pairs("train", 2, with_images=False), pair_schema())
        version.add_rows("train", make_pairs("train", 2, with_images=True), pair_schema())
        reference = version.commit(case_record())
    with pytest.raises(InvalidInput, match="Some pairs have images"):
        export_dataset(store, reference, tmp_path / "out", to="hf")
    assert list(tmp_path.iterdir()) == []


def test_export_of_a_split_or_kind_that_is_not_there_is_refused(store: Store, tmp_path: pathlib.Path):
    reference = write_preferences(store, with_images=False)
    with pytest.raises(InvalidInput, match=r"has no split test\. It has: train, validation"):
        export_dataset(store, reference, tmp_path / "out", to="hf", splits=["test"])
    with pytest.raises(InvalidInput, match="Only cases and preferences"):
        export_dataset(store, store.resolve("rankings/demo"), tmp_path / "out", to="hf")


def test_commands_print_the_card_and_write_the_folder(store: Store, tmp_path: pathlib.Path):
    import typer

    app = typer.Typer()
    app.command()(data_commands.card)
    app.command()(data_commands.export)
    reference = write_cases(store, card=STATED)
    runner = CliRunner()
    printed = runner.invoke(app, ["card", "cases/demo"])
    assert printed.exit_code == 0, printed.output
    assert f"- this version: `{reference}`" in printed.output
    described = runner.invoke(app, ["card", "cases/demo", "--croissant"])
    assert json.loads(described.output)["license"] == "CC-BY-4.0"
    out = tmp_path / "out"
    exported = runner.invoke(
        app, ["export", "cases/demo@v000001", "--to", "jsonl", "--out", str(out), "--split", "test"]
    )
    assert exported.exit_code == 0, exported.output
    assert exported.output.splitlines()[0] == "test: 4 rows"
    assert len(read_lines(out / "test.jsonl")) == 4


def test_images_of_both_formats_keep_their_bytes(store: Store, tmp_path: pathlib.Path):
    file = io.BytesIO()
    Image.open(io.BytesIO(encode_image(1))).save(file, "JPEG")
    case = next(make_cases("train", 1)).model_copy(update={"image": file.getvalue()})
    with store.write("cases", "jpeg") as version:
        version.add_rows("train", [case], case_schema())
        reference = version.commit(case_record())
    export_dataset(store, reference, tmp_path / "out", to="jsonl")
    (row,) = read_lines(tmp_path / "out/train.jsonl")
    assert row["image"].endswith(".jpg")
    assert (tmp_path / "out" / row["image"]).read_bytes() == file.getvalue()
