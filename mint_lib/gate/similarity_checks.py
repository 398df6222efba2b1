"""Near-identical contents: within train, across splits, and patients who stand in several splits.

Goes in: the gate's columns and, for the texts that may be alike, the stream again. Comes out: one outcome each. MinHash
only proposes pairs of texts; the share of common shingles decides.
"""

import numpy as np

from mint_lib.gate.columns import CaseColumns, iterate_readable
from mint_lib.gate.image_sketches import find_similar_images
from mint_lib.gate.material import GateMaterial
from mint_lib.gate.report import CheckOutcome, decide, decide_share, skip
from mint_lib.gate.settings import GateConfig
from mint_lib.gate.text_sketches import find_text_candidates, measure_jaccard
from mint_lib.records import SPLITS

_MARGIN = 0.12
"""Four standard errors of an estimate from 128 slots, measured on notes with changed words."""
_MAX_TEXTS = 20_000
"""Texts in memory for the true similarity; beyond that, the estimate decides."""


def check_similarity(material: GateMaterial, cases: CaseColumns, config: GateConfig) -> list[CheckOutcome]:
    """Near-duplicates within train, near-identical contents across splits, shared patients."""
    texts = _find_similar_texts(material, cases, config)
    pictures = find_similar_images(cases.sketches, config.similarity)
    images = cases.pictured[pictures] if len(pictures) else np.zeros((0, 2), np.int64)
    return [
        _check_train("near_duplicate_texts", "Near-duplicate texts", texts, cases.signed, cases, config),
        _check_train("near_duplicate_images", "Near-duplicate images", images, cases.pictured, cases, config),
        _check_leak("leaked_texts", "Texts in two splits", texts, cases.signed, cases, config),
        _check_leak("leaked_images", "Images in two splits", images, cases.pictured, cases, config),
        _check_patients(cases, config),
    ]


def _find_similar_texts(material: GateMaterial, cases: CaseColumns, config: GateConfig) -> np.ndarray:
    """Pairs of rows in `CaseColumns` whose texts are near-identical."""
    least = config.similarity.text_jaccard
    candidates = find_text_candidates(cases.signatures, least - _MARGIN)
    if not len(candidates):
        return np.zeros((0, 2), np.int64)
    pairs = cases.signed[candidates]
    texts = _read_texts(material, np.unique(pairs)[:_MAX_TEXTS])
    alike = []
    for (one, other), place in zip(pairs.tolist(), candidates, strict=True):
        if one in texts and other in texts:
            alike.append(measure_jaccard(texts[one], texts[other]) >= least)
        else:
            first, second = cases.signatures[place]
            alike.append(bool((first == second).mean() >= least))
    return np.asarray(pairs[np.array(alike)])


def _read_texts(material: GateMaterial, rows: np.ndarray) -> dict[int, str]:
    wanted = set(rows.tolist())
    texts: dict[int, str] = {}
    row = 0
    for split in SPLITS:
        for case in iterate_readable(lambda split=split: material.cases(split)):  # type: ignore[misc]
            if row in wanted:
                texts[row] = case.text or ""
            row += 1
    return texts


def _check_train(
    check: str, title: str, pairs: np.ndarray, rows: np.ndarray, cases: CaseColumns, config: GateConfig
) -> CheckOutcome:
    """Training cases that are near-identical to one of another patient."""
    train = rows[cases.split[rows] == 0]
    if not len(train):
        return skip(check, title, "not_applicable", "No training case has such a content, or it is not compared.")
    inside = pairs[(cases.split[pairs] == 0).all(axis=1)]
    foreign = inside[cases.group[inside[:, 0]] != cases.group[inside[:, 1]]]
    concerned = np.unique(foreign)
    num_own = len(np.setdiff1d(inside, foreign))
    return decide_share(
        check,
        title,
        len(concerned),
        len(train),
        config.max_near_duplicate_share,
        f"{len(concerned)} of {len(train)} training cases are near-identical to one of another patient.",
        counts={"compared": len(train), "found": len(concerned), "of the same patient": num_own},
        case_ids=cases.name(foreign.ravel()),
        batches=cases.rank_batches(concerned),
    )


def _check_leak(
    check: str, title: str, pairs: np.ndarray, rows: np.ndarray, cases: CaseColumns, config: GateConfig
) -> CheckOutcome:
    """Validation and test cases that are near-identical to one of an earlier split."""
    held = rows[cases.split[rows] > 0]
    if not len(held):
        return skip(check, title, "not_applicable", "No validation or test case has such a content.")
    across = pairs[cases.split[pairs[:, 0]] != cases.split[pairs[:, 1]]]
    # The rows stand in the order of the splits, so the second of a pair is in the later one.
    concerned = np.unique(across.max(axis=1)) if len(across) else np.zeros(0, np.int64)
    places = np.unique(cases.split[np.sort(across, axis=1)], axis=0)
    return decide_share(
        check,
        title,
        len(concerned),
        len(held),
        config.max_leaked_share,
        f"{len(concerned)} of {len(held)} validation and test cases are near-identical to one of another split"
        + (f" ({_name_splits(places)})." if len(concerned) else "."),
        counts={"compared": len(held), "found": len(concerned)},
        case_ids=cases.name(np.unique(across)),
        batches=cases.rank_batches(concerned),
    )


def _check_patients(cases: CaseColumns, config: GateConfig) -> CheckOutcome:
    check, title = "shared_patients", "Patients in two splits"
    if config.max_shared_patients is None:
        return skip(check, title, "off", "The recipe switches it off, as for data that are split by image.")
    places = np.unique(np.stack([cases.group, cases.split.astype(np.int32)], axis=1), axis=0)
    groups, counts = np.unique(places[:, 0], return_counts=True)
    concerned = np.nonzero(np.isin(cases.group, groups[counts > 1]))[0]
    num_found = int((counts > 1).sum())
    return decide(
        check,
        title,
        float(num_found) if len(groups) else None,
        float(config.max_shared_patients),
        f"{num_found} of {len(groups)} patients stand in several splits.",
        counts={"patients": len(groups), "found": num_found},
        case_ids=cases.name(concerned),
        batches=cases.rank_batches(concerned),
    )


def _name_splits(places: np.ndarray) -> str:
    return ", ".join(f"{SPLITS[first]} and {SPLITS[second]}" for first, second in places)
