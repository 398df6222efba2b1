"""Disease names: resolves the names of a free answer to ontology ids.

Goes in: the label set, and diseases outside it. Comes out: for a name its label's id, or why it is none. Names are
compared by id, by normalised form and by synonym; a near miss is told apart and never resolves. It knows no answers.
"""

import difflib
from collections.abc import Mapping, Sequence

from mint_lib.records import Label
from mint_lib.template import normalise_name

OUTSIDE, FUZZY, UNKNOWN = "outside:", "fuzzy:", "unknown"


class NameTable:
    """The names of the label set, and those of the diseases outside it."""

    def __init__(self, labels: Sequence[Label], *, diseases: Mapping[str, Sequence[str]], fuzzy_ratio: float):
        """`diseases` maps an id to its names; `fuzzy_ratio` is the least similarity of a near miss."""
        self._fuzzy_ratio = fuzzy_ratio
        self._ids = {label.id.casefold(): label.id for label in labels}
        self._names = _index_names({label.id: (label.name,) for label in labels})
        self._synonyms = _index_names({label.id: label.synonyms for label in labels})
        label_ids = {label.id for label in labels}
        self._synonyms = (
            _index_names({key: names for key, names in diseases.items() if key in label_ids}) | self._synonyms
        )
        self._outside = {
            normalise_name(name): key
            for key, names in sorted(diseases.items(), reverse=True)
            for name in names
            if key not in label_ids
        }

    def resolve(self, name: str) -> str:
        """A label's id, `outside:<id>` for another disease, `fuzzy:<id>` for a near miss, or `unknown`."""
        normalised = normalise_name(name)
        exact = self._ids.get(name.strip().casefold()) or self._names.get(normalised) or self._synonyms.get(normalised)
        if exact:
            return exact
        if normalised in self._outside:
            return OUTSIDE + self._outside[normalised]
        near = difflib.get_close_matches(normalised, list(self._names), n=1, cutoff=self._fuzzy_ratio)
        return FUZZY + self._names[near[0]] if near else UNKNOWN


def _index_names(names_of: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Normalised name to id; a name that several ids carry resolves to none of them."""
    found: dict[str, set[str]] = {}
    for key, names in names_of.items():
        for name in names:
            found.setdefault(normalise_name(name), set()).add(key)
    return {name: next(iter(keys)) for name, keys in found.items() if name and len(keys) == 1}
