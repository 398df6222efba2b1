"""Flipped labels: whether labels contradict the content of their cases, spread over the data or in one batch.

Goes in: cases with the evidence of their content. Comes out: two outcomes: the share of labels that look random, and
the batches in which contradicted cases are far more frequent than in the others. Patients are counted once, so that
several cases of one do not pass for independent.
"""

import numpy as np

from mint_lib.gate.probe_cases import ProbeCases
from mint_lib.gate.report import CheckOutcome, decide, skip
from mint_lib.gate.settings import GateConfig, LabelFlipsConfig
from mint_lib.statistics import correct_holm

SHARE, BATCHES = "label_flips", "label_flips_by_batch"
TITLES = {SHARE: "Flipped labels", BATCHES: "Flipped labels in one batch"}


def check_label_flips(
    probe: ProbeCases,
    config: LabelFlipsConfig,
    gate: GateConfig,
    *,
    judges_pairs: bool,
    case_ids: list[str],
    batches: list[str],
) -> tuple[CheckOutcome, CheckOutcome]:
    """Both outcomes.

    Args:
        probe: what is looked at.
        config: thresholds.
        gate: says whether they decide.
        judges_pairs: the labels are a teacher's, who errs more than the data may.
        case_ids: of all cases, by the rows of `probe`.
        batches: names of all batches.
    """
    evidence = probe.evidence
    contradicted = evidence.contradicts(evidence.scores, probe.label, config.odds)
    margin = evidence.scores.max(axis=1) - evidence.scores[np.arange(len(probe.label)), probe.label]
    worst = [case_ids[probe.rows[place]] for place in np.argsort(-margin) if contradicted[place]]
    counts = {"cases looked at": len(probe.label), "contradicted by their content": int(contradicted.sum())}
    right = float((evidence.scores.argmax(axis=1) == probe.label).mean())
    figures = {
        "share of labels that look random": evidence.random_share,
        "lower end of the interval": evidence.random_share_low,
        "labels that the content foretells": right,
    }
    threshold = config.max_share if probe.words is not None else config.max_image_share
    if judges_pairs:
        threshold = config.max_chosen_share
    share = "No label looks more random than the content leaves open."
    if evidence.random_share_low > 0:
        share = (
            f"{evidence.random_share:.1%} of the labels look as if drawn at random, at least "
            f"{evidence.random_share_low:.1%} with 95 % confidence."
        )
    spread = decide(
        SHARE,
        TITLES[SHARE],
        evidence.random_share_low,
        threshold,
        f"{share} The content alone foretells {right:.0%} of the labels; what it cannot tell apart does not count.",
        decides=not gate.allow_contradiction,
        counts=counts,
        figures=figures,
        case_ids=worst,
    )
    return spread, _compare_batches(probe, contradicted, config, gate, case_ids=case_ids, batches=batches)


def _compare_batches(
    probe: ProbeCases,
    contradicted: np.ndarray,
    config: LabelFlipsConfig,
    gate: GateConfig,
    *,
    case_ids: list[str],
    batches: list[str],
) -> CheckOutcome:
    if config.alpha is None:
        return skip(BATCHES, TITLES[BATCHES], "off", "The recipe switches it off.")
    numbers = np.unique(probe.batch)
    if len(numbers) < 2:
        return skip(BATCHES, TITLES[BATCHES], "not_applicable", "There is one batch, so none can stand out.")
    key = np.stack([probe.batch, probe.label, probe.group], axis=1)
    units, unit_of = np.unique(key, axis=0, return_inverse=True)
    flagged = np.zeros(len(units), bool)
    np.logical_or.at(flagged, unit_of, contradicted)
    p_values = [stratified_p_value(flagged, units[:, 0] == number, units[:, 1]) for number in numbers]
    adjusted = np.array(correct_holm(p_values))
    named = [int(index) for index in np.argsort(adjusted, kind="stable") if adjusted[index] <= config.alpha]
    places = np.isin(probe.batch, numbers[named]) & contradicted
    shown = ", ".join(
        f"{batches[numbers[index]]} ({flagged[units[:, 0] == numbers[index]].mean():.0%} of its patients)"
        for index in named[:3]
    )
    return decide(
        BATCHES,
        TITLES[BATCHES],
        float(adjusted.min()),
        config.alpha,
        f"Labels contradict the content far more often than elsewhere in: {shown}."
        if named
        else f"No batch of {len(numbers)} has more contradicted labels than chance and its mix of classes explain.",
        bound="at_least",
        decides=not gate.allow_contradiction,
        counts={"batches": len(numbers), "batches named": len(named)},
        figures={"least p-value, Holm": float(adjusted.min())},
        case_ids=[case_ids[row] for row in probe.rows[places]],
        batches=[batches[numbers[index]] for index in named],
    )


def stratified_p_value(flagged: np.ndarray, inside: np.ndarray, stratum: np.ndarray) -> float:
    """Chance of as many flagged units inside, given the margins of every stratum: Fisher's test, one-sided and exact.

    The sum of independent hypergeometric counts (Gart 1970), one a stratum: a batch with more of a label that is often
    contradicted is not blamed for that.
    """
    from scipy.stats import hypergeom

    chances = np.ones(1)
    for number in np.unique(stratum[flagged]):
        here = stratum == number
        num_all, num_flagged, num_inside = int(here.sum()), int((here & flagged).sum()), int((here & inside).sum())
        chances = np.convolve(chances, hypergeom.pmf(np.arange(num_flagged + 1), num_all, num_flagged, num_inside))
    return float(min(1.0, chances[int((flagged & inside).sum()) :].sum()))
