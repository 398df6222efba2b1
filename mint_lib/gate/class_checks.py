"""Checks of a whole set: lengths of both sides, balance and shift of the classes, contradiction of known labels.

Goes in: the gate's columns and lengths in tokens. Comes out: one outcome each. Cases are the unit of the tests on
lengths, so that several pairs of one case do not pass for independent.
"""

from statistics import NormalDist

import numpy as np

from mint_lib.gate.columns import PAIRED_SPLITS, CaseColumns, PairColumns
from mint_lib.gate.material import GateMaterial
from mint_lib.gate.probe_cases import find_labels
from mint_lib.gate.report import CheckOutcome, decide, decide_share, skip
from mint_lib.gate.settings import GateConfig

_PERMUTATIONS = 2000
_NO_PAIRS = "Only cases are judged here."


def check_lengths(
    material: GateMaterial, cases: CaseColumns, pairs: PairColumns, config: GateConfig
) -> list[CheckOutcome]:
    """Whether one side is longer than the other as a rule: standardised mean difference, and share of cases."""
    titles = {"length_difference": "Length bias", "longer_side": "Longer side"}
    if material.pairs is None or config.length_bias is None:
        status, why = (
            ("not_applicable", _NO_PAIRS) if material.pairs is None else ("off", "The recipe switches it off.")
        )
        return [skip(check, title, status, why) for check, title in titles.items()]  # type: ignore[arg-type]
    bias = config.length_bias
    chosen, rejected, case = _collect_lengths(material, pairs, per_name=bias.unit == "name")
    unit = "tokens a name" if bias.unit == "name" else "tokens"
    missing = "Lengths in tokens are missing or not numbers."
    effect = low = share = share_low = float("nan")
    num_longer = num_untied = 0
    if len(case) and np.isfinite(chosen).all() and np.isfinite(rejected).all():
        level = NormalDist().inv_cdf(0.5 + bias.confidence / 2)
        numbers = np.unique(case, return_inverse=True)[1]
        sizes = np.bincount(numbers)
        firsts, seconds = (np.bincount(numbers, side) / sizes for side in (chosen, rejected))
        effect, low = _measure_difference(firsts, seconds, level)
        num_longer, num_untied = int((firsts > seconds).sum()), int((firsts != seconds).sum())
        share = max(num_longer, num_untied - num_longer) / num_untied if num_untied else 0.5
        share_low = max(0.5, _lower_wilson(share, num_untied, level)) if num_untied else 0.5
    mean_chosen, mean_rejected = (float(side.mean()) if len(side) else float("nan") for side in (chosen, rejected))
    known = np.isfinite(effect)
    return [
        decide(
            "length_difference",
            titles["length_difference"],
            low,
            bias.max_difference,
            f"Chosen answers have {mean_chosen:.1f} {unit}, rejected ones {mean_rejected:.1f}: {effect:+.2f} standard "
            f"deviations, at least {low:.2f} in size with {bias.confidence:.0%} confidence."
            if known
            else missing,
            counts={"pairs": len(case)},
            figures={"difference": effect, "chosen": mean_chosen, "rejected": mean_rejected},
        ),
        decide(
            "longer_side",
            titles["longer_side"],
            share_low,
            bias.max_share,
            f"The {'chosen' if 2 * num_longer >= num_untied else 'rejected'} side is longer in {share:.0%} of the "
            f"{num_untied} cases in which one is, at least {share_low:.0%} with {bias.confidence:.0%} confidence."
            if known
            else missing,
            counts={"chosen longer": num_longer, "rejected longer": num_untied - num_longer},
            figures={"share": share},
        ),
    ]


