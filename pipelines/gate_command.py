"""`mint gate`: the gate's verdict on a version of cases, preferences or quarantine, with its report as a page."""

import pathlib

from rich.console import Console
from rich.table import Table

from mint_lib.errors import InvalidInput
from mint_lib.gate.report import GateReport
from mint_lib.gate.verdict import PAGE, REPORT, read_report
from mint_lib.records import Reference
from mint_lib.store import Store


def show_verdict(reference: Reference, *, store: Store, console: Console, folder: pathlib.Path) -> bool:
    """Print the checks, write the page to `folder`, and return whether the data passed.

    Raises:
        InvalidInput: the gate never judged this version.
    """
    report = read_report(store, reference)
    if report is None:
        raise InvalidInput(
            f"{reference} has no {REPORT}: the gate judges cases and preferences as their stages write them."
        )
    console.print(_make_table(report))
    for outcome in report.refusals:
        console.print(f"refused: {outcome.title}: {outcome.sentence}", highlight=False, markup=False)
        if outcome.batches:
            console.print(f"  batches: {', '.join(outcome.batches)}", highlight=False, markup=False)
        if outcome.case_ids:
            console.print(f"  cases: {', '.join(outcome.case_ids)}", highlight=False, markup=False)
    path = folder / f"{reference.kind}-{reference.name}-{reference.version}.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(store.read_bytes(reference, PAGE))
    console.print(f"gate     {'passed' if report.passed else 'refused: nothing can be trained on these data'}")
    console.print(f"report   {path.resolve()}", highlight=False, soft_wrap=True)
    return report.passed


def _make_table(report: GateReport) -> Table:
    table = Table(box=None, pad_edge=False)
    for title in ("check", "verdict", "measured", "threshold"):
        table.add_column(title, justify="right" if title in ("measured", "threshold") else "left")
    for outcome in report.outcomes:
        style = {"refused": "red", "passed": "green"}.get(outcome.status, "dim")
        table.add_row(
            outcome.title,
            f"[{style}]{outcome.status.replace('_', ' ')}[/{style}]",
            "" if outcome.measured is None else f"{outcome.measured:.4g}",
            "" if outcome.threshold is None else f"{outcome.threshold:g}",
        )
    return table
