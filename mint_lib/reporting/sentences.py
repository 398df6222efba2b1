"""Report text: sentences and numbers in words, drawn from the findings alone.

Goes in: an `EvaluationReport`. Comes out: its headline, its sentences, its rules in words, numbers as they are printed,
and the model card. It decides nothing: a difference is called shown where its interval excludes 0.
"""

import json
import math
from collections.abc import Sequence

from mint_lib.records import Comparison, Estimate, EvaluationReport, GateOutcome, Metric, ModelCard

_ACRONYMS = {"orpo": "ORPO", "dpo": "DPO", "sft": "SFT"}
_FEW_PATIENTS = 200
"""Below this the interval of a share near one half is wider than 7 points to either side."""
_FEW_RUNS = 5
_MINUS = "\N{MINUS SIGN}"


def describe_headline(report: EvaluationReport) -> str:
    """The main student's lead metric, and whether it beats the base student."""
    lead = report.lead
    metric, estimate = report.metrics[lead], report.systems[report.main][lead]
    unit = " %" if metric.unit == "percent" else ""
    own = (
        f"{name_system(report, report.main)} reaches {metric.title} {format_value(estimate.value, metric)}{unit} "
        f"on {report.counts['measured_cases']} {_kind_of_cases(report)}cases"
    )
    base = [item for item in report.comparisons if item.metric == lead and report.roles[item.other] == "base"]
    if not base:
        return f"{own}."
    verdict = judge(base[0].difference)
    if verdict == "open":
        difference = format_estimate(base[0].difference, metric, signed=True)
        return f"{own}, which is not shown to be better than the base student (difference {difference})."
    return f"{own}, {_format_lead(base[0].difference, metric)} {verdict} the base student."


def describe_findings(report: EvaluationReport) -> tuple[str, ...]:
    """A sentence on every other system, and on what limits the numbers."""
    main = name_system(report, report.main)
    sentences = []
    for other in report.order:
        found = [item for item in report.comparisons if item.other == other]
        is_expected = report.roles[other] == "reference" and found and judge(found[0].difference) == "above"
        if found and not is_expected:
            sentences.append(_describe_comparison(report, main, found))
    patients = report.counts["measured_patients"]
    if patients < _FEW_PATIENTS:
        width = 100 * 1.96 * 0.5 / math.sqrt(max(1, patients))
        sentences.append(
            f"Few cases: with {patients} patients a share near one half is known to about ±{width:.0f} points, so "
            "small differences cannot be seen."
        )
    if report.synthetic != "none":
        which = "All" if report.synthetic == "all" else "Some"
        sentences.append(
            f"{which} test cases are simulated: these numbers do not say how well real patients are answered."
        )
    runs = report.runs[report.main]
    if runs > 1:
        few = f" {runs} seeds show little of how much training varies." if runs < _FEW_RUNS else ""
        sentences.append(
            f"{main} is the mean of {runs} seeds; intervals resample patients and seeds, tests only patients.{few}"
        )
    return tuple(sentences)


def judge(difference: Estimate) -> str:
    """`above` or `below` where the interval excludes 0, else `open`."""
    if difference.low is not None and difference.low > 0:
        return "above"
    return "below" if difference.high is not None and difference.high < 0 else "open"


def name_system(report: EvaluationReport, name: str) -> str:
    """How a system is called in a sentence."""
    role = report.roles[name]
    if role == "base":
        return "the base student"
    if role == "teacher":
        return "the teacher"
    if role == "baseline":
        return f"the {name} baseline"
    if role == "reference":
        return {"chance": "chance", "majority": "the most frequent diagnosis"}.get(name, name)
    return "-".join(_ACRONYMS.get(part, part) for part in name.split("-"))


def format_value(value: float | None, metric: Metric, *, signed: bool = False) -> str:
    """`34.4 %` or `0.412`; `+12.0` and a real minus sign where `signed`; a dash for what cannot be computed."""
    if value is None:
        return "–"
    number = f"{100 * value:+.1f}" if metric.unit == "percent" else f"{value:+.3f}"
    number = number.removeprefix("+") if not signed else number
    return number.replace("-", _MINUS)


def format_estimate(estimate: Estimate, metric: Metric, *, signed: bool = False) -> str:
    """Value, unit and interval in one phrase."""
    unit = {True: " points", False: " %"}[signed] if metric.unit == "percent" else ""
    value = format_value(estimate.value, metric, signed=signed) + unit
    if estimate.low is None:
        return f"{value} (no interval)"
    low, high = (format_value(end, metric, signed=signed) for end in (estimate.low, estimate.high))
    return f"{value} ({low} to {high})"


