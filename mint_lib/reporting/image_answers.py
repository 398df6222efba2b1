"""Image answers: asks a student about images that are no case's, for probes that alter images.

Goes in: the test material, a student, and its answers to the cases. Comes out: a function from images to the label
that the student ranks first. It knows neither what was altered nor what is right.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mint_lib.progress import Progress
from mint_lib.reading import Reader
from mint_lib.report_records import Prediction
from mint_lib.reporting.grounding import AskImages
from mint_lib.reporting.material import Material
from mint_lib.student import rank_labels

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def ask_images(
    material: Material,
    model: "PreTrainedModel",
    reader: Reader,
    answers: Sequence[Prediction],
    *,
    description: str,
) -> AskImages:
    """A function that says which label the student ranks first for each image.

    The question about an image is the same for all cases, so the answer depends on the image alone: one that was
    answered before, `answers` among them, is not asked again.
    """
    turns = material.template.prompt()
    known = {
        case.image: answer.ranked_ids[0]
        for case, answer in zip(material.cases, answers, strict=True)
        if case.image is not None
    }

    def ask(images: Sequence[bytes]) -> list[str]:
        unknown = [image for image in dict.fromkeys(images) if image not in known]
        if unknown:
            with Progress(description, total=len(unknown)) as progress:
                scores_NL = rank_labels(
                    model,
                    reader,
                    material.template,
                    material.labels,
                    [turns] * len(unknown),
                    images=[(image,) for image in unknown],
                    progress=progress.advance,
                )
            firsts = (material.labels[int(column)].id for column in scores_NL.argmax(axis=1))
            known.update(zip(unknown, firsts, strict=True))
        return [known[image] for image in images]

    return ask
