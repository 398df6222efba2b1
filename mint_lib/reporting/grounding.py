"""Grounding: whether an image student looks at the image, by what it answers without it.

Goes in: cases with images, the student's answers to them, and a function that asks it about other images. Comes out: a
`Grounding` with a verdict, and what was shown. A student that answers from the labels' frequencies or from the prompt
alone fails, however high its top-1. It knows neither models nor the store. N is the number of cases.

What is shown instead of a case's image:

- `blank`: one flat colour, the same for all: the mean of all probed images.
- `noise`: independent uniform pixels.
- `permuted`: the image of another case; all are dealt on in one cycle, so that nobody keeps the own one.
- `swapped`: the image of a case of another label. A student that looks follows the label of the image it is shown.
- `colour`: one flat colour, the mean of the case's own image. It does not decide: stain differs between tissues, so
  this colour is information, and what it is worth is reported.

A variant passes if all three hold; intervals resample patients.

1. The paired difference of top-1, own images minus the variant, has its whole interval above 0: without the image the
   student is worse.
2. The variant's top-1 is not shown to be above the ceiling: its interval begins at or below it. The ceiling is chance
   or the share of the most frequent label of the probed cases, whichever is more. Nothing that does not depend on the
   right image can do better in expectation: a constant answer is right as often as its label is frequent, and any mix
   of answers is right at most as often as the best constant one. In `permuted` a perfect student is right where the
   dealt image happens to be of the same label, for shares p the sum of p squared, which is no more than the largest p.
3. The interval of the share of changed first answers begins above 0.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from mint_lib.errors import RefusedData
from mint_lib.records import Case
from mint_lib.report_records import Grounding, GroundingVariant, Prediction
from mint_lib.reporting.altered_images import make_flat, make_noise, mean_colour
from mint_lib.reporting.findings import Resampling
from mint_lib.statistics import measure_mean

AskImages = Callable[[Sequence[bytes]], list[str]]
"""From images to the label that the student ranks first for each."""
Kind = Literal["blank", "noise", "permuted", "swapped", "colour"]


class GroundingConfig(BaseModel):
    """How the image-grounding probe is made."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    cases: int = Field(default=100, ge=2)
    """Test cases probed, drawn with the seed; all where there are fewer. Each costs two answers, for noise and for its
    colour: the others are to images that were answered before."""


class Shown(NamedTuple):
    """What one variant showed for each probed case."""

    images: tuple[bytes, ...]
    answers: tuple[str, ...]
    """Labels ranked first."""


class Probe(NamedTuple):
    """The verdict, with what it rests on."""

    grounding: Grounding
    cases: tuple[Case, ...]
    own: Shown
    shown: Mapping[Kind, Shown]
    donors: Mapping[Kind, Sequence[Case]]
    """Whose images were shown, where they were anybody's."""


def probe_grounding(
    cases: Sequence[Case],
    answers: Sequence[Prediction],
    ask: AskImages,
    *,
    config: GroundingConfig,
    student: str,
    num_labels: int,
    resampling: Resampling,
) -> Probe:
    """Whether the student that gave `answers` to `cases` looks at their images.

    Raises:
        RefusedData: the cases are all of one label, so that no image can be swapped.
    """
    order = np.random.default_rng(resampling.seed).permutation(len(cases))[: config.cases]
    probed = [cases[index] for index in map(int, order)]
    images = [_image_of(case) for case in probed]
    own = Shown(tuple(images), tuple(answers[index].ranked_ids[0] for index in map(int, order)))
    donors = _deal_donors(probed, cases, np.random.default_rng([resampling.seed, 1]))
    noise = np.random.default_rng([resampling.seed, 2])
    grey = mean_colour(images)
    instead: dict[Kind, list[bytes]] = {
        "blank": [make_flat(image, grey) for image in images],
        "noise": [make_noise(image, noise) for image in images],
        **{kind: [_image_of(case) for case in dealt] for kind, dealt in donors.items()},
        "colour": [make_flat(image, mean_colour([image])) for image in images],
    }
    shown = {kind: Shown(tuple(altered), tuple(ask(altered))) for kind, altered in instead.items()}
    labels = [str(case.label_id) for case in probed]
    ceiling = max(1 / num_labels, max(Counter(labels).values()) / len(labels))
    bootstrap = resampling.of([case.group_id for case in probed])
    right = measure_mean(_matches(own.answers, labels))
    variants = []
    for kind, (_, found) in shown.items():
        still = measure_mean(_matches(found, labels))
        changed = bootstrap.estimate([measure_mean(1 - _matches(found, own.answers))])
        top_1, drop = bootstrap.estimate([still]), bootstrap.difference([right], [still])
        shows = [str(case.label_id) for case in donors.get(kind, ())]
        variants.append(
            GroundingVariant(
                kind=kind,
                changed=changed,
                top_1=top_1,
                drop=drop,
                follows=bootstrap.estimate([measure_mean(_matches(found, shows))]) if shows else None,
                passed=None
                if kind == "colour"
                else is_above(drop.low, 0.0) and is_above(changed.low, 0.0) and not is_above(top_1.low, ceiling),
            )
        )
    grounding = Grounding(
        student=student,
        passed=all(variant.passed is not False for variant in variants),
        ceiling=ceiling,
        top_1=bootstrap.estimate([right]),
        variants=tuple(variants),
    )
    return Probe(grounding, tuple(probed), own, shown, donors)


def is_above(low: float | None, bound: float) -> bool:
    """Whether an interval that begins at `low` lies above `bound`; without an interval nothing is shown."""
    return low is not None and low > bound


def _deal_donors(probed: Sequence[Case], cases: Sequence[Case], rng: np.random.Generator) -> dict[Kind, list[Case]]:
    """For each probed case the one whose image it is shown."""
    # The cases stand in an order by lot, so that the next one is any other.
    permuted = [*probed[1:], probed[0]]
    swapped = []
    for case in probed:
        others = [other for other in cases if other.label_id != case.label_id]
        if not others:
            raise RefusedData("All test cases are of one label, so no image can be swapped. Mend the test set.")
        swapped.append(others[int(rng.integers(len(others)))])
    return {"permuted": permuted, "swapped": swapped}


def _image_of(case: Case) -> bytes:
    assert case.image is not None, "cases to probe have images"
    return case.image


def _matches(answers: Sequence[str], labels: Sequence[str]) -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
    return np.array([float(answer == label) for answer, label in zip(answers, labels, strict=True)])
