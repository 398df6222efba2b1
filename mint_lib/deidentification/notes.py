"""Labelled clinical notes to measure recognisers with: invented, in two parts that share neither template nor name.

Goes in: which part, how many notes and a seed. Comes out: notes with the spans that identify somebody, by type, and
the spans of eponymous diseases, genes and findings that must stay. Knows no recogniser. What the notes hold is in
`notes_development.yaml` and `notes_held_out.yaml`; only figures of the held-out part are reported.
"""

import datetime
import functools
import pathlib
import random
import re
import unicodedata
from collections.abc import Callable
from typing import Literal, NamedTuple

import yaml

from mint_lib.deidentification.spans import IdentifierType, Span

Part = Literal["development", "held_out"]
_FIELD = re.compile(r"\{(\w+)\}")
_TYPES: dict[str, IdentifierType] = {
    "date": "date",
    "day_month": "date",
    "month_year": "date",
    "age_over_89": "age",
    "phone": "phone",
    "fax": "phone",
    "email": "email",
    "url": "url",
    "ip": "ip",
    "mrn": "number",
    "account": "number",
    "insurance": "number",
    "ssn": "number",
    "serial": "number",
    "licence": "number",
    "street": "address",
    "zip": "address",
    "town": "place",
    "hospital": "organisation",
    "employer": "organisation",
}
_KEPT = ("disease", "gene", "finding", "drug", "lab", "age", "region")


class LabelledNote(NamedTuple):
    """A note and what is known about it."""

    text: str
    identifying: tuple[Span, ...]
    """What must not be left."""
    kept: tuple[Span, ...]
    """Names of diseases: what must stay although it looks like a person's name."""
    medical: tuple[Span, ...]
    """All that a reader needs: diseases, genes, findings, drugs, laboratory values, ages, states."""


def write_notes(part: Part, *, num_notes: int, seed: int) -> list[LabelledNote]:
    """`num_notes` notes of a part, its templates in turn; the same ones for the same seed."""
    values = _read_values(part)
    rng = random.Random(f"{part}/{seed}")
    templates = values["templates"]
    return [_write_note(templates[index % len(templates)], values, rng) for index in range(num_notes)]


@functools.cache
def _read_values(part: Part) -> dict[str, list[str]]:
    path = pathlib.Path(__file__).with_name(f"notes_{part}.yaml")
    values: dict[str, list[str]] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return values


def _write_note(template: str, values: dict[str, list[str]], rng: random.Random) -> LabelledNote:
    """Fill a template; people, town and hospital stay the same through a note, all else is drawn anew."""
    people = {who: _Person.draw(values, rng) for who in ("patient", "relative")}
    people["doctor"] = _Person(rng.choice(values["first"]), rng.choice(values["doctor"]), rng.choice("ABDEJLMRS"))
    steady = {field: rng.choice(values[field]) for field in ("town", "hospital", "street", "region", "disease", "gene")}
    text = ""
    end = 0
    identifying, kept, medical = [], [], []
    for match in _FIELD.finditer(template):
        text += template[end : match.start()]
        end = match.end()
        field = match[1]
        who, _, form = field.partition("_")
        if who in people:
            value, kind = people[who].write(form), "name"
        elif field == "age":
            value, kind = str(rng.randint(1, 89)), field
        elif field in steady:
            value, kind = steady[field], field
        else:
            value, kind = _fill(rng.choice(values[field]), people["patient"], rng), field
        start = len(text)
        text += value
        if kind in _KEPT:
            medical.append(Span(start, len(text), "other"))
            if kind == "disease":
                kept.append(Span(start, len(text), "other"))
        elif kind != "weekday":  # alone it is no date
            identifying.append(Span(start, len(text), "name" if who in people else _TYPES[kind]))
    return LabelledNote(text + template[end:], tuple(identifying), tuple(kept), tuple(medical))


class _Person(NamedTuple):
    first: str
    last: str
    middle: str

    @classmethod
    def draw(cls, values: dict[str, list[str]], rng: random.Random) -> "_Person":
        return cls(rng.choice(values["first"]), rng.choice(values["last"]), rng.choice("ABCDEGHJKLMNPRSTW"))

    def write(self, form: str) -> str:
        """The name in one of the forms that notes have; the default one varies with the name."""
        whole = f"{self.first} {self.middle}. {self.last}" if len(self.first) % 2 else f"{self.first} {self.last}"
        forms: dict[str, Callable[[], str]] = {
            "": lambda: whole,
            "full": lambda: whole,
            "first": lambda: self.first,
            "last": lambda: self.last,
            "caps": lambda: f"{self.first} {self.last}".upper(),
            "lower": lambda: f"{self.first} {self.last}".lower(),
            "comma": lambda: f"{self.last}, {self.first} {self.middle}.",
            "initials": lambda: f"{self.first[0]}.{self.middle}.{self.last[0].upper()}.",
            "initial_last": lambda: f"{self.first[0]}. {self.last}",
        }
        if form == "lower" and self.middle in "ABCDEG":
            return self.last.lower()
        return forms[form]()


def _fill(pattern: str, person: _Person, rng: random.Random) -> str:
    """A value of a pattern of `#`, `?`, name fields and `strftime` codes."""
    day = datetime.date(rng.randint(1941, 2025), rng.randint(1, 12), rng.randint(1, 28))
    suffix = "th" if day.day in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(day.day % 10, "th")
    value = pattern.replace("{day}", str(day.day)).replace("{month}", str(day.month))
    value = value.replace("{ordinal}", f"{day.day}{suffix}")
    value = value.replace("{first}", _letters(person.first)).replace("{last}", _letters(person.last))
    if "%" in value:
        value = day.strftime(value)
    value = re.sub("#", lambda _: rng.choice("123456789"), value)
    return re.sub(r"\?", lambda _: rng.choice("ABCDEHJKMNPRTWX"), value) if "http" not in value else value


def _letters(name: str) -> str:
    """The plain small letters of a name, as mail addresses have them."""
    decomposed = unicodedata.normalize("NFKD", name.lower())
    return "".join(letter for letter in decomposed if letter.isascii() and letter.isalpha())