def _collect_lengths(
    material: GateMaterial, pairs: PairColumns, *, per_name: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lengths of chosen and rejected, without the end of turn, and the case of each pair."""
    parts = []
    for split in PAIRED_SPLITS:
        num_rows = pairs.num_rows.get(split, 0)
        lengths = np.asarray(material.lengths.get(split, np.zeros((0, 3))), dtype=np.float64).reshape(-1, 3)
        parts.append(lengths if len(lengths) == num_rows else np.full((num_rows, 3), np.nan))
    sides = np.concatenate(parts)[:, 1:] - 1
    if per_name:
        sides = sides / np.maximum(pairs.num_names, 1)
    return sides[:, 0], sides[:, 1], pairs.case


def _measure_difference(firsts: np.ndarray, seconds: np.ndarray, level: float) -> tuple[float, float]:
    """Standardised mean difference, and the end of its interval nearer to 0 as a size (Hedges and Olkin 1985)."""
    num = len(firsts)
    deviation = float(np.sqrt((firsts.var(ddof=1) + seconds.var(ddof=1)) / 2)) if num > 1 else float("nan")
    gap = float(firsts.mean() - seconds.mean())
    if gap == 0:
        return 0.0, 0.0
    if num > 1 and deviation == 0:
        # Every chosen answer differs from every rejected one by the same number of tokens.
        return float(np.copysign(99.0, gap)), 99.0
    effect = gap / deviation
    error = np.sqrt(2 / num + effect**2 / (4 * num))
    return effect, max(0.0, abs(effect) - level * float(error)) if np.isfinite(effect) else float("nan")


def _lower_wilson(share: float, num: int, level: float) -> float:
    """Lower end of Wilson's interval (1927)."""
    middle = share + level**2 / (2 * num)
    spread = level * float(np.sqrt(share * (1 - share) / num + level**2 / (4 * num**2)))
    return (middle - spread) / (1 + level**2 / num)


def count_labels(material: GateMaterial, cases: CaseColumns, pairs: PairColumns) -> np.ndarray:
    """Training cases of each label: their own, or with pairs the first chosen one."""
    labels = find_labels(material, cases, pairs)[cases.split == 0]
    return np.bincount(labels[labels >= 0], minlength=len(material.labels))


def check_classes(material: GateMaterial, counts: np.ndarray, config: GateConfig) -> list[CheckOutcome]:
    """The rarest class, the effective number of classes, and the shift of shares from the last version."""
    titles = {"least_class": "Rarest class", "effective_classes": "Class balance", "class_shift": "Class shift"}
    total = int(counts.sum())
    if not total:
        why = "No training case has a label, as in few-label mode and for captions."
        return [skip(check, title, "not_applicable", why) for check, title in titles.items()]
    shares = counts / total
    present = shares[shares > 0]
    effective = float(np.exp(-(present * np.log(present)).sum()))
    rarest = material.labels[int(np.where(counts > 0, counts, counts.max() + 1).argmin())].id
    num_absent = int((counts == 0).sum())
    balance = config.class_balance
    if balance is None:
        off = "The recipe switches it off."
        outcomes = [skip(check, titles[check], "off", off) for check in ("least_class", "effective_classes")]
    else:
        outcomes = [
            decide(
                "least_class",
                titles["least_class"],
                float(present.min()),
                balance.min_least_share,
                f"The rarest class that occurs is {rarest} with {present.min():.1%} of {total} training cases; "
                f"{num_absent} of {len(counts)} classes do not occur.",
                bound="at_least",
                counts={"labelled training cases": total, "classes that do not occur": num_absent},
            ),
            decide(
                "effective_classes",
                titles["effective_classes"],
                effective / len(counts),
                balance.min_effective_share,
                f"The shares of the {len(counts)} classes are worth {effective:.1f} equal ones.",
                bound="at_least",
                figures={"effective number of classes": effective},
            ),
        ]
    return [*outcomes, _check_shift(material, counts, config, titles["class_shift"])]


def _check_shift(material: GateMaterial, counts: np.ndarray, config: GateConfig, title: str) -> CheckOutcome:
    check = "class_shift"
    if config.class_shift is None:
        return skip(check, title, "off", "The recipe switches it off.")
    before = material.previous.statistics.label_counts if material.previous is not None else {}
    if not before:
        return skip(check, title, "not_applicable", "There is no version before this one to compare with.")
    after = {label.id: int(count) for label, count in zip(material.labels, counts, strict=True)}
    names = sorted({*before, *after})
    table = np.array([[before.get(name, 0) for name in names], [after.get(name, 0) for name in names]])
    shares = table / table.sum(axis=1, keepdims=True)
    distance = float(np.abs(shares[0] - shares[1]).sum() / 2)
    p_value = permute_shares(table, distance)
    most = names[int(np.abs(shares[0] - shares[1]).argmax())]
    place = names.index(most)
    by_chance = p_value > config.class_shift.alpha
    return decide(
        check,
        title,
        0.0 if by_chance else distance,
        config.class_shift.max_distance,
        f"The class shares moved by {distance:.1%} (total variation) from the last version, p = {p_value:.2g}"
        + (", which chance explains" if by_chance else "")
        + f". The largest move is {most}: {shares[0, place]:.1%} to {shares[1, place]:.1%}.",
        figures={"total variation distance": distance, "p-value": p_value},
    )


def permute_shares(table: np.ndarray, observed: float) -> float:
    """Chance of a total variation distance of `observed` or more if both rows of counts came from one distribution.

    Monte Carlo over the tables with the same margins, the observed one counted (Phipson and Smyth 2010).
    """
    rng = np.random.default_rng(0)
    sizes = table.sum(axis=1)
    drawn = rng.multivariate_hypergeometric(table.sum(axis=0), int(sizes[0]), size=_PERMUTATIONS, method="marginals")
    gaps = np.abs(drawn / sizes[0] - (table.sum(axis=0) - drawn) / sizes[1]).sum(axis=1) / 2
    return float((1 + (gaps >= observed - 1e-12).sum()) / (1 + _PERMUTATIONS))


def check_truth(
    material: GateMaterial, cases: CaseColumns, pairs: PairColumns, config: GateConfig
) -> list[CheckOutcome]:
    """Pairs that reject the known label of their case, and pairs that do not choose it."""
    titles = {"truth_rejected": "Known label rejected", "truth_not_chosen": "Known label not chosen"}
    if material.pairs is None:
        return [skip(check, title, "not_applicable", _NO_PAIRS) for check, title in titles.items()]
    asked = (pairs.case >= 0) & (pairs.first_chosen >= 0)
    known = asked & (cases.label[pairs.case] >= 0) if len(cases) else asked
    if not known.any():
        why = "No pair names labels for a case whose label is known."
        return [skip(check, title, "not_applicable", why) for check, title in titles.items()]
    num_known = int(known.sum())
    num_first = int((known & (pairs.first_chosen == cases.label[pairs.case])).sum())
    checks = (
        ("truth_rejected", known & pairs.truth_rejected, config.max_truth_rejected_share, "reject it"),
        ("truth_not_chosen", known & ~pairs.truth_chosen, config.max_truth_not_chosen_share, "do not choose it"),
    )
    outcomes = []
    for check, marked, threshold, what in checks:
        concerned = pairs.case[marked]
        outcome = decide_share(
            check,
            titles[check],
            len(concerned),
            num_known,
            threshold,
            f"{len(concerned)} of {num_known} pairs with a known label {what}; {num_first} choose it first.",
            counts={"pairs with a known label": num_known, "found": len(concerned), "chosen first": num_first},
            case_ids=list(dict.fromkeys(cases.name(concerned))),
            batches=cases.rank_batches(concerned),
        )
        if config.allow_contradiction and outcome.status != "off":
            outcome = outcome.model_copy(update={"status": "reported"})
        outcomes.append(outcome)
    return outcomes
