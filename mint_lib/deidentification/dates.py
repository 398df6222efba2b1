"""Dates of a text: where they are, and the same date some days later in the same spelling.

Goes in: a text. Comes out: spans of type `date`, and shifted spellings. A date without a year or a day is shifted too.
A year alone is a date only as that of a birth: Safe Harbor (45 CFR 164.514(b)(2)) allows the others. Knows no patient.
"""

import calendar
import datetime
import re
from collections.abc import Iterable

from mint_lib.deidentification.spans import Span

_MONTHS = tuple(name.lower() for name in calendar.month_name)[1:]
_DAYS = tuple(name.lower() for name in calendar.day_name)
_MONTH = r"(?P<name>(?:jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|sept?(?:ember)?|oct(?:ober)?|nov(?:ember)?|dec(?:ember)?))"  # noqa: E501
_WEEKDAY = r"(?:(?P<weekday>(?:mon|tues?|wed(?:nes)?|thu(?:rs)?|fri|sat(?:ur)?|sun)(?:day)?)\.?,?\s+(?:the\s+)?)?"
_SUFFIX = r"(?P<suffix>st|nd|rd|th)"
_YEAR = r"(?P<year>\d{4}|'?\d{2})"
_SHAPES = (
    r"(?P<year>\d{4})(?P<sep>[-/.])(?P<month>\d{1,2})(?P=sep)(?P<day>\d{1,2})",
    rf"(?P<first>\d{{1,2}})(?P<sep>\s?[-/.]\s?)(?P<second>\d{{1,2}})(?P=sep){_YEAR}",
    rf"{_WEEKDAY}(?P<day>\d{{1,2}}){_SUFFIX}?(?:\s+of\s+|[\s.-]*){_MONTH}\b(?:\.?,?[\s-]*{_YEAR}(?!\d|[:/]\d|\s?m[gl]\b))?",
    rf"(?P<day>\d{{1,2}}){_MONTH}{_YEAR}",
    rf"{_WEEKDAY}{_MONTH}\.?[\s-]*(?P<day>\d{{1,2}}){_SUFFIX}?(?!\d|\s?(?:m[gl]|mcg|years?|months?|weeks?|days?)\b)"
    rf"(?:,?[\s-]*{_YEAR}(?!\d|[:/]\d|\s?m[gl]\b))?",
    rf"{_MONTH}\.?,?(?:\s+of)?[\s/-]*(?P<year>\d{{4}}|'\d{{2}})",
    r"(?P<month>0?[1-9]|1[0-2])(?P<sep>/)(?P<year>(?:19|20)\d{2})",
    r"(?P<year>(?:19|20)\d{2})(?P<sep>-)(?P<month>0[1-9]|1[0-2])",
    r"(?P<first>\d{1,2})(?P<sep>/)(?P<second>\d{1,2})",
)
_COMPILED = tuple(re.compile(rf"(?<![\w./:-]){shape}(?![\w/]|-\d|\.\d)", re.IGNORECASE) for shape in _SHAPES)
_MONTH_ALONE = re.compile(
    rf"\b(?:in|since|until|from|last|early|mid|late|during|before|after|by|next|this)[\s-]+(?P<all>{_MONTH})\b",
    re.IGNORECASE,
)
_BIRTH_YEAR = re.compile(r"\b(?:born|birth)\b[^.;\n\d]{0,16}(?P<all>(?P<year>(?:18|19|20)\d{2}))\b", re.IGNORECASE)
_DAY_ALONE = re.compile(rf"\bon\s+the\s+(?P<all>(?P<day>[123]?\d){_SUFFIX})\b(?!\s+(?:per)?cent)", re.IGNORECASE)
_PARTS = tuple(
    re.compile(shape, re.IGNORECASE) for shape in (_MONTH, rf"(?P<day>\d{{1,2}}){_SUFFIX}", r"(?P<year>\d{4})")
)
_HOLIDAY = re.compile(
    r"\b(?:christmas(?: (?:eve|day))?|boxing day|new year(?:'s (?:eve|day))?|easter(?: (?:sunday|monday))?|"
    r"thanksgiving|halloween|valentine'?s day|diwali|ramadan|eid|passover|hanukkah|"
    r"labou?r day|memorial day|independence day)\b",
    re.IGNORECASE,
)
# A grade, a score, visual acuity or a blood pressure is written like a day and a month.
_GRADE_BEFORE = re.compile(
    r"(?:grade|gcs|power|murmurs?|"
    r"strength|reflex(?:es)?|acuity|vision|score|scored|pain|bp|pulses?|systolic|od|os|ou|apgars?)"
    r"\s*(?:of|was|is|:|=)?\s*$",
    re.IGNORECASE,
)
_GRADE_AFTER = re.compile(
    r"\s*(?:systolic|diastolic|murmur|strength|power|in (?:all|the|both)|throughout|pulses?|mmhg|vision|"
    r"criteria|points?|bilat)",
    re.IGNORECASE,
)
_CENTURY_TURN = 30


def find_dates(text: str) -> list[Span]:
    """Every date, also partial ones such as `3/14`, `March 2020` and `in March`."""
    found: list[Span] = []
    for shape in _COMPILED:
        for match in shape.finditer(text):
            span = Span(match.start(), match.end(), "date")
            if not any(span.overlaps(other) for other in found) and _is_date(match, text):
                found.append(span)
    for match in (*_MONTH_ALONE.finditer(text), *_DAY_ALONE.finditer(text), *_BIRTH_YEAR.finditer(text)):
        span = Span(match.start("all"), match.end("all"), "date")
        is_verb = text[span.start : span.end] in ("may", "march")
        if not is_verb and not any(span.overlaps(other) for other in found):
            found.append(span)
    found += [Span(match.start(), match.end(), "date") for match in _HOLIDAY.finditer(text)]
    return sorted(found)


