"""Registering, promoting and rolling back on a real store."""

from typing import Any

import pytest

from mint_lib.errors import Conflict, GateFailed, InvalidInput
from mint_lib.records import Reference, StageRecord
from mint_lib.registry import RegistryConfig, promote_model, register_model, rollback_model
from mint_lib.report_records import Estimate, EvaluationReport, Gate, GateOutcome, Metric, ModelCard
from mint_lib.store import Store

CONFIG = RegistryConfig(name="rare", licence="Apache-2.0")
STUDENT = {"model": "tiny", "revision": None, "num_layers": 1, "window_tokens": 256, "dtype": "float32"}


CALIBRATION = {
    "split": "validation",
    "num_cases": 9,
    "temperature": 1.5,
    "nll_before": 1.0,
    "nll_after": 0.9,
    "ece_before": 0.2,
    "ece_after": 0.1,
}


def make_record(stage: str) -> StageRecord:
    return StageRecord(stage=stage, config={}, inputs={}, code_version="test")


def write_student(store: Store, number: int) -> Reference:
    with store.write("student", "rare-orpo") as version:
        version.add_bytes("adapter/adapter_model.safetensors", f"weights {number}".encode())
        version.add_json("student.json", {"student": STUDENT, "method": "orpo", "base_digest": "sha256:1"})
        return version.commit(make_record("alignment"))


def write_report(store: Store, student: Reference, *, passed: bool, calibrated: Reference | None = None) -> Reference:
    with store.write("rankings", "rare") as version:
        version.add_json("qualification.json", {"teacher_digest": "sha256:2"})
        rankings = version.commit(make_record("teacher"))
    estimate = Estimate(value=0.9 if passed else 0.1, low=0.05, high=0.95, n=30)
    rule: dict[str, Any] = {"metric": "top_1", "system": "orpo", "over": None, "bound": "value", "at_least": 0.5}
    report = EvaluationReport(
        name="rare",
        task="rare_disease_ranking",
        main="orpo",
        headline="A headline.",
        statements=("A statement.",),
        lead="top_1",
        order=("orpo",),
        metrics={"top_1": Metric(title="Top-1", meaning="Ranked first.", unit="percent", better="higher")},
        systems={"orpo": {"top_1": estimate}},
        roles={"orpo": "student"},
        runs={"orpo": 1},
        comparisons=(),
        slices={},
        gate=Gate(passed=passed, rules=(GateOutcome(**rule, observed=estimate.value, passed=passed),)),
        inputs={"rankings": str(rankings), "students.orpo": str(student)},
        counts={"measured_cases": 30},
        synthetic="all",
        seed=1,
        bootstrap_draws=200,
        confidence=0.95,
    )
    with store.write("report", "rare") as version:
        version.add_bytes("report.html", b"<!doctype html>")
        version.add_json("report.json", report.model_dump(mode="json"))
        if calibrated is not None:
            version.add_json("calibration.json", CALIBRATION | {"student": str(calibrated)})
        return version.commit(make_record("evaluation"))


def register(store: Store, number: int, *, passed: bool = True) -> Reference:
    student = write_student(store, number)
    return register_model(CONFIG, store=store, student=student, report=write_report(store, student, passed=passed))


def test_register_writes_weights_card_and_report_and_moves_candidate(store: Store) -> None:
    model = register(store, 1)
    assert set(store.files(model)) == {
        "adapter/adapter_model.safetensors",
        "student.json",
        "card.md",
        "card.json",
        "report.html",
        "report.json",
        "record.json",
    }
    assert store.read_bytes(model, "adapter/adapter_model.safetensors") == b"weights 1"
    card = ModelCard.model_validate(store.read_json(model, "card.json"))
    assert card.synthetic == "all"
    assert any("first 1 layers" in limit for limit in card.limits)
    assert "Not a medical device" in store.read_bytes(model, "card.md").decode()
    candidate = store.alias("model", "rare", "candidate")
    assert candidate is not None
    assert candidate.reference == model
    assert store.record(model).stage == "registry"


def test_register_copies_the_calibration_of_this_student_and_of_no_other_seed(store: Store) -> None:
    first, second = write_student(store, 1), write_student(store, 2)
    own = register_model(
        CONFIG, store=store, student=first, report=write_report(store, first, passed=True, calibrated=first)
    )
    assert store.read_json(own, "calibration.json") == CALIBRATION | {"student": str(first)}
    foreign = register_model(
        CONFIG, store=store, student=first, report=write_report(store, first, passed=True, calibrated=second)
    )
    assert "calibration.json" not in store.files(foreign)


def test_register_of_a_student_that_the_report_is_not_about_writes_nothing(store: Store) -> None:
    measured, another = write_student(store, 1), write_student(store, 2)
    report = write_report(store, measured, passed=True)
    with pytest.raises(InvalidInput, match="not about"):
        register_model(CONFIG, store=store, student=another, report=report)
    assert store.list_versions("model", "rare") == []


def test_promote_then_rollback_moves_champion_and_keeps_the_log(store: Store) -> None:
    first, second = register(store, 1), register(store, 2)
    promote_model(store, str(first), who="ada", why="first")
    promote_model(store, "rare", who="ada", why="better")
    alias = rollback_model(store, "rare", who="bob", why="drift on site 3")
    assert alias.reference == first
    assert [(move.who, move.why) for move in alias.log] == [
        ("ada", "first"),
        ("ada", "better"),
        ("bob", "drift on site 3"),
    ]
    assert store.list_versions("model", "rare") == ["v000001", "v000002"]
    assert store.resolve(str(second)) == second


def test_promote_past_a_failed_gate_leaves_the_champion_in_place(store: Store) -> None:
    good = register(store, 1)
    promote_model(store, str(good), who="ada", why="first")
    bad = register(store, 2, passed=False)
    with pytest.raises(GateFailed, match=r"observed 10\.0 %"):
        promote_model(store, str(bad), who="ada", why="newer")
    champion = store.alias("model", "rare", "champion")
    assert champion is not None
    assert champion.reference == good


def test_move_of_a_champion_that_somebody_else_moved_conflicts(store: Store) -> None:
    first, second = register(store, 1), register(store, 2)
    promote_model(store, str(first), who="ada", why="first")
    with pytest.raises(Conflict):
        store.move_alias("champion", second, who="bob", why="stale view", expected=None)
