"""The record of a comparison: numbers and case ids, no content."""

from mint_lib.data_difference.figures import Figures, Lengths
from mint_lib.records import Record, Reference, Split


class Affected(Record):
    """Rows that one thing happened to."""

    num_rows: int
    num_cases: int
    """As pairs may have a case in common."""
    case_ids: tuple[str, ...]
    """Of these cases; the first ones, unless all were asked for."""


class SplitDifference(Record):
    """One split in both versions."""

    before: Figures | None
    """None: files that both versions have were not read, and what the versions state does not fill the gap."""
    after: Figures | None
    shift: float | None
    """Total variation distance of the class shares: 0 the same, 1 no class in common."""
    p_value: float | None
    """Chi-square test that the rows that are new in this split have classes as frequent as those of `before`. None:
    there are none, or too few for the test. Several rows of one patient make it too small."""


class Agreement(Record):
    """How alike the teachers' choices are in the rows that both versions have, as far as they were read."""

    num_rows: int
    first_label_changed: float
    """Share of these rows."""
    overlap: float | None
    """Of rankings: mean average overlap of the first labels, up to 10: 1 the same order, 0 no label in common."""


class FileCounts(Record):
    """Files of rows, by sha256."""

    num_shared: int
    shared_bytes: int
    num_new: int
    new_bytes: int
    num_gone: int
    gone_bytes: int


class DataDifference(Record):
    """What is different in version `after`, seen from version `before`."""

    before: Reference
    after: Reference
    is_same_data: bool
    """The same rows in the same splits, whatever their order, and the same labels."""
    num_unread_files: int
    """Files of rows that both versions have and that were not read."""
    added: dict[Split, Affected]
    removed: dict[Split, Affected]
    changed: Affected
    changes: dict[str, Affected]
    """The changed rows by what is different in them."""
    moves: dict[str, Affected]
    """The changed rows that are in another split, by `from -> to`."""
    leaked: Affected
    """Rows of train whose patient was in test, and not in train, before, as far as both were read: what was tested on
    that patient no longer counts."""
    splits: dict[Split, SplitDifference]
    lengths: dict[str, tuple[Lengths | None, Lengths | None]]
    """Characters by part, of the rows that were read."""
    labels: dict[str, tuple[str | None, str | None]]
    """Labels that were added, removed or renamed: id to both names."""
    teachers: tuple[dict[str, int], dict[str, int]]
    """Digests of teachers to the number of their rows that were read."""
    agreement: Agreement | None
    settings: dict[str, tuple[str | None, str | None]]
    """Config, inputs and code of the records where these differ, as JSON."""
    files: FileCounts
    bytes_per_row: float
    """Held in memory for each row that was read."""
