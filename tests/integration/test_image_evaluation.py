"""The evaluation and the registry of image students on a real store: one that looks, and one that does not."""

import pathlib
from typing import Any

import pytest
from tiny_seeing_students import LABELS, STUDENT, TEMPLATE, make_cases, save_student

from mint_lib.errors import GateFailed, InvalidInput
from mint_lib.evaluation import evaluate_students
from mint_lib.records import Ranking, Reference, StageRecord
from mint_lib.registry import RegistryConfig, register_model
from mint_lib.report_records import EvaluationReport, ModelCard, Prediction
from mint_lib.reporting.settings import EvaluationConfig
from mint_lib.rows import case_schema, ranking_schema
from mint_lib.store import Store
from mint_lib.template import Template

NUM_TEST = 48
IDS = [label.id for label in LABELS]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, pathlib.Path]:
    """Adapters of a student that looks and of one that answers from the prompt."""
    folder = tmp_path_factory.mktemp("adapters")
    save_student(folder / "seeing", num_steps=40)
    save_student(folder / "blind", num_steps=8, is_blind=True)
    return {name: folder / name for name in ("seeing", "blind")}


def make_record(stage: str, *, notes: tuple[str, ...] = (), **config: Any) -> StageRecord:
    return StageRecord(stage=stage, config=config, inputs={}, code_version="test", notes=notes)


def write_inputs(
    store: Store, *, notes: tuple[str, ...] = (), template: Template = TEMPLATE, synthetic: bool = True
) -> dict[str, Reference]:
    labels = [label.model_dump(mode="json") for label in LABELS]
    with store.write("cases", "tissue") as version:
        for split, size in (("train", 12), ("validation", 12), ("test", NUM_TEST)):
            version.add_rows(split, make_cases(split, size, synthetic=synthetic), case_schema())
        version.add_json("labels.json", labels)
        cases = version.commit(make_record("data", notes=notes))
    with store.write("rankings", "tissue") as version:
        rows = []
        for case in make_cases("test", NUM_TEST):
            order = (str(case.label_id), *(key for key in IDS if key != case.label_id))
            values = {"label_ids": order, "probabilities": (0.8, 0.1, 0.1), "teacher_digest": "sha256:0"}
            rows.append(Ranking(case_id=case.case_id, **values))
        version.add_rows("test", rows, ranking_schema())
        version.add_json("qualification.json", {"teacher_digest": "sha256:0"})
        rankings = version.commit(make_record("teacher"))
    with store.write("preferences", "tissue") as version:
        version.add_bytes("template.yaml", template.data)
        preferences = version.commit(make_record("preferences", top_k=1, bottom_q=1))
    return {"cases": cases, "rankings": rankings, "preferences": preferences}


def write_student(store: Store, adapter: pathlib.Path) -> Reference:
    facts = {"student": STUDENT.model_dump(mode="json"), "method": "orpo", "base_digest": "sha256:1"}
    with store.write("student", adapter.name) as version:
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            version.add_file(f"adapter/{name}", adapter / name)
        version.add_json("student.json", facts)
        version.add_bytes("template.yaml", TEMPLATE.data)
        version.add_json("labels.json", [label.model_dump(mode="json") for label in LABELS])
        version.add_json("history.json", [])
        return version.commit(make_record("alignment"))


def evaluate(store: Store, student: Reference, *, inputs: dict[str, Any] | None = None, **values: Any) -> Reference:
    known = {
        "name": "tissue",
        "seed": 1,
        "student": STUDENT.model_dump(),
        "main": "orpo",
        "task": "tissue_type",
        "bootstrap_draws": 500,
        "slice_attributes": ["site"],
        "gate": [{"metric": "top_1", "over": "base", "at_least": 0.1}],
    }
    return evaluate_students(
        EvaluationConfig.model_validate(known | values),
        store=store,
        students={"orpo": student},
        baselines={},
        **(inputs or write_inputs(store)),
    )


def read(store: Store, report: Reference) -> EvaluationReport:
    return EvaluationReport.model_validate(store.read_json(report, "report.json"))


def register(store: Store, student: Reference, report: Reference) -> Reference:
    config = RegistryConfig(name="tissue", licence="Apache-2.0")
    return register_model(config, store=store, student=student, report=report)


