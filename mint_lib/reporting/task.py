"""What an evaluation task is: what students are asked and how answers are scored.

Goes in: the test material. Comes out: the base class of the plug-ins in `mint_lib/evaluation_tasks`, and the names of
the systems that every report has. It knows neither the stage nor the store.
"""

import abc
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel

from mint_lib.reading import Reader
from mint_lib.records import Ranking
from mint_lib.report_records import Metric, Prediction, Wording
from mint_lib.reporting.findings import PairedTest
from mint_lib.reporting.material import Material
from mint_lib.statistics import Measurement

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BASE, TEACHER, CHANCE, MAJORITY = "base", "teacher", "chance", "majority"


class EvaluationTask(abc.ABC):
    """Base of the plug-ins in `mint_lib/evaluation_tasks`: what is asked and how answers are scored."""

    Config: ClassVar[type[BaseModel]]
    metrics: ClassVar[Mapping[str, Metric]]
    """Every metric that `measure` may give; the first is the one that sentences lead with."""
    tests: ClassVar[Mapping[str, PairedTest]]
    """Metrics that are means over cases and are compared by a paired test."""
    wording: ClassVar[Wording] = Wording()
    """What the report calls labels, cases and pictures."""
    confusion: ClassVar[Literal["families", "labels"]] = "families"
    """What confusions are shown of: the families of labels that are answered worst, or all labels."""

    def __init__(self, config: Any, material: Material):
        self.config = config
        self.material = material

    @abc.abstractmethod
    def answer(self, model: "PreTrainedModel", reader: Reader, *, system: str) -> list[Prediction]:
        """The model's answer to every case, in their order."""

    @abc.abstractmethod
    def adopt(self, rankings: Mapping[str, Ranking], *, system: str) -> list[Prediction]:
        """Rankings that were made elsewhere, as answers."""

    @abc.abstractmethod
    def guess(self) -> dict[str, list[Prediction]]:
        """Systems that do not look at the case, by name."""

    @abc.abstractmethod
    def measure(self, predictions: Sequence[Prediction]) -> dict[str, Measurement]:
        """Metric to measurement, with a row for every case. A metric that does not apply is left out."""

    @abc.abstractmethod
    def describe(self) -> tuple[str, ...]:
        """Sentences on what was asked and of how many cases, for the report."""
