"""Two sides of a comparison: run in turn, and judged against a target in one line.

Goes in: functions that do the same work, or figures of both sides that were measured elsewhere. Comes out: a line with
the median ratio, its range, the target and whether it is met. It knows nothing of what is measured.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple


class Timing(NamedTuple):
    """Seconds of one run."""

    wall: float
    cpu: float
    """Of the whole process, all threads."""


class Target(NamedTuple):
    """What a ratio is to be."""

    bound: Literal["at least", "at most"]
    ratio: float

    def judge(self, ratio: float) -> str:
        """Whether `ratio` is as the target says."""
        is_met = ratio >= self.ratio if self.bound == "at least" else ratio <= self.ratio
        return "met" if is_met else "MISSED"


def time_call(call: Callable[[], object]) -> Timing:
    """Seconds of one call."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return Timing(time.perf_counter() - wall, time.process_time() - cpu)


def take_turns(sides: Mapping[str, Callable[[], object]], *, num_rounds: int) -> dict[str, list[Timing]]:
    """Timings of all sides, one a round; each round starts with the side that the one before ended with."""
    timings: dict[str, list[Timing]] = {side: [] for side in sides}
    for number in range(num_rounds):
        for side in reversed(sides) if number % 2 else sides:
            timings[side].append(time_call(sides[side]))
    return timings


def compare_timings(
    what: str,
    over: Sequence[Timing],
    under: Sequence[Timing],
    target: Target,
    *,
    clock: Literal["wall", "cpu"] = "wall",
) -> str:
    """The line of `over` divided by `under`, round by round on `clock`; both clocks are told."""
    pairs = list(zip(over, under, strict=True))
    ratios = [getattr(top, clock) / getattr(bottom, clock) for top, bottom in pairs]
    seconds = " | ".join(
        f"{name} s {statistics.median(getattr(top, name) for top, _ in pairs):.3g} / "
        f"{statistics.median(getattr(bottom, name) for _, bottom in pairs):.3g}"
        for name in Timing._fields
    )
    return compare_figures(f"{what} [{clock}]", ratios, target, note=seconds)


def compare_figures(what: str, ratios: Sequence[float], target: Target, *, note: str) -> str:
    """The line of the ratios of all rounds."""
    median = statistics.median(ratios)
    return (
        f"{what}: {median:.3g} ({min(ratios):.3g} to {max(ratios):.3g}, {len(ratios)} rounds), "
        f"target {target.bound} {target.ratio:g}: {target.judge(median)} | {note}"
    )
