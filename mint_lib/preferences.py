"""Preferences: turns a teacher's rankings into prompts with a chosen and a rejected answer.

Goes in: a version of `cases` and the `rankings` of a teacher for it. Comes out: a version of `preferences` with the
pairs of train and validation, the template file that made their prompts, the label set, `checks.json` and the verdict
of the gate; or, if that refused them, a version of `quarantine` and an error. Of a case,
only the text or only the image reaches a prompt, as the student reads: what the teacher saw beside it, the student
learns from the ranking. Everything is checked as the student's own tokenizer and image processor read it, before
anything is written. Test cases are read by the gate alone, which looks for leaks.
"""

import hashlib
import logging
import math
import pathlib
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, model_validator

from mint_lib.dataset_card.beside import add_card
from mint_lib.dataset_card.description import describe_draft
from mint_lib.errors import InvalidInput, PromptTooLong, RefusedData
from mint_lib.gate.material import GateMaterial
from mint_lib.gate.report import GateReport
from mint_lib.gate.settings import GateConfig
from mint_lib.gate.verdict import REPORT, add_report, choose_kind, enforce, read_report
from mint_lib.pair_checks import PairChecker, PairStatistics, Preference
from mint_lib.progress import track_progress
from mint_lib.records import Case, Label, Name, PreferencePair, Ranking, Reference, Split, StageRecord, code_version
from mint_lib.rows import StoredShards, pair_schema, write_shards
from mint_lib.student import StudentConfig, load_reader
from mint_lib.template import Template, normalise_name

if TYPE_CHECKING:
    from mint_lib.store import Store

logger = logging.getLogger(__name__)
_PAIRED_SPLITS: tuple[Split, ...] = ("train", "validation")
_SHOWN_CASE_IDS = 20


class PreferencesConfig(BaseModel):
    """How a ranking becomes pairs."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: Name
    """Name of the version in the store."""
    seed: int = Field(ge=0, lt=2**32)
    """Seed of every draw. A case's draws do not depend on which other cases there are."""
    student: StudentConfig
    """The student whose tokenizer and window the pairs are checked with."""
    template: str = "rare_disease"
    """File of `mint_lib/templates`."""
    pairs: Literal["ranking", "captions"] = "ranking"
    """`captions` prefers a case's own text to another case's as the description of its image, and looks at no ranking:
    what an image student's projector is trained on before the alignment (PeFoMed's first stage)."""
    top_k: int = Field(default=10, ge=1, le=99)
    """Names in a chosen answer, the teacher's most probable first; the prompt asks for as many. MINT: 10."""
    bottom_q: int = Field(default=15, ge=1, le=99)
    """Names in a rejected answer. MINT's published ORPO script: 15."""
    rejected: Literal["bottom", "next", "sampled"] = "bottom"
    """Which ranks are rejected: the last `bottom_q` (MINT), the `bottom_q` right after the chosen ones, or a draw."""
    sample_from_ranks: int | None = Field(default=None, ge=1)
    """`sampled` draws from this many ranks after the chosen ones; none: from all of them."""
    pairs_per_case: int = Field(default=1, ge=1, le=16)
    """Rejected answers drawn for one prompt (a prompt tree). More than 1 needs `rejected: sampled`."""
    ground_truth: Literal["none", "first", "drop"] = "none"
    """`none`: the teacher alone decides, labelled or not. `first`: a known diagnosis is moved to the front of the
    chosen names, replacing the last one where the teacher missed it; cases without one follow the teacher. `drop`:
    only cases whose diagnosis is known and among the chosen names give pairs."""
    confidence_floor: float = Field(default=0.0, ge=0.0, le=1.0)
    """Least probability of the teacher's first label; cases below it give no pair, in every control alike."""
    control: Literal["none", "shuffled_teacher", "ground_truth_only"] = "none"
    """Control of a transfer study. `shuffled_teacher`: every case gets the ranking of another one.
    `ground_truth_only`: the diagnosis comes first and all other names are drawn at random; cases without a
    diagnosis give no pair."""
    max_train_cases: int | None = Field(default=None, ge=1)
    """Draw at most this many training cases; none: all."""
    max_validation_cases: int | None = Field(default=None, ge=1)
    """Draw at most this many validation cases; none: all."""
    max_refused_share: float = Field(default=0.05, ge=0.0, lt=1.0)
    """Share of cases that may be refused by a check (prompt too long, control tokens) before the set is refused."""
    gate: GateConfig = GateConfig()
    """What the pairs, and the cases behind them, must satisfy before anything is trained on them. The controls of a
    study contradict the truth by design, which then does not decide."""

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if self.rejected != "sampled" and (self.pairs_per_case > 1 or self.sample_from_ranks is not None):
            raise ValueError("pairs_per_case above 1 and sample_from_ranks need rejected: sampled")
        if self.sample_from_ranks is not None and self.sample_from_ranks < self.bottom_q:
            raise ValueError(f"sample_from_ranks {self.sample_from_ranks} is less than bottom_q {self.bottom_q}")
        if self.pairs == "captions" and (self.student.reads != "image" or self.control != "none"):
            raise ValueError("pairs: captions is for image students (student.reads: image), without a control")
        if self.control == "shuffled_teacher" and self.ground_truth == "drop":
            raise ValueError("ground_truth: drop would undo shuffled_teacher, as it keeps only the right rankings")
        return self