def test_a_student_that_looks_is_measured_passes_the_probe_and_is_registered(
    store: Store, adapters: dict[str, pathlib.Path]
) -> None:
    student = write_student(store, adapters["seeing"])
    report = evaluate(store, student, config={"generation_cases": 3}, perturbations={"cases": 12})
    found = read(store, report)
    top_1 = found.systems["orpo"]["top_1"].value
    assert top_1 is not None
    assert top_1 > 0.9
    assert found.systems["orpo"]["generated_top_1"].n == 3
    assert found.systems["orpo"]["macro_f1"].value == pytest.approx(top_1, abs=0.1)
    assert found.gate.passed
    assert found.reads == "image"
    assert set(found.slices) == {"label", "site"}
    assert [item.kind for item in found.perturbations] == ["stain", "blur", "compression"]
    assert found.grounding is not None
    assert found.grounding.passed
    variants = {variant.kind: variant for variant in found.grounding.variants}
    assert variants["swapped"].top_1.value == pytest.approx(0.0, abs=0.1)
    follows = variants["swapped"].follows
    assert follows is not None
    assert follows.value == pytest.approx(top_1, abs=0.1)
    assert "calibration.json" in store.files(report)
    assert len(store.read_rows(report, "predictions", Prediction)) == 5 * NUM_TEST
    model = register(store, student, report)
    card = ModelCard.model_validate(store.read_json(model, "card.json"))
    assert card.grounding == found.grounding
    assert any("list of tissues is closed" in limit for limit in card.limits)
    assert "ORPO looks at the image" in store.read_bytes(model, "card.md").decode()


def test_a_student_that_answers_from_the_prompt_fails_the_probe_and_is_not_registered(
    store: Store, adapters: dict[str, pathlib.Path]
) -> None:
    student = write_student(store, adapters["blind"])
    report = evaluate(store, student)
    found = read(store, report)
    assert found.grounding is not None
    assert [variant.changed.value for variant in found.grounding.variants] == [0.0] * 5
    assert [variant.passed for variant in found.grounding.variants] == [False, False, False, False, None]
    assert any("not shown to look at the image" in text for text in found.statements)
    with pytest.raises(GateFailed, match="failed the grounding probe with blank, noise, permuted, swapped"):
        register(store, student, report)
    assert store.list_versions("model", "tissue") == []


def test_a_student_that_was_not_probed_is_not_registered(store: Store, adapters: dict[str, pathlib.Path]) -> None:
    student = write_student(store, adapters["seeing"])
    report = evaluate(store, student, grounding=None)
    assert read(store, report).grounding is None
    with pytest.raises(GateFailed, match=r"its report probed none.*evaluation\.grounding"):
        register(store, student, report)


def test_preferences_that_ask_about_text_are_refused(store: Store, adapters: dict[str, pathlib.Path]) -> None:
    student = write_student(store, adapters["seeing"])
    inputs = write_inputs(store, template=Template.load("rare_disease").with_num_answers(1))
    with pytest.raises(InvalidInput, match="asks about text, and the students to measure read image"):
        evaluate(store, student, inputs=inputs)


def test_a_leak_in_the_record_of_the_cases_is_the_first_thing_the_report_says(
    store: Store, adapters: dict[str, pathlib.Path]
) -> None:
    student = write_student(store, adapters["seeing"])
    notes = ("LEAK: tiles of one patient are in training and in test.", "Tiles are drawn.")
    report = evaluate(store, student, inputs=write_inputs(store, notes=notes))
    found = read(store, report)
    assert found.headline.startswith("The test is not fair, for the splits leak: ORPO reaches")
    assert found.statements[0].startswith("Leak: tiles of one patient are in training and in test.")
    assert "Tiles are drawn." in found.notes
    model = register(store, student, report)
    card = ModelCard.model_validate(store.read_json(model, "card.json"))
    assert any("tiles of one patient are in training" in limit for limit in card.limits)


def test_a_report_of_observed_images_holds_none_unless_the_recipe_says_so(
    store: Store, adapters: dict[str, pathlib.Path]
) -> None:
    student = write_student(store, adapters["seeing"])
    inputs = write_inputs(store, synthetic=False)
    without = store.read_bytes(evaluate(store, student, inputs=inputs), "report.html")
    with_images = store.read_bytes(
        evaluate(store, student, inputs=inputs, examples="with_observed_images"), "report.html"
    )
    assert b"data:image" not in without
    assert with_images.count(b"data:image") > 6
    assert b"only the teacher reads of" not in without + with_images


def test_evaluation_of_images_made_twice_gives_the_same_digest(store: Store, adapters: dict[str, pathlib.Path]) -> None:
    student = write_student(store, adapters["seeing"])
    inputs = write_inputs(store)
    first, second = (
        evaluate(store, student, inputs=inputs, perturbations={"cases": 6}, grounding={"cases": 12}) for _ in range(2)
    )
    assert first.digest == second.digest
