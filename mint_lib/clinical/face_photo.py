"""Drawn photos of faces: a caricature with 30 axes that facial findings push, so that a photo says what a note omits.

Goes in: the facial findings' terms, sex, age and a generator. Comes out: a PNG that carries the visible word
`synthetic` and a text chunk of that name. One axis is a length, an angle or a shade; identity varies every axis, a
finding shifts its own by `min_effect` to `max_effect`. Light, pose, skin, hair and age vary and mean nothing. This is
no model of any real face. Knows neither diseases nor the ontology's files.
"""

import functools
import io
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from mint_lib.clinical.face_drawing import draw_head

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image, ImageFont

_MAX_PARAMETER = 3.0


class Axis(NamedTuple):
    """One direction in which faces differ, and the terms whose patients lie above or below the average."""

    name: str
    higher: tuple[str, ...]
    lower: tuple[str, ...]


AXES = (
    Axis("eye spacing", ("HP:0000316", "HP:0000506"), ("HP:0000601",)),
    Axis("eye slant", ("HP:0000582",), ("HP:0000494",)),
    Axis("lid opening", ("HP:0000520",), ("HP:0000508", "HP:0045025", "HP:0000581")),
    Axis("eye width", ("HP:0000637",), ("HP:0012745", "HP:0000581")),
    Axis("epicanthus", ("HP:0000286",), ()),
    Axis("eye depth", ("HP:0000490", "HP:0000336"), ("HP:0000586", "HP:0009891")),
    Axis("brow thickness", ("HP:0000574", "HP:0011229"), ("HP:0045075", "HP:0002223", "HP:0000535")),
    Axis("brow arch", ("HP:0002553",), ("HP:0011228",)),
    Axis("synophrys", ("HP:0000664",), ()),
    Axis("lash length", ("HP:0000527",), ("HP:0000653", "HP:0000561")),
    Axis("nasal bridge height", ("HP:0000426", "HP:0000444"), ("HP:0005280", "HP:0000457", "HP:0011120")),
    Axis("nasal bridge width", ("HP:0000431",), ("HP:0000446", "HP:0000418")),
    Axis("nose length", ("HP:0003189",), ("HP:0003196",)),
    Axis("nasal tip width", ("HP:0000414", "HP:0000455", "HP:0000445"), ("HP:0000430", "HP:0000460")),
    Axis("nares anteversion", ("HP:0000463",), ("HP:0009765", "HP:0000437")),
    Axis("philtrum length", ("HP:0000343",), ("HP:0000322",)),
    Axis("philtrum depth", ("HP:0002002",), ("HP:0000319",)),
    Axis("mouth width", ("HP:0000154",), ("HP:0000160",)),
    Axis("upper lip", ("HP:0000215", "HP:0012471"), ("HP:0000219", "HP:0000233")),
    Axis("lower lip", ("HP:0000179", "HP:0012471", "HP:0000232"), ("HP:0010282", "HP:0000233")),
    Axis("mouth corners", (), ("HP:0002714",)),
    Axis("cupid's bow", ("HP:0002263", "HP:0010804"), ()),
    Axis("chin size", ("HP:0000303",), ("HP:0000347", "HP:0000278", "HP:0000331")),
    Axis("chin point", ("HP:0000307", "HP:0000325"), ("HP:0011822", "HP:0000321")),
    Axis("face length", ("HP:0000276", "HP:0000275"), ("HP:0000311", "HP:0000283")),
    Axis("cheeks", ("HP:0000293",), ("HP:0000272", "HP:0011800")),
    Axis("forehead height", ("HP:0000348", "HP:0011220", "HP:0002007", "HP:0009890"), ("HP:0000294", "HP:0000340")),
    Axis("forehead width", ("HP:0000337",), ("HP:0000341",)),
    Axis("ear position", (), ("HP:0000369",)),
    Axis("ear size", ("HP:0000400", "HP:0000411"), ("HP:0008551",)),
)
"""Term ids of the Human Phenotype Ontology; a term below one of them moves the same axis."""
_INDEX = {axis.name: index for index, axis in enumerate(AXES)}


