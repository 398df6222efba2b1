"""The words that recognisers know: safe ones, first names and last names, and the names of diseases.

Goes in: the word lists of the package philter-lite (Norgeot et al., npj Digital Medicine 2020: 195,253 words that are
safe in clinical notes, 97,014 first names, 161,470 last names), which is located and read and never imported, and the
eponyms of `eponyms.yaml`. Comes out: sets of small-letter words, and a search for known phrases. Knows no recogniser.
"""

import functools
import hashlib
import importlib.util
import pathlib
import re
import tomllib
import unicodedata
from collections.abc import Iterable
from typing import NamedTuple

import yaml

from mint_lib.deidentification.word_lists import read_words
from mint_lib.errors import MissingDependency

# Words of clinical notes that the lists lack, or have among the last names.
_ALSO_SAFE = frozenset(read_words("also_safe"))
_WORD = re.compile(r"[^\W\d_]+")


class Vocabulary(NamedTuple):
    """Sets of words in small plain letters, as `plain` gives them."""

    safe: frozenset[str]
    first: frozenset[str]
    last: frozenset[str]

    def is_safe(self, word: str) -> bool:
        """A word of clinical English, in any case; the parts of a hyphenated one are looked up on their own."""
        return all(part in self.safe or part.removesuffix("s") in self.safe for part in _parts(word))

    def is_first_name(self, word: str) -> bool:
        """Some part of `word` is listed as a first name."""
        return any(part in self.first for part in _parts(word))

    def is_last_name(self, word: str) -> bool:
        """Some part of `word`, or the word without its apostrophe, is listed as a last name."""
        return any(part in self.last for part in (*_parts(word), "".join(_parts(word))))

    def is_name(self, word: str) -> bool:
        """Listed as a first or a last name."""
        return self.is_first_name(word) or self.is_last_name(word)


@functools.cache
def load_vocabulary() -> Vocabulary:
    """The word lists; about a second when first asked for.

    Raises:
        MissingDependency: the package with the lists is not installed.
    """
    lists = tomllib.loads(_find_word_lists().read_text(encoding="utf-8"))
    return Vocabulary(
        safe=frozenset(lists["nonames"]) - {""} | _ALSO_SAFE | frozenset(_read_list("medical_words.yaml")),
        first=frozenset(lists["firstnames"]) - _ALSO_SAFE,
        last=frozenset(lists["lastnames"]) - _ALSO_SAFE,
    )


def digest_vocabulary() -> str:
    """`sha256:...` of the package's word lists, on which every result depends.

    Raises:
        MissingDependency: the package with the lists is not installed.
    """
    return "sha256:" + hashlib.sha256(_find_word_lists().read_bytes()).hexdigest()


def _find_word_lists() -> pathlib.Path:
    package = importlib.util.find_spec("philter_lite")
    if package is None or not package.submodule_search_locations:
        raise MissingDependency(
            "De-identification reads the word lists of the package philter-lite, which is not installed. "
            "Install mint-platform[train], or philter-lite."
        )
    return pathlib.Path(package.submodule_search_locations[0]) / "filters" / "set.toml"


@functools.cache
def read_eponyms() -> tuple[str, ...]:
    """Disease names and signs that are named after people or places."""
    return _read_list("eponyms.yaml")


def _read_list(name: str) -> tuple[str, ...]:
    """The entries of a file of this package."""
    return tuple(yaml.safe_load(pathlib.Path(__file__).with_name(name).read_text(encoding="utf-8")))


def plain(word: str) -> str:
    """`Siobhán` to `siobhan`: small letters without accents, as the lists have them."""
    if word.isascii():
        return word.lower()
    folded = word.lower().translate(_FOLDED)
    return "".join(letter for letter in unicodedata.normalize("NFKD", folded) if not unicodedata.combining(letter))


_FOLDED = str.maketrans({"ø": "o", "ł": "l", "đ": "d", "ß": "ss", "æ": "ae", "œ": "oe", "ı": "i", "’": "'"})


@functools.lru_cache(maxsize=65536)
def _parts(word: str) -> tuple[str, ...]:
    """The parts of a word around hyphens and apostrophes, without the possessive."""
    folded = plain(word)
    folded = folded.removesuffix("'s")
    return tuple(_WORD.findall(folded))


class PhraseSearch:
    """Finds known phrases in texts, in any case and across line breaks."""

    def __init__(self, phrases: Iterable[str]):
        """Search for `phrases`; a phrase of one word that is short is left out, as it says too little."""
        self._by_first: dict[str, list[tuple[str, ...]]] = {}
        for phrase in phrases:
            words = tuple(plain(word) for word in _WORD.findall(phrase))
            if words and (len(words) > 1 or len(words[0]) > 2):
                self._by_first.setdefault(words[0], []).append(words)
        for known in self._by_first.values():
            known.sort(key=len, reverse=True)

    def find(self, text: str) -> list[tuple[int, int]]:
        """Start and end of each known phrase, the longest where several start at one word."""
        words = [(plain(match[0]), match.start(), match.end()) for match in _WORD.finditer(text)]
        found = []
        index = 0
        while index < len(words):
            length = 1
            for phrase in self._by_first.get(words[index][0], ()):
                if tuple(word for word, _, _ in words[index : index + len(phrase)]) == phrase:
                    length = len(phrase)
                    found.append((words[index][1], words[index + length - 1][2]))
                    break
            index += length
        return found
