"""The model card: what somebody must know before using a model, as Markdown.

Goes in: a `ModelCard` and the report behind it. Comes out: text with the metadata block that model hubs read. It
decides nothing and knows no store.
"""

import json

from mint_lib.report_records import EvaluationReport, ModelCard
from mint_lib.reporting.sentences import describe_grounding, format_estimate, name_system


def render_card(card: ModelCard, report: EvaluationReport) -> str:
    """The model card as Markdown with the metadata block that model hubs read."""
    rows = [
        f"| {report.metrics[key].title}{' (free answers)' if key.startswith('generated_') else ''} "
        f"| {format_estimate(estimate, report.metrics[key])} | {estimate.n} |"
        for key, estimate in card.metrics.items()
    ]
    main = name_system(report, report.main)
    looks = [describe_grounding(card.grounding, main, report.wording)] if card.grounding else []
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
        f"Gate {'passed' if card.gate_passed else 'not passed'}. "
        f"{describe_origin(card.synthetic, report.wording.subjects)}",
        "",
        *(line for sentence in looks for line in (sentence, "")),
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
        *(f"- {sentence}" for sentence in report.statements if sentence not in looks),
        "",
        "## Lineage",
        f"- student: `{card.student}` (method `{card.method}`)",
        f"- base model: `{card.base_model}`, `{card.base_digest}`",
        f"- teacher: `{card.teacher_digest}`",
        *(f"- {name}: `{reference}`" for name, reference in card.inputs.items()),
    ]
    return "\n".join(lines) + "\n"


def describe_origin(synthetic: str, subjects: str) -> str:
    """Whether the test cases were generated, in a sentence; `subjects` are what would be observed."""
    return {
        "all": "All test cases were simulated.",
        "some": "Some test cases were simulated.",
        "none": f"The test cases are observed {subjects}.",
    }[synthetic]
