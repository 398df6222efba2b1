"""Worse images: what each perturbation does to pixels, and what is measured of it."""

import io
from collections.abc import Sequence

import numpy as np
import pytest
import scipy.ndimage
from PIL import Image
from skimage.color import hed_from_rgb, rgb2hed

from mint_lib.records import Case
from mint_lib.report_records import Prediction
from mint_lib.reporting.altered_images import blur, compress, decode_pixels, encode_pixels, scale_stains
from mint_lib.reporting.findings import Resampling
from mint_lib.reporting.perturbations import PerturbationsConfig, measure_perturbations, perturb

RESAMPLING = Resampling(draws=200, seed=3, confidence=0.95)


def make_tile(seed: int = 0) -> bytes:
    """Smooth spots of haematoxylin on a ground of eosin."""
    rng = np.random.default_rng(seed)
    spots = scipy.ndimage.gaussian_filter(rng.random((48, 48)), 3)
    amount = 0.2 + 1.5 * (spots > np.quantile(spots, 0.7))
    ground = np.array([0.07, 0.99, 0.11]) * 0.4
    density = amount[..., None] * np.array([0.65, 0.70, 0.29]) + ground
    return encode_pixels(np.rint(255 * np.exp(-density)).astype(np.uint8))


def test_stain_of_level_zero_gives_the_image_back() -> None:
    tile = make_tile()
    assert scale_stains(tile, 0.0, np.random.default_rng(0)) == tile


def test_stain_scales_haematoxylin_and_eosin_by_the_level_and_leaves_the_rest() -> None:
    tile = decode_pixels(make_tile())
    scaled = decode_pixels(scale_stains(make_tile(), 0.2, np.random.default_rng(1)))
    before, after = (-np.log((pixels + 1.0) / 256) @ hed_from_rgb for pixels in (tile, scaled))
    factors = np.median(after[..., :2] / before[..., :2], axis=(0, 1))
    # Pixels are rounded to 256 values before and after, which is up to a tenth of a weak stain's change.
    np.testing.assert_allclose(np.abs(factors - 1), 0.2, atol=0.03)
    np.testing.assert_allclose(after[..., 2], before[..., 2], atol=0.05)


def test_stain_agrees_with_skimage_on_which_stain_is_which() -> None:
    rng = np.random.default_rng(1)
    signs = np.random.default_rng(1).choice([-1.0, 1.0], size=2)
    before, after = rgb2hed(decode_pixels(make_tile())), rgb2hed(decode_pixels(scale_stains(make_tile(), 0.3, rng)))
    change = np.sign((after - before).mean(axis=(0, 1)))[:2]
    np.testing.assert_array_equal(change, signs)


def test_blur_agrees_with_a_gaussian_of_scipy() -> None:
    tile = decode_pixels(make_tile())
    blurred = decode_pixels(blur(make_tile(), 2.0)).astype(float)
    expected = scipy.ndimage.gaussian_filter(tile.astype(float), (2, 2, 0), mode="nearest")
    # Pillow approximates the Gaussian by box filters; two of 256 values is its error on smooth images.
    assert np.abs(blurred - expected).mean() < 2


def test_compression_writes_a_jpeg_that_is_smaller_and_worse_at_lower_quality() -> None:
    tile = decode_pixels(make_tile()).astype(float)
    files = [compress(make_tile(), quality) for quality in (50, 20, 5)]
    assert all(Image.open(io.BytesIO(file)).format == "JPEG" for file in files)
    sizes = [len(file) for file in files]
    assert sizes == sorted(sizes, reverse=True)
    errors = [np.abs(decode_pixels(file) - tile).mean() for file in files]
    assert errors == sorted(errors)


@pytest.mark.parametrize("kind", ["stain", "blur", "compression"])
def test_every_default_level_is_further_from_the_image_than_the_one_before(kind: str) -> None:
    tile = make_tile()
    levels = getattr(PerturbationsConfig(), kind)
    errors = [
        np.abs(decode_pixels(perturb(tile, kind, level, seed=4)).astype(float) - decode_pixels(tile)).mean()  # type: ignore[arg-type]
        for level in levels
    ]
    assert len(levels) == 3
    assert 0 < errors[0] < errors[1] < errors[2]


def test_measured_levels_are_of_the_same_cases_and_in_order() -> None:
    cases = [
        Case(
            case_id=f"c{number}",
            group_id=f"p{number // 2}",
            image=make_tile(number),
            label_id="TISSUE:a",
            source="test",
            synthetic=True,
        )
        for number in range(20)
    ]
    rows = [
        Prediction(
            system="orpo",
            case_id=case.case_id,
            label_id="TISSUE:a",
            ranked_ids=("TISSUE:a", "TISSUE:b"),
            probabilities=(0.9, 0.1),
        )
        for case in cases
    ]
    asked: list[Sequence[bytes]] = []

    def ask(images: Sequence[bytes]) -> list[str]:
        asked.append(images)
        share = (3 - (len(asked) - 1) % 3) / 4
        return ["TISSUE:a" if place < share * len(images) else "TISSUE:b" for place in range(len(images))]

    config = PerturbationsConfig(cases=12)
    found = measure_perturbations(cases, rows, ask, config=config, resampling=RESAMPLING)
    assert [item.kind for item in found] == ["stain", "blur", "compression"]
    assert [len(images) for images in asked] == [12] * 9
    for item in found:
        assert item.top_1.value == 1.0
        assert [level.level for level in item.levels] == list(getattr(config, item.kind))
        assert [level.top_1.value for level in item.levels] == [0.75, 0.5, 0.25]
        assert [level.change.value for level in item.levels] == [-0.25, -0.5, -0.75]
        assert all(level.top_1.n == 12 for level in item.levels)
