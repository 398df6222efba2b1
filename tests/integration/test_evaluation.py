"""The evaluation stage on a real store with a tiny student."""

import json
import pathlib
from typing import Any

import numpy as np
import pytest

from mint_lib.calibration import fit_temperature
from mint_lib.errors import InvalidInput
from mint_lib.evaluation import evaluate_students
from mint_lib.reading import TextReader
from mint_lib.records import Case, Label, Ranking, Reference, StageRecord
from mint_lib.report_records import Calibration, EvaluationReport, Prediction
from mint_lib.reporting.injection_texts import KINDS
from mint_lib.reporting.injections import Injections
from mint_lib.reporting.sentences import describe_injections
from mint_lib.reporting.settings import EvaluationConfig
from mint_lib.rows import case_schema, ranking_schema
from mint_lib.store import Store
from mint_lib.student import StudentConfig, load_reader, load_student, load_tokenizer, rank_labels
from mint_lib.template import Template

STUDENT = StudentConfig(model="tiny", window_tokens=1024)
NAMES = ("Noonan syndrome 1", "Noonan syndrome 4", "Kabuki syndrome 1", "Robinow syndrome", "Costello syndrome")
LABELS = [Label(id=f"OMIM:{n}", name=name, family=name.split()[0]) for n, name in enumerate(NAMES)]
IDS = tuple(label.id for label in LABELS)
TEMPLATE = Template.load("rare_disease").with_num_answers(2)
SECRET = "a finding that only the note tells"


def make_record(stage: str, **config: Any) -> StageRecord:
    return StageRecord(stage=stage, config=config, inputs={}, code_version="test")


def write_cases(store: Store) -> Reference:
    with store.write("cases", "tiny") as version:
        for split, size in (("train", 10), ("validation", 5), ("test", 12)):
            rows = [
                Case(
                    case_id=f"{split}-{n}",
                    group_id=f"{split}-{n // 2}",
                    text=f"Short stature, {SECRET}." if n else None,
                    image=b"\x89PNG" if n % 3 == 0 else None,
                    label_id=IDS[n % 5],
                    attributes={"sex": "female" if n % 2 else "male"},
                    source="test",
                    synthetic=False,
                )
                for n in range(size)
            ]
            version.add_rows(split, rows, case_schema())
        version.add_json("labels.json", [label.model_dump(mode="json") for label in LABELS])
        return version.commit(make_record("data"))


def write_rankings(store: Store, name: str, *, label_ids: tuple[str, ...] = IDS) -> Reference:
    with store.write("rankings", name) as version:
        rows = []
        for n in range(12):
            order = (IDS[n % 5], *(key for key in label_ids if key != IDS[n % 5]))[: len(label_ids)]
            share = 1 / len(order)
            values = {"label_ids": order, "probabilities": (share,) * len(order), "teacher_digest": "sha256:0"}
            rows.append(Ranking(case_id=f"test-{n}", **values))
        version.add_rows("test", rows, ranking_schema())
        version.add_json("qualification.json", {"teacher_digest": "sha256:0"})
        return version.commit(make_record("teacher"))


def write_preferences(store: Store) -> Reference:
    with store.write("preferences", "tiny") as version:
        version.add_bytes("template.yaml", TEMPLATE.data)
        return version.commit(make_record("preferences", top_k=2, bottom_q=2))


def write_student(store: Store, folder: pathlib.Path, name: str, **values: Any) -> Reference:
    import peft
    import torch

    torch.manual_seed(7)
    config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    model = peft.get_peft_model(load_student(STUDENT), config)
    if values.get("tuning") == "full":
        model.merge_and_unload().save_pretrained(str(folder / name))
    else:
        model.save_pretrained(str(folder / name))
    facts = {"student": STUDENT.model_dump(mode="json"), "method": "orpo", "base_digest": "sha256:1"}
    history = [{"kind": "validation", "step": step, "loss": 1.0, "reward_margin": 0.1} for step in (0, 5)]
    with store.write("student", name) as version:
        whole = {"config.json": "weights", "model.safetensors": "weights"}
        for path, place in (whole | {"adapter_config.json": "adapter", "adapter_model.safetensors": "adapter"}).items():
            if (folder / name / path).is_file():
                version.add_file(f"{place}/{path}", folder / name / path)
        version.add_json("student.json", facts | values)
        version.add_bytes("template.yaml", TEMPLATE.data)
        version.add_json("labels.json", [label.model_dump(mode="json") for label in LABELS])
        version.add_json("history.json", history)
        return version.commit(make_record("alignment"))


