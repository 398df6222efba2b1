"""The gate: every check on one version of cases or pairs, and the verdict.

Goes in: `GateConfig` and `GateMaterial`. Comes out: `GateReport`. Bad data give a report that refuses, never an
exception; a failing store does raise. The rows are streamed two or three times. 100,000 short notes with a pair each
were judged in 18 s of one core, at 1.5 kB a note beyond what the packages take.
"""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from mint_lib.gate.class_checks import check_classes, check_lengths, check_truth, count_labels
from mint_lib.gate.columns import CaseColumns, PairColumns, read_cases, read_pairs
from mint_lib.gate.label_flips import BATCHES, SHARE, TITLES, check_label_flips
from mint_lib.gate.material import GateMaterial
from mint_lib.gate.probe_cases import collect_probe_cases
from mint_lib.gate.report import CheckOutcome, GateReport, GateStatistics, skip
from mint_lib.gate.row_checks import check_images, check_pair_rows, check_preparation, check_schema
from mint_lib.gate.settings import GateConfig, LabelFlipsConfig
from mint_lib.gate.similarity_checks import check_similarity
from mint_lib.gate.triggers import CHECK as TRIGGER
from mint_lib.gate.triggers import TITLE as TRIGGER_TITLE
from mint_lib.gate.triggers import check_triggers
from mint_lib.records import SPLITS

logger = logging.getLogger(__name__)


def judge_data(config: GateConfig, material: GateMaterial) -> GateReport:
    """The report on one version. The same rows and config give the same report."""
    cases = read_cases(material, config)
    pairs = read_pairs(material, cases)
    label_counts = count_labels(material, cases, pairs)
    outcomes = [
        check_schema(cases, pairs, config),
        *check_pair_rows(material, cases, pairs, config),
        *check_preparation(material, cases, pairs, config),
        *check_similarity(material, cases, config),
        *check_images(material, cases, config),
        *check_lengths(material, cases, pairs, config),
        *check_classes(material, label_counts, config),
        *check_truth(material, cases, pairs, config),
        *_probe(material, cases, pairs, config),
    ]
    report = GateReport(
        name=material.name,
        judged="cases" if material.pairs is None else "pairs",
        reads=material.reads,
        passed=all(outcome.passed for outcome in outcomes),
        outcomes=tuple(outcomes),
        statistics=_summarise(material, cases, pairs, label_counts),
    )
    refusals = ", ".join(outcome.check for outcome in report.refusals)
    logger.info("gate: %d checks of %s, refused by: %s", len(outcomes), material.name, refusals or "none")
    return report


def _probe(
    material: GateMaterial, cases: CaseColumns, pairs: PairColumns, config: GateConfig
) -> Sequence[CheckOutcome]:
    """The probes for poison: flipped labels and trigger phrases."""
    titles = {**TITLES, TRIGGER: TRIGGER_TITLE}
    flips, trigger = config.label_flips, config.trigger
    off = "The recipe switches it off."
    if flips is None and trigger is None:
        return [skip(check, title, "off", off) for check, title in titles.items()]
    looking = flips or LabelFlipsConfig()
    probe = collect_probe_cases(material, cases, pairs, looking)
    if isinstance(probe, str):
        return [skip(check, title, "not_applicable", f"Not probed: {probe}.") for check, title in titles.items()]
    names: dict[str, Any] = {"case_ids": cases.case_ids, "batches": cases.batches}
    return [
        *(
            check_label_flips(probe, flips, config, judges_pairs=material.pairs is not None, **names)
            if flips is not None
            else [skip(check, TITLES[check], "off", off) for check in (SHARE, BATCHES)]
        ),
        check_triggers(probe, trigger, config, odds=looking.odds, **names)
        if trigger is not None
        else skip(TRIGGER, TRIGGER_TITLE, "off", off),
    ]


def _summarise(
    material: GateMaterial, cases: CaseColumns, pairs: PairColumns, label_counts: np.ndarray
) -> GateStatistics:
    batches = np.bincount(cases.batch, minlength=len(cases.batches))
    return GateStatistics(
        num_cases={split: int((cases.split == index).sum()) for index, split in enumerate(SPLITS)},
        num_pairs={str(split): number for split, number in pairs.num_rows.items()},
        label_counts={label.id: int(count) for label, count in zip(material.labels, label_counts, strict=True)},
        batches={name: int(count) for name, count in zip(cases.batches, batches, strict=True)},
    )
