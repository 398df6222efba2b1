"""The words of a text with what names are told by: their case, their neighbours, and what medicine calls by them.

Goes in: a text, a vocabulary and known phrases. Comes out: `Word`s and the spans of diseases, signs and genes that are
named after people. Decides nothing about names.
"""

import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mint_lib.deidentification.vocabulary import PhraseSearch, Vocabulary, plain, read_eponyms
from mint_lib.deidentification.word_lists import read_words

_WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")
# What makes the word before it the name of something medical. The weak ones also follow people's names.
_STRONG_HEADS = frozenset(read_words("eponym_heads"))
_WEAK_HEADS = frozenset(read_words("weak_eponym_heads"))
TITLES = frozenset(read_words("titles"))
"""Words before a name."""
_LINKS = frozenset(read_words("links"))
_DOSE = re.compile(r"\s*\d+(?:[.,]\d+)?\s?(?:m?c?g|mg|ml|units?|iu|micrograms?|puffs?|tabs?|%)\b", re.IGNORECASE)
_GENE = re.compile(r"[A-Z][A-Z0-9]{1,7}(?:-[A-Z0-9]{1,3})?")
_MOST_BACK = 4


@dataclass(frozen=True, slots=True)
class Word:
    """One word of a text."""

    text: str
    start: int
    end: int
    plain: str
    before: str
    """What stands between the word and the one before it."""
    in_capitals: bool
    """Its line is written in capitals: they say nothing."""
    starts_sentence: bool

    @property
    def is_capitalised(self) -> bool:
        """`Smith`, and `SMITH` where the line is not all capitals."""
        return self.text[0].isupper() and not self.in_capitals

    @property
    def is_acronym(self) -> bool:
        """A short word in capitals, such as `PICU`."""
        return self.text.isupper() and 2 <= len(self.text) <= 5


def split_words(text: str) -> list[Word]:
    """The words of `text`, in order."""
    shouted = [(start, end) for start, end in _lines(text) if _is_shouted(text[start:end])]
    words: list[Word] = []
    last = 0
    for match in _WORD.finditer(text):
        before = text[last : match.start()]
        last = match.end()
        words.append(
            Word(
                text=match[0],
                start=match.start(),
                end=match.end(),
                plain=plain(match[0]).removesuffix("'s"),
                before=before,
                in_capitals=any(start <= match.start() < end for start, end in shouted),
                starts_sentence=not words or _ends_sentence(before, words[-1]),
            )
        )
    return words


class MedicalNames:
    """Finds what medicine has named after people and places, and what must stay for other reasons."""

    def __init__(self, vocabulary: Vocabulary, known_phrases: Iterable[str] = ()):
        """`known_phrases` are the names of the label set and of coded findings."""
        self._vocabulary = vocabulary
        self._phrases = PhraseSearch(phrase for phrase in known_phrases if self._is_telling(phrase))
        self._eponyms = PhraseSearch(read_eponyms())

    def find(self, text: str, words: Sequence[Word]) -> list[tuple[int, int]]:
        """Start and end of each such name."""
        found = self._phrases.find(text)
        eponyms = self._eponyms.find(text)
        for index, word in enumerate(words):
            if index and (word.plain in _STRONG_HEADS or word.plain in _WEAK_HEADS):
                start = self._go_back(words, index, eponyms, is_strong=word.plain in _STRONG_HEADS)
                if start is not None:
                    found.append((start, word.end))
            elif _DOSE.match(text, word.end) and not self._vocabulary.is_name(word.text):
                found.append((word.start, word.end))
            elif _GENE.fullmatch(text[word.start : _token_end(text, word.end)]) and re.search(
                r"\d", text[word.end : _token_end(text, word.end)]
            ):
                found.append((word.start, _token_end(text, word.end)))
        # A rare eponym, such as Prader-Willi, needs no word behind it; a common name, such as Down, does.
        for start, end in eponyms:
            if self._stands_alone(text[start:end]):
                found.append((start, end))
        titled = {word.start for before, word in itertools.pairwise(words) if before.plain in TITLES}
        return [(start, end) for start, end in found if start not in titled]

    def _stands_alone(self, eponym: str) -> bool:
        """An eponym that is nobody's name: no list has it, or it has a hyphen or an ordinary word."""
        has_plain_word = any(
            self._vocabulary.is_safe(word) and not self._vocabulary.is_name(word) for word in eponym.split()
        )
        return "-" in eponym or has_plain_word or not self._vocabulary.is_name(eponym)

    def _is_telling(self, phrase: str) -> bool:
        """A phrase of names only could be somebody."""
        return any(not self._vocabulary.is_name(word[0]) for word in _WORD.finditer(phrase))

    def _go_back(
        self, words: Sequence[Word], index: int, eponyms: Sequence[tuple[int, int]], *, is_strong: bool
    ) -> int | None:
        """Where the name before the head at `index` starts, or None if there is none."""
        for known, end in eponyms:
            if known <= words[index - 1].start < end:
                return known
        if not is_strong:
            return None
        start: int | None = None
        for back in range(index - 1, max(-1, index - 1 - _MOST_BACK), -1):
            word, follows = words[back], words[back + 1]
            if follows.before.strip(" -'’") or "\n\n" in follows.before:
                break
            if word.plain in TITLES or re.search(r"['’]s$", word.text):
                return None  # Mrs Field's disease is hers
            is_common = self._vocabulary.is_safe(word.text) and not word.text[0].isupper()
            if is_common and word.plain not in _LINKS:
                break
            if self._vocabulary.is_first_name(word.text) and "-" not in word.text and start is not None:
                return None  # John Parkinson disease: the names are somebody's
            start = word.start
        return start


def _ends_sentence(between: str, last: Word) -> bool:
    """Whether a new sentence, field or line starts behind `between`; the dot of an initial or a title ends none."""
    if between in (".", ". ") and (len(last.text) == 1 or last.plain in TITLES):
        return False
    return re.search(r"[.!?:;\n•*>|-]\s*[\"'(\[]?\s*$|\n", between) is not None


def _lines(text: str) -> Iterable[tuple[int, int]]:
    start = 0
    for match in re.finditer(r"[^\n]*\n?", text):
        if match[0]:
            yield start, start + len(match[0])
            start += len(match[0])


def _is_shouted(line: str) -> bool:
    letters = [letter for letter in line if letter.isalpha()]
    return len(letters) >= 4 and sum(letter.isupper() for letter in letters) > 0.6 * len(letters)


def _token_end(text: str, end: int) -> int:
    while end < len(text) and (text[end].isalnum()):
        end += 1
    return end
