"""The pairs of one split, streamed from its cases and rankings.

Goes in: cases and rankings that can be read again and again, the settings and a `PairChecker`. Comes out: pairs one
after another, and what was found on the way. It knows neither the store nor the gate.
"""

from collections.abc import Iterable, Iterator, Sequence

from mint_lib.errors import PromptTooLong, RefusedData
from mint_lib.pairing.checks import PairChecker
from mint_lib.pairing.facts import NUM_SHOWN_CASES, SplitFacts
from mint_lib.pairing.policy import describe_policy, draw_other_text, draw_preferences
from mint_lib.pairing.selection import exchange_rankings, keep_selected, select_cases
from mint_lib.pairing.settings import PreferencesConfig
from mint_lib.progress import track_progress
from mint_lib.records import Case, Label, PreferencePair, Ranking, Split


def pair_split(
    cases: Iterable[Case],
    rankings: Iterable[Ranking],
    labels: Sequence[Label],
    config: PreferencesConfig,
    checker: PairChecker,
    split: Split,
    facts: SplitFacts,
) -> Iterator[PreferencePair]:
    """The pairs of one split, one after another; `facts` is complete at the end.

    Cases and rankings are read twice and not held, but for the rankings of `shuffled_teacher` and the texts of
    captions, which go to other cases.

    Raises:
        RefusedData: too many cases break a rule, or no pair is left; carries counts by cause and case ids.
        PromptTooLong: the only rule broken is that prompt and answer must fit the student's window.
    """
    selected = select_cases(cases, rankings, labels, config, split, checker.template, facts)
    num_selected = int(selected.sum())
    exchanged: dict[str, Ranking] = {}
    texts: list[str] = []
    if config.control == "shuffled_teacher":
        own = [ranking for _, ranking in keep_selected(cases, rankings, selected)]
        exchanged = exchange_rankings(own, config, split)
    elif config.pairs == "captions":
        texts = _read_captions([case for case, _ in keep_selected(cases, rankings, selected)], split)
    policy = describe_policy(config)
    chosen = keep_selected(cases, rankings, selected)
    for case, ranking in track_progress(chosen, f"preferences: {split}", total=num_selected):
        if config.pairs == "captions":
            made = [checker.make_caption_pair(case, draw_other_text(case, texts, config), policy=policy)]
        else:
            used = exchanged.get(case.case_id, ranking)
            preferences = draw_preferences(case, used, config)
            if isinstance(preferences, str):
                facts.dropped[preferences] += 1
                continue
            digest = used.teacher_digest
            made = [checker.make_pair(case, item, teacher_digest=digest, policy=policy) for item in preferences]
        causes = [cause for cause in made if isinstance(cause, str)]
        if causes:
            facts.refused.setdefault(causes[0], []).append(case.case_id)
            continue
        for pair, length in (item for item in made if not isinstance(item, str)):
            facts.statistics.add(pair, length, truth=case.label_id)
            yield pair
    _refuse_bad_set(facts, num_selected, config, split)


def _read_captions(cases: Sequence[Case], split: Split) -> list[str]:
    """The texts of the cases, of which two at least differ."""
    texts = [case.text or "" for case in cases]
    if len(set(texts)) < 2:
        raise RefusedData(f"{split}: the {len(cases)} cases have one text, so no other caption could be rejected.")
    return texts


def _refuse_bad_set(facts: SplitFacts, num_cases: int, config: PreferencesConfig, split: Split) -> None:
    """Raise where too many cases were refused or no pair is left."""
    refused, dropped, has_pairs = facts.refused, facts.dropped, facts.statistics.num_pairs > 0
    num_refused = sum(map(len, refused.values()))
    if has_pairs and num_refused <= config.max_refused_share * num_cases:
        return
    counts = {cause: len(case_ids) for cause, case_ids in refused.items()}
    counts |= {cause: count for cause, count in dropped.items() if count}
    shown = {cause: case_ids[:NUM_SHOWN_CASES] for cause, case_ids in refused.items()}
    causes = ", ".join(f"{cause}: {count}" for cause, count in sorted(counts.items())) or "there are no cases"
    named = "; ".join(f"{cause}: {', '.join(case_ids)}" for cause, case_ids in sorted(shown.items()))
    message = f"{split}: {num_refused} of {num_cases} cases were refused"
    message += "" if has_pairs else " and no pair is left"
    message += f" (allowed share {config.max_refused_share:g}). By cause: {causes}."
    message += f" Cases: {named}." if named else ""
    if list(refused) == ["longer_than_window"]:
        raise PromptTooLong(
            f"{message} Prompt and answer must fit the student's window of {config.student.window_tokens} tokens: "
            "raise student.window_tokens, lower top_k and bottom_q, or shorten the texts."
        )
    raise RefusedData(f"{message} Mend the cases or the policy.", counts, shown)
