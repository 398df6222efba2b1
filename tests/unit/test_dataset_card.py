"""The data set card and Croissant: what they tell comes from the store, and what nobody stated is said so."""

import json
import pathlib
from typing import Any

import pytest
import yaml
from mlcroissant import Dataset
from tiny_data import (
    GATE,
    LABELS,
    STATED,
    TEACHER,
    case_record,
    make_cases,
    make_pairs,
    write_cases,
    write_preferences,
)

from mint_lib.dataset_card.beside import render_beside
from mint_lib.dataset_card.card import render_card
from mint_lib.dataset_card.croissant import render_croissant
from mint_lib.dataset_card.description import Description, describe_dataset, describe_draft
from mint_lib.dataset_card.facts import NOT_STATED, DatasetFacts
from mint_lib.dataset_card.figures import FigureCounter, batch_records
from mint_lib.errors import InvalidInput
from mint_lib.gate.report import GateReport
from mint_lib.records import Case
from mint_lib.rows import case_schema, pair_schema
from mint_lib.store import Store


def read_metadata(card: str) -> Any:
    """The block between the dashes."""
    assert card.startswith("---\n")
    return yaml.safe_load(card.split("---\n")[1])


def test_figures_of_cases_are_those_of_a_count_by_hand():
    cases = list(make_cases("train", 300))
    counter = FigureCounter("cases")
    for batch in batch_records("cases", cases):
        counter.add(batch)
    figures = counter.figures()
    assert figures.num_rows == figures.num_with_text == 300
    assert figures.num_subjects == len({case.group_id for case in cases}) == 150
    assert figures.num_with_image == sum(case.image is not None for case in cases) == 225
    assert figures.num_synthetic == 0
    assert figures.labels == {label.id: sum(case.label_id == label.id for case in cases) for label in LABELS}
    assert figures.num_without_label == sum(case.label_id is None for case in cases) == 100
    assert figures.facts == {"source": {"clinic_a": 150, "clinic_b": 150}}


@pytest.mark.parametrize("with_images", [False, True])
def test_figures_of_pairs_are_those_of_a_count_by_hand(with_images: bool):
    pairs = list(make_pairs("train", 10, with_images=with_images))
    pairs.append(pairs[0].model_copy(update={"chosen_label_ids": (), "case_id": "caption"}))
    counter = FigureCounter("preferences")
    for batch in batch_records("preferences", pairs):
        counter.add(batch)
    figures = counter.figures()
    assert (figures.num_rows, figures.num_subjects) == (11, 6)
    assert figures.num_with_image == (11 if with_images else 0)
    assert figures.num_synthetic is None
    assert figures.labels == {"D:1": 5, "D:2": 5}
    assert figures.num_without_label == 1
    assert figures.facts["teacher_digest"] == {TEACHER: 11}


def test_card_of_cases_says_what_the_owner_stated_and_what_the_store_holds(store: Store):
    card = render_card(describe_dataset(store, write_cases(store, card=STATED)))
    metadata = read_metadata(card)
    assert metadata["license"] == "cc-by-4.0"
    assert metadata["configs"][0]["data_files"] == [
        {"split": split, "path": f"{split}/*.parquet"} for split in ("train", "validation", "test")
    ]
    assert "- consent: Waived by the ethics board, vote 12/2026" in card
    assert "- creators: Clinic A" in card
    assert "| train | 8 | 4 | 8 | 6 | 0 | 2 |" in card
    assert "| test | 4 | 2 | 4 | 3 | 0 | 1 |" in card
    assert "| D:1 | Noonan syndrome | 3 | 1 | 1 |" in card
    assert "All 16 cases are observed, none is generated." in card
    assert "Split by patient" in card
    assert "- clinic_a: 8 cases" in card
    assert "- Adults only." in card
    assert "is not stated" not in card


