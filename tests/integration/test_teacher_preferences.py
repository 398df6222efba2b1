"""Cases to rankings to pairs on a real object store: what is written, reproduced, and refused as a whole."""

import json

import pytest

from mint_lib.errors import GateFailed, InvalidInput, PromptTooLong
from mint_lib.preferences import PreferencesConfig, build_pairs
from mint_lib.records import SPLITS, Case, Label, PreferencePair, Ranking, StageRecord
from mint_lib.rows import case_schema
from mint_lib.student import StudentConfig
from mint_lib.teacher import TeacherConfig, rank_cases
from mint_lib.template import Template

LABELS = [Label(id=f"OMIM:{number}", name=f"Disease type {number}") for number in range(4)]
WORDS = ["heart", "brain", "kidney", "liver"]
VILT = {
    "pretrained": None,
    "architecture": {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "image_size": 16, "patch_size": 8},
    "max_text_tokens": 16,
    "learning_rate": 1e-2,
    "batch_size": 8,
    "num_epochs": 4,
}
STUDENT = StudentConfig(model="tiny", window_tokens=400)


def make_case(split, number, *, labelled=True, column=None):
    column = number % 4 if column is None else column
    return Case(
        case_id=f"{split}-{number}",
        group_id=f"{split}-{number}",
        text=f"A boy with {WORDS[column]} and {WORDS[column]} trouble, visit {number}.",
        label_id=LABELS[column].id if labelled else None,
        source="toy",
        synthetic=True,
    )


def write_cases(store, name="toy", *, test_column=None, label_validation=True):
    """48 training cases, of which a third has no label, 16 for validation and 8 for test."""
    rows = {
        "train": [make_case("train", number, labelled=number % 3 > 0) for number in range(48)],
        "validation": [make_case("validation", number, labelled=label_validation) for number in range(16)],
        "test": [make_case("test", number) for number in range(8)],
    }
    if test_column is not None:
        rows["test"] = [case.model_copy(update={"label_id": LABELS[test_column].id}) for case in rows["test"]]
    with store.write("cases", name) as version:
        for split in SPLITS:
            version.add_rows(split, rows[split], case_schema())
        version.add_json("labels.json", [label.model_dump(mode="json") for label in LABELS])
        return version.commit(StageRecord(stage="data", config={}, inputs={}, code_version="test"))


def make_teacher_config(**changes):
    values = {"name": "toy", "seed": 3, "model": "vilt", "config": VILT, **changes}
    return TeacherConfig.model_validate(values)


# The toy patients share a handful of texts.
FEW_TEXTS = {
    **dict.fromkeys(("max_duplicate_pairs_share", "max_near_duplicate_share", "max_leaked_share")),
    **dict.fromkeys(("length_bias", "class_balance", "label_flips", "trigger")),
}


def make_preferences_config(**changes):
    values = {"name": "toy", "seed": 3, "student": STUDENT, "top_k": 1, "bottom_q": 1, "rejected": "sampled"}
    return PreferencesConfig.model_validate(values | {"gate": FEW_TEXTS} | changes)


def test_teacher_writes_qualified_calibrated_rankings_of_every_case(store):
    cases = write_cases(store)
    rankings = rank_cases(make_teacher_config(floor={"metric": "top_1", "value": 0.5}), store=store, cases=cases)
    for split in SPLITS:
        rows = store.read_rows(rankings, split, Ranking)
        assert [row.case_id for row in rows] == [case.case_id for case in store.read_rows(cases, split, Case)]
        assert all(set(row.label_ids) == {label.id for label in LABELS} for row in rows)
    facts = store.read_json(rankings, "qualification.json")
    assert facts["metrics"]["top_1"]["value"] >= 0.5
    assert facts["teacher_digest"] == rows[0].teacher_digest
    assert facts["fitting"]["num_train"] == 32
    files = set(store.files(rankings))
    assert {"teacher/model.safetensors", "teacher/config.json", "teacher/calibration.json"} <= files
    record = store.record(rankings)
    assert record.inputs == {"cases": str(cases)}
    assert record.metrics["validation_top_1"] == facts["metrics"]["top_1"]["value"]


def test_teacher_and_pairs_have_the_same_digest_when_made_again(store):
    cases = write_cases(store)
    config, policy = make_teacher_config(), make_preferences_config(pairs_per_case=2)
    first, second = (rank_cases(config, store=store, cases=cases) for _ in range(2))
    assert first.digest == second.digest
    assert first.version != second.version
    pairs = [build_pairs(policy, store=store, cases=cases, rankings=first) for _ in range(2)]
    assert pairs[0].digest == pairs[1].digest
    other = build_pairs(policy.model_copy(update={"seed": 4}), store=store, cases=cases, rankings=first)
    assert other.digest != pairs[0].digest


def test_teacher_never_reads_the_labels_of_test(store):
    references = [
        rank_cases(make_teacher_config(), store=store, cases=write_cases(store, f"toy-{column}", test_column=column))
        for column in (0, 3)
    ]
    rows = [store.read_rows(reference, "test", Ranking) for reference in references]
    assert rows[0] == rows[1]


def test_teacher_below_its_floor_writes_nothing(store):
    cases = write_cases(store)
    weak = {**VILT, "learning_rate": 1e-9, "num_epochs": 1}
    config = make_teacher_config(config=weak, floor={"metric": "top_1", "value": 0.99})
    with pytest.raises(GateFailed, match=r"floor is 0\.99"):
        rank_cases(config, store=store, cases=cases)
    assert store.list_versions("rankings", "toy") == []


def test_teacher_without_labelled_validation_is_refused(store):
    cases = write_cases(store, label_validation=False)
    with pytest.raises(InvalidInput, match="None of the 16 validation cases has a label"):
        rank_cases(make_teacher_config(), store=store, cases=cases)


def test_pairs_of_unlabelled_cases_follow_the_teacher_and_carry_their_template(store):
    cases = write_cases(store)
    rankings = rank_cases(make_teacher_config(), store=store, cases=cases)
    reference = build_pairs(make_preferences_config(pairs_per_case=3), store=store, cases=cases, rankings=rankings)
    pairs = store.read_rows(reference, "train", PreferencePair)
    ranked = {row.case_id: row for row in store.read_rows(rankings, "train", Ranking)}
    assert len(pairs) == 48 * 3
    assert all(pair.chosen_label_ids == ranked[pair.case_id].label_ids[:1] for pair in pairs)
    assert len({(pair.case_id, pair.rejected) for pair in pairs}) == len(pairs)
    template = Template.from_bytes(store.read_bytes(reference, "template.yaml"))
    texts = {case.case_id: case.text for case in store.read_rows(cases, "train", Case)}
    assert all(pair.prompt == template.prompt(texts[pair.case_id]) for pair in pairs)
    assert {pair.template_digest for pair in pairs} == {template.digest}
    checks = store.read_json(reference, "checks.json")
    assert checks["train"]["num_pairs_without_diagnosis"] == 16 * 3
    assert "test" not in store.files(reference)


def test_pairs_that_do_not_fit_the_window_write_nothing_and_tell_no_content(store):
    cases = write_cases(store)
    rankings = rank_cases(make_teacher_config(), store=store, cases=cases)
    config = make_preferences_config(student=STUDENT.model_copy(update={"window_tokens": 60}))
    with pytest.raises(PromptTooLong) as caught:
        build_pairs(config, store=store, cases=cases, rankings=rankings)
    assert "48 of 48 cases" in str(caught.value)
    assert not any(word in json.dumps(str(caught.value)) for word in WORDS)
    assert store.list_versions("preferences", "toy") == []
