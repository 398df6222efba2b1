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
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from mint_lib.additions import add_cases, add_counts
from mint_lib.case_intake import CaseIntake, check_labels
from mint_lib.case_keys import CaseKey, Content
from mint_lib.case_rows import ImageLimits, LeftOut, Row
from mint_lib.case_spool import CaseSpool
from mint_lib.case_version import SplitTables, judge_cases, write_version
from mint_lib.code_version import code_version
from mint_lib.dataset_card.facts import DatasetFacts
from mint_lib.deidentification.config import DeidentificationConfig
from mint_lib.errors import InvalidInput
from mint_lib.gate.settings import GateConfig
from mint_lib.gate.verdict import enforce
from mint_lib.label_set import read_labels
from mint_lib.plugins import load_plugin, parse_plugin_config
from mint_lib.records import SPLITS, Case, Label, Name, Reference, Split, StageRecord
from mint_lib.splits import (
    SplitBy,
    SplitWeights,
    check_assigned,
    count_cases,
    describe_leak,
    describe_origin,
    make_splits,
)

if TYPE_CHECKING:
    import numpy as np

    from mint_lib.store import Store

logger = logging.getLogger(__name__)


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
        StoreError: the temporary folder has no room for the cases.
    """
    wanted = None if base is None else tuple(read_labels(store, base))
    source = open_source(config, wanted=wanted)
    labels = source.labels() if wanted is None else list(wanted)
    check_labels(labels, config.source)
    sources = [source]
    if config.test_source is not None:
        sources.append(open_source(config.test_source, wanted=tuple(labels), where="data.test_source"))
    with CaseSpool() as spool:
        return _prepare(config, sources, labels, spool, store=store, base=base)


def _prepare(
    config: DataConfig,
    sources: list[DataSource],
    labels: list[Label],
    spool: CaseSpool,
    *,
    store: "Store",
    base: Reference | None,
) -> Reference:
    """`prepare_cases` with its sources opened: the main one, then that of the test split if there is one."""
    import numpy as np

    intake = _open_intake(config, sources, labels, spool)
    cases, test_cases = _read_sources(config, sources, intake)
    counts, cleaning = intake.counts, intake.cleaning
    inputs = {f"source/{index}": item.digest() for index, item in enumerate(sources)}
    notes = [note for item in sources for note in item.notes()]
    if cleaning is not None:
        inputs |= cleaning.inputs
        counts.update(cleaning.counts)
        cleaning.set_aside(store, config.name, config=config.model_dump(mode="json"), inputs=inputs)
        notes.append(cleaning.describe())
    elif intake.has_observed_text:
        notes.append("Texts of observed cases were not de-identified by this platform (data.deidentify).")
    rng = np.random.default_rng([config.seed, 3])
    if base is None:
        splits = make_splits(
            cases,
            None if config.test_source is None else test_cases,
            config.split,
            by=config.split_by,
            labelled_per_label=config.labelled_per_label,
            rng=rng,
            counts=counts,
        )
    else:
        splits = _add(config, cases, counts, rng, contents=intake.contents, store=store, base=base)
    counts.update(count_cases(splits))
    notes += describe_origin(splits)
    if config.split_by == "image":
        notes.insert(0, describe_leak(splits, knows_patients=sources[0].knows_patients))
    if base is not None:
        before = store.record(base)
        counts = add_counts(counts, before.counts)
        notes = list(dict.fromkeys([*before.notes, *notes]))
        inputs["base"] = str(base)
    tables = SplitTables(splits, spool, store=store, base=base)
    reads: Literal["text", "image"] = "image" if intake.contents == ("image",) else "text"
    report = judge_cases(config.gate, config.name, tables=tables, labels=labels, by=config.split_by, reads=reads)
    record = StageRecord(
        stage="data",
        config=config.model_dump(mode="json"),
        inputs=inputs,
        code_version=code_version(),
        counts=dict(sorted(counts.items())),
        metrics={} if cleaning is None else cleaning.metrics,
        notes=tuple(notes),
    )
    reference = write_version(store, config.name, tables=tables, labels=labels, report=report, record=record)
    sizes = ", ".join(f"{len(splits[split])} {split}" for split in SPLITS)
    verb = "written" if base is None else f"added to {base.version}"
    logger.info("data: %s cases of %d labels, %s as %s", sizes, len(labels), verb, reference)
    enforce(report, reference)
    return reference


def _open_intake(config: DataConfig, sources: list[DataSource], labels: list[Label], spool: CaseSpool) -> CaseIntake:
    cleaning = None
    if config.deidentify is not None:
        from mint_lib.deidentification.cleaning import Cleaning

        cleaning = Cleaning(config.deidentify, labels, spool)
    return CaseIntake(
        spool,
        labels,
        ImageLimits(config.max_image_pixels, config.max_image_bytes),
        ("image",) if any(item.describes_images for item in sources) else ("text", "image"),
        batch=config.batch,
        max_refused_share=config.max_refused_share,
        cleaning=cleaning,
    )


def _read_sources(
    config: DataConfig, sources: list[DataSource], intake: CaseIntake
) -> tuple[list[CaseKey], list[CaseKey]]:
    """Keys of the main source's cases and of the test source's; what they counted is added to the counts."""
    import numpy as np

    found: tuple[list[CaseKey], list[CaseKey]] = ([], [])
    for index, source in enumerate(sources):
        name = type(source).__module__.rpartition(".")[2]
        found[index].extend(intake.read(source.read(np.random.default_rng([config.seed, 1 + index])), name=name))
        intake.counts.update({f"{name}/{key}": number for key, number in source.counts.items()})
        if index == 0 and config.split_by == "patient" and not source.knows_patients:
            check_assigned(found[0], config.source)
    return found


def _add(
    config: DataConfig,
    cases: list[CaseKey],
    counts: collections.Counter[str],
    rng: "np.random.Generator",
    *,
    contents: Sequence[Content],
    store: "Store",
    base: Reference,
) -> dict[Split, list[CaseKey]]:
    """The new ones of `cases` by split. Raises RefusedData where too many do not fit the base, or none is new."""
    before = store.record(base).config
    if before.get("split_by", config.split_by) != config.split_by:
        raise InvalidInput(
            f"{base} was split by {before['split_by']} and data.split_by is {config.split_by}. Add cases as "
            "the version was split."
        )
    return add_cases(
        cases,
        {split: store.open_rows(base, split, Case) for split in SPLITS},
        config.split,
        to=str(base),
        by=config.split_by,
        contents=contents,
        labelled_per_label=config.labelled_per_label,
        max_refused_share=config.max_refused_share,
        rng=rng,
        counts=counts,
    )
