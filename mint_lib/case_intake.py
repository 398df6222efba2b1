"""Intake of cases: rows of a source are validated, de-identified where that is asked for, and spooled to local disk.

Goes in: rows as a source reads them, one at a time. Comes out: keys of the cases in the spool, counts of what was left
out, or `RefusedData` where too many rows are bad. Knows no source by name and nothing of splits.
"""

import collections
import logging
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from mint_lib.case_keys import CaseKey, Content, make_key
from mint_lib.case_rows import ImageLimits, LeftOut, Row, validate_row
from mint_lib.case_spool import CaseSpool
from mint_lib.errors import RefusedData
from mint_lib.records import Label
from mint_lib.splits import describe_case_ids

if TYPE_CHECKING:
    from mint_lib.deidentification.cleaning import Cleaning

logger = logging.getLogger(__name__)
_SHOWN_LABELS = 5


class CaseIntake:
    """Takes the rows of the sources of one run into the spool."""

    def __init__(
        self,
        spool: CaseSpool,
        labels: Sequence[Label],
        limits: ImageLimits,
        contents: Sequence[Content],
        *,
        batch: str | None,
        max_refused_share: float,
        cleaning: "Cleaning | None",
    ):
        """Prepare.

        Args:
            spool: where cases go.
            labels: the label set.
            limits: largest images.
            contents: of what makes two cases identical.
            batch: name of the delivery, which a case keeps unless its source names one.
            max_refused_share: share of a source's rows that may be refused.
            cleaning: de-identification; None takes the cases as they are.
        """
        self._spool = spool
        self._label_ids = {label.id for label in labels}
        self._limits = limits
        self._batch = batch
        self._max_refused_share = max_refused_share
        self.contents = tuple(contents)
        self.cleaning = cleaning
        self.counts: collections.Counter[str] = collections.Counter()
        """What was left out, by source and cause."""
        self.has_observed_text = False
        """A case that was not generated has a text."""

    def read(self, rows: Iterable[Row | LeftOut], *, name: str) -> list[CaseKey]:
        """Keys of the cases of the source `name`, in their order; those that de-identification puts aside are missing.

        Raises:
            RefusedData: the source is empty, or more than the allowed share of its rows is bad. Where cases are
                de-identified, it names rows by their number, from 1, since ids may tell somebody's name.
        """
        seen: set[str] = set()
        keys: list[CaseKey] = []
        refused: dict[str, list[str]] = collections.defaultdict(list)
        num_accepted = 0
        for number, row in enumerate(rows, start=1):
            shown = row.case_id if self.cleaning is None else f"row {number}"
            if isinstance(row, LeftOut):
                if row.refused:
                    refused[row.cause].append(shown)
                else:
                    self.counts[f"{name}/not wanted/{row.cause}"] += 1
                continue
            case = validate_row(row, self._limits, label_ids=self._label_ids, seen=seen, batch=self._batch)
            seen.add(row.case_id)
            if isinstance(case, str):
                refused[case].append(shown)
                continue
            num_accepted += 1
            if refused and not self._max_refused_share:
                continue  # the source is refused in the end; only its other faults are still of interest
            cleaned = case if self.cleaning is None else self.cleaning.clean(case)
            if cleaned is not None:
                place = self._spool.append(cleaned)
                keys.append(make_key(cleaned, place=place, contents=self.contents, assigned=row.split))
                self.has_observed_text |= bool(cleaned.text) and not cleaned.synthetic
        self._check(refused, num_accepted, name)
        return keys

    def _check(self, refused: dict[str, list[str]], num_accepted: int, name: str) -> None:
        """Count what was refused, and raise RefusedData where that is too much or nothing is left."""
        by_cause = {cause: len(ids) for cause, ids in sorted(refused.items())}
        self.counts.update({f"{name}/refused/{cause}": number for cause, number in by_cause.items()})
        num_refused = sum(by_cause.values())
        total = num_accepted + num_refused
        logger.info("data: source %s gave %d rows, %d refused", name, total, num_refused)
        if num_refused and num_refused > self._max_refused_share * total:
            raise RefusedData(
                f"{num_refused} of {total} rows of source {name!r} are bad: {describe_case_ids(refused)}. "
                f"data.max_refused_share = {self._max_refused_share:g} allows {int(self._max_refused_share * total)}. "
                "Mend or remove these rows, or allow a larger share.",
                by_cause,
                dict(refused),
            )
        if not num_accepted:
            not_wanted = {key: count for key, count in self.counts.items() if key.startswith(f"{name}/not wanted/")}
            raise RefusedData(
                f"Source {name!r} gave no case"
                + (f"; not wanted: {sum(not_wanted.values())} rows" if not_wanted else "")
                + ". Check its path, filters and labels in the recipe's data section.",
                not_wanted | by_cause,
            )


def check_labels(labels: Sequence[Label], source_name: str) -> None:
    """Raise RefusedData unless there are two labels or more, with distinct ids and names."""
    if len(labels) < 2:
        raise RefusedData(f"Source {source_name!r} offers {len(labels)} labels; at least 2 are needed to rank them.")
    for what, values in (("id", [item.id for item in labels]), ("name", [item.name.casefold() for item in labels])):
        twice = sorted(value for value, count in collections.Counter(values).items() if count > 1)
        if twice:
            raise RefusedData(
                f"Two labels of source {source_name!r} have the same {what}: {', '.join(twice[:_SHOWN_LABELS])}. "
                "Answers could not be told apart; choose other labels."
            )
