"""Simulated patients and tiles of a tissue, before anything is drawn.

Goes in: a tissue's profile and a random generator. Comes out: a patient (effects on every attribute, stain, blur,
compression) and tiles of that patient as attributes in physical units. Stain, blur and compression depend on the
laboratory and the patient, never on the tissue. Knows no picture.
"""

import math
from typing import TYPE_CHECKING, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from mint_lib.histology.nuclei import ARRANGEMENTS, Arrangement, NucleusStatistics
from mint_lib.histology.tissue_profiles import AXES, TissueProfile

if TYPE_CHECKING:
    import numpy as np

SITES = ("north", "east", "south", "west")
# Optical densities per channel of haematoxylin and eosin (Ruifrok and Johnston 2001), about which laboratories differ.
_HAEMATOXYLIN = (0.65, 0.70, 0.29)
_EOSIN = (0.17, 0.93, 0.32)
_SITE_STAINS = {  # strength of haematoxylin and of eosin, share of eosin in haematoxylin (hue), blur in pixels, quality
    "north": (1.0, 1.0, 0.0, 0.3, 90),
    "east": (1.3, 0.75, -0.1, 0.5, 80),
    "south": (0.75, 1.3, 0.15, 0.4, 85),
    "west": (1.05, 1.1, 0.08, 0.7, 72),
}


class VariationConfig(BaseModel):
    """How far patients and tiles of one tissue differ, in the units of the profiles."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    patient: float = Field(default=0.5, ge=0)
    """Standard deviation of a patient's effect on each attribute."""
    tile: float = Field(default=0.3, ge=0)
    """Standard deviation between tiles of one patient."""
    stain: float = Field(default=1.3, ge=0)
    """Factor on the patients' differences in stain; laboratories differ in any case."""


class SimulatedPatient(NamedTuple):
    """What stays the same in all tiles of a patient."""

    profile: TissueProfile
    site: str
    sex: str
    age_years: int
    effects: tuple[float, ...]
    arrangement: tuple[float, ...]
    haematoxylin: tuple[float, float, float]
    eosin: tuple[float, float, float]
    blur_pixels: float
    jpeg_quality: int


class TileAttributes(NamedTuple):
    """One tile, as it is to be drawn."""

    nuclei_per_mm2: float
    area_um2: float
    area_variation: float
    eccentricity: float
    chromatin: float
    stroma_fraction: float
    arrangement: Arrangement

    def as_statistics(self) -> NucleusStatistics:
        """The same, as what is known of the tile's nuclei."""
        return NucleusStatistics(**self._asdict())


def draw_patient(profile: TissueProfile, *, config: VariationConfig, rng: "np.random.Generator") -> SimulatedPatient:
    """A patient with this tissue."""
    import numpy as np

    site = SITES[int(rng.integers(len(SITES)))]
    strength_h, strength_e, hue, blur, quality = _SITE_STAINS[site]
    strength_h *= float(np.exp(rng.normal(0, 0.2 * config.stain)))
    strength_e *= float(np.exp(rng.normal(0, 0.25 * config.stain)))
    hue += float(rng.normal(0, 0.08 * config.stain))
    haematoxylin = np.array(_HAEMATOXYLIN) + hue * np.array(_EOSIN) + rng.normal(0, 0.03 * config.stain, 3)
    eosin = np.array(_EOSIN) + rng.normal(0, 0.05 * config.stain, 3)
    weights = np.array(profile.arrangement) * np.exp(rng.normal(0, 0.5 * config.patient, len(ARRANGEMENTS)))
    sex = profile.sex if profile.sex != "any" else ("female", "male")[int(rng.integers(2))]
    return SimulatedPatient(
        profile=profile,
        site=site,
        sex=sex,
        age_years=int(np.clip(rng.normal(60, 14), 18, 92)),
        effects=tuple(rng.normal(0, config.patient, len(AXES)).tolist()),
        arrangement=tuple((weights / weights.sum()).tolist()),
        haematoxylin=tuple((strength_h * np.maximum(haematoxylin, 0.05)).tolist()),
        eosin=tuple((strength_e * np.maximum(eosin, 0.05)).tolist()),
        blur_pixels=float(max(0.0, blur + rng.normal(0, 0.3))),
        jpeg_quality=int(np.clip(quality + rng.normal(0, 6), 50, 96)),
    )


def draw_attributes(
    patient: SimulatedPatient, *, config: VariationConfig, rng: "np.random.Generator"
) -> TileAttributes:
    """A tile of this patient."""
    noise = rng.normal(0, config.tile, len(AXES))
    values = zip(AXES, patient.profile.means, patient.effects, noise, strict=True)
    z = {axis: mean + effect + float(shift) for axis, mean, effect, shift in values}
    return TileAttributes(
        nuclei_per_mm2=8000 * math.exp(0.42 * z["density"]),
        area_um2=27 * math.exp(0.36 * z["size"]),
        area_variation=min(0.9, 0.4 * math.exp(0.4 * z["variation"])),
        eccentricity=min(0.93, max(0.3, 0.68 + 0.14 * z["elongation"])),
        chromatin=1 / (1 + math.exp(-1.1 * z["chromatin"])),
        stroma_fraction=0.75 / (1 + math.exp(1.2 - 1.1 * z["stroma"])),
        arrangement=ARRANGEMENTS[int(rng.choice(len(ARRANGEMENTS), p=patient.arrangement))],
    )


def spoil_attributes(
    attributes: TileAttributes,
    others: TileAttributes,
    *,
    missing_share: float,
    wrong_share: float,
    rng: "np.random.Generator",
) -> NucleusStatistics:
    """What an observer notes of a tile: some attributes are missing, some are those of another tile."""
    noted: dict[str, object] = {}
    for field, value in attributes._asdict().items():
        luck = rng.random()
        if luck < missing_share:
            continue
        noted[field] = getattr(others, field) if luck < missing_share + wrong_share else value
    return NucleusStatistics(**noted)  # type: ignore[arg-type]
