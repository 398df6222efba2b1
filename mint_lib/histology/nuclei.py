"""Nuclei of a tile: their statistics, measured in a mask or read from a table, and the sentence that describes them.

Goes in: an instance mask, or numbers that a source has. Comes out: `NucleusStatistics` and a description, which is for
the teacher only. It never names a tissue, because statistics do not know one. Knows neither files nor cases.
"""

from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    import numpy as np

Wording = Literal["words", "words_and_figures"]
Arrangement = Literal["diffuse", "clustered", "glandular", "files"]
ARRANGEMENTS: tuple[Arrangement, ...] = ("diffuse", "clustered", "glandular", "files")
_ARRANGED = {
    "diffuse": "scattered evenly",
    "clustered": "in nests",
    "glandular": "around lumina",
    "files": "in files",
}
# Steps at about the 10th, 30th, 70th and 90th percentile of 384 tiles of MoNuSeg (six organs, 40x); the two columns
# that it lacks, chromatin and stroma, are steps of equal width between none and the most.
_STEPS: dict[str, tuple[tuple[float, ...], tuple[str, ...]]] = {
    "nuclei_per_mm2": (
        (5_000, 7_000, 10_000, 16_000),
        ("very sparse", "sparse", "moderately dense", "dense", "very dense"),
    ),
    "area_um2": ((10, 20, 32, 42), ("very small", "small", "medium-sized", "large", "very large")),
    "area_variation": ((0.42, 0.5, 0.65, 0.8), ("uniform", "fairly uniform", "varied", "very varied", "pleomorphic")),
    "eccentricity": ((0.66, 0.7, 0.76, 0.8), ("round", "nearly round", "oval", "elongated", "spindle-shaped")),
    "solidity": ((0.925, 0.94, 0.95, 0.957), ("indented", "irregular", "fairly smooth", "smooth", "very smooth")),
    "nuclear_fraction": (
        (0.1, 0.16, 0.27, 0.35),
        ("very little nuclear area", "little nuclear area", "a quarter nuclear area", "much nuclear area",
         "mostly nuclear area"),
    ),
    "chromatin": ((0.2, 0.4, 0.6, 0.8), ("smooth", "fine", "granular", "coarse", "clumped")),
    "stroma_fraction": ((0.1, 0.2, 0.35, 0.5), ("no stroma", "little stroma", "some stroma", "much stroma",
                                                "mostly stroma")),
}  # fmt: skip


class NucleusStatistics(NamedTuple):
    """What is known of a tile's nuclei; None is not known."""

    nuclei_per_mm2: float | None = None
    """Nuclei per square millimetre of tissue."""
    area_um2: float | None = None
    """Mean area of a nucleus in square micrometres."""
    area_variation: float | None = None
    """Standard deviation of the area over its mean."""
    eccentricity: float | None = None
    """Mean eccentricity of the ellipse with the nucleus's second moments: 0 is a circle, 1 a line."""
    solidity: float | None = None
    """Mean share of a nucleus in its convex hull: 1 has no indentation."""
    nuclear_fraction: float | None = None
    """Share of the tile's area that is nuclei."""
    chromatin: float | None = None
    """0 is smooth, 1 is clumped."""
    stroma_fraction: float | None = None
    """Share of the tile's area that is fibrous stroma."""
    arrangement: Arrangement | None = None
    """How the nuclei lie to one another."""
    cell_shares: tuple[tuple[str, float], ...] = ()
    """Kinds of cells and the share of the nuclei that is of each."""


def measure_nuclei(instances_HW: "np.ndarray", *, microns_per_pixel: float) -> NucleusStatistics:
    """The statistics of the nuclei in an instance mask (height x width, 0 is background, one id a nucleus).

    Eccentricity is that of the ellipse with the same second central moments, pixels counted as points.
    """
    import numpy as np

    pixel_um2 = microns_per_pixel**2
    tile_mm2 = instances_HW.size * pixel_um2 * 1e-6
    ys, xs = np.nonzero(instances_HW)
    if not len(ys):
        return NucleusStatistics(nuclei_per_mm2=0.0, nuclear_fraction=0.0)
    _, owner, areas = np.unique(instances_HW[ys, xs], return_inverse=True, return_counts=True)
    x = xs - (np.bincount(owner, xs) / areas)[owner]
    y = ys - (np.bincount(owner, ys) / areas)[owner]
    xx, yy, xy = (np.bincount(owner, product) / areas for product in (x * x, y * y, x * y))
    spread = np.sqrt((xx - yy) ** 2 + 4 * xy**2)
    longest = xx + yy + spread
    eccentricity = np.sqrt(2 * spread / np.where(longest > 0, longest, 1))  # a single pixel is round
    return NucleusStatistics(
        nuclei_per_mm2=len(areas) / tile_mm2,
        area_um2=float(areas.mean() * pixel_um2),
        area_variation=float(areas.std() / areas.mean()),
        eccentricity=float(eccentricity.mean()),
        nuclear_fraction=float(areas.sum() / instances_HW.size),
    )


def describe_nuclei(statistics: NucleusStatistics, *, wording: Wording) -> str:
    """One sentence about the nuclei of a tile; empty where nothing is known.

    Args:
        statistics: what is known.
        wording: words alone, which are few tokens, or with the figures behind them.
    """
    figures = {
        "nuclei_per_mm2": "{:.0f} nuclei/mm2",
        "area_um2": "{:.0f} um2",
        "area_variation": "variation {:.2f}",
        "eccentricity": "eccentricity {:.2f}",
        "solidity": "solidity {:.2f}",
        "nuclear_fraction": "{:.0%} of the area",
        "chromatin": "{:.1f} of 1",
        "stroma_fraction": "{:.0%} of the area",
    }
    suffixes = {"area_variation": " in size", "solidity": " in outline", "chromatin": " chromatin"}
    parts = []
    for field, figure in figures.items():
        value = getattr(statistics, field)
        if value is None:
            continue
        steps, words = _STEPS[field]
        word = words[sum(value >= step for step in steps)] + suffixes.get(field, "")
        parts.append(f"{word} ({figure.format(value)})" if wording == "words_and_figures" else word)
    if statistics.arrangement is not None:
        parts.append(_ARRANGED[statistics.arrangement])
    for kind, share in statistics.cell_shares:
        if share > 0:
            parts.append(f"{share:.0%} {kind}")
    return f"Nuclei {', '.join(parts)}." if parts else ""
