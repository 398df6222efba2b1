"""Everything in a text that could identify somebody: the recognisers together.

Goes in: a text, and names of diseases and findings that are known to be none of a person. Comes out: typed spans that
do not overlap. Knows no patient and replaces nothing.
"""

from collections.abc import Iterable

from mint_lib.deidentification.dates import find_dates
from mint_lib.deidentification.names import find_names
from mint_lib.deidentification.patterns import find_codes, find_patterns, find_states
from mint_lib.deidentification.places import find_places, find_towns_behind
from mint_lib.deidentification.spans import Span, merge_spans
from mint_lib.deidentification.vocabulary import load_vocabulary
from mint_lib.deidentification.words import MedicalNames, split_words


class Recogniser:
    """Finds identifiers in English clinical text."""

    def __init__(self, known_phrases: Iterable[str] = ()):
        """`known_phrases`: names of the label set and of coded findings, which always stay.

        Raises:
            MissingDependency: the word lists are not installed.
        """
        self.vocabulary = load_vocabulary()
        self.medical_names = MedicalNames(self.vocabulary, known_phrases)

    def find(self, text: str) -> list[Span]:
        """Every identifier, in order and without overlap."""
        words = split_words(text)
        medical = self.medical_names.find(text, words)
        formed = [*find_dates(text), *find_patterns(text)]
        taken = [(span.start, span.end) for span in (*formed, *find_codes(text), *find_states(text))]
        places = find_places(text, words, self.vocabulary, medical=medical)
        anchors = [span for span in (*formed, *places) if span.type in ("address", "organisation")]
        places += find_towns_behind(text, anchors)
        blocked = [*medical, *taken, *((span.start, span.end) for span in places)]
        names = find_names(text, words, self.vocabulary, medical=blocked)
        return merge_spans([*formed, *places, *names])
