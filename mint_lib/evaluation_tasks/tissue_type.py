"""Tissue type: from which tissue of a closed set an image of nuclei is, as a student answers from the image alone.

Goes in: the test material, whose template shows students the image. Comes out: exact rankings and free answers of a
student, scored as `LabelRanking` does, with the F1 score of every tissue and all confusions. Whether a student looks at
the image at all is not measured here: that is the grounding probe's.
"""

from collections.abc import Mapping
from typing import ClassVar

from mint_lib.report_records import Metric, Wording
from mint_lib.reporting.label_ranking import LabelRanking, describe_metric, list_metrics

_TOPS = (1, 3, 5)
_WORDING = Wording(
    label="tissue",
    labels="tissues",
    subjects="tiles",
    picture="image",
    question="from the image alone, of which of {num_labels} tissues are these nuclei?",
    closed="The list of tissues is closed: an image of any other tissue is always answered wrongly.",
    simulation=(
        "test images are drawn by a program. They bear the names of organs, but their nuclei are stylised: drawn from "
        "overlapping ranges of size, density, shape and arrangement that were chosen, not observed. That shows whether "
        "the method transfers what a teacher knows and whether the student looks at the image; it does not show how "
        "real sections are answered, and differences between groups are those of the program."
    ),
)
_F1 = describe_metric(
    "Macro F1", "Harmonic mean of precision and recall of each tissue, averaged over the tissues.", unit="score"
)
_INVENTED = describe_metric("Invented", "Share of the names that are no tissue of the list.", better="lower")


class TissueType(LabelRanking):
    """Ranking and free answers over the tissues of the images."""

    tops: ClassVar[tuple[int, ...]] = _TOPS
    """MINT reports 1 and 5 of 19."""
    metrics: ClassVar[Mapping[str, Metric]] = list_metrics(_WORDING, tops=_TOPS, further={"macro_f1": _F1}) | {
        "generated_invented": _INVENTED
    }
    wording: ClassVar[Wording] = _WORDING
    confusion = "labels"
