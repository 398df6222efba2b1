"""What a description means, in plain sentences that the card and Croissant share.

Goes in: a `Description`. Comes out: sentences drawn from its figures and records; what nobody stated is said to be not
stated. Knows no format.
"""

from collections.abc import Iterable
from typing import Any

from mint_lib.dataset_card.description import Description
from mint_lib.dataset_card.facts import NOT_STATED

_SHOWN_METRICS = ("top_1", "top_3", "mrr")
_SHOWN_SOURCES = 20
_USES = {
    "cases": (
        "Fitting and qualifying a teacher on train and validation.",
        "Measuring students, teachers and baselines on test, which nothing is trained on.",
    ),
    "preferences": (
        "Preference optimisation (ORPO, DPO, SimPO) or fine-tuning of a student on train.",
        "Choosing a checkpoint on validation.",
    ),
}


def describe_content(description: Description) -> str:
    """What the data are: what their owners say, or a sentence made from the figures."""
    if description.facts.description:
        return description.facts.description
    rows = sum(figures.num_rows for figures in description.splits.values())
    if description.kind == "cases":
        return f"{rows} cases with {len(description.labels)} labels: clinical text, images, or both, one row per case."
    return (
        f"{rows} preference pairs over {len(description.labels)} labels: one prompt with a chosen and a rejected "
        "answer, made from a teacher's ranking."
    )


def describe_origin(description: Description) -> str:
    """Whether the cases were generated or observed."""
    found = description.synthetic
    if found is None:
        return "Whether the cases were generated or observed is not stated: their record is no longer in the store."
    synthetic, total = found
    if synthetic == total:
        return f"All {total} cases are synthetic: generated, not observed."
    if not synthetic:
        return f"All {total} cases are observed, none is generated."
    return f"{synthetic} of {total} cases are synthetic (generated); the others are observed."


def describe_privacy(description: Description) -> tuple[str, ...]:
    """What a reader must know of the people in the data."""
    found = description.synthetic
    if found is not None and found[0] == found[1]:
        return ("No person is described: every case is generated.", f"Consent: {description.facts.consent}.")
    content = [
        name
        for name, number in (
            ("clinical text", sum(figures.num_with_text for figures in description.splits.values())),
            ("images", sum(figures.num_with_image for figures in description.splits.values())),
        )
        if number
    ]
    return (
        f"Health data of patients ({' and '.join(content) or 'no text and no image'}), with diagnoses.",
        f"Consent: {description.facts.consent}.",
        *describe_deidentification(description),
    )


def describe_deidentification(description: Description) -> tuple[str, ...]:
    """What the records tell of de-identification, or that they tell nothing."""
    records = [record for record in (description.record, description.cases) if record]
    told = [note for note in description.notes if "identif" in note.casefold()]
    for record in records:
        figures: dict[str, Any] = record.counts | record.metrics
        told += [f"{key}: {value:g}" for key, value in figures.items() if "identif" in key.casefold()]
    return tuple(dict.fromkeys(told)) or ("De-identification: the records tell of none.",)


def list_sources(description: Description) -> tuple[str, ...]:
    """Where the cases come from, the most frequent first; a source may be a paper, so only some are named."""
    found = sorted(sum_facts(description, "source").items(), key=lambda item: (-item[1], item[0]))
    shown = [f"{source}: {number} cases" for source, number in found[:_SHOWN_SOURCES]]
    rest = found[_SHOWN_SOURCES:]
    return (*shown, *([f"{len(rest)} other sources: {sum(number for _, number in rest)} cases"] if rest else []))


def describe_split(description: Description) -> str:
    """How the splits were made."""
    if description.leaks:
        return description.leaks[0]
    by = description.cases.config.get("split_by") if description.cases else None
    if by == "patient":
        return "Split by patient: no patient and no identical image stands in two splits."
    return f"How the splits were made is {NOT_STATED}."


def describe_teacher(description: Description) -> tuple[str, ...]:
    """Which teacher ranked, and how well it does on labelled validation cases."""
    if description.kind != "preferences":
        return ()
    digests = join_facts(description, "teacher_digest")
    teacher = description.teacher
    if teacher is None:
        return (f"Teacher: {digests or NOT_STATED}. Its qualification is not in the store.",)
    metrics = teacher.get("metrics", {})
    shown = "; ".join(
        f"{name} {_spell_estimate(metrics[name])}, chance {teacher['chance'][name]:.3f}"
        for name in _SHOWN_METRICS
        if name in metrics
    )
    number = teacher.get("num_cases", 0)
    return (
        f"Teacher `{teacher.get('model', NOT_STATED)}`: {digests or NOT_STATED}.",
        f"On {number} labelled validation cases it reaches {shown or 'nothing that was measured'}.",
    )


def describe_gate(description: Description) -> tuple[str, ...]:
    """What the data gate decided, one sentence for each of its checks."""
    gate = description.gate
    if gate is None:
        return ("No data gate is stored with this version.",)
    verdict = "The data gate was passed." if gate.get("passed") else "The data gate was NOT passed."
    checks = [
        f"{item.get('title')}: {str(item.get('status')).replace('_', ' ')}. {item.get('sentence', '')}".strip()
        for item in gate.get("outcomes", ())
    ]
    return (verdict, *checks)


def list_limits(description: Description) -> tuple[str, ...]:
    """Known limits: what the owners state, and what follows from the figures."""
    limits = [*description.facts.limits, *description.leaks]
    for what, value in (("licence", description.facts.licence), ("consent", description.facts.consent)):
        if value == NOT_STATED:
            limits.append(f"The {what} is not stated. Ask the owner before the data leave this platform.")
    if description.synthetic is None or description.synthetic[0]:
        limits.append(f"{describe_origin(description)} Results on generated cases say nothing of real patients.")
    if description.kind == "preferences":
        limits.append("Chosen answers are a teacher's opinion, not the truth; see its quality above.")
    rare = describe_imbalance(description)
    return (*limits, *((rare,) if rare else ()))


def describe_imbalance(description: Description) -> str | None:
    """How unevenly the classes of train are filled; None where there are none."""
    figures = description.splits.get("train")
    if figures is None or not figures.labels:
        return None
    missing = len({label.id for label in description.labels} - set(figures.labels))
    what = "Cases of a class" if description.kind == "cases" else "Pairs whose first chosen label is one class"
    sentence = f"{what} in train: {min(figures.labels.values())} to {max(figures.labels.values())}"
    return f"{sentence}; {missing} of {len(description.labels)} classes have none." if missing else f"{sentence}."


def list_uses(description: Description) -> tuple[str, ...]:
    """What the platform uses such data for."""
    return _USES[description.kind]


def join_facts(description: Description, column: str) -> str:
    """The values of a column over all splits, with commas."""
    values = {value for figures in description.splits.values() for value in figures.facts.get(column, {})}
    return ", ".join(sorted(values))


def sum_facts(description: Description, column: str) -> dict[str, int]:
    """Value to rows over all splits."""
    total: dict[str, int] = {}
    for figures in description.splits.values():
        for value, number in figures.facts.get(column, {}).items():
            total[value] = total.get(value, 0) + number
    return dict(sorted(total.items()))


def join_sentences(sentences: Iterable[str]) -> str:
    """Sentences as one paragraph."""
    return " ".join(sentences)


def _spell_estimate(estimate: dict[str, Any]) -> str:
    value, low, high = (estimate.get(key) for key in ("value", "low", "high"))
    if value is None:
        return "not measured"
    return f"{value:.3f}" + (
        f" (95 % interval {low:.3f} to {high:.3f})" if low is not None and high is not None else ""
    )
