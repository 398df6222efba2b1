"""Measures recognisers on labelled notes: what they find, what they find too much, what they take from medicine.

Goes in: a recogniser as a function and labelled notes. Comes out: figures by type with Wilson intervals. An identifier
counts as found only if every word of it that says something is covered. Knows no recogniser.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from mint_lib.deidentification.notes import LabelledNote, write_notes
from mint_lib.deidentification.spans import IdentifierType, Span
from mint_lib.deidentification.word_lists import read_words

HELD_OUT_NOTES = 240
_SEED = 0
_TOKEN = re.compile(r"\w+")
# Words inside an identifier that say nothing on their own.
_FILLING = frozenset(read_words("filling"))
_Z_95 = 1.959964


class Share(NamedTuple):
    """A share with its Wilson interval at 95 %."""

    hits: int
    total: int

    @property
    def value(self) -> float:
        """The share itself; 1 of nothing."""
        return self.hits / self.total if self.total else 1.0

    def interval(self) -> tuple[float, float]:
        """Wilson 1927; (0, 1) of nothing."""
        if not self.total:
            return 0.0, 1.0
        centre = self.value + _Z_95**2 / (2 * self.total)
        half = _Z_95 * math.sqrt(self.value * (1 - self.value) / self.total + (_Z_95 / (2 * self.total)) ** 2)
        scale = 1 + _Z_95**2 / self.total
        return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


class RecallFigures(NamedTuple):
    """What a recogniser does on labelled notes."""

    recall: Share
    """Identifiers found of all identifiers."""
    recall_by_type: dict[IdentifierType, Share]
    precision: Share
    """Found spans that hold an identifier of all found spans."""
    eponyms_kept: Share
    """Names of diseases left whole of all of them."""
    medical_kept: Share
    """Diseases, genes, findings, drugs, values, ages and states left whole of all of them."""


def measure_recall(find: Callable[[str], Sequence[Span]], notes: Iterable[LabelledNote] | None = None) -> RecallFigures:
    """Figures of `find` on `notes`; on the held-out ones of this package if None."""
    if notes is None:
        notes = write_notes("held_out", num_notes=HELD_OUT_NOTES, seed=_SEED)
    hits: Counter[IdentifierType] = Counter()
    totals: Counter[IdentifierType] = Counter()
    counts: Counter[str] = Counter()
    for note in notes:
        found = list(find(note.text))
        for span in note.identifying:
            totals[span.type] += 1
            hits[span.type] += not find_uncovered(note.text, span, found)
        counts["found"] += len(found)
        counts["right"] += sum(any(span.overlaps(true) for true in note.identifying) for span in found)
        for name, spans in (("kept", note.kept), ("medical", note.medical)):
            counts[name] += len(spans)
            counts[f"{name} whole"] += sum(not any(span.overlaps(other) for other in found) for span in spans)
    return RecallFigures(
        recall=Share(hits.total(), totals.total()),
        recall_by_type={kind: Share(hits[kind], total) for kind, total in sorted(totals.items())},
        precision=Share(counts["right"], counts["found"]),
        eponyms_kept=Share(counts["kept whole"], counts["kept"]),
        medical_kept=Share(counts["medical whole"], counts["medical"]),
    )


def find_uncovered(text: str, span: Span, found: Sequence[Span]) -> list[str]:
    """The words of `span` that say something and that no found span covers."""
    return [
        match[0]
        for match in _TOKEN.finditer(text, span.start, span.end)
        if match[0].lower() not in _FILLING
        and not any(other.start <= match.start() and match.end() <= other.end for other in found)
    ]
