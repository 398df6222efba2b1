"""What is held of rows while two versions are compared: hashes, a few numbers and the case ids, never content.

Goes in: rows of `cases`, `rankings` or `preferences`, one after another. Comes out: a numpy array with one entry a row,
and which entry of one array belongs to which of another. It knows no store.

Hashes have 64 bits and a key that is drawn for one comparison, so nobody can prepare two texts that look equal here.
"""

import hashlib
import json
import secrets
import struct
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from mint_lib.records import SPLITS, Case, PreferencePair, Ranking, Record, Split

if TYPE_CHECKING:
    from numpy.typing import NDArray

TableKind = Literal["cases", "rankings", "preferences"]
ROW_TYPES: dict[TableKind, type[Record]] = {"cases": Case, "rankings": Ranking, "preferences": PreferencePair}
FIELDS: dict[TableKind, tuple[str, ...]] = {
    "cases": ("patient", "text", "image", "findings", "label", "attributes", "origin"),
    "rankings": ("order of labels", "probabilities", "teacher"),
    "preferences": ("prompt", "image", "chosen", "rejected", "teacher", "prompt template", "policy"),
}
"""What of a row is compared, each with its own hash."""
LENGTHS: dict[TableKind, tuple[str, ...]] = {
    "cases": ("text",),
    "rankings": (),
    "preferences": ("prompt", "chosen", "rejected"),
}
"""What of a row is counted in characters."""
DEPTH = 10
"""Labels of a ranking that are held, the first ones."""
_MATCHED_BY: dict[TableKind, tuple[tuple[str, ...], ...]] = {
    "cases": ((),),
    "rankings": ((),),
    "preferences": (("chosen", "rejected"), ()),
}
"""What two rows of a case that are not the same throughout have to share, from the strictest; nothing: their order."""
_CHUNK_ROWS = 65_536
_GOLDEN = 0x9E3779B97F4A7C15
"""2**64 over the golden ratio, odd: its powers weigh the hashes of a row's fields in their sum."""


class _Taken(NamedTuple):
    """What is taken of one row."""

    fields: tuple[Iterable[bytes | None], ...]
    label: str | None
    has_image: bool
    is_synthetic: bool
    lengths: tuple[int, ...] = ()
    first_labels: tuple[str, ...] = ()


