"""The report: what was found, as one self-contained HTML page.

Goes in: an `EvaluationReport` and exhibits. Comes out: a page that asks nothing of the network, runs no script and
escapes everything it was given. It knows neither models nor the store.
"""

import base64
import pathlib
from collections.abc import Mapping
from typing import Any

from mint_lib.report_records import EvaluationReport, Metric
from mint_lib.reporting.exhibits import Confusion, Exhibits
from mint_lib.reporting.injection_texts import TEXTS
from mint_lib.reporting.plots import (
    draw_confusion,
    draw_curve,
    draw_intervals,
    draw_perturbation,
    draw_reliability,
    is_large,
)
from mint_lib.reporting.sentences import (
    capitalise,
    describe_level,
    describe_rule,
    format_p_value,
    format_value,
    is_grounded,
    judge,
    name_injection,
    name_system,
    name_variant,
)

_TEMPLATES = pathlib.Path(__file__).parents[1] / "templates"
_FACTS = {
    "refused_no_label": "Left out: the {label} is not known",
    "refused_other_label": "Left out: the {label} is not in the label set",
    "refused_no_text": "Left out: no text, which is all a student reads",
    "refused_no_image": "Left out: no image, which is all a student sees",
    "refused_control_tokens_in_text": "Left out: the text spells a control token, which could open a turn of its own",
    "refused_longer_than_window": "Left out: the {reads} does not fit the student's window",
    "test_cases": "Test cases",
    "measured_cases": "Measured cases",
    "measured_patients": "Measured patients",
    "measured_with_photo": "Measured cases with a photo",
    "labels": "{Labels} in the label set",
    "train_cases": "Training cases",
    "labelled_train_cases": "Training cases with a known {label}",
}
_PERTURBATIONS = {
    "stain": "Stain: haematoxylin and eosin stronger or weaker by this share.",
    "blur": "Blur: standard deviation of a Gaussian.",
    "compression": "Compression: quality of a JPEG.",
}


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
        "name_variant": lambda kind: capitalise(name_variant(kind, report.wording)),
        "name_injection": lambda kind: capitalise(name_injection(kind)),
        "percent": report.metrics.get("top_1"),
        "places": Metric(title="Rank", meaning="", unit="score", better="lower"),
        "words": report.wording,
    }
    page = environment.get_template("report.html").render(
        report=report,
        facts=[(_name_fact(report, key), count) for key, count in report.counts.items()],
        rules=[(describe_rule(report, rule), rule) for rule in report.gate.rules],
        tables=_list_tables(report),
        tested=list(dict.fromkeys(item.metric for item in report.comparisons)),
        slices=_list_slices(report, exhibits),
        pictures=_draw_pictures(report, exhibits),
        examples=exhibits.examples,
        strip=exhibits.strip,
        worse=[(describe_level(item.kind, item.level), item.image) for item in exhibits.worse],
        injections=exhibits.injections,
        injection_texts=TEXTS,
        may_be_promoted=report.gate.passed and (report.reads == "text" or is_grounded(report)),
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
            "title": report.wording.label if title == "label" else title.replace("_", " "),
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

    wanted = ("top_1", "top_3", "mrr") if "macro_f1" not in report.metrics else ("top_1", "macro_f1", "top_5")
    metrics = [metric for metric in wanted if metric in report.systems[report.main]]
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
    confusions = exhibits.confusions
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
            (_caption_confusion(report, item), draw_confusion(item)) for item in confusions if not is_large(item)
        ],
        "large": [(_caption_confusion(report, item), draw_confusion(item)) for item in confusions if is_large(item)],
        "perturbation": [
            (
                _PERTURBATIONS[item.kind],
                draw_perturbation(
                    item,
                    [describe_level(item.kind, level.level, short=True) for level in item.levels],
                    chance=1 / report.counts["labels"],
                ),
            )
            for item in report.perturbations
        ],
    }
    return {section: [(caption, Markup(svg)) for caption, svg in pictures] for section, pictures in drawn.items()}  # noqa: S704


def _short_name(report: EvaluationReport, name: str) -> str:
    if report.roles[name] == "reference":
        return {"majority": "most frequent"}.get(name, name)
    return name_system(report, name).removeprefix("the ").removesuffix(" baseline")


def _caption_confusion(report: EvaluationReport, item: Confusion) -> str:
    return f"{item.family}. Rows: the {report.wording.label}. Columns: what the student ranks first."


def _name_fact(report: EvaluationReport, key: str) -> str:
    label, labels = report.wording.label, capitalise(report.wording.labels)
    return _FACTS.get(key, key.replace("_", " ")).format(label=label, Labels=labels, reads=report.reads)


def _encode_image(data: bytes) -> str:
    """A `data:` address; only PNG and JPEG exist in a case."""
    kind = "png" if data.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
