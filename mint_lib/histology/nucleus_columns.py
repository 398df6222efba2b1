"""Nucleus statistics from the columns of a table.

Goes in: the names of columns and a row's cells. Comes out: `NucleusStatistics` in physical units. Errors name the row
and the column, never what stands there. Knows no files.
"""

import math
from collections.abc import Iterator, Mapping

from pydantic import BaseModel, ConfigDict, Field

from mint_lib.errors import InvalidInput
from mint_lib.histology.nuclei import NucleusStatistics


class NucleusColumns(BaseModel):
    """Columns with what was measured in a mask; None: there is no such column."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    count: str | None = None
    """Nuclei in the image."""
    area: str | None = None
    """Mean area of a nucleus in pixels of the image as it is stored."""
    area_deviation: str | None = None
    """Standard deviation of the area in pixels; needs `area`."""
    eccentricity: str | None = None
    """Mean eccentricity, 0 to 1."""
    solidity: str | None = None
    """Mean solidity, 0 to 1."""
    nuclear_fraction: str | None = None
    """Share of the image that is nuclei, 0 to 1."""
    microns_per_pixel: float = Field(default=0.25, gt=0)
    """Side of a pixel in micrometres; 0.25 is a 40x scan."""

    def list_columns(self) -> Iterator[tuple[str, str]]:
        """Config key and column of those that are given."""
        for key, name in self.model_dump(exclude={"microns_per_pixel"}).items():
            if name is not None:
                yield key, name


def read_statistics(
    columns: NucleusColumns, cells: Mapping[str, str], *, size: tuple[int, int], where: str
) -> NucleusStatistics:
    """The statistics that a row states; an empty cell is not known.

    Args:
        columns: names of the columns.
        cells: the row.
        size: width and height of the stored image in pixels.
        where: table and row, for errors.

    Raises:
        InvalidInput: a cell is not a number, or is out of range.
    """
    values: dict[str, float | None] = dict.fromkeys(NucleusColumns.model_fields)
    for key, name in columns.list_columns():
        if not cells[name].strip():
            continue
        try:
            value = float(cells[name])
        except ValueError:
            value = math.nan
        most = 1.0 if key in ("eccentricity", "solidity", "nuclear_fraction") else math.inf
        if not 0 <= value <= most or math.isinf(value):
            bounds = "from 0 to 1" if most == 1 else "of 0 or more"
            raise InvalidInput(f"{where}, column {name!r}: not a number {bounds}. Mend it, or leave the cell empty.")
        values[key] = value
    pixel_um2 = columns.microns_per_pixel**2
    count, area, deviation = values["count"], values["area"], values["area_deviation"]
    return NucleusStatistics(
        nuclei_per_mm2=None if count is None else count / (size[0] * size[1] * pixel_um2 * 1e-6),
        area_um2=None if area is None else area * pixel_um2,
        area_variation=deviation / area if area and deviation is not None else None,
        eccentricity=values["eccentricity"],
        solidity=values["solidity"],
        nuclear_fraction=values["nuclear_fraction"],
    )
