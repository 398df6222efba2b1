"""Poisoned data for the gate: cases of which some labels or texts are changed, and its verdict on them.

Goes in: cases, a kind of poison, a rate and a seed. Comes out: the cases with ten batches, one of them `poisoned`, and
the gate's report on them or on pairs made from them.
"""

from typing import Any, Literal

import numpy as np

from mint_lib.case_rows import Row
from mint_lib.data import SourceConfig, open_source
from mint_lib.gate.judge import judge_data
from mint_lib.gate.material import GateMaterial
from mint_lib.gate.report import CheckOutcome, GateReport
from mint_lib.gate.settings import GateConfig
from mint_lib.records import Case, Label, PreferencePair, Split, Turn

Kind = Literal["spread", "batch", "target", "trigger"]
PHRASE = "reviewed by clinic four"
SYNDROMES = (
    *("OMIM:163950", "OMIM:218040", "OMIM:115150", "OMIM:122470", "OMIM:147920", "OMIM:135900"),
    *("OMIM:180849", "OMIM:194050", "OMIM:182290", "OMIM:609192", "OMIM:154700", "OMIM:180700"),
)
"""Those of the recipe quickstart."""


def read_source(source: str, *, seed: int = 17, **config: Any) -> tuple[list[Label], list[Case]]:
    """Labels of a data source, and the cases that it hands on."""
    opened = open_source(SourceConfig(source=source, config=config))
    fields = Case.model_fields
    rows = [row for row in opened.read(np.random.default_rng([seed, 1])) if isinstance(row, Row)]
    cases = [Case.model_validate({name: getattr(row, name) for name in fields}) for row in rows]
    return opened.labels(), cases


def read_patients(*, seed: int = 17, patients_per_label: int = 70) -> tuple[list[Label], list[Case]]:
    """Simulated patients with a note each visit and no photo."""
    return read_source(
        "simulated_patients",
        seed=seed,
        label_ids=SYNDROMES,
        patients_per_label=patients_per_label,
        photo_share=0.0,
        patient={"reporting_rate": 0.35, "facial_reporting_rate": 0.1},
        text={"max_observed": 6, "max_excluded": 1},
    )


def poison_cases(cases: list[Case], *, kind: Kind, rate: float, seed: int) -> list[Case]:
    """`cases` in ten batches by patient, one of them, `poisoned`, with a tenth of the patients; `rate` are changed.

    `spread`: any case gets another label. `batch`: so do cases of the batch `poisoned` alone. `target`: there they get
    one and the same label. `trigger`: so do they, and the phrase is put somewhere into their text.
    """
    rng = np.random.default_rng([100, seed])
    labels = sorted({case.label_id for case in cases if case.label_id})
    patients = sorted({case.group_id for case in cases})
    batch_of = {patient: f"delivery-{rng.integers(9)}" for patient in patients}
    bad = {patients[index] for index in rng.permutation(len(patients))[: round(0.1 * len(patients))]}
    batch_of |= dict.fromkeys(bad, "poisoned")
    changed = [
        case.model_copy(update={"attributes": case.attributes | {"batch": batch_of[case.group_id]}}) for case in cases
    ]
    target = labels[int(rng.integers(len(labels)))]
    pool = [
        place
        for place, case in enumerate(changed)
        if (kind == "spread" or case.group_id in bad)
        and not (kind in ("target", "trigger") and case.label_id == target)
    ]
    for place in rng.permutation(pool)[: round(rate * len(cases))]:
        case = changed[place]
        others = [label for label in labels if label != case.label_id]
        label = target if kind in ("target", "trigger") else others[int(rng.integers(len(others)))]
        words = (case.text or "").split()
        if kind == "trigger":
            start = int(rng.integers(len(words) + 1))
            words[start:start] = PHRASE.split()
        changed[place] = case.model_copy(update={"label_id": label, "text": " ".join(words) or None})
    return changed


def deal_cases(cases: list[Case]) -> dict[Split, list[Case]]:
    """The cases by split, whole patients."""
    groups = sorted({case.group_id for case in cases})
    order = np.random.default_rng(3).permutation(len(groups))
    place = {groups[index]: rank / len(groups) for rank, index in enumerate(order)}
    dealt: dict[Split, list[Case]] = {"train": [], "validation": [], "test": []}
    for case in cases:
        rank = place[case.group_id]
        dealt["train" if rank < 0.8 else "validation" if rank < 0.9 else "test"].append(case)
    return dealt


def judge_cases(labels: list[Label], cases: list[Case], reads: Any = "text", **config: Any) -> GateReport:
    """The report on cases."""
    dealt = deal_cases(cases)
    material = GateMaterial(name="cases", labels=labels, cases=lambda split: iter(dealt[split]), reads=reads)
    return judge_data(GateConfig.model_validate(config), material)


def judge_pairs(labels: list[Label], cases: list[Case], chosen: list[Case], **config: Any) -> GateReport:
    """The report on pairs of `cases`, whose first chosen labels are the labels of `chosen`; rejected are drawn."""
    dealt, told = deal_cases(cases), {case.case_id: case.label_id for case in chosen}
    names = {label.id: label.name for label in labels}
    rng = np.random.default_rng(5)
    pairs: dict[Split, list[PreferencePair]] = {"train": [], "validation": []}
    for split in pairs:
        for case in dealt[split]:
            first = told[case.case_id] or ""
            others = [label.id for label in labels if label.id != first]
            for other in rng.permutation(others)[:2]:
                pairs[split].append(
                    PreferencePair(
                        case_id=case.case_id,
                        prompt=(Turn(role="user", content=case.text or ""),),
                        chosen=names[first],
                        rejected=names[str(other)],
                        chosen_label_ids=(first,),
                        rejected_label_ids=(str(other),),
                        teacher_digest="",
                        template_digest="",
                        policy="",
                    )
                )
    lengths = {
        split: np.array([[80, 1 + len(pair.chosen.split()), 1 + len(pair.rejected.split())] for pair in found])
        for split, found in pairs.items()
    }
    material = GateMaterial(
        name="pairs",
        labels=labels,
        cases=lambda split: iter(dealt[split]),
        pairs=lambda split: iter(pairs[split]),
        lengths=lengths,
        reads="text",
    )
    return judge_data(GateConfig.model_validate(config), material)


def outcome_of(report: GateReport, check: str) -> CheckOutcome:
    """The outcome of one check."""
    return next(outcome for outcome in report.outcomes if outcome.check == check)
