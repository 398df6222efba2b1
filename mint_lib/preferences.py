"""Preferences: turns a teacher's rankings into prompts with a chosen and a rejected answer.

Goes in: a version of `cases` and the `rankings` of a teacher for it. Comes out: a version of `preferences` with the
pairs of train and validation, the template file that made their prompts, the label set, `checks.json` and the verdict
of the gate; or, if that refused them, a version of `quarantine` and an error. Of a case, only the text or only the
image reaches a prompt, as the student reads: what the teacher saw beside it, the student learns from the ranking.
Everything is checked as the student's own tokenizer and image processor read it, before anything is written. Test
cases are read by the gate alone, which looks for leaks. How one ranking becomes pairs is `pairing`'s.
"""

import logging
import pathlib
import tempfile
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mint_lib.code_version import code_version
from mint_lib.dataset_card.beside import add_card
from mint_lib.dataset_card.description import describe_draft
from mint_lib.errors import InvalidInput
from mint_lib.gate.material import GateMaterial
from mint_lib.gate.report import GateReport
from mint_lib.gate.verdict import REPORT, add_report, choose_kind, enforce, read_report
from mint_lib.label_set import LABELS, read_labels
from mint_lib.pairing.checks import PairChecker
from mint_lib.pairing.facts import SplitFacts
from mint_lib.pairing.policy import check_label_set, describe_policy
from mint_lib.pairing.settings import PAIRED_SPLITS, PreferencesConfig
from mint_lib.pairing.split import pair_split
from mint_lib.records import Case, Label, PreferencePair, Ranking, Reference, Split, StageRecord
from mint_lib.rows import StoredShards, pair_schema, write_shards
from mint_lib.student import load_reader
from mint_lib.template import Template

if TYPE_CHECKING:
    from mint_lib.store import Store

logger = logging.getLogger(__name__)


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
    labels = read_labels(store, cases)
    template = Template.load(config.template).with_num_answers(config.top_k).with_label_names(labels)
    check_template(template, config)
    check_label_set(labels, config)
    student = config.student
    window_tokens = student.window_tokens if student.over_long == "refuse" else None
    checker = PairChecker(load_reader(student), template, labels, window_tokens)
    facts: dict[Split, SplitFacts] = {split: SplitFacts() for split in PAIRED_SPLITS}
    with tempfile.TemporaryDirectory(prefix="mint-pairs-") as scratch:
        shards: dict[Split, list[pathlib.Path]] = {}
        for split in PAIRED_SPLITS:
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
            version.add_json(LABELS, label_rows)
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
                documents={LABELS: label_rows, REPORT: report.model_dump(mode="json")},
            )
            add_card(version, draft)
            reference: Reference = version.commit(record)
    sizes = " and ".join(f"{found.statistics.num_pairs} {split}" for split, found in facts.items())
    logger.info("preferences: %s pairs, written as %s", sizes, reference)
    enforce(report, reference)
    return reference


def check_template(template: Template, config: PreferencesConfig) -> None:
    """Refuse a template that asks about what the student does not read. Raises InvalidInput."""
    if template.reads != config.student.reads:
        raise InvalidInput(
            f"preferences.template {config.template} asks about {template.reads}, and the student reads "
            f"{config.student.reads}. Choose a template of the student's kind, or another student."
        )


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


def _flatten_counts(checks: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    """The counts of all splits for the record."""
    counts: dict[str, int] = {}
    for split, found in checks.items():
        counts |= {f"{split}_{key}": found[key] for key in ("num_cases", "num_paired_cases", "num_pairs")}
        counts |= {f"{split}_dropped_{cause}": count for cause, count in found["dropped"].items()}
        counts |= {f"{split}_refused_{cause}": count for cause, count in found["refused"].items()}
    return counts
