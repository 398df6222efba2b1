"""Stage data: rows of a source become cases, split by patient, that the other stages can trust.

Goes in: a `DataConfig`, which names a plug-in of `mint_lib/data_sources`. Comes out: a version of kind `cases` with
the tables `train`, `validation`, `test` (rows of `Case`) and `labels.json`. Every row is validated and
refusals are counted by cause; patients and identical contents never stand in two splits, unless the recipe asks for a
split by image, which the record calls a leak. Knows no source by name.
"""

import abc
import collections
import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, TypeAdapter

from mint_lib.additions import KnownCases, limit_labels, place_additions
from mint_lib.case_rows import ImageLimits, LeftOut, Row, validate_row
from mint_lib.dataset_card.beside import add_card
from mint_lib.dataset_card.description import describe_draft
from mint_lib.dataset_card.facts import DatasetFacts
from mint_lib.deidentification.config import DeidentificationConfig
from mint_lib.errors import InvalidInput, RefusedData
from mint_lib.gate.material import GateMaterial
from mint_lib.gate.report import GateReport
from mint_lib.gate.settings import GateConfig
from mint_lib.gate.verdict import REPORT, add_report, choose_kind, enforce, read_report
from mint_lib.plugins import load_plugin, parse_plugin_config
from mint_lib.records import SPLITS, Case, Label, Name, Reference, Split, StageRecord, code_version
from mint_lib.rows import case_schema
from mint_lib.splits import (
    Content,
    SplitBy,
    SplitWeights,
    check_assigned,
    describe_case_ids,
    describe_leak,
    prove_disjoint,
    split_cases,
    withhold_labels,
)

if TYPE_CHECKING:
    import numpy as np

    from mint_lib.store import Store

logger = logging.getLogger(__name__)
_SHOWN_IDS = 5


class SourceConfig(BaseModel):
    """A data source and its config."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    source: str
    """Name of a file in `mint_lib/data_sources`."""
    config: dict[str, Any] = {}
    """That source's own config."""


class DataConfig(SourceConfig):
    """What the stage `data` reads and how it splits."""

    name: Name
    """Name of the version written."""
    batch: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")] | None = None
    """Name of this delivery, which its cases keep as the attribute `batch`: reports of the gate name it. None: a case
    that has no such attribute belongs to the batch of its source."""
    seed: int = Field(ge=0, lt=2**32)
    """Seed of simulation, wording and split."""
    test_source: SourceConfig | None = None
    """A second source whose cases, all of them, are the test split. Its labels are those of `source`."""
    split: SplitWeights = SplitWeights()
    """Proportions of the splits, for patients whom the source does not assign itself."""
    split_by: SplitBy = "patient"
    """What stands in one split only. `image` deals images of one patient to several splits: a leak, named as one."""
    labelled_per_label: int | None = Field(default=None, ge=0)
    """Few-label mode: training patients per label who keep their label. None: all of them."""
    max_refused_share: float = Field(default=0.0, ge=0, le=1)
    """Share of a source's rows that may be refused before the stage fails."""
    max_image_pixels: int = Field(default=16_777_216, ge=1)
    """Pixels of an image above which its row is refused before decoding (decompression bombs)."""
    max_image_bytes: int = Field(default=20_971_520, ge=1)
    """Encoded size of an image above which its row is refused."""
    deidentify: DeidentificationConfig | None = None
    """Replace what identifies somebody in texts, attributes and ids by surrogates; cases of which this cannot be told
    go to a version of `quarantine`. None: texts are taken as they are, and the record says so."""
    card: DatasetFacts = DatasetFacts()
    """What the owners of the data state of them, for the card."""
    gate: GateConfig = GateConfig()
    """What the cases must satisfy as a whole; the preferences stage judges them again, with its pairs."""


class DataSource(abc.ABC):
    """Base of the plug-ins in `mint_lib/data_sources`."""

    Config: ClassVar[type[BaseModel]]
    describes_images: ClassVar[bool] = False
    """The rows' text describes their image, for the teacher: two images may well have the same one."""

    def __init__(self, config: Any, *, wanted: tuple[Label, ...] | None = None):
        """Keep the config.

        Args:
            config: an instance of the plug-in's `Config`.
            wanted: the label set of another source, where this one only gives test cases for it.
        """
        self.config = config
        self.wanted = wanted
        self.counts: collections.Counter[str] = collections.Counter()
        """Facts about the rows read, filled while reading."""

    @abc.abstractmethod
    def labels(self) -> list[Label]:
        """The closed label set."""

    @abc.abstractmethod
    def read(self, rng: "np.random.Generator") -> Iterator[Row | LeftOut]:
        """Every row once, in an order that depends on nothing but the input and `rng`."""

    @abc.abstractmethod
    def digest(self) -> str:
        """`sha256:...` of everything outside the config that the rows depend on, such as the files read."""

    @property
    def knows_patients(self) -> bool:
        """Whether rows say which patient they are from. Without that, only splits that the source assigns will do."""
        return True

    def notes(self) -> tuple[str, ...]:
        """Facts that a reader of the report must know."""
        return ()


