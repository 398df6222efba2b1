"""The cases that the probes for poison look at, and what their content says about their labels.

Goes in: the gate's columns and the streams. Comes out: `ProbeCases`: labelled cases of train and validation, at most a
given number, with the evidence of their content. The label is that of the case, or where pairs are judged the first
chosen one. Judges nothing.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mint_lib.gate.columns import PAIRED_SPLITS, CaseColumns, PairColumns, iterate_readable
from mint_lib.gate.evidence import NUM_FOLDS, Evidence, Words, describe_image, split_words, weigh_images, weigh_words
from mint_lib.gate.settings import LabelFlipsConfig
from mint_lib.records import SPLITS

if TYPE_CHECKING:
    from mint_lib.gate.material import GateMaterial

_MAX_IMAGES = 2000
"""Reading colours and texture of an image takes 20 to 40 ms."""


@dataclass(frozen=True)
class ProbeCases:
    """One entry a case that is looked at."""

    rows: np.ndarray
    """Rows in `CaseColumns`."""
    label: np.ndarray
    """Labels, renumbered from 0."""
    label_ids: tuple[str, ...]
    group: np.ndarray
    batch: np.ndarray
    evidence: Evidence
    words: Words | None
    """None for images."""


def collect_probe_cases(
    material: "GateMaterial", cases: CaseColumns, pairs: PairColumns, config: LabelFlipsConfig
) -> ProbeCases | str:
    """The cases to look at, or why there is nothing to look at."""
    label_of = find_labels(material, cases, pairs)
    usable = (label_of >= 0) & (cases.split < len(PAIRED_SPLITS))
    has_content = np.zeros(len(cases), bool)
    if material.reads == "text":
        has_content[cases.signed] = True
    else:
        sound = [row for row, sketch in zip(cases.pictured, cases.sketches, strict=True) if sketch.fault is None]
        has_content[np.array(sound, dtype=np.int64)] = True
    rows = np.nonzero(usable & has_content)[0]
    if not len(rows):
        return "no case of train or validation has both a label and a content that the student reads"
    rows = _draw(rows, cases, config.max_cases if material.reads == "text" else min(config.max_cases, _MAX_IMAGES))
    patients = np.unique(np.stack([label_of[rows], cases.group[rows]], axis=1), axis=0)
    numbers, counts = np.unique(patients[:, 0], return_counts=True)
    kept = numbers[counts >= config.min_patients]
    rows = rows[np.isin(label_of[rows], kept)]
    if len(kept) < 2 or len(np.unique(cases.group[rows])) < NUM_FOLDS:
        return f"fewer than two labels have {config.min_patients} patients"
    label = np.searchsorted(kept, label_of[rows])
    group, batch = cases.group[rows], cases.batch[rows]
    words = None
    if material.reads == "text":
        words = split_words(_read_texts(material, rows))
        evidence = weigh_words(words, label, group, len(kept))
    else:
        evidence = weigh_images(_read_figures(material, rows), label, group, len(kept))
    label_ids = tuple(material.labels[int(number)].id for number in kept)
    return ProbeCases(rows, label, label_ids, group, batch, evidence, words)


def find_labels(material: "GateMaterial", cases: CaseColumns, pairs: PairColumns) -> np.ndarray:
    """The label of every case, or with pairs the first chosen one of its first pair; below 0 where there is none."""
    if material.pairs is None:
        return cases.label
    label_of = np.full(len(cases), -1, np.int32)
    known = np.nonzero(pairs.case >= 0)[0][::-1]
    label_of[pairs.case[known]] = pairs.first_chosen[known]
    return label_of


def _draw(rows: np.ndarray, cases: CaseColumns, most: int) -> np.ndarray:
    """At most `most` rows, those whose ids have the least hashes."""
    if len(rows) <= most:
        return rows
    hashes = [
        hashlib.blake2b(cases.case_ids[row].encode(errors="surrogatepass"), digest_size=8).digest() for row in rows
    ]
    order = sorted(range(len(rows)), key=hashes.__getitem__)[:most]
    return rows[np.sort(order)]


def _read_texts(material: "GateMaterial", rows: np.ndarray) -> list[str]:
    return [text or "" for text, _ in _read_contents(material, rows)]


def _read_figures(material: "GateMaterial", rows: np.ndarray) -> np.ndarray:
    return np.stack([describe_image(image) for _, image in _read_contents(material, rows) if image])


def _read_contents(material: "GateMaterial", rows: np.ndarray) -> Iterator[tuple[str | None, bytes | None]]:
    """Text and image of `rows`, which rise, in a second pass over the stream."""
    wanted = set(rows.tolist())
    row = 0
    for split in SPLITS:
        for case in iterate_readable(lambda split=split: material.cases(split)):  # type: ignore[misc]
            if row in wanted:
                yield case.text, case.image
            row += 1
