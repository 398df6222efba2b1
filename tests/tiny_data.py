"""Small versions of cases, rankings and preferences, as the stages write them, for tests of cards and exports."""

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from mint_lib.records import SPLITS, Case, Finding, Label, PreferencePair, Reference, StageRecord, Turn
from mint_lib.rows import case_schema, pair_schema, ranking_schema
from mint_lib.store import Store

LABELS = (Label(id="D:1", name="Noonan syndrome"), Label(id="D:2", name="Kabuki syndrome"))
STATED = {
    "licence": "CC-BY-4.0",
    "consent": "Waived by the ethics board, vote 12/2026",
    "creators": ["Clinic A"],
    "citation": "@misc{a, title={A}}",
    "limits": ["Adults only."],
}
TEACHER = "sha256:" + "ab" * 32
QUALIFICATION = {
    "model": "ontology",
    "teacher_digest": TEACHER,
    "num_cases": 40,
    "metrics": {"top_1": {"value": 0.825, "low": 0.7, "high": 0.9, "n": 40}},
    "chance": {"top_1": 0.5},
}
_UNMEASURED = {"measured": None, "threshold": None, "bound": "at_most", "counts": {}, "figures": {}}
GATE = {
    "name": "demo",
    "judged": "pairs",
    "reads": "text",
    "passed": False,
    "outcomes": [
        _UNMEASURED
        | {
            "check": "duplicates",
            "title": "Duplicate pairs",
            "status": "passed",
            "sentence": "0 of 12 pairs are duplicates.",
        },
        _UNMEASURED
        | {
            "check": "length_bias",
            "title": "Length bias",
            "status": "refused",
            "sentence": "Chosen answers are longer in 90 % of the pairs.",
        },
    ],
    "statistics": {"num_cases": {}, "num_pairs": {}, "label_counts": {}, "batches": {}},
}


def encode_image(seed: int, *, size: int = 16) -> bytes:
    """A PNG of random pixels."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def make_cases(split: str, number: int, *, with_images: bool = True, synthetic: bool = False) -> Iterator[Case]:
    """Two cases a patient; every third has no known diagnosis, every fourth no image."""
    for index in range(number):
        yield Case(
            case_id=f"{split}-{index}",
            group_id=f"{split}-patient-{index // 2}",
            text=f"Note {index} of {split}: short stature.",
            image=encode_image(index) if with_images and index % 4 != 3 else None,
            findings=(Finding(id="HP:0004322", label="Short stature"), Finding(id="", label="Mild", excluded=True)),
            label_id=None if index % 3 == 2 else LABELS[index % 2].id,
            attributes={"sex": "female", "age": str(index)} if index % 2 else {},
            source="clinic_a" if index % 2 else "clinic_b",
            synthetic=synthetic,
        )


def make_pairs(split: str, number: int, *, with_images: bool) -> Iterator[PreferencePair]:
    """Two pairs a case, alternating which label is chosen."""
    for index in range(number):
        chosen, rejected = LABELS if index % 2 else LABELS[::-1]
        yield PreferencePair(
            case_id=f"{split}-{index // 2}",
            prompt=(
                Turn(role="system", content="You name diagnoses."),
                Turn(role="user", content=f"Case {index // 2} of {split}."),
            ),
            images=(encode_image(index // 2),) if with_images else (),
            chosen=f"1. {chosen.name}",
            rejected=f"1. {rejected.name}",
            chosen_label_ids=(chosen.id,),
            rejected_label_ids=(rejected.id,),
            teacher_digest=TEACHER,
            template_digest="sha256:template",
            policy="top1-bottom1/ground-truth=none/control=none",
        )


def case_record(*, card: dict[str, Any] | None = None, split_by: str = "patient", **changes: Any) -> StageRecord:
    """A record of the stage data."""
    config = {"name": "demo", "split_by": split_by} | ({"card": card} if card else {})
    values = {"stage": "data", "config": config, "inputs": {"source/0": "sha256:source"}, "code_version": "test"}
    return StageRecord(**(values | changes))


def write_cases(
    store: Store, *, sizes: tuple[int, ...] = (8, 4, 4), synthetic: bool = False, **record: Any
) -> Reference:
    """A version of cases with its three splits."""
    counts = {f"{split}/cases": size for split, size in zip(SPLITS, sizes, strict=True)}
    counts |= {f"{split}/synthetic": size if synthetic else 0 for split, size in zip(SPLITS, sizes, strict=True)}
    with store.write("cases", "demo") as version:
        for split, size in zip(SPLITS, sizes, strict=True):
            version.add_rows(split, make_cases(split, size, synthetic=synthetic), case_schema())
        version.add_json("labels.json", [label.model_dump(mode="json") for label in LABELS])
        return version.commit(case_record(counts=counts, **record))


def write_preferences(
    store: Store, *, with_images: bool, sizes: tuple[int, int] = (8, 4), gate: bool = True, **cases: Any
) -> Reference:
    """A version of preferences with the cases and rankings that it was made from."""
    source = write_cases(store, **cases)
    with store.write("rankings", "demo") as version:
        version.add_rows("train", [], ranking_schema())
        version.add_json("qualification.json", QUALIFICATION)
        rankings = version.commit(
            StageRecord(stage="teacher", config={}, inputs={"cases": str(source)}, code_version="test")
        )
    with store.write("preferences", "demo") as version:
        for split, size in zip(("train", "validation"), sizes, strict=True):
            version.add_rows(split, make_pairs(split, size, with_images=with_images), pair_schema())
        version.add_json("labels.json", [label.model_dump(mode="json") for label in LABELS])
        if gate:
            version.add_json("gate.json", GATE)
        inputs = {"cases": str(source), "rankings": str(rankings)}
        return version.commit(StageRecord(stage="preferences", config={}, inputs=inputs, code_version="test"))