def has_day_first(dates: Iterable[str]) -> bool:
    """Whether `13/2` style dates of one text put the day before the month: some first number is above 12."""
    pairs = re.compile(r"(\d{1,2})\s?[-/.]\s?(\d{1,2})\s?[-/.]\s?\d")
    found = [match for date in dates if (match := pairs.match(date))]
    return any(int(match[1]) > 12 or "." in match[0] for match in found)


def shift_date(spelling: str, days: int, *, day_first: bool) -> str | None:
    """`spelling` moved by `days` and written the same way; None if it is no date of the calendar.

    What the spelling lacks is taken as the middle of the month, or as a year without 29 February.
    """
    if _HOLIDAY.fullmatch(spelling):
        return "a holiday"
    for shape in (*_COMPILED, *_PARTS):
        match = shape.fullmatch(spelling)
        if match is not None:
            return _move(match, days, day_first=day_first)
    return None


def read_year(spelling: str) -> int | None:
    """The year of a date, or None if it has none."""
    for shape in (*_COMPILED, *_PARTS):
        match = shape.fullmatch(spelling)
        if match is not None:
            year = match.groupdict().get("year")
            return _full_year(year) if year else None
    return None


def _is_date(match: re.Match[str], text: str) -> bool:
    """False for a grade such as 2/6, and for what has no month or day that exists."""
    groups = match.groupdict()
    if (
        groups.get("name", "").lower() in ("may", "mar", "march", "dec", "sat", "sun")
        and not match["name"][0].isupper()
    ):
        return bool(groups.get("year")) or bool(groups.get("suffix"))
    if "first" not in groups:
        return True
    first, second = int(groups["first"]), int(groups["second"])
    is_possible = 1 <= min(first, second) <= 12 and max(first, second) <= 31
    if "year" in groups:
        return is_possible
    is_grade = _GRADE_BEFORE.search(text[: match.start()][-24:]) or _GRADE_AFTER.match(text[match.end() :])
    return is_possible and not is_grade


def _move(match: re.Match[str], days: int, *, day_first: bool) -> str | None:
    groups = {name: value for name, value in match.groupdict().items() if value is not None}
    spans = {name: match.span(name) for name in groups}
    if "first" in groups:
        first_is_day = day_first if int(groups["second"]) <= 12 else False
        first_is_day = first_is_day or int(groups["first"]) > 12
        names = ("day", "month") if first_is_day else ("month", "day")
        for old, new in zip(("first", "second"), names, strict=True):
            groups[new], spans[new] = groups.pop(old), spans.pop(old)
    if "year" not in groups and int(groups.get("day", 0)) > 31:  # Oct 79
        groups["year"], spans["year"] = groups.pop("day"), spans.pop("day")
    month = int(groups.get("month", 0)) or _month_number(groups.get("name", "january"))
    try:
        day = datetime.date(_full_year(groups.get("year", "2023")), month, int(groups.get("day", 15)))
        moved = day + datetime.timedelta(days)
    except (ValueError, OverflowError):
        return None
    numbers = [groups[name] for name in ("month", "day") if groups.get(name, "").isdigit()]
    width = 2 if all(len(number) == 2 for number in numbers) else 1
    written = {
        "year": lambda old: _like(old, moved.year),
        "month": lambda old: f"{moved.month:0{width}d}",
        "day": lambda old: f"{moved.day:0{width if 'name' not in groups else 1 + old.startswith('0')}d}",
        "name": lambda old: _in_case(_shorten(_MONTHS[moved.month - 1], old), old),
        "weekday": lambda old: _in_case(_shorten(_DAYS[moved.weekday()], old), old),
        "suffix": lambda old: _in_case(_ordinal_suffix(moved.day), old),
    }
    result = match.string
    for name, (start, end) in sorted(spans.items(), key=lambda item: -item[1][0]):
        if name in written:
            result = result[:start] + written[name](groups[name]) + result[end:]
    return result


def _month_number(name: str) -> int:
    return next(index for index, month in enumerate(_MONTHS, start=1) if month.startswith(name.lower()[:3]))


def _full_year(year: str) -> int:
    digits = int(year.lstrip("'"))
    if len(year.lstrip("'")) == 4:
        return digits
    return digits + (2000 if digits < _CENTURY_TURN else 1900)


def _like(old: str, year: int) -> str:
    """The year with as many digits as `old`, and its apostrophe."""
    return f"{year:04d}" if len(old) == 4 else old[:-2] + f"{year % 100:02d}"


def _shorten(word: str, old: str) -> str:
    """`word` whole if `old` is a whole name, and else three letters of it."""
    is_whole = old.lower() in (*_MONTHS, *_DAYS)
    return word if is_whole else word[:3]


def _in_case(word: str, old: str) -> str:
    if old.isupper():
        return word.upper()
    return word.capitalize() if old[0].isupper() else word


def _ordinal_suffix(day: int) -> str:
    return "th" if 11 <= day <= 13 else {1: "st", 2: "nd", 3: "rd"}.get(day % 10, "th")
