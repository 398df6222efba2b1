"""The report: what was found, as one self-contained HTML page.

Goes in: an `EvaluationReport` and exhibits. Comes out: a page that asks nothing of the network, runs no script and
escapes everything it was given. It knows neither models nor the store.
"""

import base64
import pathlib
from collections.abc import Mapping
from typing import Any

from mint_lib.records import EvaluationReport
from mint_lib.reporting.exhibits import Exhibits
from mint_lib.reporting.plots import draw_confusion, draw_curve, draw_intervals, draw_reliability
from mint_lib.reporting.sentences import capitalise, describe_rule, format_p_value, format_value, judge, name_system

_TEMPLATES = pathlib.Path(__file__).parents[1] / "templates"
_CAUSES = {
    "refused_no_diagnosis": "Left out: the diagnosis is not known",
    "refused_other_diagnosis": "Left out: the diagnosis is not in the label set",
    "refused_no_text": "Left out: no text, which is all a student reads",
    "refused_longer_than_window": "Left out: the text does not fit the student's window",
    "test_cases": "Test cases",
    "measured_cases": "Measured cases",
    "measured_patients": "Measured patients",
    "measured_with_photo": "Measured cases with a photo",
    "labels": "Diagnoses in the label set",
    "train_cases": "Training cases",
    "labelled_train_cases": "Training cases with a known diagnosis",
}
_SLICES = {"label": "diagnosis"}


def render_report(report: EvaluationReport, exhibits: Exhibits) -> str:
    """The page. The same input gives the same text."""
    import jinja2
    from jinja2.sandbox import SandboxedEnvironment

    environment = SandboxedEnvironment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"p_value": format_p_value}
    environment.globals |= {
        "estimate_of": lambda name, metric: report.systems[name].get(metric),
        "format_value": format_value,
        "name_of": lambda name: capitalise(name_system(report, name)),
        "judge": judge,
    }
    page = environment.get_template("report.html").render(
        report=report,
        facts=[(_CAUSES.get(key, key.replace("_", " ")), count) for key, count in report.counts.items()],
        rules=[(describe_rule(report, rule), rule) for rule in report.gate.rules],
        tables=_list_tables(report),
        tested=list(dict.fromkeys(item.metric for item in report.comparisons)),
        slices=_list_slices(report, exhibits),
        pictures=_draw_pictures(report, exhibits),
        examples=exhibits.examples,
        encode_image=_encode_image,
    )
    return str(page)


def _list_tables(report: EvaluationReport) -> list[dict[str, Any]]:
    """The full tables of both ways of answering: title, metrics, systems that have any of them."""
    have = [metric for metric in report.metrics if any(metric in found for found in report.systems.values())]
    groups = {
        "Ranking the label set": [metric for metric in have if not metric.startswith("generated_")],
        "Free answers, as a user would get them": [metric for metric in have if metric.startswith("generated_")],
    }
    return [
        {
            "title": title,
            "metrics": metrics,
            "systems": [name for name in report.order if set(metrics) & set(report.systems[name])],
        }
        for title, metrics in groups.items()
        if metrics
    ]


def _list_slices(report: EvaluationReport, exhibits: Exhibits) -> list[dict[str, Any]]:
    """Slices with more than one value, with the systems worth a column: main student, base, teacher."""
    shown = [name for name in report.order if name == report.main or report.roles[name] in ("base", "teacher")]
    return [
        {
            "title": _SLICES.get(title, title),
            "metric": report.metrics[report.lead],
            "systems": shown,
            "rows": [
                (exhibits.label_names.get(value, value), [systems[name][report.lead] for name in shown])
                for value, systems in values.items()
            ],
        }
        for title, values in report.slices.items()
        if len(values) > 1
    ]


def _draw_pictures(report: EvaluationReport, exhibits: Exhibits) -> dict[str, list[tuple[str, Any]]]:
    """Section to captions and SVG. Markup, because the page inserts SVG as it is; the plots escape their text."""
    from markupsafe import Markup

    metrics = [metric for metric in ("top_1", "top_3", "mrr") if metric in report.systems[report.main]]
    rows_of = {
        metric: [
            (
                _short_name(report, name),
                "main" if name == report.main else report.roles[name],
                report.systems[name][metric],
            )
            for name in report.order
            if metric in report.systems[name]
        ]
        for metric in metrics
    }
    names = {name: _short_name(report, name) for name in report.order}
    drawn: Mapping[str, list[tuple[str, str]]] = {
        "ranking": [
            (
                f"{report.metrics[metric].title}. {report.metrics[metric].meaning}",
                draw_intervals(report.metrics[metric], rows),
            )
            for metric, rows in rows_of.items()
        ],
        "training": [(curve.title, draw_curve(curve, main=report.main, name_of=names)) for curve in exhibits.curves],
        "calibration": [
            (
                "A well-calibrated system lies on the dashed line.",
                draw_reliability(exhibits.reliability, main=report.main, name_of=names),
            )
        ]
        if exhibits.reliability
        else [],
        "confusion": [
            (f"{item.family}. Rows: the diagnosis. Columns: what the student ranks first.", draw_confusion(item))
            for item in exhibits.confusions
        ],
    }
    return {section: [(caption, Markup(svg)) for caption, svg in pictures] for section, pictures in drawn.items()}  # noqa: S704


def _short_name(report: EvaluationReport, name: str) -> str:
    if report.roles[name] == "reference":
        return {"majority": "most frequent"}.get(name, name)
    return name_system(report, name).removeprefix("the ").removesuffix(" baseline")


def _encode_image(data: bytes) -> str:
    """A `data:` address; only PNG and JPEG exist in a case."""
    kind = "png" if data.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
