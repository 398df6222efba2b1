"""Cases added to a version: where they go, what is refused, and what is not stored or ranked again."""

import json
import pathlib
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest
from listed_rows import ListSource, row
from pydantic import BaseModel, ConfigDict

from mint_lib import data as data_module
from mint_lib import teacher as teacher_module
from mint_lib.case_rows import Row
from mint_lib.data import DataConfig, DataSource, prepare_cases
from mint_lib.errors import GateFailed, InvalidInput, RefusedData
from mint_lib.gate.report import GateReport
from mint_lib.records import SPLITS, Case, Ranking, Reference
from mint_lib.store import Store
from mint_lib.teacher import Teacher, TeacherConfig, rank_cases

GiveRows = Callable[[list[Row]], None]


@pytest.fixture
def give_rows(monkeypatch: pytest.MonkeyPatch) -> GiveRows:
    """A function that makes the stage read these rows."""

    def give(rows: list[Row]) -> None:
        def open_source(config: Any, *, wanted: Any = None, where: str = "data") -> DataSource:
            source = ListSource(ListSource.Config(), wanted=wanted)
            source.rows = tuple(rows)
            return source

        monkeypatch.setattr(data_module, "open_source", open_source)

    return give


def config(**changes: Any) -> DataConfig:
    return DataConfig.model_validate({"name": "small", "seed": 1, "source": "list"} | changes)


@pytest.fixture
def base(store: Store, give_rows: GiveRows) -> Reference:
    """A version of 40 cases."""
    give_rows([row(number) for number in range(40)])
    return prepare_cases(config(), store=store)


def read(store: Store, reference: Reference) -> dict[str, dict[str, Case]]:
    return {split: {case.case_id: case for case in store.iterate_rows(reference, split, Case)} for split in SPLITS}


def split_of(found: dict[str, dict[str, Case]], case_id: str) -> str:
    return next(split for split, cases in found.items() if case_id in cases)


def test_added_cases_follow_their_patient_and_content(store: Store, give_rows: GiveRows, base: Reference) -> None:
    before = read(store, base)
    known = {split: next(iter(cases.values())) for split, cases in before.items()}
    rows = [row(100 + place, group_id=case.group_id) for place, case in enumerate(known.values())]
    rows += [row(200 + place, text=f" {(case.text or '').upper()} ") for place, case in enumerate(known.values())]
    # A new patient who shares a text with a new case of a known patient.
    rows += [row(300, group_id="new", text="note 100")]
    give_rows(rows)
    gate = {"max_near_duplicate_share": None}
    after = read(store, prepare_cases(config(gate=gate), store=store, base=base))
    for place, split in enumerate(known):
        assert split_of(after, f"case-{100 + place}") == split
        assert split_of(after, f"case-{200 + place}") == split
    assert split_of(after, "case-300") == split_of(after, "case-100")
    for split in SPLITS:
        assert list(after[split])[: len(before[split])] == list(before[split])


def test_added_cases_of_new_patients_are_dealt_by_weight(store: Store, give_rows: GiveRows, base: Reference) -> None:
    give_rows([row(number) for number in range(100, 200)])
    reference = prepare_cases(config(split={"train": 7, "validation": 1, "test": 2}), store=store, base=base)
    counts = store.record(reference).counts
    assert [counts[f"added/{split}/cases"] for split in SPLITS] == [70, 10, 20]
    assert sum(counts[f"{split}/cases"] for split in SPLITS) == 140
    for split in SPLITS:
        cases = store.read_rows(reference, split, Case)
        assert counts[f"{split}/patients"] == len({case.group_id for case in cases})
    assert store.record(reference).inputs["base"] == str(base)


