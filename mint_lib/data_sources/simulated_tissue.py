"""Simulated tiles of tissue with stained nuclei, for an image student: each is drawn, none was observed.

Goes in: nothing but the config. Comes out: rows that are all marked synthetic, several tiles a patient. The tissues
bear the names of organs but are stylised, not real histology: they differ in density, size, shape and chromatin of
nuclei, in their arrangement and in stroma, far more simply than real ones. Stain, blur and compression vary by
laboratory and patient, never by tissue. A tile's description, with attributes missing or wrong, is for the teacher.
Knows nothing of splits.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

from mint_lib.case_rows import LeftOut, Row
from mint_lib.data import DataSource
from mint_lib.errors import InvalidInput
from mint_lib.histology.nuclei import Wording, describe_nuclei
from mint_lib.histology.tile_drawing import draw_tile
from mint_lib.histology.tissue_model import VariationConfig, draw_attributes, draw_patient, spoil_attributes
from mint_lib.histology.tissue_profiles import PROFILES, TissueProfile
from mint_lib.progress import track_progress
from mint_lib.records import Label

if TYPE_CHECKING:
    import numpy as np

_PREFIX = "TISSUE:"


class SimulatedTissue(DataSource):
    """Tiles drawn from profiles of tissues."""

    class Config(BaseModel):
        """Which tissues, how many tiles, and how much a description tells."""

        model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

        label_ids: tuple[str, ...] = ()
        """Ids of the tissues, for instance TISSUE:liver. Empty: the first `num_labels`."""
        num_labels: int = Field(default=8, ge=2, le=len(PROFILES))
        """Without `label_ids`: how many tissues."""
        patients_per_label: int = Field(default=40, ge=1)
        """Patients of each tissue, over all splits."""
        tiles_per_patient: int = Field(default=4, ge=1)
        """Tiles of one patient."""
        size_pixels: int = Field(default=128, ge=32, le=512)
        """Side of a tile, which always shows 64 micrometres."""
        variation: VariationConfig = VariationConfig()
        """How far patients and tiles of one tissue differ."""
        missing_share: float = Field(default=0.1, ge=0, le=1)
        """Share of attributes that a description leaves out."""
        wrong_share: float = Field(default=0.07, ge=0, le=1)
        """Share of attributes that a description gives as those of another tile."""
        wording: Wording = "words"
        """How descriptions are worded."""

    config: Config
    describes_images = True

    def labels(self) -> list[Label]:
        """The tissues named, or the first ones, as answers."""
        if self.wanted is not None:
            return list(self.wanted)
        return [Label(id=_PREFIX + profile.name, name=profile.name) for profile in self._profiles()]

    def read(self, rng: "np.random.Generator") -> Iterator[Row | LeftOut]:
        """`tiles_per_patient` tiles of `patients_per_label` patients of each tissue."""
        import numpy as np

        profiles = self._profiles()
        base = int(rng.integers(2**63))
        total = self.config.patients_per_label * len(profiles)
        for number in track_progress(range(total), "data: simulated tissue", total=total):
            profile = profiles[number % len(profiles)]
            yield from self._draw_patient(f"simulated-{number:05d}", profile, np.random.default_rng([base, number]))

    def digest(self) -> str:
        """A fixed word: the rows depend on nothing outside the config and the code."""
        return "sha256:" + "0" * 64

    def notes(self) -> tuple[str, ...]:
        """That no tile here is real."""
        return (
            "simulated_tissue: tiles are drawn by a program. They bear names of organs but are stylised, not real "
            "histology; scores on them say nothing about real tissue. Descriptions are made from the drawing's "
            f"attributes, {self.config.missing_share:.0%} missing and {self.config.wrong_share:.0%} wrong.",
        )

    def _profiles(self) -> list[TissueProfile]:
        """The profiles that the config, or another source's label set, asks for."""
        by_id = {_PREFIX + profile.name: profile for profile in PROFILES}
        wanted = tuple(label.id for label in self.wanted) if self.wanted is not None else self.config.label_ids
        unknown = [label_id for label_id in wanted if label_id not in by_id]
        if unknown:
            raise InvalidInput(
                f"Tiles of {', '.join(unknown[:5])} cannot be simulated. Choose from {', '.join(by_id)}."
            )
        return [by_id[label_id] for label_id in wanted] or list(PROFILES[: self.config.num_labels])

    def _draw_patient(self, patient_id: str, profile: TissueProfile, rng: "np.random.Generator") -> Iterator[Row]:
        """The tiles of one patient."""
        config = self.config
        patient = draw_patient(profile, config=config.variation, rng=rng)
        for number in range(config.tiles_per_patient):
            attributes = draw_attributes(patient, config=config.variation, rng=rng)
            tile, num_nuclei = draw_tile(patient, attributes, size_pixels=config.size_pixels, rng=rng)
            self.counts["nuclei drawn"] += num_nuclei
            # Wrong attributes are those of any tissue, so that an error does not tell the right one.
            stranger = draw_patient(PROFILES[int(rng.integers(len(PROFILES)))], config=config.variation, rng=rng)
            noted = spoil_attributes(
                attributes,
                draw_attributes(stranger, config=config.variation, rng=rng),
                missing_share=config.missing_share,
                wrong_share=config.wrong_share,
                rng=rng,
            )
            yield Row(
                case_id=f"{patient_id}-{number + 1}",
                group_id=patient_id,
                source="simulated_tissue",
                synthetic=True,
                text=describe_nuclei(noted, wording=config.wording) or None,
                image=tile,
                label_id=_PREFIX + profile.name,
                attributes={"sex": patient.sex, "age_years": str(patient.age_years), "site": patient.site},
            )