def make_config(**values: Any) -> EvaluationConfig:
    known = {
        "name": "tiny",
        "seed": 1,
        "student": STUDENT.model_dump(),
        "main": "orpo",
        "config": {"generation_cases": 3},
        "bootstrap_draws": 200,
        "gate": [{"metric": "top_1", "over": "base", "at_least": 0.5}],
    }
    return EvaluationConfig.model_validate(known | values)


def evaluate(store: Store, students: dict[str, Reference], **values: Any) -> Reference:
    return evaluate_students(
        values.pop("config", None) or make_config(),
        store=store,
        cases=write_cases(store),
        rankings=write_rankings(store, "tiny"),
        preferences=write_preferences(store),
        students=students,
        baselines=values.pop("baselines", {}),
    )


def test_evaluation_measures_all_systems_and_writes_a_whole_report(store: Store, tmp_path: pathlib.Path) -> None:
    students = {"orpo": write_student(store, tmp_path, "orpo"), "sft": write_student(store, tmp_path, "sft")}
    reference = evaluate(store, students, baselines={"ontology": write_rankings(store, "ontology")})
    written = {"report.html", "report.json", "predictions/000000.parquet", "calibration.json", "record.json"}
    assert set(store.files(reference)) == written
    report = EvaluationReport.model_validate(store.read_json(reference, "report.json"))
    assert list(report.order) == ["orpo", "sft", "base", "teacher", "ontology", "majority", "chance"]
    assert report.counts["refused_no_text"] == 1
    assert report.counts["measured_cases"] == 11
    assert report.systems["orpo"]["generated_top_1"].n == 3
    assert report.systems["orpo"] == report.systems["sft"]
    assert not report.gate.passed
    assert report.inputs["students.orpo"] == str(students["orpo"])
    rows = store.read_rows(reference, "predictions", Prediction)
    assert len(rows) == 7 * 11
    assert all(abs(sum(row.probabilities) - 1) < 1e-6 for row in rows)
    record = store.record(reference)
    assert record.metrics["teacher.top_1"] == report.systems["teacher"]["top_1"].value


def test_evaluation_measures_a_student_of_which_all_weights_were_trained(store: Store, tmp_path: pathlib.Path) -> None:
    students = {
        "orpo": write_student(store, tmp_path, "orpo"),
        "whole": write_student(store, tmp_path, "whole", tuning="full"),
    }
    reference = evaluate(store, students, config=make_config(config={}))
    scores: dict[str, list[tuple[float, ...]]] = {}
    for row in store.read_rows(reference, "predictions", Prediction):
        scores.setdefault(row.system, []).append(row.probabilities)
    # The same adapter, beside the base's weights and added to them: float32 sums in another order.
    np.testing.assert_allclose(scores["whole"], scores["orpo"], atol=1e-4)
    assert np.abs(np.array(scores["whole"]) - np.array(scores["base"])).max() > 0.01


def test_evaluation_calibrates_the_first_run_of_the_main_student_on_validation_cases(
    store: Store, tmp_path: pathlib.Path
) -> None:
    students = {f"orpo/seed-{seed}": write_student(store, tmp_path, f"orpo-{seed}") for seed in (1, 2)}
    reference = evaluate(store, students, config=make_config(config={}))
    found = Calibration.model_validate(store.read_json(reference, "calibration.json"))
    assert found.student == str(students["orpo/seed-1"])
    assert found.num_cases == 4  # of five, one has no text
    tokenizer = load_tokenizer(STUDENT)
    model = load_student(STUDENT, tmp_path / "orpo-1")
    rows = [row for row in store.read_rows(store.resolve("cases/tiny"), "validation", Case) if row.text]
    scores = rank_labels(
        model, TextReader(tokenizer), TEMPLATE, LABELS, [TEMPLATE.prompt(row.text or "") for row in rows]
    )
    truth = [IDS.index(str(row.label_id)) for row in rows]
    # Batches of other shapes round differently: 1e-5 nats is far below what a temperature can be known to.
    assert found.nll_before == pytest.approx(-scores[range(4), truth].mean(), abs=1e-5)
    assert found.temperature == pytest.approx(fit_temperature(scores, np.array(truth)), rel=1e-3)


