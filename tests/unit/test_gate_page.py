"""The data gate's page: what it shows, and that it is safe to open."""

import re

import pytest

from mint_lib.gate.page import format_measured, format_threshold, render_gate
from mint_lib.gate.report import CheckOutcome, GateReport, GateStatistics, decide, skip


def make_report(*outcomes: CheckOutcome, name: str = "cases", batch: str = "clinic") -> GateReport:
    return GateReport(
        name=name,
        judged="cases",
        reads="text",
        passed=all(outcome.passed for outcome in outcomes),
        outcomes=outcomes,
        statistics=GateStatistics(
            num_cases={"train": 3, "validation": 1, "test": 1},
            num_pairs={},
            label_counts={"D:1": 3},
            batches={batch: 5},
        ),
    )


def test_page_passing_report_says_so() -> None:
    page = render_gate(make_report(decide("schema", "Rows and labels", 0.0, 0.0, "All rows are right.")))
    assert "Gate passed" in page
    assert "may be trained on" in page
    assert "Refused" not in page


def test_page_refusing_report_names_check_cases_and_batches_first() -> None:
    passed = decide("schema", "Rows and labels", 0.0, 0.0, "All rows are right.")
    refused = decide("leaked_texts", "Texts in two splits", 0.25, 0.0, "Found.", case_ids=["c-7"], batches=["b-3"])
    off = skip("blank_images", "Blank images", "off", "The recipe switches it off.")
    page = render_gate(make_report(passed, off, refused))
    assert "Gate not passed" in page
    assert page.index("Texts in two splits") < page.index("Rows and labels")
    assert {"c-7", "b-3", "25 %", "at most 0 %"} <= set(re.findall(r"c-7|b-3|25 %|at most 0 %", page))
    assert page.index("Blank images") > page.index("Not checked")


def test_page_escapes_what_it_is_given_and_loads_nothing() -> None:
    hostile = "<script>alert(1)</script>"
    outcome = decide("schema", hostile, 1.0, 0.0, hostile, case_ids=[hostile], batches=[hostile])
    page = render_gate(make_report(outcome, name=hostile, batch=hostile))
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert not re.search(r"(src|href)=|@import|url\(", page)
    assert "default-src 'none'" in page


def test_page_many_batches_are_cut_and_counted() -> None:
    report = make_report(decide("schema", "Rows", 0.0, 0.0, "Fine."))
    many = report.statistics.model_copy(update={"batches": {f"paper-{number}": number for number in range(200)}})
    page = render_gate(report.model_copy(update={"statistics": many}))
    assert "of 200 batches" in page
    assert "paper-199" in page
    assert "paper-10<" not in page


@pytest.mark.parametrize(
    ("check", "measured", "threshold", "bound", "shown"),
    [
        ("leaked_texts", 0.0012, 0.0, "at_most", ("0.12 %", "at most 0 %")),
        ("effective_classes", 0.5, 0.25, "at_least", ("50 %", "at least 25 %")),
        ("shared_patients", 3.0, 0.0, "at_most", ("3", "at most 0")),
        ("trigger_phrase", 1e-20, 0.01, "at_least", ("p 1e-20", "at least p 0.01")),
        ("length_difference", 0.734, 0.5, "at_most", ("0.73 SD", "at most 0.50 SD")),
        ("length_difference", None, 0.5, "at_most", ("not measured", "at most 0.50 SD")),
    ],
)
def test_page_shows_each_measure_in_its_unit(check, measured, threshold, bound, shown) -> None:  # type: ignore[no-untyped-def]
    outcome = decide(check, "Check", measured, threshold, "Found.", bound=bound)
    assert (format_measured(outcome), format_threshold(outcome)) == shown
