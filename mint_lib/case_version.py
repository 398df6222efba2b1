"""A version of cases: split tables, label set, the gate's verdict, the record and the card, committed as one.

Goes in: the new cases as they lie in the spool, and the version that grows, if one does. Comes out: the version, of
kind `cases`, or `quarantine` where the gate refuses it. Cases are streamed; memory holds their keys. Knows no source.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from mint_lib.case_keys import CaseKey
from mint_lib.case_spool import CaseSpool
from mint_lib.dataset_card.beside import add_card
from mint_lib.dataset_card.description import describe_draft
from mint_lib.gate.material import GateMaterial
from mint_lib.gate.report import GateReport
from mint_lib.gate.settings import GateConfig
from mint_lib.gate.verdict import REPORT, add_report, choose_kind, read_report
from mint_lib.label_set import LABELS
from mint_lib.records import SPLITS, Case, Label, Reference, Split, StageRecord
from mint_lib.rows import case_schema
from mint_lib.splits import SplitBy

if TYPE_CHECKING:
    from mint_lib.store import Store


class SplitTables:
    """The cases of each split, streamed anew at each call: those of the version that grows, then the new ones."""

    def __init__(
        self, splits: Mapping[Split, Sequence[CaseKey]], spool: CaseSpool, *, store: "Store", base: Reference | None
    ):
        self._splits = splits
        self._spool = spool
        self._store = store
        self.base = base

    def read(self, split: Split) -> Iterator[Case]:
        """Every case of a split."""
        if self.base is not None:
            yield from self._store.iterate_rows(self.base, split, Case)
        yield from self.read_new(split)

    def read_new(self, split: Split) -> Iterator[Case]:
        """The new cases of a split, without the labels that few-label mode withholds."""
        for key in self._splits[split]:
            case = self._spool.read(key.place)
            yield case if case.label_id == key.label_id else case.model_copy(update={"label_id": key.label_id})

    def read_previous_report(self) -> GateReport | None:
        """The gate's verdict on the version that grows; None where there is none."""
        return None if self.base is None else read_report(self._store, self.base)

    def has_new(self, split: Split) -> bool:
        """Whether anything is added to a split."""
        return bool(self._splits[split])


def judge_cases(
    gate: GateConfig,
    name: str,
    *,
    tables: SplitTables,
    labels: Sequence[Label],
    by: SplitBy,
    reads: Literal["text", "image"],
) -> GateReport:
    """The gate's verdict on all cases of a version, compared with the version that grows.

    Args:
        gate: the thresholds.
        name: name of the version.
        tables: its cases.
        labels: the label set.
        by: how it was split; patients may stand in several splits where images were dealt.
        reads: what the student is shown.
    """
    from mint_lib.gate.judge import judge_data

    if by == "image":
        gate = gate.model_copy(update={"max_shared_patients": None})
    previous = tables.read_previous_report()
    return judge_data(gate, GateMaterial(name=name, labels=labels, cases=tables.read, reads=reads, previous=previous))


def write_version(
    store: "Store", name: str, *, tables: SplitTables, labels: Sequence[Label], report: GateReport, record: StageRecord
) -> Reference:
    """Write and commit one version; shards of the version that grows are taken over as they are.

    Args:
        store: where it goes.
        name: its name.
        tables: its cases.
        labels: the label set.
        report: the gate's verdict on these cases.
        record: how they were made.
    """
    kind = choose_kind(report, "cases")
    base = tables.base if kind == "cases" else None
    label_set = [label.model_dump(mode="json") for label in labels]
    with store.write(kind, name, base=base) as version:
        for split in SPLITS:
            if base is not None:
                version.carry_table(split)
            if tables.has_new(split) or tables.base is None:
                version.add_rows(split, tables.read_new(split), case_schema())
        version.add_json(LABELS, label_set)
        add_report(version, report)
        draft = describe_draft(
            store,
            kind="cases",
            name=name,
            record=record,
            files=version.files,
            tables={split: tables.read(split) for split in SPLITS},
            documents={LABELS: label_set, REPORT: report.model_dump(mode="json")},
        )
        add_card(version, draft)
        return version.commit(record)
