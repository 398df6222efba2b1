"""What the gate found: one outcome for each check, and the figures that the next version is compared with.

Goes in: measured values and thresholds. Comes out: `GateReport`, which holds case ids and batches but no content of a
case. A value that is missing or not a number refuses: nothing passes because it could not be measured.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Literal

from mint_lib.records import Record

SHOWN_IDS = 20
"""Case ids and batches that an outcome names at most."""
Status = Literal["passed", "refused", "off", "not_applicable", "reported"]


class CheckOutcome(Record):
    """One check."""

    check: str
    """Name of the check, for instance `near_duplicates`."""
    title: str
    status: Status
    """`off`: switched off by the recipe. `not_applicable`: these data have nothing to check. `reported`: measured, and
    the recipe says that it does not decide."""
    measured: float | None
    """None: not measured, which passes only as `off` or `not_applicable`."""
    threshold: float | None
    bound: Literal["at_most", "at_least"]
    sentence: str
    """What was found, for people."""
    counts: dict[str, int]
    figures: dict[str, float | None]
    case_ids: tuple[str, ...] = ()
    """Some of the cases concerned."""
    batches: tuple[str, ...] = ()
    """The batches concerned, the most conspicuous first."""

    @property
    def passed(self) -> bool:
        """Whether this outcome lets the data through."""
        return self.status != "refused"


class GateStatistics(Record):
    """What the next version is compared with."""

    num_cases: dict[str, int]
    """By split."""
    num_pairs: dict[str, int]
    """By split; empty where only cases were judged."""
    label_counts: dict[str, int]
    """Training cases of each label; with pairs, those whose first chosen label it is."""
    batches: dict[str, int]
    """Cases of each batch."""


class GateReport(Record):
    """The verdict on one version."""

    name: str
    judged: Literal["cases", "pairs"]
    reads: Literal["text", "image"]
    passed: bool
    outcomes: tuple[CheckOutcome, ...]
    statistics: GateStatistics

    @property
    def refusals(self) -> tuple[CheckOutcome, ...]:
        """The checks that refuse the data."""
        return tuple(outcome for outcome in self.outcomes if not outcome.passed)


def decide(
    check: str,
    title: str,
    measured: float | None,
    threshold: float | None,
    sentence: str,
    *,
    bound: Literal["at_most", "at_least"] = "at_most",
    decides: bool = True,
    counts: Mapping[str, int] | None = None,
    figures: Mapping[str, float] | None = None,
    case_ids: Sequence[str] = (),
    batches: Sequence[str] = (),
) -> CheckOutcome:
    """The outcome of comparing `measured` with `threshold`; None as threshold is a check that is switched off."""
    value = measured if measured is not None and math.isfinite(measured) else None
    if threshold is None:
        status: Status = "off"
    elif not decides:
        status = "reported"
    elif value is None:
        status = "refused"
        sentence = f"This could not be measured, which refuses the data. {sentence}"
    else:
        status = "passed" if (value <= threshold if bound == "at_most" else value >= threshold) else "refused"
    return CheckOutcome(
        check=check,
        title=title,
        status=status,
        measured=value,
        threshold=threshold,
        bound=bound,
        sentence=sentence,
        counts=dict(counts or {}),
        figures={name: number if math.isfinite(number) else None for name, number in (figures or {}).items()},
        case_ids=tuple(case_ids[:SHOWN_IDS]),
        batches=tuple(batches[:SHOWN_IDS]),
    )


def decide_share(
    check: str,
    title: str,
    num_found: int,
    num_all: int,
    threshold: float | None,
    sentence: str,
    *,
    counts: Mapping[str, int] | None = None,
    case_ids: Sequence[str] = (),
    batches: Sequence[str] = (),
) -> CheckOutcome:
    """The outcome for `num_found` of `num_all`; of none at all, no share can be measured."""
    return decide(
        check,
        title,
        num_found / num_all if num_all else None,
        threshold,
        sentence,
        counts=counts,
        case_ids=case_ids,
        batches=batches,
    )


def skip(check: str, title: str, status: Literal["off", "not_applicable"], sentence: str) -> CheckOutcome:
    """The outcome of a check that was not made."""
    return CheckOutcome(
        check=check,
        title=title,
        status=status,
        measured=None,
        threshold=None,
        bound="at_most",
        sentence=sentence,
        counts={},
        figures={},
    )