def test_added_version_stores_only_what_is_new(store: Store, give_rows: GiveRows, base: Reference) -> None:
    give_rows([row(number) for number in range(100, 120)])
    files = store.files(prepare_cases(config(), store=store, base=base))
    for split in SPLITS:
        old, new = files[f"{split}/000000.parquet"], files[f"{split}/000001.parquet"]
        assert old.stored_in == base.version
        assert old.holds_same(store.files(base)[f"{split}/000000.parquet"])
        assert new.stored_in == ""
    assert files["labels.json"].stored_in == base.version


def test_added_twice_is_refused_and_nothing_is_written(store: Store, give_rows: GiveRows, base: Reference) -> None:
    give_rows([row(number) for number in range(40)])
    with pytest.raises(RefusedData, match="None of the 40 cases is new"):
        prepare_cases(config(), store=store, base=base)
    assert store.list_versions("cases", "small") == [base.version]


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"case_id": "case-1"}, "case id of another case"),
        ({"split": "test"}, "assigned to another split"),
        ({"text": "note 3"}, "belongs to several splits"),
    ],
)
def test_added_case_that_does_not_fit_is_refused_by_cause_without_content(
    store: Store, give_rows: GiveRows, changes: dict[str, Any], cause: str
) -> None:
    give_rows([row(0, split="train"), row(1, split="train"), row(2, split="validation"), row(3, split="test")])
    base = prepare_cases(config(), store=store)
    give_rows([row(100, **{"group_id": "patient-0", "text": "secret words"} | changes)])
    with pytest.raises(RefusedData, match=cause) as refused:
        prepare_cases(config(), store=store, base=base)
    assert "secret" not in str(refused.value)
    assert store.list_versions("cases", "small") == [base.version]


def test_added_cases_keep_to_the_few_labels_allowed(store: Store, give_rows: GiveRows) -> None:
    give_rows([row(number) for number in range(40)])
    base = prepare_cases(config(labelled_per_label=3), store=store)
    give_rows([row(number) for number in range(100, 140)])
    after = prepare_cases(config(labelled_per_label=4), store=store, base=base)
    labelled = [case for case in store.read_rows(after, "train", Case) if case.label_id]
    assert sum(case.label_id == "D:1" for case in labelled) == 4
    assert sum(case.label_id == "D:2" for case in labelled) == 4


def test_added_cases_carry_the_name_of_their_delivery(store: Store, give_rows: GiveRows, base: Reference) -> None:
    give_rows([row(100), row(101, attributes={"batch": "own"})])
    after = read(store, prepare_cases(config(batch="may-2026"), store=store, base=base))
    assert after[split_of(after, "case-100")]["case-100"].attributes["batch"] == "may-2026"
    assert after[split_of(after, "case-101")]["case-101"].attributes["batch"] == "own"


def test_added_cases_split_in_another_way_are_refused(store: Store, give_rows: GiveRows, base: Reference) -> None:
    give_rows([row(100)])
    with pytest.raises(InvalidInput, match="was split by patient"):
        prepare_cases(config(split_by="image"), store=store, base=base)


def test_added_cases_that_the_gate_refuses_lie_in_quarantine(
    store: Store, give_rows: GiveRows, base: Reference
) -> None:
    give_rows([row(number, text="the very same words", split="train") for number in range(100, 140)])
    with pytest.raises(GateFailed, match="quarantine/small@v000001") as refused:
        prepare_cases(config(), store=store, base=base)
    assert "very same" not in str(refused.value)
    assert store.list_versions("cases", "small") == [base.version]
    quarantined = store.resolve("quarantine/small")
    assert len(store.read_rows(quarantined, "train", Case)) == 40
    report = GateReport.model_validate(store.read_json(quarantined, "gate.json"))
    assert [outcome.check for outcome in report.refusals] == ["near_duplicate_texts"]


