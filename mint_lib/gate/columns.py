"""What the gate holds of every row while it judges: small columns, filled in one pass over the stream.

Goes in: `GateMaterial`. Comes out: `CaseColumns` and `PairColumns`. A case with a text costs about 0.7 kB (of which its
MinHash signature is 512 bytes), one with an image 1.3 kB more, a pair 0.1 kB; texts and images are not kept. A row that
cannot be read ends its split's stream and is counted. Judges nothing.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from mint_lib.gate.image_sketches import ImageSketch, sketch_image
from mint_lib.gate.material import GateMaterial, name_batch
from mint_lib.gate.settings import GateConfig
from mint_lib.gate.text_sketches import NUM_SLOTS, sign_texts
from mint_lib.records import SPLITS, PreferencePair, Record, Split

logger = logging.getLogger(__name__)
PAIRED_SPLITS: tuple[Split, ...] = ("train", "validation")
NO_LABEL, UNKNOWN_LABEL = -1, -2
_CHUNK = 1024
R = TypeVar("R", bound=Record)


@dataclass
class CaseColumns:
    """One entry a case, in the order of the splits."""

    case_ids: list[str] = field(default_factory=list)
    split: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int8))
    """Index into `SPLITS`."""
    group: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    """Number of the patient."""
    batch: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    """Index into `batches`."""
    label: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    """Index into the label set, `NO_LABEL` or `UNKNOWN_LABEL`."""
    signatures: np.ndarray = field(default_factory=lambda: np.zeros((0, NUM_SLOTS), np.uint32))
    """Of the cases of `signed`."""
    signed: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """Rows with a text, where texts are compared."""
    sketches: list[ImageSketch] = field(default_factory=list)
    """Of the cases of `pictured`."""
    pictured: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """Rows with an image."""
    batches: list[str] = field(default_factory=list)
    faults: Counter[str] = field(default_factory=Counter)
    """Rows that break the schema, by cause."""
    faulty_ids: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.case_ids)

    def name(self, rows: np.ndarray) -> list[str]:
        """Case ids of `rows`."""
        return [self.case_ids[int(row)] for row in rows]

    def rank_batches(self, rows: np.ndarray) -> list[str]:
        """The batches of `rows`, the one with most of them first."""
        return [self.batches[index] for index, _ in Counter(self.batch[rows].tolist()).most_common()]


@dataclass
class PairColumns:
    """One entry a pair, train before validation."""

    case: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """Row in `CaseColumns`; -1: unknown."""
    num_rows: dict[Split, int] = field(default_factory=dict)
    first_chosen: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    """Index into the label set, or `NO_LABEL` for a caption."""
    num_names: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), np.int16))
    """Names on the chosen and the rejected side."""
    truth_chosen: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    truth_rejected: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    empty: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    equal: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    """The sides are equal but for case and spacing."""
    repeated: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    """An earlier pair is the same to the byte."""
    faults: Counter[str] = field(default_factory=Counter)
    faulty_ids: list[str] = field(default_factory=list)


def read_cases(material: GateMaterial, config: GateConfig) -> CaseColumns:
    """The columns of all splits' cases."""
    columns = CaseColumns()
    places = {label.id: index for index, label in enumerate(material.labels)}
    groups: dict[str, int] = {}
    batches: dict[str, int] = {}
    seen: set[str] = set()
    numbers: list[tuple[int, int, int, int]] = []
    signatures: list[np.ndarray] = []
    signed: list[int] = []
    pictured: list[int] = []
    texts: list[str] = []
    for index, split in enumerate(SPLITS):
        for case in iterate_readable(lambda split=split: material.cases(split), columns.faults):  # type: ignore[misc]
            row = len(columns)
            label = NO_LABEL if case.label_id is None else places.get(case.label_id, UNKNOWN_LABEL)
            batch = batches.setdefault(name_batch(case), len(batches))
            numbers.append((index, groups.setdefault(case.group_id, len(groups)), batch, label))
            columns.case_ids.append(case.case_id)
            if label == UNKNOWN_LABEL:
                columns.faults["label outside the label set"] += 1
                columns.faulty_ids.append(case.case_id)
            if case.case_id in seen:
                columns.faults["case id given twice"] += 1
                columns.faulty_ids.append(case.case_id)
            seen.add(case.case_id)
            if material.reads == "text" and case.text and case.text.strip():
                signed.append(row)
                texts.append(case.text)
                if len(texts) == _CHUNK:
                    signatures.append(sign_texts(texts))
                    texts = []
            if case.image is not None:
                pictured.append(row)
                columns.sketches.append(sketch_image(case.image, config.max_image_pixels))
    signatures.append(sign_texts(texts))
    table = np.array(numbers, dtype=np.int32).reshape(-1, 4)
    columns.split, columns.group = table[:, 0].astype(np.int8), table[:, 1].copy()
    columns.batch, columns.label = table[:, 2].copy(), table[:, 3].copy()
    columns.signatures, columns.signed = np.concatenate(signatures), np.array(signed, dtype=np.int64)
    columns.pictured = np.array(pictured, dtype=np.int64)
    columns.batches = list(batches)
    return columns


