"""The gate's report as one self-contained HTML page.

Goes in: a `GateReport`. Comes out: a page that asks nothing of the network, runs no script and escapes everything it
was given. It shows case ids and batches, never content of a case.
"""

import pathlib

from mint_lib.gate.report import CheckOutcome, GateReport

_TEMPLATES = pathlib.Path(__file__).parents[1] / "templates"
_COUNTED = {"shared_patients"}
_PROBABILITIES = {"label_flips_by_batch", "trigger_phrase"}
_EFFECTS = {"length_difference"}
_ORDER = ("refused", "passed", "reported", "off", "not_applicable")
_SHOWN_BATCHES = 60
_WORDS = {
    "passed": "Passed",
    "refused": "Refused",
    "off": "Off",
    "not_applicable": "Nothing to check",
    "reported": "Reported",
}


def render_gate(report: GateReport) -> str:
    """The page. The same report gives the same text."""
    import jinja2
    from jinja2.sandbox import SandboxedEnvironment

    environment = SandboxedEnvironment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made = [outcome for outcome in report.outcomes if outcome.status not in ("off", "not_applicable")]
    page = environment.get_template("gate.html").render(
        report=report,
        headline=_write_headline(report),
        made=sorted(made, key=lambda outcome: _ORDER.index(outcome.status)),
        skipped=[outcome for outcome in report.outcomes if outcome.status in ("off", "not_applicable")],
        words=_WORDS,
        measure=format_measured,
        limit=format_threshold,
        classes=_list_classes(report),
        batches=sorted(report.statistics.batches.items(), key=lambda item: (-item[1], item[0]))[:_SHOWN_BATCHES],
    )
    return str(page)


def format_measured(outcome: CheckOutcome) -> str:
    """What was measured, in the unit of the check."""
    return "not measured" if outcome.measured is None else _format_value(outcome.check, outcome.measured)


def format_threshold(outcome: CheckOutcome) -> str:
    """The threshold, such as `at most 2 %`."""
    if outcome.threshold is None:
        return ""
    words = "at most" if outcome.bound == "at_most" else "at least"
    return f"{words} {_format_value(outcome.check, outcome.threshold)}"


def _format_value(check: str, value: float) -> str:
    if check in _COUNTED:
        return f"{value:.0f}"
    if check in _PROBABILITIES:
        return f"p {value:.2g}"
    if check in _EFFECTS:
        return f"{value:.2f} SD"
    percent = 100 * value
    return f"{percent:.0f} %" if percent in (0, 100) or percent >= 10 else f"{percent:.2g} %"


def _write_headline(report: GateReport) -> str:
    refused = [outcome.title.lower() for outcome in report.refusals]
    if not refused:
        return f"The {report.judged} of {report.name} passed the data gate."
    named = ", ".join(refused[:3]) + (f" and {len(refused) - 3} more" if len(refused) > 3 else "")
    return f"The {report.judged} of {report.name} are refused: {named}."


def _list_classes(report: GateReport) -> list[tuple[str, int, float]]:
    """Label id, training cases and width of a bar in percent, the most frequent first."""
    counts = report.statistics.label_counts
    most = max(counts.values(), default=0)
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [(name, count, 100 * count / most if most else 0.0) for name, count in ranked]