def format_p_value(value: float) -> str:
    """`0.012`, or `< 0.001`."""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def describe_rule(report: EvaluationReport, rule: GateOutcome) -> str:
    """A gate rule in words."""
    metric = report.metrics.get(rule.metric)
    title = metric.title if metric else rule.metric
    names = [name_system(report, name) if name in report.roles else name for name in (rule.system, rule.over or "")]
    subject = f"lead of {names[0]} over {names[1]} in {title}" if rule.over else f"{title} of {names[0]}"
    bound = "lower end of the interval" if rule.bound == "lower" else "value"
    shown = [
        _plain(value, metric).replace(" %", " points" if rule.over else " %")
        for value in (rule.at_least, rule.observed)
    ]
    return f"{capitalise(subject)}: {bound} at least {shown[0]}; observed {shown[1]}"


def render_card(card: ModelCard, report: EvaluationReport) -> str:
    """The model card as Markdown with the metadata block that model hubs read."""
    rows = [
        f"| {report.metrics[key].title}{' (free answers)' if key.startswith('generated_') else ''} "
        f"| {format_estimate(estimate, report.metrics[key])} | {estimate.n} |"
        for key, estimate in card.metrics.items()
    ]
    lines = [
        "---",
        f"license: {json.dumps(card.licence)}",
        f"base_model: {json.dumps(card.base_model)}",
        "library_name: peft",
        "---",
        f"# {card.name}",
        "",
        card.headline,
        "",
        f"Gate {'passed' if card.gate_passed else 'not passed'}. {describe_origin(card.synthetic)}",
        "",
        "## Intended use",
        card.intended_use,
        "",
        "## Limits",
        *(f"- {limit}" for limit in card.limits),
        "",
        f"## Figures ({100 * report.confidence:g} % intervals)",
        "| Metric | Value | Cases or names |",
        "|---|---|---|",
        *rows,
        "",
        *(f"- {sentence}" for sentence in report.statements),
        "",
        "## Lineage",
        f"- student: `{card.student}` (method `{card.method}`)",
        f"- base model: `{card.base_model}`, `{card.base_digest}`",
        f"- teacher: `{card.teacher_digest}`",
        *(f"- {name}: `{reference}`" for name, reference in card.inputs.items()),
    ]
    return "\n".join(lines) + "\n"


def describe_origin(synthetic: str) -> str:
    """Whether the test cases were generated, in a sentence."""
    return {
        "all": "All test cases were simulated.",
        "some": "Some test cases were simulated.",
        "none": "The test cases are observed patients.",
    }[synthetic]


def _describe_comparison(report: EvaluationReport, main: str, found: Sequence[Comparison]) -> str:
    """One sentence that leads with the first metric and says where another one disagrees with it."""
    other = name_system(report, found[0].other)
    titles = [report.metrics[item.metric] for item in found]
    verdicts = [judge(item.difference) for item in found]
    if verdicts[0] != "open" and len(set(verdicts)) == 1:
        leads = [
            f"in {metric.title} {_format_lead(item.difference, metric)}"
            for item, metric in zip(found, titles, strict=True)
        ]
        return f"{main} {'beats' if verdicts[0] == 'above' else 'is below'} {other}: {', '.join(leads)}."
    differences = [
        f"in {metric.title} {format_estimate(item.difference, metric, signed=True)}"
        for item, metric in zip(found, titles, strict=True)
    ]
    opening = {"above": "beats", "below": "is below", "open": "does not beat"}[verdicts[0]]
    shown = {"above": "ahead", "below": "behind", "open": "not shown to differ"}
    others = [f"in {metric.title} it is {shown[verdict]}" for metric, verdict in zip(titles, verdicts, strict=True)][1:]
    ending = f" Decided by {titles[0].title}; {', '.join(others)}." if len(set(verdicts)) > 1 else ""
    return f"{main} {opening} {other}: difference {', '.join(differences)}.{ending}"


def _format_lead(difference: Estimate, metric: Metric) -> str:
    """The size of a difference whose sign the sentence says."""
    if difference.value is not None and difference.value < 0:
        ends = {"low": difference.high, "high": difference.low}
        mirrored = {key: -value for key, value in ends.items() if value is not None}
        difference = difference.model_copy(update={"value": -difference.value, **mirrored})
    return format_estimate(difference, metric).replace(" %", " points")


def _kind_of_cases(report: EvaluationReport) -> str:
    return {"all": "simulated ", "some": "partly simulated ", "none": ""}[report.synthetic]


def _plain(value: float | None, metric: Metric | None) -> str:
    if value is None:
        return "nothing that can be compared"
    if metric is None:
        return f"{value:g}"
    return format_value(value, metric) + (" %" if metric.unit == "percent" else "")


def capitalise(text: str) -> str:
    """`text` as a table names it: no article, upper case at the start."""
    text = text.removeprefix("the ")
    return text[:1].upper() + text[1:]