def open_source(config: SourceConfig, *, wanted: tuple[Label, ...] | None = None, where: str = "data") -> DataSource:
    """The source that a recipe names. Raises RecipeError as the plug-in loader does."""
    plugin = load_plugin("data_sources", config.source, base=DataSource)
    return plugin(parse_plugin_config(plugin, config.config, where=f"{where}.config"), wanted=wanted)


def digest_sources(config: DataConfig) -> str:
    """`sha256:...` of what the stage reads from outside the store, so that a changed file is never taken for cached."""
    digests = [open_source(config).digest()]
    if config.test_source is not None:
        digests.append(open_source(config.test_source, where="data.test_source").digest())
    return "sha256:" + hashlib.sha256("\n".join(digests).encode()).hexdigest()


def prepare_cases(config: DataConfig, *, store: "Store", base: Reference | None = None) -> Reference:
    """Read, validate, split and write the cases of a recipe.

    With `base`, an earlier version of the same name, the cases of the source are added to it: its shards are taken over
    as they are, its label set stays, and who is in one of its splits stays there.

    Raises:
        RefusedData: a source is empty, too many of its rows are bad, splits share a patient or a content, or nothing
            is new.
        InvalidInput: the base is not one of cases of this name, or was split in another way.
        RecipeError: a source does not exist or its config is not valid.
    """
    import numpy as np

    wanted = None if base is None else tuple(read_labels(store, base))
    source = open_source(config, wanted=wanted)
    labels = source.labels() if wanted is None else list(wanted)
    check_labels(labels, config.source)
    counts: collections.Counter[str] = collections.Counter()
    rows = collect_rows(source, config, labels, np.random.default_rng([config.seed, 1]), counts)
    if config.split_by == "patient" and not source.knows_patients:
        check_assigned(rows, config.source)
    test_source: DataSource | None = None
    test_cases: list[Case] = []
    if config.test_source is not None:
        test_source = open_source(config.test_source, wanted=tuple(labels), where="data.test_source")
        test_rows = collect_rows(test_source, config, labels, np.random.default_rng([config.seed, 2]), counts)
        test_cases = [case for case, _ in test_rows]
    sources = [item for item in (source, test_source) if item is not None]
    contents: tuple[Content, ...] = ("image",) if any(item.describes_images for item in sources) else ("text", "image")
    inputs = {f"source/{index}": item.digest() for index, item in enumerate(sources)}
    notes = [note for item in sources for note in item.notes()]
    metrics: dict[str, float] = {}
    if config.deidentify is not None:
        from mint_lib.deidentification.cleaning import Cleaning
        from mint_lib.deidentification.vocabulary import digest_vocabulary

        inputs["deidentification/words"] = digest_vocabulary()
        cleaning = Cleaning(config.deidentify, labels)
        metrics = cleaning.metrics
        rows = [(case, split) for row, split in rows if (case := cleaning.clean(row)) is not None]
        test_cases = [case for row in test_cases if (case := cleaning.clean(row)) is not None]
        counts.update(cleaning.counts)
        cleaning.set_aside(store, config.name, config=config.model_dump(mode="json"), inputs=inputs)
        notes.append(cleaning.describe())
    elif any(case.text and not case.synthetic for case in (*(case for case, _ in rows), *test_cases)):
        notes.append("Texts of observed cases were not de-identified by this platform (data.deidentify).")
    rng = np.random.default_rng([config.seed, 3])
    if base is None:
        splits = split_cases(
            rows,
            config.split,
            by=config.split_by,
            contents=contents,
            has_own_test=config.test_source is not None,
            rng=rng,
            counts=counts,
        )
        splits["test"] += test_cases
        prove_disjoint(splits, by=config.split_by, contents=contents)
        for split in SPLITS:
            if not splits[split]:
                raise RefusedData(
                    f"The {split} split is empty: {len(rows)} cases were read. Read more patients per label, or give "
                    f"data.split.{split} a larger weight."
                )
        splits["train"] = withhold_labels(splits["train"], config.labelled_per_label, rng=rng)
    else:
        splits = _add_to_base(rows, config, store=store, base=base, contents=contents, rng=rng, counts=counts)
    counts.update(_count_splits(splits))
    notes += _describe_origin(splits)
    if config.split_by == "image":
        notes.insert(0, describe_leak(splits, knows_patients=source.knows_patients))
    if base is not None:
        before = store.record(base)
        counts = _add_counts(counts, before.counts)
        notes = list(dict.fromkeys([*before.notes, *notes]))
        inputs["base"] = str(base)

    def read(split: Split) -> Iterator[Case]:
        """Every case of a split, those of the base first."""
        if base is not None:
            yield from store.iterate_rows(base, split, Case)
        yield from splits[split]

    previous = read_report(store, base) if base is not None else None
    report = _judge(config, read, labels, previous, describes_images=contents == ("image",))
    kind = choose_kind(report, "cases")
    with store.write(kind, config.name, base=base if kind == "cases" else None) as version:
        for split in SPLITS:
            if base is not None and kind == "cases":
                version.carry_table(split)
            if splits[split] or base is None:
                version.add_rows(split, splits[split], case_schema())
        version.add_json("labels.json", [label.model_dump(mode="json") for label in labels])
        add_report(version, report)
        record = StageRecord(
            stage="data",
            config=config.model_dump(mode="json"),
            inputs=inputs,
            code_version=code_version(),
            counts=dict(sorted(counts.items())),
            metrics=metrics,
            notes=tuple(notes),
        )
        draft = describe_draft(
            store,
            kind="cases",
            name=config.name,
            record=record,
            files=version.files,
            tables={split: read(split) for split in SPLITS},
            documents={
                "labels.json": [label.model_dump(mode="json") for label in labels],
                REPORT: report.model_dump(mode="json"),
            },
        )
        add_card(version, draft)
        reference: Reference = version.commit(record)
    sizes = ", ".join(f"{len(splits[split])} {split}" for split in SPLITS)
    verb = "written" if base is None else f"added to {base.version}"
    logger.info("data: %s cases of %d labels, %s as %s", sizes, len(labels), verb, reference)
    enforce(report, reference)
    return reference


