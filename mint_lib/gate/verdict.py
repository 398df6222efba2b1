"""What becomes of a verdict: the files that stand beside judged data, and the refusal of data that did not pass.

Goes in: a `GateReport` and a version in the making, or a committed one. Comes out: `gate.json` and `gate.html` among
its files, or `GateFailed`. Refused data lie in a version of kind `quarantine`, which no stage reads.
"""

from typing import TYPE_CHECKING

from mint_lib.errors import GateFailed, InvalidInput
from mint_lib.gate.page import render_gate
from mint_lib.gate.report import GateReport
from mint_lib.records import Kind, Reference

if TYPE_CHECKING:
    from mint_lib.storage.writer import VersionWriter
    from mint_lib.store import Store

REPORT = "gate.json"
PAGE = "gate.html"


def choose_kind(report: GateReport, kind: Kind) -> Kind:
    """Where judged data go: to `kind`, or to quarantine."""
    return kind if report.passed else "quarantine"


def add_report(version: "VersionWriter", report: GateReport) -> None:
    """Write the verdict beside the data."""
    version.add_json(REPORT, report.model_dump(mode="json"))
    version.add_bytes(PAGE, render_gate(report).encode())


def read_report(store: "Store", reference: Reference) -> GateReport | None:
    """The verdict on a version; None where the gate did not judge it."""
    if REPORT not in store.files(reference):
        return None
    return GateReport.model_validate(store.read_json(reference, REPORT))


def enforce(report: GateReport, reference: Reference) -> None:
    """Raise GateFailed, with what refused the data and where they are, unless they passed."""
    if report.passed:
        return
    causes = " ".join(f"{outcome.title}: {outcome.sentence}" for outcome in report.refusals)
    raise GateFailed(
        f"The gate refused the {report.judged} of {report.name}. {causes} Nothing can be trained on them: they lie in "
        f"{reference} with the report ({PAGE}); `mint gate {reference.kind}/{reference.name}@{reference.version}` "
        "shows it. Mend the data, or change a threshold of the recipe's gate if the data are as they should be."
    )


def require_passed(store: "Store", reference: Reference) -> None:
    """Refuse to train on what the gate has not let through.

    Raises:
        InvalidInput: the version was never judged.
        GateFailed: it was refused.
    """
    report = read_report(store, reference)
    if report is None:
        raise InvalidInput(
            f"{reference} was not judged by the gate: it has no {REPORT}. Make it with the preferences stage."
        )
    enforce(report, reference)
