"""Checks of single rows: schema, empty and repeated pairs, equal sides, refused cases, lost label spans, image faults.

Goes in: the gate's columns and what the stage counted. Comes out: one outcome each.
"""

from collections import Counter

import numpy as np

from mint_lib.gate.columns import PAIRED_SPLITS, CaseColumns, PairColumns
from mint_lib.gate.material import GateMaterial
from mint_lib.gate.report import CheckOutcome, decide, decide_share, skip
from mint_lib.gate.settings import GateConfig

_NO_PAIRS = "Only cases are judged here."


def check_schema(cases: CaseColumns, pairs: PairColumns, config: GateConfig) -> CheckOutcome:
    """Rows that break the schema, as a share of all rows."""
    faults = Counter(cases.faults) + Counter(pairs.faults)
    num_rows = len(cases) + len(pairs.case) + faults["row that cannot be read"]
    causes = ", ".join(f"{count} × {cause}" for cause, count in sorted(faults.items()))
    return decide_share(
        "schema",
        "Rows and labels",
        sum(faults.values()),
        num_rows,
        config.max_invalid_share,
        f"Found: {causes}." if causes else f"All {num_rows} rows have the right types, known ids and known labels.",
        counts={"rows": num_rows, **faults},
        case_ids=[*cases.faulty_ids, *pairs.faulty_ids],
    )


def check_pair_rows(
    material: GateMaterial, cases: CaseColumns, pairs: PairColumns, config: GateConfig
) -> list[CheckOutcome]:
    """Empty pairs, equal sides and exact repetitions."""
    checks = (
        (
            "empty_pairs",
            "Empty prompts and answers",
            pairs.empty,
            config.max_empty_share,
            "have a blank prompt or answer",
        ),
        ("equal_sides", "Chosen equals rejected", pairs.equal, config.max_equal_sides_share, "choose what they reject"),
        (
            "duplicate_pairs",
            "Duplicate pairs",
            pairs.repeated,
            config.max_duplicate_pairs_share,
            "repeat another one to the byte",
        ),
    )
    if material.pairs is None:
        return [skip(check, title, "not_applicable", _NO_PAIRS) for check, title, *_ in checks]
    outcomes = []
    for check, title, marked, threshold, what in checks:
        concerned = pairs.case[marked & (pairs.case >= 0)]
        num_found = int(marked.sum())
        outcomes.append(
            decide_share(
                check,
                title,
                num_found,
                len(marked),
                threshold,
                f"{num_found} of {len(marked)} pairs {what}.",
                counts={"pairs": len(marked), "found": num_found},
                case_ids=list(dict.fromkeys(cases.name(concerned))),
                batches=cases.rank_batches(concerned),
            )
        )
    return outcomes


def check_preparation(
    material: GateMaterial, cases: CaseColumns, pairs: PairColumns, config: GateConfig
) -> list[CheckOutcome]:
    """Cases refused while pairs were prepared, and answers that tokenisation lost."""
    if material.pairs is None:
        return [
            skip("refused_cases", "Cases refused on the way", "not_applicable", _NO_PAIRS),
            skip("lost_spans", "Label spans lost in tokens", "not_applicable", _NO_PAIRS),
        ]
    causes: Counter[str] = Counter()
    for counts in material.refused.values():
        causes.update(counts)
    num_refused = sum(causes.values())
    num_cases = len(np.unique(pairs.case)) + num_refused
    named = ", ".join(f"{count} × {cause.replace('_', ' ')}" for cause, count in sorted(causes.items()))
    refused = decide_share(
        "refused_cases",
        "Cases refused on the way",
        num_refused,
        num_cases,
        config.max_refused_share,
        f"Of {num_cases} cases: {named}." if named else f"None of {num_cases} cases was refused.",
        counts=dict(causes),
    )
    return [refused, _check_spans(material, cases, pairs, config)]


def _check_spans(material: GateMaterial, cases: CaseColumns, pairs: PairColumns, config: GateConfig) -> CheckOutcome:
    lost: list[np.ndarray] = []
    unknown = 0
    for split in PAIRED_SPLITS:
        lengths = np.asarray(material.lengths.get(split, np.zeros((0, 3))), dtype=np.float64).reshape(-1, 3)
        num_rows = pairs.num_rows.get(split, 0)
        if len(lengths) != num_rows or not np.isfinite(lengths).all():
            unknown += num_rows
            lengths = np.full((num_rows, 3), np.nan)
        # One token is the end of turn alone.
        lost.append(np.any(lengths[:, 1:] < 2, axis=1))
    marked = np.concatenate(lost)
    num_found = int(marked.sum())
    sentence = f"{num_found} of {len(marked)} pairs have an answer without a token but the end of turn."
    if unknown:
        sentence = f"The lengths in tokens of {unknown} pairs are missing or not numbers."
    concerned = pairs.case[marked & (pairs.case >= 0)]
    return decide(
        "lost_spans",
        "Label spans lost in tokens",
        None if unknown or not len(marked) else num_found / len(marked),
        config.max_lost_span_share,
        sentence,
        counts={"pairs": len(marked), "found": num_found},
        case_ids=cases.name(concerned),
        batches=cases.rank_batches(concerned),
    )


def check_images(material: GateMaterial, cases: CaseColumns, config: GateConfig) -> list[CheckOutcome]:
    """Images that cannot be decoded, are too large to be decoded, or are blank."""
    faults = np.array([sketch.fault or "" for sketch in cases.sketches], dtype=object)
    blank = np.array([sketch.deviation <= config.blank_deviation for sketch in cases.sketches], dtype=bool)
    checks = (
        ("undecodable_images", "Undecodable images", faults == "undecodable", config.max_undecodable_share),
        ("oversized_images", "Images too large", faults == "too large", config.max_oversized_share),
        ("blank_images", "Blank images", blank, config.max_blank_share),
    )
    what = {
        "undecodable_images": "cannot be decoded as PNG or JPEG",
        "oversized_images": f"have more than {config.max_image_pixels} pixels, by their header",
        "blank_images": f"are blank (deviation of at most {config.blank_deviation:g} grey levels)",
    }
    outcomes = []
    for check, title, marked, threshold in checks:
        if not len(marked) and material.reads == "text":
            outcomes.append(skip(check, title, "not_applicable", "These cases have no image."))
            continue
        rows = cases.pictured[np.nonzero(marked)[0]]
        outcomes.append(
            decide_share(
                check,
                title,
                len(rows),
                len(marked),
                threshold,
                f"{len(rows)} of {len(marked)} images {what[check]}.",
                counts={"images": len(marked), "found": len(rows)},
                case_ids=cases.name(rows),
                batches=cases.rank_batches(rows),
            )
        )
    return outcomes