class SplitFacts:
    """What is found while the pairs of one split are made."""

    def __init__(self) -> None:
        self.num_cases = 0
        self.dropped: Counter[str] = Counter()
        self.refused: dict[str, list[str]] = {}
        """Cause to case ids."""
        self.statistics = PairStatistics()

    def describe(self) -> dict[str, Any]:
        """What `checks.json` says of the split."""
        return {
            "num_cases": self.num_cases,
            "dropped": {cause: count for cause, count in sorted(self.dropped.items()) if count},
            "refused": self.count_refused(),
            "refused_case_ids": {cause: ids[:_SHOWN_CASE_IDS] for cause, ids in sorted(self.refused.items())},
            **self.statistics.describe(),
        }

    def count_refused(self) -> dict[str, int]:
        """Cause to number of cases."""
        return {cause: len(case_ids) for cause, case_ids in sorted(self.refused.items())}


def build_pairs(
    config: PreferencesConfig,
    *,
    store: "Store",
    cases: Reference,
    rankings: Reference,
    previous: Reference | None = None,
) -> Reference:
    """A version of `preferences` made from `cases` and their `rankings`. The same inputs give the same digest.

    With `previous`, an earlier version of these pairs, the gate compares with it, and shards that are the same are not
    stored again.

    Raises:
        InvalidInput: k + q exceeds the label set, the label set cannot be told apart, or the rankings belong to
            another label set.
        RefusedData: too many cases break a rule, or none is left; carries counts by cause and case ids.
        PromptTooLong: the only rule broken is that prompt and answer must fit the student's window.
        GateFailed: the gate refused the pairs; they and its report lie in a version of `quarantine`.
    """
    labels = TypeAdapter(list[Label]).validate_python(store.read_json(cases, "labels.json"))
    template = Template.load(config.template).with_num_answers(config.top_k).with_label_names(labels)
    check_template(template, config)
    check_label_set(labels, config)
    student = config.student
    window_tokens = student.window_tokens if student.over_long == "refuse" else None
    checker = PairChecker(load_reader(student), template, labels, window_tokens)
    facts: dict[Split, SplitFacts] = {split: SplitFacts() for split in _PAIRED_SPLITS}
    with tempfile.TemporaryDirectory(prefix="mint-pairs-") as scratch:
        shards: dict[Split, list[pathlib.Path]] = {}
        for split in _PAIRED_SPLITS:
            rows = store.open_rows(cases, split, Case)
            ranked = store.open_rows(rankings, split, Ranking)
            pairs = pair_split(rows, ranked, labels, config, checker, split, facts[split])
            folder = pathlib.Path(scratch) / split
            folder.mkdir()
            shards[split] = list(write_shards(pairs, pair_schema(), folder))
        tables: dict[str, StoredShards[PreferencePair]] = {
            split: StoredShards(paths, PreferencePair) for split, paths in shards.items()
        }
        report = _judge(config, store, cases, labels, tables, facts, previous)
        inputs = {"cases": str(cases), "rankings": str(rankings)} | ({"previous": str(previous)} if previous else {})
        checks: dict[str, dict[str, Any]] = {split: found.describe() for split, found in facts.items()}
        record = StageRecord(
            stage="preferences",
            config=config.model_dump(mode="json"),
            inputs=inputs,
            code_version=code_version(),
            counts=_flatten_counts(checks),
        )
        kind = choose_kind(report, "preferences")
        base = previous if previous is not None and (previous.kind, previous.name) == (kind, config.name) else None
        label_rows = [label.model_dump(mode="json") for label in labels]
        with store.write(kind, config.name, base=base) as version:
            for split, paths in shards.items():
                version.add_shards(split, paths)
            version.add_json("labels.json", label_rows)
            version.add_bytes("template.yaml", template.data)
            version.add_json("checks.json", {"policy": describe_policy(config), "num_labels": len(labels), **checks})
            add_report(version, report)
            draft = describe_draft(
                store,
                kind="preferences",
                name=config.name,
                record=record,
                files=version.files,
                tables=tables,
                documents={"labels.json": label_rows, REPORT: report.model_dump(mode="json")},
            )
            add_card(version, draft)
            reference: Reference = version.commit(record)
    sizes = " and ".join(f"{found.statistics.num_pairs} {split}" for split, found in facts.items())
    logger.info("preferences: %s pairs, written as %s", sizes, reference)
    enforce(report, reference)
    return reference