class FaceConfig(BaseModel):
    """How faces are drawn."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    size_pixels: int = Field(default=112, ge=32, le=512)
    """Width and height of the photo; 112 is what GestaltMML's cropper gives."""
    identity_noise: float = Field(default=0.6, gt=0, le=2)
    """Standard deviation of every axis between people without a finding. With the effects below, one finding is
    readable from the exact parameters at 75 to 85 % (balanced accuracy)."""
    min_effect: float = Field(default=0.5, ge=0, le=3)
    """Smallest shift that a finding gives its axis: expression is reduced in some patients."""
    max_effect: float = Field(default=1.5, ge=0, le=3)
    """Largest shift that a finding gives its axis."""


def find_axes(lineage: frozenset[str]) -> dict[str, int]:
    """Axis name to +1 or -1 for the axes that a term moves; empty if no photo shows it.

    Args:
        lineage: the term's id and those of all its ancestors.
    """
    moved = {axis.name: (not lineage.isdisjoint(axis.higher)) - (not lineage.isdisjoint(axis.lower)) for axis in AXES}
    return {name: direction for name, direction in moved.items() if direction}


def draw_parameters(
    findings: Iterable[dict[str, int]], *, rng: "np.random.Generator", config: FaceConfig
) -> "np.ndarray":
    """One person's value on each axis of `AXES`: identity, and a shift for each axis that a finding moves.

    Args:
        findings: what `find_axes` gives for each facial finding.
        rng: decides identity and expression.
        config: sizes of both.
    """
    import numpy as np

    parameters = rng.normal(0.0, config.identity_noise, len(AXES))
    moved: dict[str, int] = {}
    for finding in findings:
        for name, direction in finding.items():
            moved.setdefault(name, direction)  # two terms of one axis are one finding of it, not twice its effect
    for name in sorted(moved, key=_INDEX.__getitem__):
        parameters[_INDEX[name]] += moved[name] * rng.uniform(config.min_effect, config.max_effect)
    return np.clip(parameters, -_MAX_PARAMETER, _MAX_PARAMETER)


def draw_photo(
    parameters: "np.ndarray", *, is_male: bool, age_years: float, rng: "np.random.Generator", config: FaceConfig
) -> bytes:
    """The PNG of a face. Everything but `parameters`, sex and age is drawn by chance and means nothing.

    Args:
        parameters: one value for each axis of `AXES`, as `draw_parameters` gives it.
        is_male: shorter hair and a heavier brow and jaw in adults.
        age_years: moves proportions; grey hair from about 55.
        rng: decides skin, hair, pose, light and grain.
        config: the photo's size.
    """
    from PIL.PngImagePlugin import PngInfo

    image = draw_head(
        dict(zip(_INDEX, parameters.tolist(), strict=True)), is_male=is_male, age_years=age_years, rng=rng
    )
    image = _mark(_light(image, config.size_pixels, rng))
    info = PngInfo()
    info.add_text("synthetic", "drawn by mint_lib.clinical.face_photo; shows no real person")
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def _light(image: "Image.Image", size_pixels: int, rng: "np.random.Generator") -> "Image.Image":
    """Scale down and add a gradient of light, a colour cast, blur and grain."""
    import numpy as np
    from PIL import Image, ImageFilter

    image = image.resize((size_pixels, size_pixels), Image.Resampling.LANCZOS)
    image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 0.7) * size_pixels / 112))
    ramp = np.linspace(-1, 1, size_pixels)
    slope = rng.uniform(-0.14, 0.14, 2)
    light_HW = 1 + slope[0] * ramp[None, :] + slope[1] * ramp[:, None]
    cast = rng.uniform(0.84, 1.1) * (1 + rng.normal(0, 0.025, 3))
    pixels_HWC = np.asarray(image, dtype=np.float64) * light_HW[:, :, None] * cast
    pixels_HWC += rng.normal(0, 2.0, (size_pixels, size_pixels, 1))
    return Image.fromarray(np.clip(pixels_HWC, 0, 255).astype(np.uint8))


def _mark(image: "Image.Image") -> "Image.Image":
    """Write `synthetic` along the lower edge."""
    from PIL import ImageDraw

    size = max(7, image.width // 12)
    ImageDraw.Draw(image).text((2, image.height - size - 3), "synthetic", fill=(255, 255, 255), font=_font(size))
    return image


@functools.cache
def _font(size_pixels: int) -> "ImageFont.FreeTypeFont | ImageFont.ImageFont":
    from PIL import ImageFont

    return ImageFont.load_default(size_pixels)
