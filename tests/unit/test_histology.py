"""Statistics of nuclei against scikit-image, and the sentence that describes them."""

import math

import numpy as np
import pytest

from mint_lib.data_sources.pannuke import TISSUES
from mint_lib.errors import InvalidInput
from mint_lib.histology.nuclei import NucleusStatistics, describe_nuclei, measure_nuclei
from mint_lib.histology.nucleus_columns import NucleusColumns, read_statistics
from mint_lib.histology.tissue_profiles import PROFILES


def draw_ellipses() -> np.ndarray:
    """Four nuclei of different size, shape and direction; ids are not consecutive."""
    mask = np.zeros((90, 120), dtype=np.int32)
    yy, xx = np.mgrid[:90, :120]
    for number, (x, y, a, b, angle) in enumerate(
        [(20, 20, 12, 6, 0.3), (60, 30, 9, 9, 0), (95, 60, 15, 4, 2), (40, 70, 5, 8, 1)]
    ):
        u = (xx - x) * math.cos(angle) + (yy - y) * math.sin(angle)
        v = (yy - y) * math.cos(angle) - (xx - x) * math.sin(angle)
        mask[(u / a) ** 2 + (v / b) ** 2 <= 1] = 3 + 5 * number
    return mask


def test_measure_nuclei_ellipses_agree_with_scikit_image() -> None:
    measure = pytest.importorskip("skimage.measure")
    mask = draw_ellipses()
    table = measure.regionprops_table(mask, properties=("area", "eccentricity"))
    found = measure_nuclei(mask, microns_per_pixel=0.5)
    # The same moments in another order of sums: float64 rounding only.
    assert found.area_um2 == pytest.approx(table["area"].mean() * 0.25, rel=1e-9)
    assert found.area_variation == pytest.approx(table["area"].std() / table["area"].mean(), rel=1e-9)
    assert found.eccentricity == pytest.approx(table["eccentricity"].mean(), rel=1e-9)
    assert found.nuclei_per_mm2 == pytest.approx(4 / (90 * 120 * 0.25e-6), rel=1e-9)
    assert found.nuclear_fraction == pytest.approx((mask > 0).mean(), rel=1e-9)


def test_measure_nuclei_single_pixel_is_round_and_empty_tile_has_none() -> None:
    mask = np.zeros((8, 8), dtype=np.int64)
    assert measure_nuclei(mask, microns_per_pixel=0.25) == NucleusStatistics(nuclei_per_mm2=0.0, nuclear_fraction=0.0)
    mask[3, 3] = 7
    assert measure_nuclei(mask, microns_per_pixel=0.25).eccentricity == 0


def test_describe_nuclei_words_follow_the_numbers_and_figures_are_asked_for() -> None:
    statistics = NucleusStatistics(
        nuclei_per_mm2=20_000, area_um2=8, eccentricity=0.9, arrangement="files", cell_shares=(("dead", 0.25),)
    )
    words = describe_nuclei(statistics, wording="words")
    assert words == "Nuclei very dense, very small, spindle-shaped, in files, 25% dead."
    figures = describe_nuclei(statistics, wording="words_and_figures")
    assert "very dense (20000 nuclei/mm2)" in figures
    assert "spindle-shaped (eccentricity 0.90)" in figures
    assert describe_nuclei(NucleusStatistics(), wording="words") == ""


def test_describe_nuclei_no_words_are_a_tissue() -> None:
    tissues = {word.casefold() for name in TISSUES for word in name.split()} | {item.name for item in PROFILES}
    for share in np.linspace(0, 1, 30):
        scale = {"nuclei_per_mm2": 30_000 * share, "area_um2": 80 * share}
        rest = dict.fromkeys(NucleusStatistics._fields[2:8], share)
        for arrangement in ("diffuse", "clustered", "glandular", "files"):
            statistics = NucleusStatistics(**scale, **rest, arrangement=arrangement)
            words = describe_nuclei(statistics, wording="words_and_figures").casefold()
            assert not tissues & set(words.replace(",", " ").replace(".", " ").split())


def test_read_statistics_pixels_become_micrometres_and_empty_cells_stay_unknown() -> None:
    columns = NucleusColumns(count="n", area="a", area_deviation="s", solidity="c")
    cells = {"n": "30", "a": "400", "s": "200", "c": " "}
    found = read_statistics(columns, cells, size=(250, 250), where="t.csv, row 2")
    assert found.nuclei_per_mm2 == pytest.approx(30 / (62.5e-3) ** 2)
    assert (found.area_um2, found.area_variation, found.solidity) == (25, 0.5, None)


@pytest.mark.parametrize("value", ["much", "nan", "-1", "inf", "1.2"])
def test_read_statistics_bad_cell_is_named_by_row_and_column_without_its_content(value: str) -> None:
    with pytest.raises(InvalidInput, match=r"t\.csv, row 7, column 'c'") as caught:
        read_statistics(NucleusColumns(solidity="c"), {"c": value}, size=(9, 9), where="t.csv, row 7")
    assert value not in str(caught.value).replace("0 to 1", "").replace("row 7", "")
