"""The second and stricter look at a text whose identifiers were replaced: is there any doubt left?

Goes in: the new text, where surrogates stand in it, and the originals. Comes out: one word for the doubt, or None. It
replaces nothing, and it would rather put ten harmless texts aside than let one through.
"""

import re
from collections.abc import Collection, Sequence
from typing import Literal

from mint_lib.deidentification.patterns import find_codes, find_states
from mint_lib.deidentification.recognition import Recogniser
from mint_lib.deidentification.spans import Span
from mint_lib.deidentification.vocabulary import plain
from mint_lib.deidentification.word_lists import read_words
from mint_lib.deidentification.words import Word, split_words

Doubt = Literal["characters", "language", "leftover", "identifier", "name", "number", "contact", "spelled"]
_CONTACT = re.compile(r"@|://|\bwww\b", re.IGNORECASE)
_LONG_NUMBER = re.compile(r"\d(?:[ .-]?\d){4,}")
_SPELLED = re.compile(r"\b(?:[^\W\d_][ .-]){3,}[^\W\d_]\b")
_TITLE = frozenset(read_words("honorifics"))
# Letters that look like others, marks of direction and what has no width hide words from any list.
_ODD = re.compile(
    r"[\u0000-\u0008\u000e-\u001f\u007f\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufeff\ud800-\udfff\ufffd]"
)
_LATIN_END = 0x0250
_LEAST_WORDS = 8
_LEAST_KNOWN_SHARE = 0.6


def find_odd_characters(text: str) -> Doubt | None:
    """`characters` for a text with letters outside Latin script or invisible marks, which no recogniser can read."""
    has_other_letters = any(
        ord(letter) >= _LATIN_END and letter.isalpha() and letter not in "αβγδµΩμ" for letter in text
    )
    return "characters" if has_other_letters or _ODD.search(text) else None


def find_doubt(
    text: str, recogniser: Recogniser, *, surrogates: Sequence[Span], originals: Collection[str]
) -> Doubt | None:
    """Why `text` must not go on, or None.

    Args:
        text: with surrogates in it.
        recogniser: finds identifiers.
        surrogates: where they stand, in order.
        originals: words and numbers of what was replaced, in small plain letters.
    """
    rest = _blank(text, surrogates)
    words = split_words(rest)
    medical = [Span(start, end, "other") for start, end in recogniser.medical_names.find(rest, words)]
    codes = [*find_codes(rest), *find_states(rest)]
    vocabulary = recogniser.vocabulary
    if any(plain(match[0]) in originals for match in re.finditer(r"\w{3,}", rest) if not _inside(match, medical)):
        return "leftover"
    if any(not any(span.overlaps(other) for other in surrogates) for span in recogniser.find(text)):
        return "identifier"
    if _CONTACT.search(rest):
        return "contact"
    if any(not _inside(match, codes) for match in _LONG_NUMBER.finditer(rest)):
        return "number"
    if _SPELLED.search(rest):
        return "spelled"
    known = [vocabulary.is_safe(word.text) for word in words]
    if len(words) >= _LEAST_WORDS and sum(known) < _LEAST_KNOWN_SHARE * len(words):
        return "language"
    for index, word in enumerate(words):
        follows_title = index > 0 and words[index - 1].plain in _TITLE and word.before.strip(" .") == ""
        if follows_title and word.text[0].isupper() and not word.text.isupper():
            return "name"
        is_part = word.is_capitalised and vocabulary.is_name(word.text) and not word.text.isupper()
        if is_part and _touches(word, rest, surrogates, gap=r"[ -]") and not _inside_span(word, medical):
            return "name"
        if known[index] or _inside_span(word, medical) or _inside_span(word, codes):
            continue
        if follows_title or _touches(word, rest, surrogates, gap=r"[ ,.'’-]{1,2}") or _is_written_like_name(word):
            return "name"
    return None


def _blank(text: str, spans: Sequence[Span]) -> str:
    """`text` with dots for what stands in `spans`, so that places stay the same."""
    for span in spans:
        text = text[: span.start] + re.sub(r"\S", "_", text[span.start : span.end]) + text[span.end :]
    return text


def _is_written_like_name(word: Word) -> bool:
    """A capital and small letters, and no list knows the word."""
    return word.text[0].isupper() and len(word.text) > 1 and not word.text.isupper()


def _touches(word: Word, rest: str, surrogates: Sequence[Span], *, gap: str) -> bool:
    """The word stands beside the surrogate of a name, with `gap` between them, as a part of the name would."""
    if len(word.text) < 3:
        return False
    return any(
        span.type == "name"
        and (
            re.fullmatch(gap, rest[span.end : word.start]) is not None
            or re.fullmatch(gap, rest[word.end : span.start]) is not None
        )
        for span in surrogates
    )


def _inside(match: re.Match[str], spans: Sequence[Span]) -> bool:
    return any(span.start <= match.start() and match.end() <= span.end for span in spans)


def _inside_span(word: Word, spans: Sequence[Span]) -> bool:
    return any(span.start < word.end and word.start < span.end for span in spans)