def _judge(
    config: DataConfig,
    read: Callable[[Split], Iterator[Case]],
    labels: list[Label],
    previous: GateReport | None,
    *,
    describes_images: bool,
) -> GateReport:
    """The gate's verdict on all cases."""
    from mint_lib.gate.judge import judge_data

    gate = config.gate
    if config.split_by == "image":
        gate = gate.model_copy(update={"max_shared_patients": None})
    reads: Literal["text", "image"] = "image" if describes_images else "text"
    return judge_data(gate, GateMaterial(name=config.name, labels=labels, cases=read, reads=reads, previous=previous))


def read_labels(store: "Store", cases: Reference) -> list[Label]:
    """The label set of a version."""
    return TypeAdapter(list[Label]).validate_python(store.read_json(cases, "labels.json"))


def _add_to_base(
    rows: list[tuple[Case, Split | None]],
    config: DataConfig,
    *,
    store: "Store",
    base: Reference,
    contents: tuple[Content, ...],
    rng: "np.random.Generator",
    counts: collections.Counter[str],
) -> dict[Split, list[Case]]:
    """The new cases among `rows` by split. Raises RefusedData where too many do not fit the base, or none is new."""
    before = store.record(base).config
    if before.get("split_by", config.split_by) != config.split_by:
        raise InvalidInput(
            f"{base} was split by {before['split_by']} and data.split_by is {config.split_by}. Add cases as "
            "the version was split."
        )
    known = KnownCases(by=config.split_by, contents=contents)
    for split in SPLITS:
        for case in store.iterate_rows(base, split, Case):
            known.add(case, split)
    already_labelled = known.count_labelled()
    patients = {split: known.list_patients(split) for split in SPLITS}
    splits, refused = place_additions(
        known, rows, config.split, by=config.split_by, contents=contents, rng=rng, counts=counts
    )
    num_refused = sum(map(len, refused.values()))
    by_cause = {cause: len(ids) for cause, ids in sorted(refused.items())}
    if num_refused > config.max_refused_share * len(rows):
        raise RefusedData(
            f"{num_refused} of {len(rows)} cases do not fit {base}: {describe_case_ids(refused)}. "
            f"data.max_refused_share = {config.max_refused_share:g} allows "
            f"{int(config.max_refused_share * len(rows))}. Give new cases ids of their own and leave patients in one "
            "split, or allow a larger share.",
            by_cause,
            refused,
        )
    counts.update({f"refused/{cause}": number for cause, number in by_cause.items()})
    if not any(splits.values()):
        raise RefusedData(
            f"None of the {len(rows)} cases is new: {base} holds them already, or they were refused. Nothing was "
            "written.",
            by_cause | {"already there": counts["already there"]},
        )
    prove_disjoint(splits, by=config.split_by, contents=contents)
    splits["train"] = limit_labels(splits["train"], config.labelled_per_label, known=already_labelled)
    for split in SPLITS:  # whoever is in the base is counted there
        counts[f"{split}/patients"] -= len({case.group_id for case in splits[split]} & patients[split])
    return splits


