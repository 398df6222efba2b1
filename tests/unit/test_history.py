"""The checker of histories: right ones pass, and every planted violation is named."""

import itertools
import random
from typing import Any

import pytest
from history import Operation, Outcome, check_register, check_versions


def move(expected: str | None, value: str, called: float, returned: float, outcome: Outcome = "done") -> Operation:
    return Operation("move", called, returned, outcome, expected=expected, value=value)


def read(value: str | None, called: float, returned: float) -> Operation:
    return Operation("read", called, returned, value=value)


def commit(value: str, called: float, returned: float, outcome: Outcome = "done") -> Operation:
    return Operation("commit", called, returned, outcome, value=value)


def simulate(seed: int, num_steps: int = 60) -> list[Operation]:
    """A history of a real register: every operation takes effect at a moment between its call and its return."""
    chance = random.Random(seed)
    current: str | None = None
    values: list[str | None] = [None]
    history = []
    for number in range(num_steps):
        moment = float(number)
        called, returned = moment - chance.random() * 5, moment + chance.random() * 5
        if chance.random() < 0.5:
            history.append(read(current, called, returned))
            continue
        expected = current if chance.random() < 0.7 else chance.choice(values)
        value, outcome = f"v{number}", "refused"
        if expected == current:
            current, outcome = value, "done"
            values.append(value)
        if chance.random() < 0.2:
            outcome = "unknown"
        history.append(move(expected, value, called, returned, outcome))
    chance.shuffle(history)
    return history


def explains(history: list[Operation]) -> bool:
    """Whether some order of the operations, and some fate of the unknown ones, explains a short history: by trial."""
    unknown = [item for item in history if item.outcome == "unknown"]
    certain = [item for item in history if item.outcome != "unknown"]
    for size in range(len(unknown) + 1):
        for chosen in itertools.combinations(unknown, size):
            if _has_order([*certain, *chosen], None):
                return True
    return False


def _has_order(left: list[Operation], current: str | None) -> bool:
    if not left:
        return True
    first_return = min(item.latest for item in left)
    for item in left:
        if item.called > first_return:
            continue
        rest = [other for other in left if other is not item]
        if item.action == "read":
            possible = item.value == current and _has_order(rest, current)
        elif item.outcome == "refused":
            possible = item.expected != current and _has_order(rest, current)
        else:
            possible = item.expected == current and _has_order(rest, item.value)
        if possible:
            return True
    return False


@pytest.mark.parametrize("seed", range(30))
def test_register_that_is_right_has_no_problem(seed: int):
    assert check_register(simulate(seed)) == []


@pytest.mark.parametrize("seed", range(150))
def test_register_checker_agrees_with_trial_of_every_order(seed: int):
    chance = random.Random(seed)
    history = simulate(seed, 6)
    if seed % 2:
        # One read gives something else: sometimes that can be explained still.
        spot = chance.randrange(len(history))
        values = [None, *(item.value for item in history if item.action == "move")]
        history[spot] = read(chance.choice(values), history[spot].called, history[spot].returned)
    assert (check_register(history) == []) == explains(history)


@pytest.mark.parametrize(
    ("history", "problem"),
    [
        ([move(None, "a", 0, 1), move("a", "b", 2, 3), move("a", "c", 2, 3)], "two winners"),
        ([move(None, "a", 0, 1), move("b", "c", 2, 3)], "lost update"),
        ([move(None, "a", 0, 1), move("a", "b", 2, 3), read("a", 4, 5)], "stale read"),
        ([move(None, "a", 0, 1), read(None, 2, 3)], "stale read"),
        ([read("a", 0, 1), move(None, "a", 2, 3)], "stale read"),
        ([move(None, "a", 0, 9), read("a", 1, 2), read(None, 3, 4)], "stale read"),
        ([move(None, "a", 0, 1), read("z", 2, 3)], "never set"),
        ([move(None, "a", 0, 1), move(None, "b", 0, 1, "refused"), read("b", 2, 3)], "took effect"),
        ([move(None, "a", 0, 1, "unknown"), move(None, "b", 0, 1, "unknown"), read("a", 2, 3), read("b", 4, 5)], "two"),
        ([move(None, "a", 0, 1), move("a", "b", 2, 3, "refused"), read("a", 4, 5)], "stood all the time"),
        ([move("a", "b", 0, 1), move(None, "a", 2, 3)], "stale read or wrong order"),
    ],
)
def test_register_with_a_planted_violation_is_found(history: list[Operation], problem: str):
    problems = check_register(history)
    assert any(problem in item for item in problems), problems


@pytest.mark.parametrize(
    "history",
    [
        [move(None, "a", 0, 1, "unknown"), read(None, 2, 3)],
        [move(None, "a", 0, 1, "unknown"), read(None, 2, 3), read("a", 4, 5)],
        [move(None, "a", 0, 9), read("a", 1, 2)],
        [move(None, "a", 0, 1, "unknown"), move("a", "b", 2, 3)],
        [move(None, "a", 0, 1), move(None, "b", 0.5, 2, "refused")],
    ],
)
def test_register_with_an_open_end_has_no_problem(history: list[Operation]):
    assert check_register(history) == []


def list_all(*values: str, called: float, returned: float) -> Operation:
    return Operation("list", called, returned, found=frozenset(values))


def fetch(value: str, called: float, returned: float, detail: str = "") -> Operation:
    return Operation("fetch", called, returned, "refused" if detail else "done", value=value, detail=detail)


@pytest.mark.parametrize(
    ("history", "final", "problem"),
    [
        ([commit("1#a", 0, 1)], [], "lost commit"),
        ([commit("1#a", 0, 1), commit("1#b", 0, 1)], ["1#a"], "two winners"),
        ([commit("1#a", 0, 1), list_all(called=2, returned=3)], ["1#a"], "a list that lacks it"),
        ([commit("1#a", 4, 5), list_all("1#a", called=2, returned=3)], ["1#a"], "nobody had begun"),
        ([commit("1#a", 0, 1), fetch("1#a", 2, 3, "IntegrityError")], ["1#a"], "torn"),
        ([commit("1#a", 0, 1), fetch("1#a", 2, 3, "NotFound")], ["1#a"], "torn"),
        ([commit("1#a", 0, 1, "refused")], ["1#a"], "never committed"),
    ],
)
def test_versions_with_a_planted_violation_are_found(history: list[Operation], final: list[str], problem: str):
    problems = check_versions(history, final=final)
    assert any(problem in item for item in problems), problems


def test_versions_that_are_right_have_no_problem():
    removal: dict[str, Any] = {"action": "remove", "value": "1#a"}
    history = [
        commit("1#a", 0, 1),
        commit("2#b", 0, 3, "unknown"),
        commit("3#c", 2, 3),
        list_all("1#a", called=1.5, returned=1.6),
        Operation(called=4, returned=5, **removal),
        list_all("2#b", "3#c", called=6, returned=7),
        fetch("1#a", 6, 7, "NotFound"),
    ]
    assert check_versions(history, final=["2#b", "3#c"]) == []
    assert check_versions(history, final=["3#c"]) == []
