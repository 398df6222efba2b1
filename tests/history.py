"""A recorded history of what several clients did at once, and whether one object could have answered like that.

Goes in: operations with the moments of their call and their return, on one monotonic clock. Comes out: what is wrong,
in words; nothing if the history can be explained. It knows no store: references are opaque words.

An alias is a compare-and-swap register whose values are unique. Its history is checked in linear time: the successful
moves form one chain, so their order is known and it remains to find a moment for each, between its call and its
return, such that the moments follow the chain and every read falls between the move to its value and the next one
(Wing and Gong, JPDC 1993, for the definition; unique values take away the search, Gibbons and Korach, SIAM J. Computing
1997). A refused move is judged by itself.
"""

import math
import threading
import time
from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple, TypeVar

T = TypeVar("T")
Outcome = Literal["done", "refused", "unknown"]


class Operation(NamedTuple):
    """One call. `unknown` are calls without an answer: they may have taken effect, even after their return."""

    action: Literal["move", "read", "commit", "list", "fetch", "remove"]
    called: float
    returned: float
    outcome: Outcome = "done"
    expected: str | None = None
    """Of a move."""
    value: str | None = None
    """What was moved to, read, committed, fetched or removed; None is the alias that was never set."""
    found: frozenset[str] = frozenset()
    """What a list gave."""
    detail: str = ""
    """What a fetch met instead of the right bytes."""

    @property
    def latest(self) -> float:
        """The last moment at which it can have taken effect."""
        return math.inf if self.outcome == "unknown" else self.returned


class Recorder:
    """Operations of many threads."""

    def __init__(self) -> None:
        self.operations: list[Operation] = []
        self._lock = threading.Lock()

    def record(self, call: Callable[[], T], describe: Callable[[T, float, float], Operation]) -> T:
        """What `call` returns, after `describe` has made an operation of it and of its two moments."""
        called = time.monotonic()
        result = call()
        operation = describe(result, called, time.monotonic())
        with self._lock:
            self.operations.append(operation)
        return result


def check_register(operations: Iterable[Operation]) -> list[str]:
    """Problems of a register's history of `move` and `read`; every value is moved to by one operation only."""
    operations = list(operations)
    moves = [item for item in operations if item.action == "move"]
    reads = [item for item in operations if item.action == "read"]
    chain, problems = _follow_chain(moves, reads)
    place = {None: 0} | {move.value: index + 1 for index, move in enumerate(chain)}
    for move in moves:
        if move.outcome == "done" and move.value not in place:
            problems.append(f"lost update: {move.value} was set, and nothing follows from it")
    problems += [f"{read.value} was read and never set" for read in reads if read.value not in place]
    if problems:
        return problems

    # Bounds of the moment of each move: after the calls of all reads of earlier values, before the returns of all reads
    # of its own and later ones.
    lowest, highest = [-math.inf], [math.inf] * (len(chain) + 2)
    called_in, returned_in = [-math.inf] * (len(chain) + 1), [math.inf] * (len(chain) + 1)
    for read in reads:
        index = place[read.value]
        called_in[index] = max(called_in[index], read.called)
        returned_in[index] = min(returned_in[index], read.returned)
    for index, move in enumerate(chain, 1):
        lowest.append(max(lowest[-1], move.called, called_in[index - 1]))
    for index in range(len(chain), 0, -1):
        highest[index] = min(highest[index + 1], chain[index - 1].latest, returned_in[index])
    for index, move in enumerate(chain, 1):
        if lowest[index] > highest[index]:
            problems.append(f"stale read or wrong order: no moment is left for the move to {move.value}")
    # Each refusal by itself: at some moment of it the register held something else than it expected.
    for move in moves:
        index = place.get(move.expected, -1)
        if move.outcome != "refused" or index < 0:
            continue
        set_before = index == 0 or highest[index] < move.called
        replaced_after = index == len(chain) or lowest[index + 1] > move.returned
        if set_before and replaced_after:
            problems.append(f"the move to {move.value} was refused although {move.expected} stood all the time")
    return problems


def _follow_chain(moves: list[Operation], reads: list[Operation]) -> tuple[list[Operation], list[str]]:
    """The moves that took effect, in their order. An unknown one did if its value was seen or built upon."""
    problems: list[str] = []
    effective = [move for move in moves if move.outcome == "done"]
    seen = {read.value for read in reads} | {move.expected for move in effective}
    unknown = {move.value: move for move in moves if move.outcome == "unknown"}
    # What an unknown move that took effect was built upon took effect as well.
    waiting = [value for value in seen if value in unknown]
    while waiting:
        move = unknown.pop(waiting.pop(), None)
        if move is not None:
            effective.append(move)
            if move.expected in unknown:
                waiting.append(move.expected)
    successors: dict[str | None, list[Operation]] = {}
    for move in effective:
        successors.setdefault(move.expected, []).append(move)
    chain: list[Operation] = []
    current: str | None = None
    while found := successors.pop(current, []):
        if len(found) > 1:
            problems.append(f"two winners: {', '.join(str(move.value) for move in found)} all replaced {current}")
        chain.append(found[0])
        current = found[0].value
    for move in moves:
        if move.outcome == "refused" and move.value in seen:
            problems.append(f"the move to {move.value} was refused and took effect")
    return chain, problems


def check_versions(operations: Iterable[Operation], *, final: Iterable[str]) -> list[str]:
    """Problems of a history of `commit`, `list`, `fetch` and `remove`; `final` is what can be read in the end.

    A version is spelled `v000001#digest`, so that what stands before the # is committed once.
    """
    operations, final = list(operations), set(final)
    commits = [item for item in operations if item.action == "commit"]
    removed = {str(item.value): item.called for item in operations if item.action == "remove"}
    problems = []
    winners: dict[str, str] = {}
    for commit in commits:
        if commit.outcome == "done":
            number = str(commit.value).partition("#")[0]
            if number in winners:
                problems.append(f"two winners: {winners[number]} and {commit.value}")
            winners[number] = str(commit.value)
    possible = {str(item.value): item.called for item in commits if item.outcome != "refused"}
    for value in winners.values():
        if value not in final and value not in removed:
            problems.append(f"lost commit: {value} cannot be read in the end")
    problems += [f"{value} can be read in the end and was never committed" for value in final - set(possible)]
    due = sorted((item.returned, str(item.value)) for item in commits if item.outcome == "done")
    for operation in operations:
        if operation.action == "fetch" and operation.outcome == "refused":
            gone = removed.get(str(operation.value), math.inf) <= operation.returned
            if not gone or operation.detail != "NotFound":
                problems.append(f"torn version: {operation.value} was read as {operation.detail}")
        if operation.action != "list" or operation.outcome != "done":
            continue
        for returned, value in due:
            if returned >= operation.called:
                break
            if value not in operation.found and removed.get(value, math.inf) > operation.returned:
                problems.append(f"lost commit: {value} was committed before a list that lacks it")
        for value in operation.found:
            if possible.get(value, math.inf) > operation.returned:
                problems.append(f"a list has {value}, which nobody had begun to commit")
    return problems
