"""A cron expression as Kubeflow's scheduler reads it, checked before anything is sent.

Goes in: five fields as in crontab, or six with seconds first. Comes out: six fields. Kubeflow counts in UTC. Its parser
(robfig/cron, version 1) knows days of the week from 0 to 6 and takes Sunday as 0 only.
"""

import re
from typing import NamedTuple

from mint_lib.errors import InvalidInput

_MONTHS = ("JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC")
_DAYS = ("SUN", "MON", "TUE", "WED", "THU", "FRI", "SAT")
_RANGE = re.compile(r"(?P<first>\*|\?|\w+)(-(?P<last>\w+))?(/(?P<step>\d+))?")


class _Field(NamedTuple):
    name: str
    low: int
    high: int
    names: tuple[str, ...] = ()


_FIELDS = (
    _Field("second", 0, 59),
    _Field("minute", 0, 59),
    _Field("hour", 0, 23),
    _Field("day of the month", 1, 31),
    _Field("month", 1, 12, _MONTHS),
    _Field("day of the week", 0, 6, _DAYS),
)


def parse_cron(text: str) -> str:
    """`text` as the six fields that Kubeflow takes: with 0 seconds where it has five.

    Raises:
        InvalidInput: it has another number of fields, or a field holds what its scheduler does not take.
    """
    words = text.split()
    if len(words) == len(_FIELDS) - 1:
        words = ["0", *words]
    if len(words) != len(_FIELDS):
        raise InvalidInput(
            f"--cron {text!r} has {len(words)} fields. Write minute, hour, day of the month, month and day of the "
            "week, for instance '0 3 * * 1' for Mondays at 3:00 UTC; seconds may stand before them."
        )
    for field, word in zip(_FIELDS, words, strict=True):
        for part in word.split(","):
            _check_part(field, part, text)
    return " ".join(words)


def _check_part(field: _Field, part: str, text: str) -> None:
    match = _RANGE.fullmatch(part)
    if match is None:
        raise InvalidInput(_explain(field, part, text))
    is_any = match["first"] in ("*", "?")
    first = field.low if is_any else _read_number(field, match["first"])
    last = _read_number(field, match["last"]) if match["last"] else first
    is_allowed = first is not None and last is not None and field.low <= first <= last <= field.high
    if not is_allowed or (is_any and match["last"]) or match["step"] == "0":
        raise InvalidInput(_explain(field, part, text))


def _read_number(field: _Field, word: str) -> int | None:
    if word.upper() in field.names:
        return field.names.index(word.upper()) + field.low
    return int(word) if word.isascii() and word.isdecimal() else None


def _explain(field: _Field, part: str, text: str) -> str:
    names = f", or {field.names[0]} to {field.names[-1]}" if field.names else ""
    return (
        f"--cron {text!r}: {part!r} is no {field.name}. Write *, a number from {field.low} to {field.high}{names}, a "
        "range as 1-5, a step as */15, or several with commas."
    )
