"""Perturbations: how fast a student's answers get worse as images do.

Goes in: cases with images, the student's answers to them, and a function that asks it about other images. Comes out: a
`Perturbation` for each of stain, blur and compression, from weak to strong. It knows neither models nor the store.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from mint_lib.records import Case
from mint_lib.report_records import Perturbation, PerturbationLevel, Prediction
from mint_lib.reporting.altered_images import blur, compress, scale_stains
from mint_lib.reporting.findings import Resampling
from mint_lib.reporting.grounding import AskImages
from mint_lib.statistics import measure_mean

Kind = Literal["stain", "blur", "compression"]
_KINDS: tuple[Kind, ...] = ("stain", "blur", "compression")


class PerturbationsConfig(BaseModel):
    """Which perturbations are measured. Every level costs an answer for each case."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    cases: int = Field(default=60, ge=2)
    """Test cases that are perturbed, drawn with the seed; all where there are fewer."""
    stain: tuple[float, ...] = Field(default=(0.1, 0.25, 0.5), min_length=1)
    """Share by which haematoxylin and eosin are scaled, each up or down, from weak to strong; below 1."""
    blur: tuple[float, ...] = Field(default=(1.0, 2.0, 4.0), min_length=1)
    """Standard deviations of a Gaussian in pixels of the image, from weak to strong."""
    compression: tuple[int, ...] = Field(default=(50, 20, 5), min_length=1)
    """JPEG qualities from 1 to 95, from weak to strong compression."""


def measure_perturbations(
    cases: Sequence[Case],
    answers: Sequence[Prediction],
    ask: AskImages,
    *,
    config: PerturbationsConfig,
    resampling: Resampling,
) -> tuple[Perturbation, ...]:
    """Top-1 of the student that gave `answers` to `cases`, on the same images in a worse state."""
    order = list(map(int, np.random.default_rng(resampling.seed).permutation(len(cases))[: config.cases]))
    drawn = [cases[index] for index in order]
    bootstrap = resampling.of([case.group_id for case in drawn])
    own = measure_mean(np.array([float(answers[index].ranked_ids[0] == cases[index].label_id) for index in order]))
    found = []
    for kind in _KINDS:
        levels = []
        for level in getattr(config, kind):
            images = [
                perturb(case.image or b"", kind, level, seed=resampling.seed + place)
                for place, case in enumerate(drawn)
            ]
            firsts = ask(images)
            hits = measure_mean(np.array([float(a == case.label_id) for a, case in zip(firsts, drawn, strict=True)]))
            change = bootstrap.difference([hits], [own])
            levels.append(PerturbationLevel(level=level, top_1=bootstrap.estimate([hits]), change=change))
        found.append(Perturbation(kind=kind, top_1=bootstrap.estimate([own]), levels=tuple(levels)))
    return tuple(found)


def perturb(data: bytes, kind: Kind, level: float, *, seed: int) -> bytes:
    """`data` in a worse state. The seed deals whether a stain is scaled up or down, the same at every level."""
    if kind == "stain":
        return scale_stains(data, level, np.random.default_rng(seed))
    return blur(data, level) if kind == "blur" else compress(data, int(level))
