"""The policy: which labels are preferred to which, drawn from the ranking of one case.

Goes in: a case, a ranking of the whole label set, and the settings. Comes out: the label ids of both sides of its
pairs, or the cause why it gets none. A draw has the seed and the case's id, so it does not depend on which other cases
there are. It knows neither prompts nor tokens.
"""

import hashlib
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mint_lib.errors import InvalidInput
from mint_lib.pairing.settings import PreferencesConfig
from mint_lib.records import Case, Label, Ranking
from mint_lib.template import normalise_name


class Preference(NamedTuple):
    """Both sides of a pair as label ids, in the order in which they are named."""

    chosen: tuple[str, ...]
    rejected: tuple[str, ...]


def draw_preferences(case: Case, ranking: Ranking, config: PreferencesConfig) -> list[Preference] | str:
    """The pairs of one case as label ids, or the cause why the policy gives it none."""
    rng = _seed_draws(config.seed, case)
    order = _order_labels(ranking.label_ids, case.label_id, config, rng)
    if isinstance(order, str):
        return order
    chosen, rest = tuple(order[: config.top_k]), order[config.top_k :]
    return [Preference(chosen, rejected) for rejected in _draw_rejected(rest, config, rng)]


def _order_labels(
    ranked: Sequence[str], truth: str | None, config: PreferencesConfig, rng: np.random.Generator
) -> list[str] | str:
    """The label set from the most to the least preferred, or the cause why the case gives no pair."""
    if config.control == "ground_truth_only":
        if truth is None:
            return "no_diagnosis"
        others = sorted(set(ranked) - {truth})
        return [truth, *(others[place] for place in rng.permutation(len(others)))]
    if config.ground_truth == "drop" and (truth is None or truth not in ranked[: config.top_k]):
        return "no_diagnosis" if truth is None else "diagnosis_not_chosen"
    if config.ground_truth == "first" and truth is not None:
        return [truth, *(label for label in ranked if label != truth)]
    return list(ranked)


def _draw_rejected(rest: Sequence[str], config: PreferencesConfig, rng: np.random.Generator) -> list[tuple[str, ...]]:
    """The rejected side of each pair, among the labels after the chosen ones; no two are the same."""
    if config.rejected == "bottom":
        return [tuple(rest[-config.bottom_q :])]
    if config.rejected == "next":
        return [tuple(rest[: config.bottom_q])]
    pool = rest[: config.sample_from_ranks]
    draws: list[tuple[str, ...]] = []
    while len(draws) < config.pairs_per_case:
        places = sorted(rng.choice(len(pool), size=config.bottom_q, replace=False))
        draw = tuple(pool[place] for place in places)
        if draw not in draws:
            draws.append(draw)
    return draws


def draw_other_text(case: Case, texts: Sequence[str], config: PreferencesConfig) -> str:
    """One of `texts` that is not the case's own; two of them at least must differ."""
    rng = _seed_draws(config.seed, case)
    other = case.text
    while other == case.text:
        other = texts[int(rng.integers(len(texts)))]
    return other or ""


def describe_policy(config: PreferencesConfig) -> str:
    """The policy in one string, as pairs carry it."""
    if config.pairs == "captions":
        return "captions"
    return (
        f"top{config.top_k}-{config.rejected}{config.bottom_q}/ground-truth={config.ground_truth}"
        f"/control={config.control}"
    )


def check_label_set(labels: Sequence[Label], config: PreferencesConfig) -> None:
    """Refuse a label set that the policy does not fit or whose names cannot be told apart.

    Raises:
        InvalidInput: with the numbers or the label ids at fault.
    """
    wanted = config.top_k + config.bottom_q
    if wanted > len(labels):
        raise InvalidInput(
            f"top_k {config.top_k} + bottom_q {config.bottom_q} = {wanted} is larger than the label set of "
            f"{len(labels)}, so a label would stand on both sides. Lower them to at most {len(labels)} together."
        )
    pool = min(config.sample_from_ranks or len(labels), len(labels) - config.top_k)
    num_draws = math.comb(pool, config.bottom_q)
    if config.rejected == "sampled" and num_draws < config.pairs_per_case:
        raise InvalidInput(
            f"{pool} ranks hold only {num_draws} different draws of {config.bottom_q}, fewer than "
            f"pairs_per_case {config.pairs_per_case}. Lower pairs_per_case or raise sample_from_ranks."
        )
    owners: dict[str, str] = {}
    for label in labels:
        other = owners.setdefault(normalise_name(label.name), label.id)
        if other != label.id:
            raise InvalidInput(
                f"The labels {other} and {label.id} have the same name {label.name!r}: chosen could equal rejected. "
                "Give each label its own name, or drop one."
            )


def _seed_draws(seed: int, case: Case) -> np.random.Generator:
    return np.random.default_rng([seed, int.from_bytes(hashlib.sha256(case.case_id.encode()).digest()[:8])])
