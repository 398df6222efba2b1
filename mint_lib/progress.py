"""Progress of long work, told in lines so that it survives a pipe, a pod's log and a terminal alike.

Goes in: a description and a total. Comes out: at most one line a second, as a log line or, where `MINT_PROGRESS=json`
is set (by `mint run`, which draws bars from it), as one JSON line with the prefix `@progress `.
"""

import json
import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Self, TypeVar

PREFIX = "@progress "
logger = logging.getLogger(__name__)
T = TypeVar("T")


def wants_events() -> bool:
    """True where the process that started this one draws its progress."""
    return os.environ.get("MINT_PROGRESS") == "json"


def tell_event(event: str, **values: object) -> None:
    """One machine-readable line on standard output."""
    sys.stdout.write(PREFIX + json.dumps({"event": event, **values}) + "\n")
    sys.stdout.flush()


def say(text: str) -> None:
    """One sentence about the work, shown above the bars or as a log line."""
    if wants_events():
        tell_event("note", text=text)
    else:
        logger.info("%s", text)


class Progress:
    """A counter of `total` units of work. Use it as a context manager; say figures with keywords.

    >>> with Progress("alignment: orpo", total=2) as progress:
    ...     progress.advance(loss=1.2)
    """

    def __init__(self, description: str, *, total: int, interval_seconds: float = 1.0):
        self.description = description
        self.total = total
        self.done = 0
        self._interval_seconds = interval_seconds
        self._started = self._told = time.monotonic()

    def __enter__(self) -> Self:
        self._tell({})
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None and self.done != self.total:
            self._tell({}, finished=True)

    def advance(self, count: int = 1, **figures: float) -> None:
        """Count `count` units as done; `figures` are shown beside the bar."""
        self.done += count
        if time.monotonic() - self._told >= self._interval_seconds or self.done == self.total:
            self._tell(figures, finished=self.done == self.total)

    def _tell(self, figures: dict[str, float], *, finished: bool = False) -> None:
        self._told = time.monotonic()
        seconds = self._told - self._started
        if wants_events():
            tell_event(
                "progress",
                description=self.description,
                done=self.done,
                total=self.total,
                seconds=round(seconds, 1),
                figures=figures,
                finished=finished,
            )
        else:
            shown = " ".join(f"{key}={value:.4g}" for key, value in figures.items())
            logger.info("%s: %d/%d in %.0f s %s", self.description, self.done, self.total, seconds, shown)


def track_progress(items: Iterable[T], description: str, *, total: int) -> Iterator[T]:
    """`items`, with progress told as they are taken."""
    with Progress(description, total=total) as progress:
        for item in items:
            yield item
            progress.advance()