class RowDigests:
    """The rows of one kind that were added so far."""

    def __init__(self, kind: TableKind, *, like: "RowDigests | None" = None):
        """Start with no rows; `like` is what they will be compared with, whose key and label numbers are shared."""
        self._kind = kind
        self._key: bytes = like._key if like is not None else secrets.token_bytes(32)
        self._label_codes: dict[str, int] = like._label_codes if like is not None else {}
        num_first = DEPTH if kind == "rankings" else 0
        num_fields, num_lengths = len(FIELDS[kind]), len(LENGTHS[kind])
        self._format = struct.Struct(f"<Q{num_fields}Qbi??{num_lengths}I{num_first}iQ")
        self._dtype = np.dtype(
            [
                ("case", "<u8"),
                ("fields", "<u8", (num_fields,)),
                ("split", "i1"),
                ("label", "<i4"),
                ("has_image", "?"),
                ("is_synthetic", "?"),
                ("lengths", "<u4", (num_lengths,)),
                ("first_labels", "<i4", (num_first,)),
                ("id_end", "<u8"),
            ]
        )
        self._rows = bytearray()
        self._ids = bytearray()
        self.teachers: Counter[str] = Counter()
        """Rows by the digest of the teacher they come from."""

    def __len__(self) -> int:
        return len(self._rows) // self._format.size

    @property
    def num_bytes(self) -> int:
        """Held for all rows together."""
        return len(self._rows) + len(self._ids)

    @property
    def rows(self) -> "NDArray[np.void]":
        """One entry a row, not copied: hashes `case` and `fields`, numbers of split and labels, lengths in characters.

        No row can be added while it is in use.
        """
        return np.frombuffer(self._rows, dtype=self._dtype)

    def field(self, name: str) -> "NDArray[np.uint64]":
        """The hashes of one field of `FIELDS`, a row each."""
        hashes: NDArray[np.uint64] = self.rows["fields"][:, FIELDS[self._kind].index(name)]
        return hashes

    def add(self, row: Record, split: Split) -> None:
        """Take in one row of `split`."""
        taken = _take(row)
        case_id = row.case_id.encode()  # type: ignore[attr-defined]
        self._ids += case_id
        first = [self._number(label) for label in taken.first_labels[:DEPTH]]
        num_first = self._dtype["first_labels"].shape[0]
        self._rows += self._format.pack(
            self._hash((case_id,)),
            *(self._hash(parts) for parts in taken.fields),
            SPLITS.index(split),
            -1 if taken.label is None else self._number(taken.label),
            taken.has_image,
            taken.is_synthetic,
            *taken.lengths,
            *(first + [-1] * (num_first - len(first))),
            len(self._ids),
        )
        if isinstance(row, Ranking | PreferencePair):
            self.teachers[row.teacher_digest] += 1

    def case_ids(self, places: Sequence[int]) -> tuple[str, ...]:
        """The case ids of the rows at `places`."""
        ends = self.rows["id_end"]
        spans = ((int(ends[place - 1]) if place else 0, int(ends[place])) for place in places)
        return tuple(self._ids[start:end].decode() for start, end in spans)

    def count_labels(self, chosen: "NDArray[np.bool_]") -> Counter[str]:
        """Rows by their label (of a ranking or a pair: the first one), among those that `chosen` marks."""
        codes = self.rows["label"][chosen]
        counts = np.bincount(codes[codes >= 0], minlength=len(self._label_codes))
        return Counter({label: int(counts[code]) for label, code in self._label_codes.items() if counts[code]})

    def _number(self, label: str) -> int:
        return self._label_codes.setdefault(label, len(self._label_codes))

    def _hash(self, parts: Iterable[bytes | None]) -> int:
        hasher = hashlib.blake2b(digest_size=8, key=self._key)
        for part in parts:
            hasher.update(b"-" if part is None else b"%d:" % len(part))
            hasher.update(part or b"")
        return int.from_bytes(hasher.digest())


def join_column(tables: Sequence[RowDigests], column: str) -> "NDArray[Any]":
    """One column of the rows of all `tables`, one table after another."""
    return np.concatenate([table.rows[column] for table in tables])


def match_rows(before: RowDigests, after: RowDigests, kind: TableKind) -> tuple["NDArray[np.intp]", "NDArray[np.intp]"]:
    """Places of the rows that belong together: rows `before[i]` and `after[j]` are the same, or one became the other.

    Both have the same case. Rows that are the same throughout come first, whatever their order; of pairs that are not,
    those with the same sides; the others of a case in the order in which they stand.
    """
    left, right = np.arange(len(before)), np.arange(len(after))
    found: list[tuple[NDArray[np.intp], NDArray[np.intp]]] = []
    for shared in ((*FIELDS[kind], "split"), *_MATCHED_BY[kind]):
        keys_left = _number_repeats(_mix(before, shared)[left])
        keys_right = _number_repeats(_mix(after, shared)[right])
        _, in_left, in_right = np.intersect1d(keys_left, keys_right, assume_unique=True, return_indices=True)
        found.append((left[in_left], right[in_right]))
        left, right = np.delete(left, in_left), np.delete(right, in_right)
    places_before, places_after = (np.concatenate(places) for places in zip(*found, strict=True))
    order = np.argsort(places_after)
    return places_before[order], places_after[order]