def _judge(
    config: PreferencesConfig,
    store: "Store",
    cases: Reference,
    labels: Sequence[Label],
    tables: Mapping[str, StoredShards[PreferencePair]],
    facts: Mapping[Split, SplitFacts],
    previous: Reference | None,
) -> GateReport:
    """The gate's verdict on pairs that lie in local files, and on the cases behind them."""
    from mint_lib.gate.judge import judge_data

    gate = config.gate
    if config.control != "none":
        gate = gate.model_copy(update={"allow_contradiction": True})
    if store.record(cases).config.get("split_by") == "image":
        gate = gate.model_copy(update={"max_shared_patients": None})
    material = GateMaterial(
        name=config.name,
        labels=labels,
        cases=lambda split: store.iterate_rows(cases, split, Case),
        pairs=lambda split: iter(tables[split]),
        lengths={split: found.statistics.lengths for split, found in facts.items()},
        refused={split: found.count_refused() for split, found in facts.items()},
        previous=read_report(store, previous) if previous else None,
        reads=config.student.reads,
    )
    return judge_data(gate, material)


def check_template(template: Template, config: PreferencesConfig) -> None:
    """Refuse a template that asks about what the student does not read. Raises InvalidInput."""
    if template.reads != config.student.reads:
        raise InvalidInput(
            f"preferences.template {config.template} asks about {template.reads}, and the student reads "
            f"{config.student.reads}. Choose a template of the student's kind, or another student."
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
    captions, which go to other cases. Raises as `build_pairs` does.
    """
    selected = _select_cases(cases, rankings, labels, config, split, checker.template, facts)
    num_selected = int(selected.sum())
    shuffled: dict[str, Ranking] = {}
    texts: list[str] = []
    if config.control == "shuffled_teacher":
        shuffled = _shuffle([ranking for _, ranking in _keep(cases, rankings, selected)], config, split)
    elif config.pairs == "captions":
        texts = _read_captions([case for case, _ in _keep(cases, rankings, selected)], split)
    policy = describe_policy(config)
    chosen = _keep(cases, rankings, selected)
    for case, ranking in track_progress(chosen, f"preferences: {split}", total=num_selected):
        if config.pairs == "captions":
            made = [checker.make_caption_pair(case, _draw_other(case, texts, config), policy=policy)]
        else:
            used = shuffled.get(case.case_id, ranking)
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


def draw_preferences(case: Case, ranking: Ranking, config: PreferencesConfig) -> list[Preference] | str:
    """The pairs of one case as label ids, or the cause why the policy gives it none."""
    rng = _case_rng(config.seed, case.case_id)
    order = list(ranking.label_ids)
    truth = case.label_id
    if config.control == "ground_truth_only":
        if truth is None:
            return "no_diagnosis"
        others = sorted(set(order) - {truth})
        order = [truth, *(others[place] for place in rng.permutation(len(others)))]
    elif config.ground_truth == "drop" and (truth is None or truth not in order[: config.top_k]):
        return "no_diagnosis" if truth is None else "diagnosis_not_chosen"
    elif config.ground_truth == "first" and truth is not None:
        order = [truth, *(label for label in order if label != truth)]
    chosen, rest = tuple(order[: config.top_k]), order[config.top_k :]
    if config.rejected == "bottom":
        return [Preference(chosen, tuple(rest[-config.bottom_q :]))]
    if config.rejected == "next":
        return [Preference(chosen, tuple(rest[: config.bottom_q]))]
    pool = rest[: config.sample_from_ranks]
    draws: list[tuple[str, ...]] = []
    while len(draws) < config.pairs_per_case:
        places = sorted(rng.choice(len(pool), size=config.bottom_q, replace=False))
        draw = tuple(pool[place] for place in places)
        if draw not in draws:
            draws.append(draw)
    return [Preference(chosen, draw) for draw in draws]


def describe_policy(config: PreferencesConfig) -> str:
    """The policy in one string, as pairs carry it."""
    if config.pairs == "captions":
        return "captions"
    return (
        f"top{config.top_k}-{config.rejected}{config.bottom_q}/ground-truth={config.ground_truth}"
        f"/control={config.control}"
    )


def _case_rng(seed: int, case_id: str) -> np.random.Generator:
    return np.random.default_rng([seed, int.from_bytes(hashlib.sha256(case_id.encode()).digest()[:8])])


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


def _keep(cases: Iterable[Case], rankings: Iterable[Ranking], selected: "np.ndarray") -> Iterator[tuple[Case, Ranking]]:
    """The cases that are selected, each with its ranking."""
    for (case, ranking), is_kept in zip(_match(cases, rankings), selected, strict=True):
        if is_kept and ranking is not None:
            yield case, ranking


def _select_cases(
    cases: Iterable[Case],
    rankings: Iterable[Ranking],
    labels: Sequence[Label],
    config: PreferencesConfig,
    split: Split,
    template: Template,
    facts: SplitFacts,
) -> "np.ndarray":
    """Which cases may give pairs, as booleans in their order, after checking that each is ranked over the label set."""
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
            {"no_ranking": without[:_SHOWN_CASE_IDS], "other_labels": foreign[:_SHOWN_CASE_IDS]},
        )
    kept = np.array(selected, dtype=bool)
    limit = config.max_train_cases if split == "train" else config.max_validation_cases
    num_sure = int(kept.sum())
    if limit is not None and limit < num_sure:
        order = np.random.default_rng([config.seed, _PAIRED_SPLITS.index(split)]).permutation(num_sure)
        facts.dropped["above_max_cases"] = num_sure - limit
        kept[np.flatnonzero(kept)[order[limit:]]] = False
    return kept


def _read_captions(cases: Sequence[Case], split: Split) -> list[str]:
    """The texts of the cases, of which two at least differ."""
    texts = [case.text or "" for case in cases]
    if len(set(texts)) < 2:
        raise RefusedData(f"{split}: the {len(cases)} cases have one text, so no other caption could be rejected.")
    return texts


def _draw_other(case: Case, texts: Sequence[str], config: PreferencesConfig) -> str:
    """A text of another case, drawn among those that differ."""
    rng = _case_rng(config.seed, case.case_id)
    other = case.text
    while other == case.text:
        other = texts[int(rng.integers(len(texts)))]
    return other or ""


def _shuffle(rankings: Sequence[Ranking], config: PreferencesConfig, split: Split) -> dict[str, Ranking]:
    """Rankings permuted in one cycle, so that no case keeps its own."""
    if len(rankings) < 2:
        raise RefusedData(
            f"{split}: shuffled_teacher needs at least 2 cases to exchange rankings, not {len(rankings)}."
        )
    order = np.random.default_rng([config.seed, 2, _PAIRED_SPLITS.index(split)]).permutation(len(rankings))
    return {rankings[taker].case_id: rankings[giver] for taker, giver in zip(order, np.roll(order, 1), strict=True)}


def _refuse_bad_set(facts: SplitFacts, num_cases: int, config: PreferencesConfig, split: Split) -> None:
    """Raise where too many cases were refused or no pair is left."""
    refused, dropped, has_pairs = facts.refused, facts.dropped, facts.statistics.num_pairs > 0
    num_refused = sum(map(len, refused.values()))
    if has_pairs and num_refused <= config.max_refused_share * num_cases:
        return
    counts = {cause: len(case_ids) for cause, case_ids in refused.items()}
    counts |= {cause: count for cause, count in dropped.items() if count}
    shown = {cause: case_ids[:_SHOWN_CASE_IDS] for cause, case_ids in refused.items()}
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


def _flatten_counts(checks: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    """The counts of all splits for the record."""
    counts: dict[str, int] = {}
    for split, found in checks.items():
        counts |= {f"{split}_{key}": found[key] for key in ("num_cases", "num_paired_cases", "num_pairs")}
        counts |= {f"{split}_dropped_{cause}": count for cause, count in found["dropped"].items()}
        counts |= {f"{split}_refused_{cause}": count for cause, count in found["refused"].items()}
    return counts
