"""Teacher: ranks the label set for every case, with calibrated probabilities, after it proved itself on validation.

Goes in: a version of `cases` and the name of a plug-in of `mint_lib/teachers`. Comes out: a version of `rankings` with
the rankings of all splits, the label set, `qualification.json`, and the teacher itself under `teacher/`. A teacher
that may be fitted sees the labels of train, and those of validation for stopping, temperature and qualification; a
label of test is removed before anything else happens. Scores say nothing here of how a teacher makes them.
"""

import hashlib
import json
import logging
import pathlib
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from mint_lib.calibration import fit_temperature, negative_log_likelihood, normalise_scores
from mint_lib.code_version import code_version
from mint_lib.errors import GateFailed, InvalidInput
from mint_lib.label_set import LABELS, read_labels
from mint_lib.plugins import load_plugin, parse_plugin_config
from mint_lib.records import SPLITS, Case, Label, Name, Ranking, Reference, Split, StageRecord
from mint_lib.rows import ranking_schema
from mint_lib.statistics import GroupBootstrap, Measurement, measure_calibration_error, measure_mean

if TYPE_CHECKING:
    from mint_lib.store import Store

logger = logging.getLogger(__name__)
Metric = Literal["top_1", "top_3", "top_10", "mrr"]
_NUM_RESAMPLES = 1000
"""Bootstrap resamples of an interval (Efron and Tibshirani 1993: 1,000 for percentile intervals)."""
_NUM_BINS = 15
"""Bins of the calibration error (Guo et al. 2017, section 5)."""


class Floor(BaseModel):
    """The least a teacher must reach on validation."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    metric: Metric = "top_1"
    """Share of cases with the diagnosis among the first 1, 3 or 10 labels, or the mean reciprocal rank."""
    value: float = Field(default=0.0, ge=0.0, le=1.0)
    """Least value of the metric. 0: the teacher is only measured, as a baseline is."""


class TeacherConfig(BaseModel):
    """Which teacher ranks, and how good it must be."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: Name
    """Name of the version in the store."""
    seed: int = Field(ge=0, lt=2**32)
    """Seed of fitting and of the bootstrap."""
    model: str
    """File of `mint_lib/teachers`."""
    config: dict[str, Any] = {}
    """The plug-in's own config."""
    floor: Floor = Floor()
    """Threshold of the qualification; nothing is written below it."""


class Teacher(ABC):
    """Base of the plug-ins in `mint_lib/teachers`: a nested `Config`, and what follows."""

    Config: ClassVar[type[BaseModel]]

    def __init__(self, config: Any, labels: Sequence[Label], *, seed: int):
        self.config = config
        self.labels = tuple(labels)
        self.seed = seed

    @abstractmethod
    def fit(self, train: Sequence[Case], validation: Sequence[Case]) -> dict[str, Any]:
        """Learn from labelled cases; return what `qualification.json` should tell of it, for instance a history.

        Every case of both has a `label_id` of the label set. `validation` is for stopping only.
        """

    @abstractmethod
    def score(self, cases: Sequence[Case]) -> np.ndarray:
        """Log-scores `[case, label]`, finite, higher is more probable. The cases carry no `label_id`."""

    def facts(self) -> dict[str, Any]:
        """What `qualification.json` should tell of the scoring, for instance its cost; asked for after it."""
        return {}

    def trace(self) -> bytes:
        """What is kept of the scoring as `trace.jsonl`, a line of JSON for each step; none: no such file."""
        return b""

    @abstractmethod
    def save(self, folder: pathlib.Path) -> None:
        """Write everything `load` needs into `folder`: JSON and safetensors, the same bytes for the same teacher."""

    @classmethod
    @abstractmethod
    def load(cls, folder: pathlib.Path, labels: Sequence[Label]) -> Self:
        """The teacher that `save` wrote."""


