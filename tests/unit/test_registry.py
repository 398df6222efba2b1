from typing import Any, NamedTuple

import pytest

from mint_lib.errors import Conflict, GateFailed, InvalidInput, NotFound
from mint_lib.records import Reference
from mint_lib.registry import CANDIDATE, CHAMPION, check_report, promote_model, rollback_model
from mint_lib.report_records import EvaluationReport, Gate, GateOutcome, Metric
from mint_lib.storage.aliases import Alias


class Move(NamedTuple):
    reference: str
    who: str
    why: str


class FakeAlias(NamedTuple):
    reference: Reference
    log: tuple[Move, ...]
    trail = Alias.trail


class FakeStore:
    """Aliases and reports in memory."""

    def __init__(self, *gates: bool):
        self.models = [refer("model", number) for number in range(1, len(gates) + 1)]
        self.reports = {model: make_report(passed) for model, passed in zip(self.models, gates, strict=True)}
        self.aliases: dict[str, FakeAlias] = {}
        if self.models:
            self.aliases[CANDIDATE] = FakeAlias(self.models[0], ())
        self.rival: Reference | None = None

    def resolve(self, text: str) -> Reference:
        return self.aliases[CANDIDATE].reference if text.endswith(CANDIDATE) else Reference.parse(text)

    def read_json(self, reference: Reference, path: str) -> Any:
        assert path == "report.json"
        return self.reports[reference].model_dump(mode="json")

    def alias(self, kind: str, name: str, alias: str) -> FakeAlias | None:
        found = self.aliases.get(alias)
        if self.rival is not None:
            rival, self.rival = self.rival, None
            self.move_alias(alias, rival, who="rival", why="first", expected=found.reference if found else None)
        return found

    def move_alias(self, alias: str, to: Reference, *, who: str, why: str, expected: Reference | None) -> FakeAlias:
        current = self.aliases.get(alias)
        if (current.reference if current else None) != expected:
            raise Conflict("somebody else moved it")
        self.aliases[alias] = FakeAlias(to, (*(current.log if current else ()), Move(str(to), who, why)))
        return self.aliases[alias]


def refer(kind: str, number: int) -> Reference:
    return Reference.parse(f"{kind}/rare@v{number:06d}#sha256:{number:064x}")


def make_report(passed: bool, *, main: str = "orpo", inputs: dict[str, str] | None = None) -> EvaluationReport:
    rule = GateOutcome(
        metric="top_1",
        system=main,
        over=None,
        bound="value",
        at_least=0.5,
        observed=0.9 if passed else 0.1,
        passed=passed,
    )
    return EvaluationReport(
        name="rare",
        task="rare_disease_ranking",
        main=main,
        headline="",
        statements=(),
        lead="top_1",
        order=(main,),
        metrics={"top_1": Metric(title="Top-1", meaning="", unit="percent", better="higher")},
        systems={},
        roles={main: "student"},
        runs={main: 1},
        comparisons=(),
        slices={},
        gate=Gate(passed=passed, rules=(rule,)),
        inputs=inputs or {},
        counts={},
        synthetic="all",
        seed=1,
        bootstrap_draws=100,
        confidence=0.95,
    )


def promote(store: FakeStore, number: int, **values: str) -> Any:
    return promote_model(store, str(store.models[number - 1]), **({"who": "ada", "why": "better"} | values))  # type: ignore[arg-type]


def rollback(store: FakeStore) -> Any:
    return rollback_model(store, "rare", who="ada", why="drift")  # type: ignore[arg-type]


def test_promote_past_a_passed_gate_moves_champion_with_who_and_why() -> None:
    store = FakeStore(True)
    assert promote(store, 1).log == (Move(str(store.models[0]), "ada", "better"),)


def test_promote_past_a_failed_gate_names_the_rule_and_moves_nothing() -> None:
    store = FakeStore(False)
    with pytest.raises(GateFailed, match=r"Top-1 of ORPO: value at least 50\.0 %; observed 10\.0 %"):
        promote(store, 1)
    assert CHAMPION not in store.aliases


def test_promote_without_a_declared_rule_refuses() -> None:
    store = FakeStore(True)
    store.reports[store.models[0]] = make_report(True).model_copy(update={"gate": Gate(passed=False, rules=())})
    with pytest.raises(GateFailed, match="declares no rule"):
        promote(store, 1)


def test_promote_by_name_takes_the_candidate() -> None:
    store = FakeStore(True)
    assert promote_model(store, "rare", who="ada", why="better").reference == store.models[0]  # type: ignore[arg-type]


def test_promote_of_the_champion_leaves_its_log_alone() -> None:
    store = FakeStore(True)
    assert len(promote(store, 1).log) == len(promote(store, 1).log) == 1


@pytest.mark.parametrize("values", [{"who": " "}, {"why": ""}])
def test_promote_without_who_or_why_refuses(values: dict[str, str]) -> None:
    with pytest.raises(InvalidInput, match="who moves the champion and why"):
        promote(FakeStore(True), 1, **values)


def test_promote_of_a_student_reference_refuses() -> None:
    with pytest.raises(InvalidInput, match="is not a model"):
        promote_model(FakeStore(True), str(refer("student", 1)), who="ada", why="better")  # type: ignore[arg-type]


def test_promote_that_lost_a_race_raises_conflict() -> None:
    store = FakeStore(True, True)
    store.rival = store.models[1]
    with pytest.raises(Conflict):
        promote(store, 1)
    assert store.aliases[CHAMPION].reference == store.models[1]


def test_rollback_goes_back_one_champion_at_a_time() -> None:
    store = FakeStore(True, True, True)
    for number in (1, 2, 3):
        promote(store, number)
    assert rollback(store).reference == store.models[1]
    assert rollback(store).reference == store.models[0]
    with pytest.raises(NotFound, match="first champion"):
        rollback(store)


def test_rollback_after_a_new_promotion_returns_to_the_champion_it_replaced() -> None:
    store = FakeStore(True, True, True)
    promote(store, 1)
    promote(store, 2)
    rollback(store)
    promote(store, 3)
    assert rollback(store).reference == store.models[0]


def test_rollback_without_a_champion_says_so() -> None:
    with pytest.raises(NotFound, match="no champion"):
        rollback(FakeStore(True))


def test_rollback_that_lost_a_race_raises_conflict() -> None:
    store = FakeStore(True, True, True)
    promote(store, 1)
    promote(store, 2)
    store.rival = store.models[2]
    with pytest.raises(Conflict):
        rollback(store)


def test_check_report_of_another_student_refuses() -> None:
    findings = make_report(
        True, inputs={"students.orpo": str(refer("student", 1)), "students.sft": str(refer("student", 2))}
    )
    check_report(findings, refer("student", 1), refer("report", 1))
    with pytest.raises(InvalidInput, match="not about"):
        check_report(findings, refer("student", 2), refer("report", 1))


def test_check_report_takes_any_seed_of_the_main_arm() -> None:
    inputs = {f"students.orpo/seed-{seed}": str(refer("student", seed)) for seed in (1, 2)}
    check_report(make_report(True, inputs=inputs), refer("student", 2), refer("report", 1))