class Toy(Teacher):
    """Knows the label of a case by its number, and counts what it is asked."""

    fitted = 0
    asked: ClassVar[list[str]] = []
    is_wrong = False

    class Config(BaseModel):
        model_config = ConfigDict(extra="forbid", frozen=True)

    def fit(self, train: Any, validation: Any) -> dict[str, Any]:
        Toy.fitted += 1
        return {}

    def score(self, cases: Any) -> np.ndarray:
        Toy.asked += [case.case_id for case in cases]
        numbers = np.array([int(case.case_id.removeprefix("case-")) + Toy.is_wrong for case in cases], dtype=int)
        return np.where(numbers[:, None] % 2 == np.arange(2), 0.0, -1.0 - numbers[:, None] / 1000)

    def save(self, folder: pathlib.Path) -> None:
        (folder / "toy.json").write_text("{}")

    @classmethod
    def load(cls, folder: pathlib.Path, labels: Any) -> "Toy":
        assert (folder / "toy.json").is_file()
        return cls(None, labels, seed=0)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> TeacherConfig:
    monkeypatch.setattr(teacher_module, "load_plugin", lambda *_, **__: Toy)
    Toy.fitted, Toy.asked, Toy.is_wrong = 0, [], False
    return TeacherConfig.model_validate(
        {"name": "small", "seed": 1, "model": "toy", "floor": {"metric": "top_1", "value": 0.9}}
    )


def test_teacher_ranks_only_what_was_added(
    store: Store, give_rows: GiveRows, base: Reference, toy: TeacherConfig
) -> None:
    first = rank_cases(toy, store=store, cases=base)
    give_rows([row(number) for number in range(100, 120)])
    grown = prepare_cases(config(), store=store, base=base)
    Toy.asked = []
    second = rank_cases(toy, store=store, cases=grown, previous=first)
    assert sorted(Toy.asked) == sorted(f"case-{number}" for number in range(100, 120))
    assert Toy.fitted == 1
    digests = set()
    for split in SPLITS:
        before, after = (store.read_rows(item, split, Ranking) for item in (first, second))
        assert after[: len(before)] == before
        assert [ranking.case_id for ranking in after] == [
            case.case_id for case in store.iterate_rows(grown, split, Case)
        ]
        digests |= {ranking.teacher_digest for ranking in after}
        assert store.files(second)[f"{split}/000000.parquet"].stored_in == first.version
    assert len(digests) == 1
    facts = json.loads(store.read_bytes(second, "qualification.json"))
    assert facts["num_taken_over"] == 40
    assert facts["num_cases"] == len(store.read_rows(grown, "validation", Case))
    # What is recovered from rankings for the qualification is what scores would have given.
    whole = json.loads(store.read_bytes(rank_cases(toy, store=store, cases=grown), "qualification.json"))
    assert facts["metrics"]["top_1"] == whole["metrics"]["top_1"]
    assert facts["nll_before"] == pytest.approx(whole["nll_before"], rel=0.2)


def test_teacher_that_is_no_longer_good_enough_is_refused(
    store: Store, give_rows: GiveRows, base: Reference, toy: TeacherConfig
) -> None:
    first = rank_cases(toy, store=store, cases=base)
    give_rows([row(number, split="validation") for number in range(100, 140)])
    grown = prepare_cases(config(), store=store, base=base)
    Toy.is_wrong = True
    with pytest.raises(GateFailed, match=r"its floor is 0\.9"):
        rank_cases(toy, store=store, cases=grown, previous=first)
    assert store.list_versions("rankings", "small") == [first.version]


def test_teacher_refuses_rankings_of_other_cases_or_another_teacher(
    store: Store, give_rows: GiveRows, base: Reference, toy: TeacherConfig
) -> None:
    first = rank_cases(toy, store=store, cases=base)
    give_rows([row(number) for number in range(50, 90)])
    other = prepare_cases(config(name="other"), store=store)
    with pytest.raises(InvalidInput, match="does not begin with the same shards"):
        rank_cases(toy, store=store, cases=other, previous=first)
    changed = toy.model_copy(update={"seed": 2})
    with pytest.raises(InvalidInput, match="seed differ"):
        rank_cases(changed, store=store, cases=base, previous=first)
