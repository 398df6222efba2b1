"""Rare-disease ranking: which disease of a closed set a case has, by ontology id.

Goes in: the test material. Comes out: exact rankings and free answers of a student, scored as `LabelRanking` does. A
free answer may name a disease outside the label set, which the ontology knows, or none at all, which it invented.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import ClassVar

from mint_lib.clinical.ontology import load_ontology
from mint_lib.errors import MissingDependency
from mint_lib.report_records import Metric, Wording
from mint_lib.reporting.label_ranking import LabelRanking, describe_metric, list_metrics

logger = logging.getLogger(__name__)
_TOPS = (1, 3, 10)
_OUTSIDE = {
    "generated_invented": describe_metric("Invented", "Share of the names that are no disease at all.", better="lower"),
    "generated_outside": describe_metric(
        "Outside the set", "Share of the names that are a disease outside the label set.", better="lower"
    ),
}


class RareDiseaseRanking(LabelRanking):
    """Ranking and free answers over the diseases of the cases."""

    tops: ClassVar[tuple[int, ...]] = _TOPS
    metrics: ClassVar[Mapping[str, Metric]] = list_metrics(Wording(), tops=_TOPS, further={}) | _OUTSIDE

    def load_outside_names(self) -> Mapping[str, Sequence[str]]:
        """The names of every disease of the ontology; none where it is not installed, which the report says."""
        try:
            return {disease.id: disease.names for disease in load_ontology().diseases.values()}
        except MissingDependency as error:
            logger.warning("evaluation: %s", error)
            return {}

    def describe(self) -> tuple[str, ...]:
        """What was asked of how many cases, and whether other diseases could be told from invented ones."""
        sentences = super().describe()
        if len(sentences) > 1 and not self.outside_names:
            warning = "No wider list of diseases was at hand: real diseases outside the label set count as invented."
            return (*sentences, warning)
        return sentences
