"""What the gate judges, as a stage hands it over.

Goes in: rows as callables that stream them anew each time, and what the stage counted. Comes out: `GateMaterial`. It
knows neither the store nor what is done with the rows.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from mint_lib.gate.report import GateReport
from mint_lib.records import Case, Label, PreferencePair, Split

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class GateMaterial:
    """One version that is to be written."""

    name: str
    labels: Sequence[Label]
    cases: Callable[[Split], Iterator[Case]]
    """The cases of a split, from the start at every call."""
    reads: Literal["text", "image"]
    """What the student is shown of a case: near-identical texts matter for `text` only."""
    pairs: Callable[[Split], Iterator[PreferencePair]] | None = None
    """The pairs of train or validation; None: only the cases are judged."""
    lengths: "Mapping[Split, np.ndarray]" = field(default_factory=dict)
    """`[pairs, 3]` by split: tokens of prompt, chosen and rejected answer, the end of turn included."""
    refused: Mapping[Split, Mapping[str, int]] = field(default_factory=dict)
    """Cases refused while pairs were prepared, by cause."""
    previous: GateReport | None = None
    """The report on the last version."""


def name_batch(case: Case) -> str:
    """The delivery that a case came with: its attribute `batch`, or else its source."""
    return case.attributes.get("batch", case.source)
