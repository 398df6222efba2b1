"""Which cases of a split give pairs, and whose ranking each of them gets.

Goes in: cases and rankings that can be read again and again, and the settings. Comes out: cases with their rankings,
streamed, and counts of those that were left out. It knows neither prompts nor how the sides of a pair are drawn.
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from mint_lib.errors import RefusedData
from mint_lib.pairing.facts import NUM_SHOWN_CASES, SplitFacts
from mint_lib.pairing.settings import PAIRED_SPLITS, PreferencesConfig
from mint_lib.records import Case, Label, Ranking, Split
from mint_lib.template import Template


def select_cases(
    cases: Iterable[Case],
    rankings: Iterable[Ranking],
    labels: Sequence[Label],
    config: PreferencesConfig,
    split: Split,
    template: Template,
    facts: SplitFacts,
) -> np.ndarray:
    """Which cases may give pairs, as booleans in their order, after checking that each is ranked over the label set.

    Raises:
        RefusedData: a case has no ranking, or one over other labels.
    """
    label_ids = {label.id for label in labels}
    selected: list[bool] = []
    without: list[str] = []
    foreign: list[str] = []
    for case, ranking in _match(cases, rankings):
        facts.num_cases += 1
        selected.append(False)
        if ranking is None:
            without.append(case.case_id)
        elif set(ranking.label_ids) != label_ids:
            foreign.append(case.case_id)
        elif not template.can_ask(case):
            facts.dropped[f"no_{template.reads}"] += 1
        elif config.pairs == "captions" and not (case.text and case.text.strip()):
            facts.dropped["no_caption"] += 1
        elif ranking.probabilities[0] < config.confidence_floor:
            facts.dropped["below_confidence_floor"] += 1
        else:
            selected[-1] = True
    if without or foreign:
        raise RefusedData(
            f"{split}: {len(without)} cases have no ranking and {len(foreign)} are ranked over other labels. Rankings "
            "and cases must belong together: run the teacher stage on these cases.",
            {"no_ranking": len(without), "other_labels": len(foreign)},
            {"no_ranking": without[:NUM_SHOWN_CASES], "other_labels": foreign[:NUM_SHOWN_CASES]},
        )
    kept = np.array(selected, dtype=bool)
    limit = config.max_train_cases if split == "train" else config.max_validation_cases
    num_sure = int(kept.sum())
    if limit is not None and limit < num_sure:
        order = np.random.default_rng([config.seed, PAIRED_SPLITS.index(split)]).permutation(num_sure)
        facts.dropped["above_max_cases"] = num_sure - limit
        kept[np.flatnonzero(kept)[order[limit:]]] = False
    return kept


def keep_selected(
    cases: Iterable[Case], rankings: Iterable[Ranking], selected: np.ndarray
) -> Iterator[tuple[Case, Ranking]]:
    """The cases that are selected, each with its ranking."""
    for (case, ranking), is_kept in zip(_match(cases, rankings), selected, strict=True):
        if is_kept and ranking is not None:
            yield case, ranking


def exchange_rankings(rankings: Sequence[Ranking], config: PreferencesConfig, split: Split) -> dict[str, Ranking]:
    """Case id to the ranking of another case: they are permuted in one cycle, so that no case keeps its own.

    Raises:
        RefusedData: there is only one, or none.
    """
    if len(rankings) < 2:
        raise RefusedData(
            f"{split}: shuffled_teacher needs at least 2 cases to exchange rankings, not {len(rankings)}."
        )
    order = np.random.default_rng([config.seed, 2, PAIRED_SPLITS.index(split)]).permutation(len(rankings))
    return {rankings[taker].case_id: rankings[giver] for taker, giver in zip(order, np.roll(order, 1), strict=True)}


def _match(cases: Iterable[Case], rankings: Iterable[Ranking]) -> Iterator[tuple[Case, Ranking | None]]:
    """Every case with its ranking, or None. Where both stand in one order, one ranking is held at a time."""
    waiting: dict[str, Ranking] = {}
    rest = iter(rankings)
    for case in cases:
        while case.case_id not in waiting:
            ranking = next(rest, None)
            if ranking is None:
                break
            waiting[ranking.case_id] = ranking
        yield case, waiting.pop(case.case_id, None)