def read_pairs(material: GateMaterial, cases: CaseColumns) -> PairColumns:
    """The columns of the pairs; empty where only cases are judged."""
    columns = PairColumns()
    if material.pairs is None:
        return columns
    row_of = {case_id: row for row, case_id in enumerate(cases.case_ids)}
    places = {label.id: index for index, label in enumerate(material.labels)}
    seen: set[bytes] = set()
    numbers: list[tuple[int, int, int, int]] = []
    flags: list[tuple[bool, bool, bool, bool, bool]] = []
    pairs = material.pairs
    for split in PAIRED_SPLITS:
        start = len(numbers)
        for pair in iterate_readable(lambda split=split: pairs(split), columns.faults):  # type: ignore[misc]
            row = row_of.get(pair.case_id, -1)
            causes = list(_find_pair_faults(pair, row, cases, split, places))
            columns.faults.update(causes)
            if causes:
                columns.faulty_ids.append(pair.case_id)
            first = places.get(pair.chosen_label_ids[0], UNKNOWN_LABEL) if pair.chosen_label_ids else NO_LABEL
            label = int(cases.label[row]) if row >= 0 else NO_LABEL
            truth = material.labels[label].id if label >= 0 else None
            numbers.append((row, first, len(pair.chosen_label_ids), len(pair.rejected_label_ids)))
            digest = _digest_pair(pair)
            asked = any(turn.role == "user" and turn.content.strip() for turn in pair.prompt)
            flags.append(
                (
                    truth in pair.chosen_label_ids,
                    truth in pair.rejected_label_ids,
                    not (asked and pair.chosen.strip() and pair.rejected.strip()),
                    _normalise(pair.chosen) == _normalise(pair.rejected),
                    digest in seen,
                )
            )
            seen.add(digest)
        columns.num_rows[split] = len(numbers) - start
    table = np.array(numbers, dtype=np.int64).reshape(-1, 4)
    columns.case, columns.first_chosen = table[:, 0].copy(), table[:, 1].astype(np.int32)
    columns.num_names = table[:, 2:].astype(np.int16)
    marked = np.array(flags, dtype=bool).reshape(-1, 5)
    columns.truth_chosen, columns.truth_rejected = marked[:, 0], marked[:, 1]
    columns.empty, columns.equal, columns.repeated = marked[:, 2], marked[:, 3], marked[:, 4]
    return columns


def iterate_readable(rows: Callable[[], Iterator[R]], faults: Counter[str] | None = None) -> Iterator[R]:
    """`rows` up to the first one that cannot be read, which is counted: a broken stream cannot be resumed."""
    try:
        yield from rows()
    except (ValueError, TypeError, KeyError) as error:
        if faults is not None:
            faults["row that cannot be read"] += 1
            # Only the class: the message may quote the row.
            logger.warning("gate: a row cannot be read (%s); the rest of its split is not judged", type(error).__name__)


def _find_pair_faults(
    pair: PreferencePair, row: int, cases: CaseColumns, split: Split, places: dict[str, int]
) -> Iterator[str]:
    if row < 0:
        yield "pair of an unknown case"
    elif SPLITS[cases.split[row]] != split:
        yield "pair of a case of another split"
    if not all(label_id in places for label_id in (*pair.chosen_label_ids, *pair.rejected_label_ids)):
        yield "label outside the label set"
    if bool(pair.chosen_label_ids) != bool(pair.rejected_label_ids):
        yield "labels on one side only"


def _digest_pair(pair: PreferencePair) -> bytes:
    hasher = hashlib.blake2b(digest_size=16)
    for turn in pair.prompt:
        hasher.update(f"{turn.role}\0{turn.content}\0".encode(errors="surrogatepass"))
    for image in pair.images:
        hasher.update(hashlib.sha256(image).digest())
    hasher.update(f"\0{pair.chosen}\0{pair.rejected}".encode(errors="surrogatepass"))
    return hasher.digest()


def _normalise(text: str) -> str:
    return " ".join(text.casefold().split())
