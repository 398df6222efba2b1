"""What sets the simulated tissues apart, and how far patients and tiles of one tissue differ.

Goes in: nothing. Comes out: a profile for each tissue, in standard units of the attributes below. The tissues bear the
names of organs, and lean on what a textbook says of their nuclei, but they are stylised: real organs overlap far more
and differ in far more. Knows neither pictures nor cases.
"""

from typing import Literal, NamedTuple

AXES = ("density", "size", "variation", "elongation", "chromatin", "stroma")
"""Attributes of a tile. A profile gives the mean of each in units in which tissues lie about -1.5 to 1.5."""


class TissueProfile(NamedTuple):
    """One tissue: means of `AXES`, and weights of the arrangements diffuse, clustered, glandular and files."""

    name: str
    means: tuple[float, float, float, float, float, float]
    arrangement: tuple[float, float, float, float]
    sex: Literal["any", "male", "female"] = "any"


# Density and size move against one another, so that the nuclei's share of the area, and with it the mean colour, says
# little: a classifier must look at shapes.
PROFILES: tuple[TissueProfile, ...] = (
    TissueProfile("breast", (-0.26, 0.17, 0.77, -0.26, 0.59, 0.85), (0.06, 0.29, 0.06, 0.59), "female"),
    TissueProfile("colon", (0.34, 0.09, -0.17, 1.27, 0.17, -0.17), (0.05, 0.05, 0.88, 0.02)),
    TissueProfile("kidney", (0.51, -0.51, -0.77, -0.68, -0.59, -0.59), (0.1, 0.1, 0.78, 0.02)),
    TissueProfile("liver", (-0.85, 0.59, -0.42, -1.02, -0.17, -0.85), (0.91, 0.05, 0.02, 0.02)),
    TissueProfile("lung", (-0.59, 0.77, 1.19, 0.42, 0.85, 0.34), (0.33, 0.63, 0.02, 0.02)),
    TissueProfile("prostate", (0.17, -0.09, -0.85, -0.34, 0.85, 0.51), (0.05, 0.1, 0.83, 0.02), "male"),
    TissueProfile("skin", (0.17, 0.09, 0.17, 1.10, -0.59, 0.77), (0.3, 0.3, 0.02, 0.38)),
    TissueProfile("thyroid", (0.94, -0.77, -0.51, -0.77, 0.42, -0.09), (0.1, 0.83, 0.05, 0.02)),
    TissueProfile("bladder", (0.42, 0.26, 0.51, 0.17, -0.42, -0.51), (0.7, 0.26, 0.02, 0.02)),
    TissueProfile("ovary", (-0.17, 0.26, 0.77, 0.17, -0.34, 0.42), (0.06, 0.15, 0.77, 0.02), "female"),
    TissueProfile("stomach", (-0.34, 0.26, 0.42, -0.17, 0.17, -0.34), (0.15, 0.1, 0.73, 0.02)),
    TissueProfile("testis", (-0.17, 0.85, -0.34, -0.94, 0.68, -0.77), (0.48, 0.48, 0.02, 0.02), "male"),
)
