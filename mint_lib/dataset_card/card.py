"""The data set card: what somebody must know before using a data set, as Markdown.

Goes in: a `Description`. Comes out: text that begins with the metadata block that the Hugging Face hub and `datasets`
read. It decides nothing and knows no store.
"""

import json
from collections.abc import Mapping

from mint_lib.dataset_card.description import Description
from mint_lib.dataset_card.facts import NOT_STATED
from mint_lib.dataset_card.statements import (
    describe_content,
    describe_gate,
    describe_imbalance,
    describe_origin,
    describe_privacy,
    describe_split,
    describe_teacher,
    list_limits,
    list_sources,
    list_uses,
    sum_facts,
)

_HUB_LICENCES = frozenset(
    (
        *("apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "odc-by", "odbl", "pddl"),
        *("cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nd-4.0"),
        *("cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "cc-by-nc-nd-4.0"),
    )
)
"""What the hub calls licences (huggingface.co/docs/hub/repositories-licenses); any other one is `other` with a name."""


def render_card(description: Description, *, data_files: Mapping[str, str] | None = None) -> str:
    """The card as Markdown.

    Args:
        description: What is told.
        data_files: Split to the glob pattern of its files; None: the shards as they lie in the store.
    """
    patterns = data_files or {split: f"{split}/*.parquet" for split in description.splits}
    lines = [
        *_render_metadata(description, patterns),
        f"# {description.title}",
        "",
        describe_content(description),
        "",
        describe_origin(description),
        describe_split(description),
        "",
        "## Licence, consent, makers",
        f"- licence: {description.facts.licence}",
        f"- consent: {description.facts.consent}",
        f"- creators: {', '.join(description.facts.creators) or NOT_STATED}",
        f"- citation: {description.facts.citation}",
        *(f"- {sentence}" for sentence in describe_privacy(description) if not sentence.startswith("Consent:")),
        "",
        "## Counts",
        *_render_counts(description),
        "",
        *_render_classes(description),
        *_render_making(description),
        "## Data gate",
        *(f"- {sentence}" for sentence in describe_gate(description)),
        "",
        "## Uses",
        *(f"- {use}" for use in list_uses(description)),
        "",
        "## Known limits",
        *(f"- {limit}" for limit in list_limits(description)),
        "",
        *_render_notes(description),
        "## Lineage",
        *_render_lineage(description),
    ]
    return "\n".join(lines) + "\n"


def _render_metadata(description: Description, patterns: Mapping[str, str]) -> list[str]:
    """The block that `datasets.load_dataset` finds the splits by."""
    licence = description.facts.licence
    known = licence.casefold() if licence.casefold() in _HUB_LICENCES else None
    if licence == NOT_STATED:
        named = ["license: unknown"]
    else:
        named = [f"license: {known}"] if known else ["license: other", f"license_name: {json.dumps(licence)}"]
    has_images = any(figures.num_with_image for figures in description.splits.values())
    tags = [
        "medical",
        "croissant",
        *(["image"] if has_images else []),
        *(["trl", "dpo"] if _is_pairs(description) else []),
    ]
    synthetic = description.synthetic
    tags += ["synthetic"] if synthetic and synthetic[0] == synthetic[1] else []
    return [
        "---",
        f"pretty_name: {json.dumps(description.name)}",
        *named,
        "tags:",
        *(f"- {tag}" for tag in tags),
        "configs:",
        "- config_name: default",
        "  data_files:",
        *(
            line
            for split, path in patterns.items()
            for line in (f"  - split: {split}", f"    path: {json.dumps(path)}")
        ),
        "---",
    ]


def _is_pairs(description: Description) -> bool:
    return description.kind == "preferences"


def _render_counts(description: Description) -> list[str]:
    rows, subjects = ("Pairs", "Cases") if _is_pairs(description) else ("Cases", "Patients")
    lines = [
        f"| Split | {rows} | {subjects} | With text | With image | Synthetic | Without label |",
        "|---|---|---|---|---|---|---|",
    ]
    for split, figures in description.splits.items():
        synthetic = "see cases" if figures.num_synthetic is None else str(figures.num_synthetic)
        cells = (figures.num_rows, figures.num_subjects, figures.num_with_text, figures.num_with_image)
        lines.append(f"| {split} | {' | '.join(map(str, cells))} | {synthetic} | {figures.num_without_label} |")
    return lines


def _render_classes(description: Description) -> list[str]:
    """How often each class stands in each split, with its name."""
    if not description.labels:
        return []
    names = {label.id: label.name for label in description.labels}
    splits = list(description.splits)
    counted = {label_id for figures in description.splits.values() for label_id in figures.labels}
    lines = [
        "## Classes" + (" (first chosen label of a pair)" if _is_pairs(description) else ""),
        f"| Class | Name | {' | '.join(splits)} |",
        "|---|---|" + "---|" * len(splits),
    ]
    for label_id in [*names, *sorted(counted - set(names))]:
        cells = [str(description.splits[split].labels.get(label_id, 0)) for split in splits]
        lines.append(f"| {label_id} | {names.get(label_id, NOT_STATED)} | {' | '.join(cells)} |")
    imbalance = describe_imbalance(description)
    return [*lines, "", *((imbalance, "") if imbalance else ())]


def _render_making(description: Description) -> list[str]:
    """Sources of cases; teacher, policy and template of pairs."""
    if not _is_pairs(description):
        return ["## Sources", *(f"- {source}" for source in list_sources(description)), ""]
    lines = ["## How the pairs were made", *(f"- {sentence}" for sentence in describe_teacher(description))]
    for column, title in (("policy", "policy"), ("template_digest", "template")):
        lines += [f"- {title} `{value}`: {number} pairs" for value, number in sum_facts(description, column).items()]
    return [*lines, ""]


def _render_notes(description: Description) -> list[str]:
    notes = [note for note in description.notes if note not in description.leaks]
    return ["## Notes of the stages", *(f"- {note}" for note in notes), ""] if notes else []


def _render_lineage(description: Description) -> list[str]:
    itself = (
        f"- this version: `{description.reference}`"
        if description.reference
        else "- this version: `manifest.json` beside this card has its number and digest"
    )
    lines = [itself, f"- made by `{description.record.stage}`, code `{description.record.code_version}`"]
    if description.created_at:
        lines.append(f"- committed {description.created_at.isoformat(timespec='seconds')}")
    for name, text in sorted(description.record.inputs.items()):
        lines.append(f"- input {name}: `{text}`")
    for text, record in sorted(description.lineage.items()):
        lines.append(f"- `{text}`, {f'made by {record.stage}' if record else 'no longer in the store'}")
    return lines
