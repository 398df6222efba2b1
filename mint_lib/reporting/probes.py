"""Probes: what the main student is asked beside its test cases.

Goes in: the config, the test material, the main student and its answers. Comes out: `Probes`: for a student that reads
images whether it looks at them and how it stands worse ones, for one that reads notes how far text in them moves it. It
knows no store.
"""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from mint_lib.reading import Reader
from mint_lib.records import Reference
from mint_lib.report_records import Perturbation, Prediction
from mint_lib.reporting.assembly import resampling_of
from mint_lib.reporting.grounding import Probe, probe_grounding
from mint_lib.reporting.image_answers import ask_images
from mint_lib.reporting.injections import Injections, measure_injections
from mint_lib.reporting.material import Material
from mint_lib.reporting.note_answers import ask_notes, fit_window
from mint_lib.reporting.perturbations import measure_perturbations
from mint_lib.reporting.settings import EvaluationConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


class Probes(NamedTuple):
    """What was found; None and nothing where it was not asked for."""

    grounding: Probe | None = None
    perturbations: tuple[Perturbation, ...] = ()
    injections: Injections | None = None


def probe_student(
    config: EvaluationConfig,
    material: Material,
    model: "PreTrainedModel",
    reader: Reader,
    answers: Sequence[Prediction],
    *,
    student: Reference,
) -> Probes:
    """Every probe of the config, on the main student, which gave `answers` to the test cases."""
    resampling = resampling_of(config)
    ask = ask_images(material, model, reader, answers, description=f"evaluation: altered images for {config.main}")
    probe = None
    if config.grounding:
        probe = probe_grounding(
            material.cases,
            answers,
            ask,
            config=config.grounding,
            student=str(student),
            num_labels=len(material.labels),
            resampling=resampling,
        )
        logger.info("evaluation: grounding of %s %s", config.main, "passed" if probe.grounding.passed else "failed")
    perturbations = (
        measure_perturbations(material.cases, answers, ask, config=config.perturbations, resampling=resampling)
        if config.perturbations
        else ()
    )
    injections = None
    if config.injections:
        injections = measure_injections(
            material.cases,
            answers,
            ask_notes(material, model, reader, description=f"evaluation: altered notes for {config.main}"),
            fit_window(material, reader, window_tokens=config.student.window_tokens),
            labels=material.labels,
            config=config.injections,
            student=str(student),
            resampling=resampling,
        )
        if injections is None:
            logger.warning("evaluation: no test case can be asked about with text in its note; none was measured")
    return Probes(probe, perturbations, injections)
