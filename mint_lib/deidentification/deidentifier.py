"""De-identification of one case: surrogates in the place of what identifies somebody, or the case is put aside.

Goes in: a text, attributes or a whole case, and a secret key. Comes out: the same with surrogates and counts by type,
or `Unsure` with a cause. It fails closed: whatever the second look doubts is `Unsure`. No content stands in any error,
log, count or cause. Knows no store.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from mint_lib.deidentification.config import DeidentificationConfig
from mint_lib.deidentification.dates import has_day_first, read_year
from mint_lib.deidentification.recall import RecallFigures, measure_recall
from mint_lib.deidentification.recognition import Recogniser
from mint_lib.deidentification.review import find_doubt, find_odd_characters
from mint_lib.deidentification.spans import Span
from mint_lib.deidentification.surrogates import Surrogates, draw_pseudonym
from mint_lib.deidentification.vocabulary import plain
from mint_lib.deidentification.word_lists import read_words
from mint_lib.errors import GateFailed, InvalidInput
from mint_lib.image_inputs.metadata import strip_metadata
from mint_lib.records import Case, Finding

_MOST_CHARACTERS = 50_000  # about ten pages; longer texts are no notes, and the recognisers take their time
_OLDEST_AGE = 89
_OLDEST_YEAR = 1936  # ninety years before 2026: an earlier year of birth tells an age over 89
_LONG_AGO = "90 or more years ago"
_NUMBER = re.compile(r"\d+(?:\.\d+)?")
# Attributes whose values name somebody or somewhere: they become pseudonyms, which still tell sites apart.
_PLACES = frozenset(read_words("site_attributes"))
_NEVER_KEPT = frozenset(read_words("dropped_attributes"))


class Cleaned(NamedTuple):
    """A text that may go on."""

    text: str
    counts: dict[str, int]
    """Replaced identifiers by type."""


class CleanedCase(NamedTuple):
    """A case that may go on."""

    case: Case
    counts: dict[str, int]
    """Replaced identifiers by type."""


class Unsure(NamedTuple):
    """A text or case that must be put aside."""

    cause: str
    """What the doubt is about, never a word of the text."""


class Deidentifier:
    """Replaces identifiers by surrogates that are the same for the same patient under one key."""

    def __init__(self, config: DeidentificationConfig, *, key: bytes, known_phrases: Iterable[str] = ()):
        """Prepare for one run.

        Args:
            config: language and least recall.
            key: at least 32 secret bytes, as `read_key` gives them.
            known_phrases: names and synonyms of the label set and of coded findings, which stay.

        Raises:
            MissingDependency: the word lists are not installed.
        """
        self._config = config
        self._key = key
        self._recogniser = Recogniser(known_phrases)

    def __repr__(self) -> str:
        return f"Deidentifier(language={self._config.language!r})"

    def check_recall(self) -> RecallFigures:
        """Figures on the bundled held-out notes; a second or two.

        Raises:
            GateFailed: fewer identifiers are found than the config asks for.
        """
        figures = measure_recall(self._recogniser.find)
        if not figures.recall.value >= self._config.least_recall:
            raise GateFailed(
                f"The recognisers find {figures.recall.value:.4f} of the identifiers in the bundled notes; "
                f"data.deidentify.least_recall asks for {self._config.least_recall:g}. Install the pinned version of "
                "philter-lite, or ask for less if you accept what that lets through."
            )
        return figures

    def clean(self, text: str, *, group_id: str) -> Cleaned | Unsure:
        """`text` with surrogates, or why it cannot be trusted.

        Args:
            text: English clinical text.
            group_id: the patient, whose surrogates are the same in every text.
        """
        if len(text) > _MOST_CHARACTERS:
            return Unsure("length")
        doubt = find_odd_characters(text)
        if doubt is not None:
            return Unsure(doubt)
        found = self._recogniser.find(text)
        originals = _collect_originals(text, found)
        surrogates = Surrogates(self._key, group_id, self._recogniser.vocabulary)
        day_first = has_day_first(text[span.start : span.end] for span in found if span.type == "date")
        oldest_year = _find_oldest_year(text, found)
        pieces, placed = [], []
        end = length = 0
        for span in found:
            kept = text[end : span.start]
            value = text[span.start : span.end]
            year = read_year(value) if span.type == "date" else None
            if year is not None and year < oldest_year:
                drawn = _LONG_AGO
            else:
                drawn = surrogates.replace(value, span.type, avoid=originals, day_first=day_first)
            pieces += [kept, drawn]
            length += len(kept)
            placed.append(Span(length, length + len(drawn), span.type))
            length += len(drawn)
            end = span.end
        result = "".join(pieces) + text[end:]
        telling = {word for word in originals if not self._recogniser.vocabulary.is_safe(word) or word.isdigit()}
        doubt = find_doubt(result, self._recogniser, surrogates=placed, originals=telling)
        if doubt is not None:
            return Unsure(doubt)
        return Cleaned(result, dict(sorted(Counter(span.type for span in found).items())))

    def clean_attributes(self, attributes: Mapping[str, str], *, group_id: str) -> dict[str, str] | Unsure:
        """Attributes without identifiers: ages over 89 in one class, sites as pseudonyms, names and dates left out."""
        cleaned = {}
        for name, value in attributes.items():
            words = set(re.split(r"[\s_-]+", name.lower()))
            if name.lower() in _NEVER_KEPT or words & _NEVER_KEPT:
                continue
            if words & _PLACES:
                cleaned[name] = draw_pseudonym(self._key, "site", value)
            elif "age" in words:
                number = _NUMBER.search(value)
                if number is None and value.strip().lower() not in ("", "unknown"):
                    return Unsure("attribute")
                cleaned[name] = "90 or older" if number and float(number[0]) > _OLDEST_AGE else value
            elif self.clean(value, group_id=group_id) == Cleaned(value, {}) and self.clean(
                name, group_id=""
            ) == Cleaned(name, {}):
                cleaned[name] = value
            else:
                return Unsure("attribute")
        return cleaned

    def clean_case(self, case: Case) -> CleanedCase | Unsure:
        """The whole case without identifiers: text, attributes, findings, the image's metadata; ids as pseudonyms.

        What the pixels of the image show stays.
        """
        counts: dict[str, int] = {}
        text = case.text
        if text is not None:
            outcome = self.clean(text, group_id=case.group_id)
            if isinstance(outcome, Unsure):
                return outcome
            text, counts = outcome
        attributes = self.clean_attributes(case.attributes, group_id=case.group_id)
        if isinstance(attributes, Unsure):
            return attributes
        if not all(self._is_coded(finding) for finding in case.findings):
            return Unsure("finding")
        try:
            image = None if case.image is None else strip_metadata(case.image)
        except InvalidInput:
            return Unsure("image")
        ids = {
            "case_id": draw_pseudonym(self._key, "case", case.case_id),
            "group_id": draw_pseudonym(self._key, "patient", case.group_id),
        }
        return CleanedCase(
            case.model_copy(update={**ids, "text": text, "image": image, "attributes": attributes}), counts
        )

    def _is_coded(self, finding: Finding) -> bool:
        """A finding whose label holds nothing of a person."""
        outcome = self.clean(finding.label, group_id="")
        return isinstance(outcome, Cleaned) and not outcome.counts


def _find_oldest_year(text: str, found: Iterable[Span]) -> int:
    """The first year that tells no age over 89: that of the text's last date less 89 years."""
    years = [read_year(text[span.start : span.end]) for span in found if span.type == "date"]
    return max([_OLDEST_YEAR, *(year - _OLDEST_AGE for year in years if year is not None and year < 2100)])


def _collect_originals(text: str, found: Iterable[Span]) -> frozenset[str]:
    """Words and numbers of the identifiers in `found`, in small plain letters; of dates and ages none."""
    return frozenset(
        plain(match[0])
        for span in found
        if span.type not in ("date", "age")
        for match in re.finditer(r"[^\W_]{3,}", text[span.start : span.end])
    )