def rank_cases(
    config: TeacherConfig, *, store: "Store", cases: Reference, previous: Reference | None = None
) -> Reference:
    """A version of `rankings` for `cases`. The rankings come from the saved teacher, read back.

    With `previous`, rankings of an earlier version of these cases, that version's teacher ranks what was added since,
    and the rankings of all other cases are taken over as they are. It must pass its floor on today's validation cases.

    Raises:
        InvalidInput: validation has no labelled case, a label is not of the label set, or `previous` is of another
            teacher, or of cases that were not only added to.
        GateFailed: the teacher is below its floor; nothing is written.
    """
    plugin = load_plugin("teachers", config.model, base=Teacher)
    plugin_config = parse_plugin_config(plugin, config.config, where="teacher.config")
    labels = read_labels(store, cases)
    rows: dict[Split, list[Case]] = {split: store.read_rows(cases, split, Case) for split in SPLITS}
    rows["test"] = _hide_labels(rows["test"])
    train, validation = (_labelled(rows[split], labels, split) for split in ("train", "validation"))
    if not validation:
        raise InvalidInput(
            f"None of the {len(rows['validation'])} validation cases has a label, so the teacher cannot be qualified. "
            "Let the data stage keep labels in validation."
        )
    known: dict[Split, list[Ranking]] = {split: [] for split in SPLITS}
    if previous is not None:
        check_previous(config, store=store, cases=cases, previous=previous)
        known = {split: store.read_rows(previous, split, Ranking) for split in SPLITS}
    with tempfile.TemporaryDirectory() as folder_name:
        folder = pathlib.Path(folder_name)
        fitting: dict[str, Any] = {}
        if previous is None:
            logger.info("teacher: %s on %d labelled training cases", config.model, len(train))
            fitted = plugin(plugin_config, labels, seed=config.seed)
            fitting = fitted.fit(train, validation)
            fitted.save(folder)
            teacher, temperature = plugin.load(folder, labels), None
        else:
            folder = store.download(previous, folder, prefix="teacher")
            temperature = float(json.loads((folder / "calibration.json").read_text())["temperature"])
            teacher = plugin.load(folder, labels)
        new = {split: rows[split][len(known[split]) :] for split in SPLITS}
        scores = {"validation": _score(teacher, new["validation"])}
        everything = np.concatenate([_recover_scores(known["validation"], labels, temperature), scores["validation"]])
        is_labelled = [case.label_id is not None for case in rows["validation"]]
        qualification = qualify(everything[is_labelled], validation, labels, seed=config.seed)
        check_floor(qualification, config)
        # Ranking costs much with some teachers, so only one that passed its floor goes on.
        scores |= {split: _score(teacher, new[split]) for split in ("train", "test")}
        num_taken_over = sum(map(len, known.values()))
        logger.info("teacher: ranked %d cases, took over %d", sum(map(len, new.values())), num_taken_over)
        if temperature is None:
            temperature = qualification["temperature"]
            (folder / "calibration.json").write_text(json.dumps({"temperature": temperature}))
        digest = digest_folder(folder)
        rankings = {split: rank_scores(new[split], scores[split], labels, temperature, digest) for split in SPLITS}
        facts = {"model": config.model, "teacher_digest": digest, "fitting": fitting, **qualification}
        facts |= {"used_temperature": temperature, "num_taken_over": num_taken_over}
        if scoring := teacher.facts():
            facts["scoring"] = scoring
        base = previous if previous is not None and previous.name == config.name else None
        with store.write("rankings", config.name, base=base) as version:
            for split in SPLITS:
                taken_over = [] if base else known[split]
                if base:
                    version.carry_table(split)
                if rankings[split] or not base:
                    version.add_rows(split, taken_over + rankings[split], ranking_schema())
            version.add_json(LABELS, [label.model_dump(mode="json") for label in labels])
            version.add_json("qualification.json", facts)
            version.add_folder("teacher", folder)
            if trace := teacher.trace():
                version.add_bytes("trace.jsonl", trace)
            return version.commit(
                StageRecord(
                    stage="teacher",
                    config=config.model_dump(mode="json"),
                    inputs={"cases": str(cases)} | ({"previous": str(previous)} if previous else {}),
                    code_version=code_version(),
                    counts={split: len(rows[split]) for split in SPLITS}
                    | {"labelled_train": len(train), "taken_over": num_taken_over},
                    metrics={f"validation_{name}": found["value"] for name, found in qualification["metrics"].items()},
                )
            )


def check_previous(config: TeacherConfig, *, store: "Store", cases: Reference, previous: Reference) -> None:
    """Refuse rankings that cannot be taken over. Raises InvalidInput."""
    record = store.record(previous)
    mine = config.model_dump(mode="json", exclude={"name", "floor"})
    changed = sorted(key for key, value in mine.items() if record.config.get(key) != value)
    if record.stage != "teacher" or changed:
        raise InvalidInput(
            f"{previous} was not made by this teacher: {', '.join(changed) or record.stage} differ. Leave `previous` "
            "out, and the teacher is made anew and ranks every case."
        )
    before = Reference.parse(record.inputs["cases"])
    for split in SPLITS:
        old, new = ([store.files(item)[path] for path in store.shards(item, split)] for item in (before, cases))
        if len(old) > len(new) or not all(one.holds_same(other) for one, other in zip(old, new, strict=False)):
            raise InvalidInput(
                f"{cases} is not {before} with cases added: its {split} split does not begin with the same shards. "
                "Leave `previous` out, and the teacher is made anew and ranks every case."
            )


def _recover_scores(rankings: Sequence[Ranking], labels: Sequence[Label], temperature: float | None) -> np.ndarray:
    """Scores `[case, label]` that give these rankings at `temperature`, up to a constant of each case."""
    columns = {label.id: column for column, label in enumerate(labels)}
    scores = np.zeros((len(rankings), len(labels)))
    for row, ranking in zip(scores, rankings, strict=True):
        row[[columns[label_id] for label_id in ranking.label_ids]] = ranking.probabilities
    return np.log(np.maximum(scores, np.finfo(float).tiny)) * (temperature or 1.0)


