"""The int8 gate on students whose answers are known, and warm answers whose numbers cannot be."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import pytest

from mint_lib.engine.requests import Event, Failed, Ranked, RankRequest, Started
from mint_lib.errors import ComputationFailed, DeadlineExceeded, GateFailed, InvalidInput, PromptTooLong
from mint_lib.records import Case, Reference
from mint_lib.server.asking import rank_case
from mint_lib.server.int8_gate import check_int8, wilson_interval
from mint_lib.server.students import EncodedPrompt, ServedStudent

MODEL = Reference.parse(f"model/m@v000001#sha256:{'1' * 64}")
CASES = Reference.parse(f"cases/c@v000001#sha256:{'2' * 64}")
THIRDS = (math.log(0.5), math.log(0.3), math.log(0.2))
Answer = Callable[[int], Sequence[float]]


class Ticket:
    is_cancelled = False

    def cancel(self) -> None:
        self.is_cancelled = True


class Engine:
    """Answers at once; `answer` gives log-probabilities from the number of the case."""

    def __init__(self, answer: Answer):
        self.answer = answer

    def submit(self, request: RankRequest, deliver: Callable[[Event], None]) -> Ticket:
        deliver(Started(queue_seconds=0.0, num_prompt_tokens=1, num_cached_tokens=0))
        values = tuple(self.answer(request.prompt_ids[0]))
        deliver(Ranked(log_probabilities=values, is_exact=True, num_proven=3, unreached_mass=0.0, num_label_tokens=3))
        return Ticket()


@dataclasses.dataclass
class Student:
    """As much of a served student as the gate needs."""

    engine: Any
    reference: Reference = MODEL
    adapter: str = "a"
    precision: str = "float32"
    labels: tuple[int, ...] = (0, 1, 2)
    trie: None = None

    modality: str = "text"

    def encode_case(self, case: str | bytes) -> EncodedPrompt:
        text = case if isinstance(case, str) else case.decode()
        if text == "too long":
            raise PromptTooLong("x")
        return EncodedPrompt((int(text.removeprefix("case ")),))


class CaseStore:
    """Holds a model's card and its cases."""

    def __init__(self, texts: Sequence[str], inputs: dict[str, str] | None = None):
        self.texts = texts
        self.inputs = {"cases": str(CASES)} if inputs is None else inputs

    def read_bytes(self, reference: Reference, path: str) -> bytes:
        from mint_lib.report_records import ModelCard

        card = ModelCard(
            name="m",
            base_model="tiny",
            base_digest="x",
            method="orpo",
            student="x",
            inputs=self.inputs,
            teacher_digest="x",
            headline="x",
            metrics={},
            gate_passed=True,
            synthetic="all",
            licence="x",
            intended_use="x",
            limits=(),
        )
        return card.model_dump_json().encode()

    def read_rows(self, reference: Reference, path: str, row_type: type[Case]) -> list[Case]:
        assert reference == CASES
        half = len(self.texts) // 2
        texts = {"validation": self.texts[:half], "test": self.texts[half:]}[path]
        return [
            Case(case_id=text, group_id=text, text=text, label_id="x", source="t", synthetic=True) for text in texts
        ]


def check(num_cases: int, num_different: int, *, extra: Sequence[str] = ()) -> Any:
    texts = [*(f"case {number}" for number in range(num_cases)), *extra]
    exact = Student(Engine(lambda _: THIRDS))
    quantised = Student(Engine(lambda number: THIRDS[::-1] if number < num_different else THIRDS), precision="int8")
    return check_int8(cast(Any, CaseStore(texts)), cast(ServedStudent, exact), cast(ServedStudent, quantised))


@pytest.mark.parametrize(("num_cases", "num_different"), [(20, 0), (100, 0), (200, 0), (200, 1)])
def test_gate_accepts_at_995_per_mille_and_above(num_cases: int, num_different: int) -> None:
    found = check(num_cases, num_different)
    assert (found.num_cases, found.num_agreeing) == (num_cases, num_cases - num_different)
    assert found.low < found.agreement <= found.high
    assert found.cases == str(CASES)


@pytest.mark.parametrize(("num_cases", "num_different"), [(20, 1), (100, 1), (199, 1), (200, 2), (200, 200)])
def test_gate_refuses_below_with_the_numbers(num_cases: int, num_different: int) -> None:
    numbers = rf"{num_cases - num_different} of {num_cases} cases .*95 % interval.* Serve in float32"
    with pytest.raises(GateFailed, match=numbers):
        check(num_cases, num_different)


@pytest.mark.parametrize("num_cases", [0, 1, 19])
def test_gate_refuses_what_it_cannot_judge(num_cases: int) -> None:
    with pytest.raises(GateFailed, match=rf"has {num_cases} .* 20 are needed"):
        check(num_cases, 0)


def test_gate_asks_at_most_200_cases_and_skips_those_that_do_not_fit() -> None:
    assert check(500, 0).num_cases == 200
    assert check(30, 0, extra=["too long"] * 10).num_cases == 30


def test_gate_of_a_model_that_does_not_name_its_cases_refuses() -> None:
    student = cast(ServedStudent, Student(Engine(lambda _: THIRDS)))
    with pytest.raises(InvalidInput, match="which cases"):
        check_int8(cast(Any, CaseStore([], inputs={})), student, student)


@pytest.mark.parametrize(
    ("num_hits", "num_cases", "expected"),
    # From Newcombe, Statistics in Medicine 17 (1998), table I, method 3 (score, no continuity correction).
    [(81, 263, (0.2553, 0.3662)), (15, 148, (0.0624, 0.1605)), (0, 20, (0.0, 0.1611)), (1, 29, (0.0061, 0.1718))],
)
def test_wilson_interval_is_the_published_one(num_hits: int, num_cases: int, expected: tuple[float, float]) -> None:
    assert wilson_interval(num_hits, num_cases) == pytest.approx(expected, abs=5e-5)


@pytest.mark.parametrize(
    "values",
    [
        (math.nan, *THIRDS[1:]),
        (-math.inf, *THIRDS[1:]),
        (math.inf, *THIRDS[1:]),
        (0.0, 0.0, 0.0),
        (-9.0, -9.0, -9.0),
        THIRDS[:2],
        (),
    ],
    ids=str,
)
def test_ranking_whose_numbers_are_no_probabilities_is_refused(values: tuple[float, ...]) -> None:
    with pytest.raises(ComputationFailed, match="no probabilities of its 3 labels"):
        rank_case(cast(ServedStudent, Student(Engine(lambda _: values))), "case 1", timeout_seconds=1)


def test_ranking_that_failed_raises_the_engine_s_error() -> None:
    class Failing(Engine):
        def submit(self, request: RankRequest, deliver: Callable[[Event], None]) -> Ticket:
            deliver(Failed(error=ComputationFailed("of the engine")))
            return Ticket()

    with pytest.raises(ComputationFailed, match="of the engine"):
        rank_case(cast(ServedStudent, Student(Failing(lambda _: THIRDS))), "case 1", timeout_seconds=1)


def test_ranking_that_never_comes_is_cancelled_and_named() -> None:
    ticket = Ticket()

    class Silent(Engine):
        def submit(self, request: RankRequest, deliver: Callable[[Event], None]) -> Ticket:
            return ticket

    with pytest.raises(DeadlineExceeded, match=r"within 0\.01 s"):
        rank_case(cast(ServedStudent, Student(Silent(lambda _: THIRDS))), "case 1", timeout_seconds=0.01)
    assert ticket.is_cancelled