def test_evaluation_without_calibration_cases_writes_no_calibration(store: Store, tmp_path: pathlib.Path) -> None:
    reference = evaluate(
        store, {"orpo": write_student(store, tmp_path, "orpo")}, config=make_config(config={}, calibration_cases=0)
    )
    assert "calibration.json" not in store.files(reference)


def test_evaluation_of_observed_patients_writes_none_of_their_content(store: Store, tmp_path: pathlib.Path) -> None:
    reference = evaluate(store, {"orpo": write_student(store, tmp_path, "orpo")})
    for path in store.files(reference):
        assert SECRET.encode() not in store.read_bytes(reference, path)


def test_evaluation_with_injections_reports_what_text_in_notes_does_and_nothing_of_the_notes(
    store: Store, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    student = write_student(store, tmp_path, "orpo")
    with caplog.at_level("DEBUG", logger="mint_lib"):
        reference = evaluate(store, {"orpo": student}, config=make_config(config={}, injections={"cases": 8}))
    found = Injections.model_validate(store.read_json(reference, "injections.json"))
    assert found.student == str(student)
    assert (found.num_cases, found.num_too_long) == (8, 0)
    assert [item.injected.followed.n for item in found.kinds] == [8] * len(KINDS)
    report = EvaluationReport.model_validate(store.read_json(reference, "report.json"))
    assert report.statements[-1] == describe_injections(report, found)
    assert "Notes that ask for an answer" in store.read_bytes(reference, "report.html").decode()
    assert SECRET not in caplog.text
    for path in store.files(reference):
        assert SECRET.encode() not in store.read_bytes(reference, path)


def test_evaluation_whose_window_has_no_room_for_more_text_measures_no_injection(
    store: Store, tmp_path: pathlib.Path
) -> None:
    reader = load_reader(STUDENT)
    prompt_tokens = len(reader.read(TEMPLATE.prompt(f"Short stature, {SECRET}.")).ids)
    narrow = STUDENT.model_copy(update={"window_tokens": prompt_tokens + 60})
    student = write_student(store, tmp_path, "orpo", student=narrow.model_dump(mode="json"))
    config = make_config(config={}, student=narrow.model_dump(), injections={})
    reference = evaluate(store, {"orpo": student}, config=config)
    assert "injections.json" not in store.files(reference)
    assert "Notes that ask" not in store.read_bytes(reference, "report.html").decode()


def test_evaluation_made_twice_gives_the_same_digest(store: Store, tmp_path: pathlib.Path) -> None:
    student = write_student(store, tmp_path, "orpo")
    cases, rankings, preferences = write_cases(store), write_rankings(store, "tiny"), write_preferences(store)
    inputs: dict[str, Any] = {"cases": cases, "rankings": rankings, "preferences": preferences, "baselines": {}}
    first, second = (
        evaluate_students(make_config(), store=store, students={"orpo": student}, **inputs) for _ in range(2)
    )
    assert first.digest == second.digest


def test_evaluation_of_several_seeds_reports_the_arm(store: Store, tmp_path: pathlib.Path) -> None:
    students = {f"orpo/seed-{seed}": write_student(store, tmp_path, f"orpo-{seed}") for seed in (1, 2)}
    reference = evaluate(store, students)
    report = EvaluationReport.model_validate(store.read_json(reference, "report.json"))
    assert report.runs["orpo"] == 2
    assert len(store.read_rows(reference, "predictions", Prediction)) == 6 * 11


def test_evaluation_of_a_student_of_another_base_refuses_and_writes_nothing(
    store: Store, tmp_path: pathlib.Path
) -> None:
    other = STUDENT.model_copy(update={"num_layers": 1}).model_dump(mode="json")
    student = write_student(store, tmp_path, "orpo", student=other)
    with pytest.raises(InvalidInput, match="measures"):
        evaluate(store, {"orpo": student})
    assert store.list_versions("report", "tiny") == []


def test_evaluation_with_rankings_of_other_labels_refuses(store: Store, tmp_path: pathlib.Path) -> None:
    baseline = write_rankings(store, "ontology", label_ids=IDS[:4])
    with pytest.raises(InvalidInput, match="does not rank the 5 labels"):
        evaluate(store, {"orpo": write_student(store, tmp_path, "orpo")}, baselines={"ontology": baseline})


def test_evaluation_report_json_is_plain_json_without_nan(store: Store, tmp_path: pathlib.Path) -> None:
    reference = evaluate(store, {"orpo": write_student(store, tmp_path, "orpo")})
    text = store.read_bytes(reference, "report.json").decode()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