def qualify(scores: np.ndarray, cases: Sequence[Case], labels: Sequence[Label], *, seed: int) -> dict[str, Any]:
    """Ranking metrics with 95 % intervals, chance, and calibration on labelled cases.

    The interval is a percentile bootstrap over patient groups. The temperature has one parameter and is fitted on the
    same cases that it is reported on.
    """
    columns = {label.id: column for column, label in enumerate(labels)}
    truth = np.array([columns[case.label_id] for case in cases if case.label_id is not None])
    order = np.argsort(-scores, axis=1, kind="stable")
    ranks = (order == truth[:, None]).argmax(axis=1) + 1.0
    temperature = fit_temperature(scores, truth)
    measured = {f"top_{k}": measure_mean((ranks <= k).astype(float)) for k in (1, 3, 10)}
    measured |= {
        "mrr": measure_mean(1 / ranks),
        "ece_before": _measure_calibration(normalise_scores(scores), truth),
        "ece_after": _measure_calibration(normalise_scores(scores, temperature=temperature), truth),
    }
    groups = [case.group_id for case in cases]
    bootstrap = GroupBootstrap(groups, draws=_NUM_RESAMPLES, seed=seed, confidence=0.95)
    expected = 1 / np.arange(1, len(labels) + 1)
    return {
        "num_cases": len(cases),
        "num_groups": bootstrap.num_groups,
        "num_labels": len(labels),
        "metrics": {name: bootstrap.estimate([value]).model_dump() for name, value in measured.items()},
        "chance": {"mrr": float(expected.mean())} | {f"top_{k}": min(1.0, k / len(labels)) for k in (1, 3, 10)},
        "temperature": temperature,
        "nll_before": negative_log_likelihood(scores, truth),
        "nll_after": negative_log_likelihood(scores, truth, temperature=temperature),
    }


def check_floor(qualification: dict[str, Any], config: TeacherConfig) -> None:
    """Raise GateFailed where the teacher is below its floor, or its metric is not a number."""
    metric, floor = config.floor.metric, config.floor.value
    found = qualification["metrics"][metric]
    if not found["value"] >= floor:
        interval = "" if found["low"] is None else f" (95 % interval {found['low']:.3f} to {found['high']:.3f})"
        raise GateFailed(
            f"The teacher {config.model} reaches {metric} {found['value']:.3f}{interval} on {found['n']} validation "
            f"cases; its floor is {floor:g} and chance is {qualification['chance'][metric]:.3f}. Nothing was written. "
            "Give it more labelled cases or epochs, choose another teacher, or lower teacher.floor.value if a weak "
            "teacher is meant."
        )


def rank_scores(
    cases: Sequence[Case], scores: np.ndarray, labels: Sequence[Label], temperature: float, digest: str
) -> list[Ranking]:
    """A ranking per case; equal scores keep the order of the label set."""
    probabilities = normalise_scores(scores, temperature=temperature)
    order = np.argsort(-scores, axis=1, kind="stable")
    return [
        Ranking(
            case_id=case.case_id,
            label_ids=tuple(labels[column].id for column in columns),
            probabilities=tuple(float(row[column]) for column in columns),
            teacher_digest=digest,
        )
        for case, row, columns in zip(cases, probabilities, order, strict=True)
    ]


def digest_folder(folder: pathlib.Path) -> str:
    """`sha256:...` over the names and bytes of all files in `folder`."""
    hasher = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        hasher.update(path.relative_to(folder).as_posix().encode() + b"\0")
        hasher.update(hashlib.sha256(path.read_bytes()).digest())
    return f"sha256:{hasher.hexdigest()}"


def _score(teacher: Teacher, cases: Sequence[Case]) -> np.ndarray:
    """Scores of `cases` without their labels, checked for shape and finiteness."""
    if not cases:
        return np.zeros((0, len(teacher.labels)))
    scores = np.asarray(teacher.score(_hide_labels(cases)), dtype=np.float64)
    assert scores.shape == (len(cases), len(teacher.labels)), scores.shape
    bad = [case.case_id for case, row in zip(cases, scores, strict=True) if not np.isfinite(row).all()]
    if bad:
        raise InvalidInput(
            f"The teacher gave scores that are not finite for {len(bad)} cases: {', '.join(bad[:20])}. Its training "
            "diverged: lower its learning rate."
        )
    return scores


def _hide_labels(cases: Sequence[Case]) -> list[Case]:
    return [case.model_copy(update={"label_id": None}) for case in cases]


def _labelled(cases: Sequence[Case], labels: Sequence[Label], split: Split) -> list[Case]:
    """The cases with a label, after checking that it is of the label set."""
    known = {label.id for label in labels}
    found = [case for case in cases if case.label_id is not None]
    foreign = [case.case_id for case in found if case.label_id not in known]
    if foreign:
        raise InvalidInput(
            f"{split}: {len(foreign)} cases have a label outside the label set of {len(labels)}: "
            f"{', '.join(foreign[:20])}. Make the cases again with the data stage."
        )
    return found


def _measure_calibration(probabilities: np.ndarray, truth: np.ndarray) -> Measurement:
    """Expected calibration error of the first label's probability."""
    return measure_calibration_error(
        probabilities.max(axis=1), (probabilities.argmax(axis=1) == truth).astype(np.float64), num_bins=_NUM_BINS
    )
