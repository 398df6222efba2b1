"""Invented values in the place of identifying ones: hide in plain sight (Carrell et al., JAMIA 2013).

Goes in: a secret key, a patient, a type and a value. Comes out: another value of like form, the same one every time for
the same patient, and none that could be traced back without the key: HMAC-SHA-256 draws it. Dates of one patient are
moved by one number of days, so that intervals stay. Knows no text.
"""

import hashlib
import hmac
import re
from collections.abc import Callable, Collection

from mint_lib.deidentification.dates import shift_date
from mint_lib.deidentification.spans import IdentifierType
from mint_lib.deidentification.vocabulary import Vocabulary, plain
from mint_lib.deidentification.word_lists import read_words

FIRST_NAMES = read_words("surrogate_first_names")
LAST_NAMES = read_words("surrogate_last_names")
_TOWNS = tuple(
    f"{first}{last}"
    for first in ("Ash", "Birch", "Clay", "Elm", "Fern", "Glen", "Hazel", "Linden", "Maple", "North", "Stan", "Thorn")
    for last in ("bourne", "bury", "combe", "field", "ford", "ham", "ley", "mere", "stead", "ton", "wick", "worth")
)
_STREETS = ("Alder Street", "Beech Road", "Chapel Lane", "Copper Street", "Laurel Avenue", "Mason Road", "Orchard Lane")
_ORGANISATION_HEAD = re.compile(
    r"(?:Hospitals?|Clinics?|Medical Cent(?:er|re)|Health Cent(?:er|re)|Infirmary|Institute|Practice|Surgery|Hospice|"
    r"Nursing Home|Care Home|University|College|School|Academy|Laborator(?:y|ies)|Pharmacy|Foundation|Trust)",
)
_LINKS = frozenset(read_words("links"))
_WORD = re.compile(r"[^\W\d_]+")
_LEAST_SHIFT_DAYS = 32  # more than a month: a date that has only a month moves too
_MOST_SHIFT_DAYS = 333  # less than a year: a date that has no year moves too
_MOST_TRIES = 100
_OLD_AGE = "90 or older"


class Surrogates:
    """Draws surrogates for one patient."""

    def __init__(self, key: bytes, group_id: str, vocabulary: Vocabulary):
        """Draw with `key` for the patient `group_id`."""
        self._key = key
        self._group_id = group_id
        self._vocabulary = vocabulary
        size = _LEAST_SHIFT_DAYS + self._draw("days", "", 0) % (_MOST_SHIFT_DAYS - _LEAST_SHIFT_DAYS)
        self._shift_days = size if self._draw("direction", "", 0) % 2 else -size

    def replace(self, value: str, kind: IdentifierType, *, avoid: Collection[str], day_first: bool = False) -> str:
        """Another value in the place of `value`.

        Args:
            value: as the text has it.
            kind: its type.
            avoid: the words and numbers of the text's identifiers in small plain letters: none of them is drawn. A
                moved date may meet another date of the text, since all of them move alike.
            day_first: `1/2/2020` is the first of February.
        """
        if kind == "age":
            return f"aged {_OLD_AGE}" if value.lower().startswith("in ") else _OLD_AGE
        if kind == "date":
            moved = shift_date(value, self._shift_days, day_first=day_first)
            return moved if moved is not None else self._scramble(value, kind, avoid)
        if kind == "name":
            return _WORD.sub(lambda match: self._replace_name(match, avoid), value)
        if kind == "place":
            return self._choose(_TOWNS, value, kind, avoid)
        if kind == "organisation":
            return self._replace_organisation(value, avoid)
        if kind == "address" and re.search(r"[^\W\d_]{3,}", value) and "box" not in value.lower():
            return f"{1 + self._draw('house', plain(value), 0) % 98} {self._choose(_STREETS, value, kind, avoid)}"
        if kind == "email":
            return f"person{self._draw(kind, plain(value), 0) % 10**6:06d}@mail.example"
        if kind == "url":
            return f"https://site{self._draw(kind, plain(value), 0) % 10**6:06d}.example"
        if kind == "ip":
            return f"203.0.113.{1 + self._draw(kind, plain(value), 0) % 254}"  # RFC 5737: for documentation
        return self._scramble(value, kind, avoid)

    def _replace_name(self, match: re.Match[str], avoid: Collection[str]) -> str:
        """One word of a name by another one, in the same case; links such as `de la` stay."""
        word = match[0]
        folded = plain(word)
        if folded in _LINKS or (folded == "s" and match.start() and match.string[match.start() - 1] in "'’"):
            return word
        if len(word) == 1 and match.string[match.end() : match.end() + 1] in ("'", "’"):
            return word  # O'Brien
        if len(word) == 1:
            letters = [letter for letter in "ABCDEFGHJKLMNPRSTW" if letter != word.upper()]
            return _in_case(letters[self._draw("initial", folded, 0) % len(letters)], word)
        pool = FIRST_NAMES if self._vocabulary.is_first_name(word) else LAST_NAMES
        return _in_case(self._choose(pool, word, "name", avoid), word)

    def _replace_organisation(self, value: str, avoid: Collection[str]) -> str:
        heads = _ORGANISATION_HEAD.findall(value)
        return f"{self._choose(_TOWNS, value, 'organisation', avoid)} {heads[-1] if heads else 'Company'}"

    def _scramble(self, value: str, kind: IdentifierType, avoid: Collection[str]) -> str:
        """Other digits, and in numbers of records other letters, in the places of the old ones."""
        has_letters = kind in ("number", "address")
        for attempt in range(_MOST_TRIES):
            stream = self._draw(kind, plain(value), attempt)
            result = ""
            for character in value:
                stream, drawn = divmod(stream, 2340) if stream > 2340 else (self._draw(kind, result, attempt), 7)
                if character.isdigit():
                    result += str(drawn % 10)
                elif character.isalpha() and has_letters:
                    result += _in_case("ABCDEFGHJKLMNPQRSTUVWXYZ"[drawn % 24], character)
                else:
                    result += character
            if plain(result) not in avoid and result != value:
                return result
        return "unknown"

    def _choose(self, pool: tuple[str, ...], value: str, kind: str, avoid: Collection[str]) -> str:
        """An entry of `pool`, none of whose words stands in `avoid`."""
        start = self._draw(kind, plain(value), 0)
        for attempt in range(len(pool)):
            entry = pool[(start + attempt) % len(pool)]
            if not any(plain(word) in avoid for word in _WORD.findall(entry)):
                return entry
        return "Somebody" if kind == "name" else "Somewhere"

    def _draw(self, kind: str, value: str, attempt: int) -> int:
        """A number of 256 bits that only the key, the patient, the type and the value decide."""
        message = "\0".join((self._group_id, kind, value, str(attempt))).encode("utf-8", "surrogatepass")
        return int.from_bytes(hmac.digest(self._key, message, hashlib.sha256))


def draw_pseudonym(key: bytes, kind: str, value: str) -> str:
    """`kind-` and 16 hex digits (64 bits): the same for the same value, and not to be turned back without the key."""
    message = "\0".join((kind, value)).encode("utf-8", "surrogatepass")
    return f"{kind}-{hmac.digest(key, message, hashlib.sha256).hex()[:16]}"


def _in_case(word: str, old: str) -> str:
    """`word` in capitals, small letters or with a first capital, as `old` is."""
    change: Callable[[str], str] = str.upper if old.isupper() else str.lower if old.islower() else str
    return change(word)