def measure_overlap(before: "NDArray[np.int32]", after: "NDArray[np.int32]") -> float:
    """Mean average overlap of ranked labels, arrays `[row, rank]` of numbers, -1 behind the last one.

    Average overlap (Webber, Moffat and Zobel 2010, section 3.1): the share of labels in common among the first d,
    averaged over the depths d from 1 to that of the longer list.
    """
    total = 0.0
    for start in range(0, len(before), _CHUNK_ROWS):
        left, right = before[start : start + _CHUNK_ROWS], after[start : start + _CHUNK_ROWS]
        is_same = (left[:, :, None] == right[:, None, :]) & (left[:, :, None] >= 0)
        num_common = np.stack([is_same[:, :d, :d].sum(axis=(1, 2)) for d in range(1, left.shape[1] + 1)], axis=1)
        depth = np.maximum((left >= 0).sum(axis=1), (right >= 0).sum(axis=1))
        ranks = np.arange(1, left.shape[1] + 1)
        shares = np.where(ranks <= depth[:, None], num_common / ranks, 0.0)
        total += float((shares.sum(axis=1) / np.maximum(depth, 1)).sum())
    return total / len(before)


def _mix(table: RowDigests, names: Sequence[str]) -> "NDArray[np.uint64]":
    """One number a row, of its case and what `names` says."""
    mixed: NDArray[np.uint64] = table.rows["case"].copy()
    for name in names:
        column = table.rows["split"].astype(np.uint64) if name == "split" else table.field(name)
        mixed = mixed * np.uint64(_GOLDEN) + column
    return mixed


def _number_repeats(keys: "NDArray[np.uint64]") -> "NDArray[np.uint64]":
    """Distinct numbers: the second and later rows with one key get keys of their own, the same ones on both sides."""
    order = np.argsort(keys, kind="stable")
    places = np.arange(len(keys))
    is_first = np.ones(len(keys), dtype=bool)
    is_first[1:] = np.diff(keys[order]) != 0
    repeats = np.empty(len(keys), dtype=np.uint64)
    repeats[order] = places - np.maximum.accumulate(np.where(is_first, places, 0))
    return keys + repeats * np.uint64(_GOLDEN)


def _take(row: Record) -> _Taken:
    """What is taken of a row, by its type."""
    if isinstance(row, Case):
        return _take_case(row)
    if isinstance(row, Ranking):
        return _take_ranking(row)
    assert isinstance(row, PreferencePair), type(row)
    return _take_pair(row)


def _take_case(case: Case) -> _Taken:
    findings = [[item.id, item.label, item.excluded] for item in case.findings]
    return _Taken(
        fields=(
            _encode(case.group_id),
            _encode(case.text),
            (case.image,),
            _spell(findings),
            _encode(case.label_id),
            _spell(sorted(case.attributes.items())),
            _spell([case.source, case.synthetic]),
        ),
        label=case.label_id,
        has_image=case.image is not None,
        is_synthetic=case.synthetic,
        lengths=(len(case.text or ""),),
    )


def _take_ranking(ranking: Ranking) -> _Taken:
    return _Taken(
        fields=(
            _encode(*ranking.label_ids),
            (struct.pack(f"<{len(ranking.probabilities)}d", *ranking.probabilities),),
            _encode(ranking.teacher_digest),
        ),
        label=next(iter(ranking.label_ids), None),
        has_image=False,
        is_synthetic=False,
        first_labels=ranking.label_ids[:DEPTH],
    )


def _take_pair(pair: PreferencePair) -> _Taken:
    return _Taken(
        fields=(
            _encode(*(text for turn in pair.prompt for text in (turn.role, turn.content))),
            pair.images,
            _encode(pair.chosen, *pair.chosen_label_ids),
            _encode(pair.rejected, *pair.rejected_label_ids),
            _encode(pair.teacher_digest),
            _encode(pair.template_digest),
            _encode(pair.policy),
        ),
        label=next(iter(pair.chosen_label_ids), None),
        has_image=bool(pair.images),
        is_synthetic=False,
        lengths=(sum(len(turn.content) for turn in pair.prompt), len(pair.chosen), len(pair.rejected)),
    )


def _encode(*texts: str | None) -> tuple[bytes | None, ...]:
    return tuple(None if text is None else text.encode() for text in texts)


def _spell(value: Any) -> tuple[bytes]:
    return (json.dumps(value).encode(),)
