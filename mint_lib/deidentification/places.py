"""Places smaller than a state, and organisations: where somebody lives, is treated or works.

Goes in: a text, its words and what is medical in it. Comes out: spans of type `place` and `organisation`. States of the
USA and countries stay, as HIPAA Safe Harbor allows. Knows no gazetteer: a town is told by the words around it.
"""

import re
from collections.abc import Sequence

from mint_lib.deidentification.patterns import STATE
from mint_lib.deidentification.spans import IdentifierType, Span
from mint_lib.deidentification.vocabulary import Vocabulary
from mint_lib.deidentification.word_lists import read_words
from mint_lib.deidentification.words import Word

_CAP = r"(?:[A-Z][\w'’-]{0,40}|St\.)"
_HEAD = (
    r"(?:Hospital|Hospitals|Clinic|Clinics|Medical Cent(?:er|re)|Health Cent(?:er|re)|Cent(?:er|re)|Infirmary|"
    r"Institute|"
    r"Practice|Surgery|Hospice|Sanatorium|Nursing Home|Care Home|Rehabilitation|Rehab|Medical Group|Health System|"
    r"Healthcare|University|College|School|Academy|Church|Trust|Foundation|Laborator(?:y|ies)|Labs?|Pharmacy|Associates)"
)
_ORGANISATION = re.compile(
    rf"\b(?:The\s+)?(?:{_CAP}|of|the|and|&)(?:[ ]+(?:{_CAP}|of|the|and|&)){{0,5}}?[ ]+{_HEAD}\b"
    rf"(?:[ ]+(?:of|at|in|for)[ ]+(?:the[ ]+)?{_CAP}(?:[ ]+{_CAP}){{0,2}})?"
    rf"|\b{_HEAD}[ ]+of[ ]+{_CAP}(?:[ ]+{_CAP}){{0,2}}"
)
_EMPLOYER = re.compile(
    rf"\b(?:work(?:s|ed|ing)?|employed|job)\s+(?:at|for|by|with)\s+"
    rf"(?P<value>(?:the\s+)?{_CAP}(?:[ ]+(?:&[ ]+)?{_CAP}){{0,3}})"
)
_GENERIC = frozenset(read_words("generic_organisations"))
_LIVES = re.compile(
    rf"\b(?:liv(?:es?|ed|ing)|resid(?:es?|ed|ing)|born|raised|grew\s+up|moved|moving|relocated|travel(?:s|led|ed|ling)?|"
    rf"transferred|visit(?:s|ed|ing)|comes?|came|arrived|home|based|stays?|staying|practi[cs]es?|resident|native|town|city|"
    rf"village|county|parish|suburb|originally|ambulance|team|here|seizure|episode|accident|known\s+people|family|clinic|"
    rf"gp|child|man|woman|boy|girl|patient|referred|seen|there)\b[^.;\n]{{0,24}}?\b(?:in|from|at|near|to|of|outside|around)"
    rf"\s+(?P<value>{_CAP}(?:[ ]+{_CAP}){{0,2}})"
)
_SHOUTED = re.compile(
    r"\b(?:FROM|LIVES IN|RESIDES IN|BORN IN|RESIDENT OF|TOWN OF|CITY OF)\s+"
    r"(?P<value>[A-Z][A-Z'’-]+(?:[ ][A-Z][A-Z'’-]+){0,2})"
)
_LOWER = re.compile(
    r"\b(?:liv(?:es?|ed|ing)\s+(?:in|near|at|outside)|resid(?:es?|ing)\s+in|moved\s+(?:to|from)|born\s+in|home\s+in|town\s+of|"
    r"city\s+of|resident\s+of|grew\s+up\s+in|comes\s+from|originally\s+from)\s+(?P<value>[\w'’-]+(?:[ ][\w'’-]+)?)",
    re.IGNORECASE,
)
_BEFORE_STATE = re.compile(rf"(?<![\w-])(?P<value>{_CAP}(?:[ ]+{_CAP}){{0,2}}),[ ]+(?!(?:MD|PA)\b(?!\s*\d)){STATE}\b")
_AFTER_ADDRESS = re.compile(rf"[ ]*,[ \n]*(?P<value>{_CAP}(?:[ ]+{_CAP}){{0,2}})")
_FIELD = re.compile(
    rf"\b(?:City|Town|Village|County|Place of birth|Birthplace|Address)\s*:\s*(?P<value>{_CAP}(?:[ ]+{_CAP}){{0,2}})",
    re.I,
)
# Capitalised words after "in", "from", "at" that are no town.
_STAYS = frozenset(read_words("no_towns"))
_STATE = re.compile(STATE)


def find_places(
    text: str, words: Sequence[Word], vocabulary: Vocabulary, *, medical: Sequence[tuple[int, int]]
) -> list[Span]:
    """Every town, hospital, clinic and employer."""
    found = [
        span
        for match in _ORGANISATION.finditer(text)
        if (span := _without_generic(text, match.start(), match.end())) is not None
    ]
    found += [_span(match, "organisation") for match in _EMPLOYER.finditer(text)]
    for pattern in (_LIVES, _SHOUTED, _BEFORE_STATE, _FIELD):
        found += [_span(match, "place") for match in pattern.finditer(text) if _is_town(match["value"])]
    for match in _LOWER.finditer(text):
        town = [word for word in words if match.start("value") <= word.start < match.end("value")]
        unsafe = [word for word in town if not vocabulary.is_safe(word.text) or word.text[0].isupper()]
        if unsafe and _is_town(text[unsafe[0].start : unsafe[-1].end]):
            found.append(Span(unsafe[0].start, unsafe[-1].end, "place"))
    return [span for span in found if not any(start < span.end and span.start < end for start, end in medical)]


def find_towns_behind(text: str, addresses: Sequence[Span]) -> list[Span]:
    """What follows an address or an organisation: `14 Elm Street, Millbrook`."""
    found = []
    for address in addresses:
        match = _AFTER_ADDRESS.match(text, address.end)
        if match and _is_town(match["value"]):
            found.append(_span(match, "place"))
    return found


def _span(match: re.Match[str], kind: IdentifierType) -> Span:
    return Span(match.start("value"), match.end("value"), kind)


def _is_town(value: str) -> bool:
    words = re.findall(r"[^\W\d_]+", value)
    return not _STATE.fullmatch(value) and bool(words) and words[0].lower() not in _STAYS


def _is_open(word: Word, vocabulary: Vocabulary) -> bool:
    return word.text[0].isupper() or not vocabulary.is_safe(word.text)


def _without_generic(text: str, start: int, end: int) -> Span | None:
    """The span of an organisation that has a name of its own; None for `the Genetics Clinic`."""
    words = list(re.finditer(r"[^\W\d_]+(?:['’][^\W\d_]+)*", text[start:end]))
    while words and words[0][0].lower() in ("of", "and", "at"):
        words.pop(0)
    own = [
        word[0]
        for word in words
        if word[0][0].isupper() and word[0].lower().replace("'s", "").replace("’s", "") not in _GENERIC
        and not re.fullmatch(_HEAD, word[0])
    ]  # fmt: skip
    return Span(start + words[0].start(), end, "organisation") if own else None
