"""The int8 gate: 8-bit weights are served only where they leave the student's answers as they were.

Goes in: one student loaded twice, as trained and in int8, and the store that holds its cases. Comes out: how often both
put the same label first on cases of the student's own validation and test splits, or a refusal with the numbers.
"""

import logging
import math
from typing import TYPE_CHECKING

import numpy

from mint_lib.errors import GateFailed, PromptTooLong
from mint_lib.records import Case, Record
from mint_lib.server.asking import rank_case
from mint_lib.server.stored_student import find_cases
from mint_lib.server.students import ServedStudent

if TYPE_CHECKING:
    from mint_lib.store import Store

logger = logging.getLogger(__name__)
MIN_AGREEMENT = 0.995
MIN_CASES = 20
NUM_CASES = 200
"""The smallest number at which one case that differs is still within 99.5 %."""
_RANK_SECONDS = 60.0
_Z95 = 1.959964
_SEED = 20


class Int8Agreement(Record):
    """What the gate found."""

    cases: str
    """Reference of the cases."""
    num_cases: int
    num_agreeing: int
    agreement: float
    low: float
    """Lower end of the 95 % interval."""
    high: float


def check_int8(store: "Store", exact: ServedStudent, quantised: ServedStudent) -> Int8Agreement:
    """How often `quantised` puts the same label first as `exact`, on up to 200 of the model's own cases.

    Raises:
        GateFailed: they agree on less than 99.5 % of the cases, or there are fewer than 20.
    """
    reference = find_cases(store, exact.reference)
    shown = [
        content
        for split in ("validation", "test")
        for case in store.read_rows(reference, split, Case)
        if (content := _show(case, exact))
    ]
    num_agreeing = num_cases = 0
    for place in numpy.random.default_rng(_SEED).permutation(len(shown)):
        if num_cases == NUM_CASES:
            break
        try:
            firsts = [_first_label(student, shown[place]) for student in (exact, quantised)]
        except PromptTooLong:
            continue
        num_cases += 1
        num_agreeing += firsts[0] == firsts[1]
    if num_cases < MIN_CASES:
        raise GateFailed(
            f"int8 cannot be judged for {exact.reference}: {reference} has {num_cases} validation and test cases that "
            f"it can read, and {MIN_CASES} are needed. Serve in {exact.precision}."
        )
    low, high = wilson_interval(num_agreeing, num_cases)
    found = Int8Agreement(
        cases=str(reference),
        num_cases=num_cases,
        num_agreeing=num_agreeing,
        agreement=num_agreeing / num_cases,
        low=low,
        high=high,
    )
    logger.info("int8 gate: %d of %d cases agree for %s", num_agreeing, num_cases, exact.reference)
    if found.agreement < MIN_AGREEMENT:
        raise GateFailed(
            f"int8 changes the answers of {exact.reference}: the first label stays the same on {num_agreeing} of "
            f"{num_cases} cases ({found.agreement:.1%}, 95 % interval {low:.1%} to {high:.1%}), and "
            f"{MIN_AGREEMENT:.1%} are needed. Serve in {exact.precision}."
        )
    return found


def wilson_interval(num_hits: int, num_cases: int) -> tuple[float, float]:
    """95 % score interval of a share (Wilson 1927); unlike a bootstrap it is no point where all cases agree."""
    share, z2 = num_hits / num_cases, _Z95**2
    centre = (share + z2 / (2 * num_cases)) / (1 + z2 / num_cases)
    half = _Z95 / (1 + z2 / num_cases) * math.sqrt(share * (1 - share) / num_cases + z2 / (4 * num_cases**2))
    # Rounding must not put the share itself outside where all or none agree.
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))


def _show(case: Case, student: ServedStudent) -> str | bytes:
    """What of `case` the student reads; empty if the case has nothing of the kind."""
    if student.modality == "image":
        return case.image or b""
    return case.text if case.text and case.text.strip() else ""


def _first_label(student: ServedStudent, case: str | bytes) -> int:
    """Index of the label that the student puts first."""
    values = rank_case(student, case, timeout_seconds=_RANK_SECONDS).log_probabilities
    return max(range(len(values)), key=values.__getitem__)