def test_card_of_many_sources_names_the_most_frequent(store: Store):
    cases = list(make_cases("train", 60, with_images=False))
    cases = [case.model_copy(update={"source": f"paper-{min(index, 30):02}"}) for index, case in enumerate(cases)]
    with store.write("cases", "papers") as version:
        version.add_rows("train", cases, case_schema())
        reference = version.commit(case_record())
    card = render_card(describe_dataset(store, reference))
    assert "## Sources\n- paper-30: 30 cases\n- paper-00: 1 cases\n" in card
    assert card.count("- paper-") == 20
    assert "- 11 other sources: 11 cases" in card


def test_card_without_stated_facts_says_so(store: Store):
    card = render_card(describe_dataset(store, write_cases(store)))
    assert read_metadata(card)["license"] == "unknown"
    assert "- licence: not stated" in card
    assert "- consent: not stated" in card
    assert "The licence is not stated. Ask the owner" in card
    assert "The consent is not stated. Ask the owner" in card


def test_card_of_synthetic_cases_with_a_leak_names_both(store: Store):
    leak = "LEAK: split by image (data.split_by), not by patient: 3 of 8 patients stand in several splits."
    reference = write_cases(
        store, synthetic=True, split_by="image", notes=(leak, "De-identification: 12 spans replaced")
    )
    description = describe_dataset(store, reference)
    card = render_card(description)
    assert "All 16 cases are synthetic" in card
    assert card.count(leak) == 2, "where the splits are told, and among the limits"
    assert "synthetic" in read_metadata(card)["tags"]
    assert "- De-identification: 12 spans replaced" in card
    document = render_croissant(description, case_schema())
    assert leak in document["rai:dataBiases"]
    assert "No person is described" in document["rai:personalSensitiveInformation"][0]


def test_card_of_pairs_tells_teacher_policy_gate_and_lineage(store: Store):
    reference = write_preferences(store, with_images=True, card=STATED, synthetic=True)
    card = render_card(describe_dataset(store, reference))
    assert read_metadata(card)["license"] == "cc-by-4.0"
    assert f"Teacher `ontology`: {TEACHER}." in card
    assert "it reaches top_1 0.825 (95 % interval 0.700 to 0.900), chance 0.500." in card
    assert "- policy `top1-bottom1/ground-truth=none/control=none`: 12 pairs" in card
    assert "- The data gate was NOT passed." in card
    assert "- Length bias: refused. Chosen answers are longer in 90 % of the pairs." in card
    assert "| train | 8 | 4 | 8 | 8 | see cases | 0 |" in card
    assert "All 12 cases are synthetic" in card, "those of train and validation"
    for text in ("cases/demo@v000001#", "rankings/demo@v000001#", f"- this version: `{reference}`"):
        assert text in card


def test_gate_of_these_tests_is_a_report_of_the_gate():
    assert not GateReport.model_validate(GATE).passed


def test_card_of_pairs_whose_teacher_and_cases_are_gone_says_so(store: Store):
    reference = write_preferences(store, with_images=False, gate=False)
    for text in ("rankings/demo", "cases/demo"):
        store.remove(store.resolve(text))
    card = render_card(describe_dataset(store, reference))
    assert "Its qualification is not in the store." in card
    assert "generated or observed is not stated" in card
    assert card.count("no longer in the store") >= 2
    assert "No data gate is stored with this version." in card


def test_description_of_a_draft_is_that_of_the_version_but_for_number_and_time(store: Store):
    reference = write_cases(store, card=STATED)
    whole = describe_dataset(store, reference)
    draft = describe_draft(
        store,
        kind="cases",
        name="demo",
        record=store.record(reference),
        files=store.files(reference),
        tables={split: store.iterate_rows(reference, split, Case) for split in ("train", "validation", "test")},
        documents={"labels.json": store.read_json(reference, "labels.json")},
    )
    assert draft == whole.model_copy(update={"reference": None, "created_at": None})
    beside = render_beside(draft)
    document = json.loads(beside["croissant.json"])
    assert "version" not in document
    assert "datePublished" not in document
    assert not any(reference.digest.encode() in data for data in beside.values())


