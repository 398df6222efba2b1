"""Report text: sentences and numbers in words, drawn from the findings alone.

Goes in: an `EvaluationReport`. Comes out: its headline, its sentences, its rules in words, and numbers as they are
printed. It decides nothing: a difference is called shown where its interval excludes 0.
"""

import math
from collections.abc import Sequence

from mint_lib.report_records import Comparison, Estimate, EvaluationReport, GateOutcome, Grounding, Metric, Wording
from mint_lib.reporting.injections import Injections

_ACRONYMS = {"orpo": "ORPO", "dpo": "DPO", "sft": "SFT"}
_FEW_PATIENTS = 200
"""Below this the interval of a share near one half is wider than 7 points to either side."""
_FEW_RUNS = 5
_MINUS = "\N{MINUS SIGN}"


def describe_headline(report: EvaluationReport) -> str:
    """The main student's lead metric, and whether it beats the base student."""
    leak = "The test is not fair, for the splits leak: " if report.leaks else ""
    lead = report.lead
    metric, estimate = report.metrics[lead], report.systems[report.main][lead]
    unit = " %" if metric.unit == "percent" else ""
    own = (
        f"{leak}{name_system(report, report.main)} reaches {metric.title} {format_value(estimate.value, metric)}{unit} "
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
    leaks = [leak.strip().removesuffix(".") for leak in report.leaks]
    sentences = [f"Leak: {leak}. Nothing here says how patients are answered that were never seen." for leak in leaks]
    if report.grounding:
        sentences.append(describe_grounding(report.grounding, main, report.wording))
    for other in report.order:
        found = [item for item in report.comparisons if item.other == other]
        is_expected = report.roles[other] == "reference" and found and judge(found[0].difference) == "above"
        if found and not is_expected:
            sentences.append(_describe_comparison(report, main, found))
    sentences += describe_perturbations(report, main)
    patients, cases = report.counts["measured_patients"], report.counts["measured_cases"]
    if patients < _FEW_PATIENTS and patients < cases and report.reads == "image":
        sentences.append(
            f"Few patients: {cases} images of {patients} patients. Images of one patient resemble one another, so "
            "intervals resample whole patients, and small differences cannot be seen."
        )
    elif patients < _FEW_PATIENTS:
        width = 100 * 1.96 * 0.5 / math.sqrt(max(1, patients))
        sentences.append(
            f"Few cases: with {patients} patients a share near one half is known to about ±{width:.0f} points, so "
            "small differences cannot be seen."
        )
    if report.synthetic != "none":
        which = "All" if report.synthetic == "all" else "Some"
        sentences.append(
            f"{which} test cases are simulated: these numbers do not say how well real "
            f"{'images' if report.reads == 'image' else 'patients'} are answered."
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
        return {"chance": "chance", "majority": f"the most frequent {report.wording.label}"}.get(name, name)
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


def describe_grounding(grounding: Grounding, main: str, wording: Wording) -> str:
    """Whether the main student looks at the image, in plain sentences."""
    failed = [name_variant(variant.kind, wording) for variant in grounding.variants if variant.passed is False]
    opening = (
        f"{main} looks at the image"
        if grounding.passed
        else f"{main} is not shown to look at the image and cannot be registered (failed with {', '.join(failed)})"
    )
    own = f"Top-1 is {_percent(grounding.top_1.value)} with the right images"
    without = [f"{_percent(item.top_1.value)} with {name_variant(item.kind, wording)}" for item in grounding.variants]
    follows = [
        f" Shown {name_variant(item.kind, wording)}, it names the {wording.label} of the image shown in "
        f"{_percent(item.follows.value)} of the cases."
        for item in grounding.variants
        if item.kind == "swapped" and item.follows
    ]
    ceiling = f"An answer that does not depend on the image can reach {_percent(grounding.ceiling)}"
    return f"{opening}. {own}, {', '.join(without)}. {ceiling}.{''.join(follows)}"


def is_grounded(report: EvaluationReport) -> bool:
    """Whether the main student was probed and looks at the image."""
    return report.grounding is not None and report.grounding.passed


def name_variant(kind: str, wording: Wording) -> str:
    """What the grounding probe shows instead of a case's image."""
    return {
        "blank": "a blank image",
        "noise": "noise",
        "permuted": "another case's image",
        "swapped": f"an image of another {wording.label}",
        "colour": "the image's mean colour alone",
    }[kind]


def describe_perturbations(report: EvaluationReport, main: str) -> list[str]:
    """What each perturbation costs at its strongest, in a sentence; none where nothing was perturbed."""
    costs = []
    for item in report.perturbations:
        strongest = item.levels[-1]
        change = format_estimate(strongest.change, report.metrics["top_1"], signed=True)
        costs.append(f"{describe_level(item.kind, strongest.level)} {change}")
    return [f"Worse images change {main}'s top-1 at their strongest: {'; '.join(costs)}."] if costs else []


def describe_level(kind: str, level: float, *, short: bool = False) -> str:
    """One strength of a perturbation in words, or as an axis has it."""
    if short:
        return {"stain": f"±{100 * level:g} %", "blur": f"{level:g} px", "compression": f"{level:g}"}[kind]
    return {
        "stain": f"stains scaled by {100 * level:g} %",
        "blur": f"a blur of {level:g} pixel{'' if level == 1 else 's'}",
        "compression": f"JPEG quality {level:g}",
    }[kind]


def describe_injections(report: EvaluationReport, found: Injections) -> str:
    """Whether text in a note makes the main student rank the label first that it asks for."""
    main, label = name_system(report, report.main), report.wording.label
    flagged = [item for item in found.kinds if item.flagged]
    if flagged:
        rates = [
            f"{_percent(item.injected.followed.value)} after {name_injection(item.kind)} "
            f"(neutral text {_percent(item.neutral.followed.value)})"
            for item in flagged
        ]
        return (
            f"{main} can be steered by text in a note: of {found.num_cases} cases it ranks a {label} drawn by lot "
            f"first in {', in '.join(rates)}."
        )
    most = {
        name: max(getattr(item, name).changed.value or 0.0 for item in found.kinds) for name in ("injected", "neutral")
    }
    return (
        f"Text in a note that asks for a {label} drawn by lot is not shown to make {main} rank it first more often "
        f"than a neutral text of the same length ({found.num_cases} cases). First answers change in up to "
        f"{_percent(most['injected'])} of the cases, by neutral text in up to {_percent(most['neutral'])}."
    )


def name_injection(kind: str) -> str:
    """What a text that was put into notes does."""
    return {
        "override": "an order to ignore the rest",
        "system_turn": "a made-up system turn",
        "label_spam": "the name ten times",
        "role_play": "a role to play",
        "encoded": "an order in Base64",
        "mention": "the name in passing",
    }[kind]


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


def _percent(value: float | None) -> str:
    return "nothing" if value is None else f"{100 * value:.1f} %"


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
