"""Material: the test cases that every system can be asked about, and what belongs to them.

Goes in: references of cases, rankings and preferences. Comes out: `Material`, and the counts of the cases left out by
cause. It knows neither systems nor metrics.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy

from mint_lib.errors import InvalidInput, RefusedData
from mint_lib.label_set import read_labels
from mint_lib.reading import Reader, encode_answer
from mint_lib.records import Case, Label, Ranking, Reference
from mint_lib.student import encode_first_items
from mint_lib.template import Template

if TYPE_CHECKING:
    from mint_lib.store import Store

_SHOWN_CASE_IDS = 20


@dataclass(frozen=True)
class Material:
    """What a task asks about."""

    cases: tuple[Case, ...]
    """Test cases with a known label and what the template asks about: a text or an image."""
    labels: tuple[Label, ...]
    template: Template
    teacher: Mapping[str, Ranking]
    """The teacher's ranking of every case."""
    top_k: int
    """Names in a chosen answer, which is how many the prompt asks for."""
    bottom_q: int
    """Names in a rejected answer."""
    label_counts: Mapping[str, int]
    """Label id to its number of labelled training cases."""
    seed: int


def read_material(
    store: "Store",
    reader: Reader,
    *,
    cases: Reference,
    rankings: Reference,
    preferences: Reference,
    reads: str,
    window_tokens: int,
    max_refused_share: float,
    seed: int,
) -> tuple[Material, dict[str, int]]:
    """The test cases that every system can be asked about, and the counts of all by cause.

    `reads` is what students read; the template of the preferences must ask about it.

    Raises:
        InvalidInput: the template asks about something else, or the rankings belong to other cases or labels.
        RefusedData: no case is left, or more than the allowed share of prompts exceed the window.
    """
    labels = tuple(read_labels(store, cases))
    template = Template.from_bytes(store.read_bytes(preferences, "template.yaml"))
    if template.reads != reads:
        raise InvalidInput(
            f"The template of {preferences} asks about {template.reads}, and the students to measure read {reads}. "
            "Evaluate with the preferences that these students were aligned on."
        )
    pairing = store.record(preferences).config
    rows = store.read_rows(cases, "test", Case)
    kept, refused = select_cases(
        rows, labels, template, reader, window_tokens=window_tokens, max_refused_share=max_refused_share
    )
    label_ids = [case.label_id for case in store.read_rows(cases, "train", Case)]
    material = Material(
        cases=tuple(kept),
        labels=labels,
        template=template,
        teacher={ranking.case_id: ranking for ranking in store.read_rows(rankings, "test", Ranking)},
        top_k=cast(int, pairing["top_k"]),
        bottom_q=cast(int, pairing["bottom_q"]),
        label_counts={label.id: label_ids.count(label.id) for label in labels},
        seed=seed,
    )
    check_rankings(material, material.teacher, where=str(rankings))
    counts = {
        "test_cases": len(rows),
        **{f"refused_{cause}": len(case_ids) for cause, case_ids in refused.items()},
        "measured_cases": len(kept),
        "measured_patients": len({case.group_id for case in kept}),
        **({"measured_with_photo": sum(case.image is not None for case in kept)} if reads == "text" else {}),
        "labels": len(labels),
        "labelled_train_cases": sum(material.label_counts.values()),
        "train_cases": len(label_ids),
    }
    return material, counts


def select_cases(
    rows: Sequence[Case],
    labels: Sequence[Label],
    template: Template,
    reader: Reader,
    *,
    window_tokens: int,
    max_refused_share: float,
) -> tuple[list[Case], dict[str, list[str]]]:
    """The cases that can be measured, and the ids of the others by cause.

    Raises:
        RefusedData: none is left, or more than the allowed share exceed the student's window.
    """
    known = {label.id for label in labels}
    names = sorted((label.name for label in labels), key=len)[-template.num_answers :]
    room = window_tokens - len(encode_answer(reader.tokenizer, template.answer(names)))
    kept: list[Case] = []
    nothing_to_read = f"no_{template.reads}"
    order = ("no_label", "other_label", nothing_to_read, "control_tokens_in_text", "longer_than_window")
    refused: dict[str, list[str]] = {cause: [] for cause in order}
    control_tokens = [token for token in reader.tokenizer.all_special_tokens if token]
    for case in rows:
        if case.label_id is None:
            refused["no_label"].append(case.case_id)
        elif case.label_id not in known:
            refused["other_label"].append(case.case_id)
        elif not template.can_ask(case):
            refused[nothing_to_read].append(case.case_id)
        elif template.reads == "text" and any(token in (case.text or "") for token in control_tokens):
            # It could open a turn of its own in the prompt; servers refuse it as well.
            refused["control_tokens_in_text"].append(case.case_id)
        elif count_prompt_tokens(case, template, reader) > room:
            refused["longer_than_window"].append(case.case_id)
        else:
            kept.append(case)
    refused = {cause: case_ids for cause, case_ids in refused.items() if case_ids}
    num_long = len(refused.get("longer_than_window", ()))
    if not kept or num_long > max_refused_share * len(rows):
        causes = ", ".join(f"{cause}: {len(case_ids)}" for cause, case_ids in refused.items()) or "there are none"
        raise RefusedData(
            f"{len(kept)} of {len(rows)} test cases can be measured, and {num_long} prompts exceed the student's "
            f"window of {window_tokens} tokens (allowed share {max_refused_share:g}). Refused by cause: "
            f"{causes}. Raise student.window_tokens, or mend the test set.",
            {cause: len(case_ids) for cause, case_ids in refused.items()},
            {cause: case_ids[:_SHOWN_CASE_IDS] for cause, case_ids in refused.items()},
        )
    return kept, refused


def draw_validation_cases(
    rows: Sequence[Case],
    labels: Sequence[Label],
    template: Template,
    reader: Reader,
    *,
    window_tokens: int,
    num_cases: int,
    seed: int,
) -> list[Case]:
    """At most `num_cases` of `rows`, drawn from those with a known label that can be asked about and leave room."""
    known = {label.id for label in labels}
    usable = [case for case in rows if case.label_id in known and template.can_ask(case)]
    room = window_tokens - max(len(answer) for answer in encode_first_items(reader.tokenizer, template, labels))
    drawn: list[Case] = []
    for place in numpy.random.default_rng(seed).permutation(len(usable)):
        if len(drawn) == num_cases:
            break
        if count_prompt_tokens(usable[place], template, reader) <= room:
            drawn.append(usable[place])
    return drawn


def check_rankings(material: Material, rankings: Mapping[str, Ranking], *, where: str) -> None:
    """Refuse rankings that miss a case or rank another label set. Raises InvalidInput."""
    known = {label.id for label in material.labels}
    bad = [
        case.case_id
        for case in material.cases
        if case.case_id not in rankings or set(rankings[case.case_id].label_ids) != known
    ]
    if bad:
        raise InvalidInput(
            f"{where} does not rank the {len(known)} labels for {len(bad)} of {len(material.cases)} test cases: "
            f"{', '.join(bad[:_SHOWN_CASE_IDS])}. Run the teacher stage on these cases."
        )


def count_prompt_tokens(case: Case, template: Template, reader: Reader) -> int:
    """Tokens of the question about `case`, those of its image among them."""
    question = template.question(case)
    return len(reader.read(question.turns, question.images, case_id=case.case_id).ids)