def _add_counts(added: Mapping[str, int], before: Mapping[str, int]) -> collections.Counter[str]:
    """Counts of the whole version, and what this addition brought as `added/...`."""
    total = collections.Counter({key: count for key, count in before.items() if not key.startswith("added/")})
    total.update({key: count for key, count in added.items() if key.partition("/")[0] in SPLITS})
    total.update({f"added/{key}": count for key, count in added.items()})
    return total


def check_labels(labels: list[Label], source_name: str) -> None:
    """Raise RefusedData unless there are two labels or more, with distinct ids and names."""
    if len(labels) < 2:
        raise RefusedData(f"Source {source_name!r} offers {len(labels)} labels; at least 2 are needed to rank them.")
    for what, values in (("id", [item.id for item in labels]), ("name", [item.name.casefold() for item in labels])):
        twice = sorted(value for value, count in collections.Counter(values).items() if count > 1)
        if twice:
            raise RefusedData(
                f"Two labels of source {source_name!r} have the same {what}: {', '.join(twice[:_SHOWN_IDS])}. "
                "Answers could not be told apart; choose other labels."
            )


def collect_rows(
    source: DataSource,
    config: DataConfig,
    labels: list[Label],
    rng: "np.random.Generator",
    counts: collections.Counter[str],
) -> list[tuple[Case, Split | None]]:
    """The valid rows of a source with the split that it assigns; what is left out is added to `counts` by cause.

    Raises:
        RefusedData: the source is empty, or more than `max_refused_share` of its rows are bad.
    """
    name = type(source).__module__.rpartition(".")[2]
    label_ids = {label.id for label in labels}
    limits = ImageLimits(config.max_image_pixels, config.max_image_bytes)
    seen: set[str] = set()
    accepted: list[tuple[Case, Split | None]] = []
    refused: dict[str, list[str]] = collections.defaultdict(list)
    for row in source.read(rng):
        if isinstance(row, LeftOut):
            if row.refused:
                refused[row.cause].append(row.case_id)
            else:
                counts[f"{name}/not wanted/{row.cause}"] += 1
            continue
        outcome = validate_row(row, limits, label_ids=label_ids, seen=seen, batch=config.batch)
        if isinstance(outcome, Case):
            accepted.append((outcome, row.split))
        else:
            refused[outcome].append(row.case_id)
        seen.add(row.case_id)
    by_cause = {cause: len(ids) for cause, ids in sorted(refused.items())}
    counts.update({f"{name}/refused/{cause}": number for cause, number in by_cause.items()})
    counts.update({f"{name}/{key}": number for key, number in source.counts.items()})
    num_refused = sum(by_cause.values())
    total = len(accepted) + num_refused
    logger.info("data: source %s gave %d rows, %d refused", name, total, num_refused)
    if num_refused and num_refused > config.max_refused_share * total:
        raise RefusedData(
            f"{num_refused} of {total} rows of source {name!r} are bad: {describe_case_ids(refused)}. "
            f"data.max_refused_share = {config.max_refused_share:g} allows {int(config.max_refused_share * total)}. "
            "Mend or remove these rows, or allow a larger share.",
            by_cause,
            dict(refused),
        )
    if not accepted:
        not_wanted = {key: number for key, number in counts.items() if key.startswith(f"{name}/not wanted/")}
        raise RefusedData(
            f"Source {name!r} gave no case"
            + (f"; not wanted: {sum(not_wanted.values())} rows" if not_wanted else "")
            + ". Check its path, filters and labels in the recipe's data section.",
            not_wanted | by_cause,
        )
    return accepted


def _count_splits(splits: Mapping[Split, list[Case]]) -> dict[str, int]:
    counts: collections.Counter[str] = collections.Counter()
    for split, cases in splits.items():
        counts[f"{split}/cases"] = len(cases)
        counts[f"{split}/patients"] = len({case.group_id for case in cases})
        counts[f"{split}/without label"] = sum(case.label_id is None for case in cases)
        counts[f"{split}/with image"] = sum(case.image is not None for case in cases)
        counts[f"{split}/synthetic"] = sum(case.synthetic for case in cases)
        counts.update(f"{split}/label/{case.label_id}" for case in cases if case.label_id is not None)
    return dict(counts)


def _describe_origin(splits: Mapping[Split, list[Case]]) -> list[str]:
    notes = []
    for split, cases in splits.items():
        num_synthetic = sum(case.synthetic for case in cases)
        if num_synthetic:
            notes.append(f"{split}: {num_synthetic} of {len(cases)} cases are synthetic (generated, not observed)")
    return notes
