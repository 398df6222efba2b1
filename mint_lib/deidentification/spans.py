"""Where a text identifies somebody: typed spans, and how overlapping ones become one.

Goes in: spans that recognisers found. Comes out: spans that do not overlap, in order. Knows no recogniser.
"""

import typing
from collections.abc import Iterable
from typing import Literal, NamedTuple

IdentifierType = Literal[
    "name", "date", "age", "phone", "email", "url", "ip", "number", "address", "place", "organisation", "other"
]
IDENTIFIER_TYPES: tuple[IdentifierType, ...] = typing.get_args(IdentifierType)


class Span(NamedTuple):
    """Characters `start` to `end` (exclusive) of a text."""

    start: int
    end: int
    type: IdentifierType

    def overlaps(self, other: "Span") -> bool:
        """Whether the two share a character."""
        return self.start < other.end and other.start < self.end


def merge_spans(spans: Iterable[Span]) -> list[Span]:
    """The spans without overlap: those that share characters become one, of the type of the longest.

    Of equally long ones the first decides.

    Nothing that a recogniser found is lost by merging, unlike by choosing the best of several.
    """
    merged: list[Span] = []
    longest = 0
    for span in sorted(spans, key=lambda item: (item.start, -item.end)):
        if merged and span.start < merged[-1].end:
            last = merged[-1]
            length = span.end - span.start
            merged[-1] = Span(last.start, max(last.end, span.end), span.type if length > longest else last.type)
            longest = max(longest, length)
        else:
            merged.append(span)
            longest = span.end - span.start
    return merged