def test_card_of_a_kind_without_one_is_refused(store: Store):
    write_preferences(store, with_images=False)
    with pytest.raises(InvalidInput, match="Only cases and preferences"):
        describe_dataset(store, store.resolve("rankings/demo"))


def test_facts_of_a_recipe_refuse_an_unknown_key_and_an_empty_text():
    assert DatasetFacts().licence == NOT_STATED
    for values in ({"license": "MIT"}, {"licence": "  "}):
        with pytest.raises(ValueError, match="licen"):
            DatasetFacts.model_validate(values)


def load_croissant(description: Description, folder: pathlib.Path) -> Dataset:
    """What mlcroissant, the specification's own reader, makes of the document; it raises where it is not valid."""
    schema = case_schema() if description.kind == "cases" else pair_schema()
    path = folder / "croissant.json"
    path.write_text(json.dumps(render_croissant(description, schema)))
    return Dataset(jsonld=str(path))


def test_croissant_of_cases_is_valid_and_its_reader_finds_every_row(store: Store, tmp_path: pathlib.Path):
    reference = write_cases(store, card=STATED)
    description = describe_dataset(store, reference)
    folder = store.download(reference, tmp_path)
    dataset = load_croissant(description, folder)
    issues = dataset.metadata.issues
    assert not issues.errors
    assert not issues.warnings
    cases = store.read_rows(reference, "train", Case)
    records = list(dataset.records("train"))
    assert [record["train/case_id"].decode() for record in records] == [case.case_id for case in cases]
    assert [record["train/image"] is not None for record in records] == [case.image is not None for case in cases]
    assert records[0]["train/image"].size == (16, 16)
    assert records[0]["train/findings"][1] == {
        "train/findings/id": b"",
        "train/findings/label": b"Mild",
        "train/findings/excluded": True,
    }
    assert records[0]["train/synthetic"] is False


def test_croissant_lists_every_file_with_its_checksum(store: Store):
    reference = write_preferences(store, with_images=False, card=STATED)
    document = render_croissant(describe_dataset(store, reference), pair_schema())
    files = {item["@id"]: item for item in document["distribution"] if item["@type"] == "cr:FileObject"}
    assert {path: (item["sha256"], item["contentSize"]) for path, item in files.items()} == {
        path: (entry.sha256, f"{entry.size} B") for path, entry in store.files(reference).items()
    }
    assert document["isLiveDataset"] is False
    assert "url" not in document
    properties = {(item["name"], item["value"]) for item in document["additionalProperty"]}
    assert ("teacher_digest", TEACHER) in properties
    assert ("consent", STATED["consent"]) in properties
    assert [item["name"] for item in document["creator"]] == STATED["creators"]


def test_croissant_of_pairs_is_valid_and_its_reader_finds_every_row(store: Store, tmp_path: pathlib.Path):
    reference = write_preferences(store, with_images=True, card=STATED)
    dataset = load_croissant(describe_dataset(store, reference), store.download(reference, tmp_path))
    assert not dataset.metadata.issues.errors
    (first, *others) = dataset.records("validation")
    assert len(others) == 3
    assert first["validation/prompt"][1]["validation/prompt/role"] == b"user"
    assert first["validation/images"][0].size == (16, 16)


def test_croissant_without_stated_facts_is_still_valid(store: Store, tmp_path: pathlib.Path):
    reference = write_cases(store, sizes=(2, 2, 2))
    dataset = load_croissant(describe_dataset(store, reference), store.download(reference, tmp_path))
    assert not dataset.metadata.issues.errors


def test_record_is_not_changed_by_unknown_card_keys(store: Store):
    record = case_record(card={"colour": "red"})
    with pytest.raises(ValueError, match="colour"):
        describe_draft(store, kind="cases", name="demo", record=record, files={}, tables={}, documents={})
