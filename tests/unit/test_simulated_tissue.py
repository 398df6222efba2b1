"""Simulated tiles: what is in a case, and how hard the problem is for colour, texture and an all-knowing observer."""

import io
import time
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from mint_lib.case_rows import Row
from mint_lib.data import DataConfig, prepare_cases
from mint_lib.data_sources.simulated_tissue import SimulatedTissue
from mint_lib.errors import InvalidInput
from mint_lib.histology.nuclei import ARRANGEMENTS
from mint_lib.histology.tile_drawing import draw_tile
from mint_lib.histology.tissue_model import VariationConfig, draw_attributes, draw_patient
from mint_lib.histology.tissue_profiles import PROFILES
from mint_lib.records import SPLITS, Case
from mint_lib.store import Store

NUM_LABELS, NUM_PATIENTS, NUM_TILES = 8, 24, 4


def read(seed: int = 0, **config: Any) -> list[Row]:
    source = SimulatedTissue(SimulatedTissue.Config.model_validate({"patients_per_label": 2} | config))
    return [row for row in source.read(np.random.default_rng(seed)) if isinstance(row, Row)]


def test_read_same_seed_gives_same_rows_and_another_seed_others() -> None:
    assert read() == read()
    assert [row.image for row in read()] != [row.image for row in read(1)]


def test_read_every_tile_is_synthetic_described_and_of_the_size_asked_for() -> None:
    rows = read(num_labels=12, size_pixels=64)
    assert len(rows) == 12 * 2 * 4
    assert all(row.synthetic and row.source == "simulated_tissue" for row in rows)
    assert {Image.open(io.BytesIO(row.image or b"")).size for row in rows} == {(64, 64)}
    assert sum(row.text is not None for row in rows) > 0.95 * len(rows)
    names = [profile.name for profile in PROFILES]
    assert not [row for row in rows if any(name in (row.text or "").casefold() for name in names)]


def test_read_patient_keeps_sex_site_and_stain_over_its_tiles() -> None:
    rows = read(tiles_per_patient=3)
    by_patient: dict[str, list[Row]] = {}
    for row in rows:
        by_patient.setdefault(row.group_id, []).append(row)
    assert {len(tiles) for tiles in by_patient.values()} == {3}
    assert all(len({tuple(tile.attributes.items()) for tile in tiles}) == 1 for tiles in by_patient.values())
    assert all(len({tile.label_id for tile in tiles}) == 1 for tiles in by_patient.values())
    sexes = {label: {row.attributes["sex"] for row in rows if row.label_id == f"TISSUE:{label}"} for label in
             ("prostate", "breast")}  # fmt: skip
    assert sexes == {"prostate": {"male"}, "breast": {"female"}}


def test_read_descriptions_miss_and_err_as_often_as_the_config_says() -> None:
    perfect = read(patients_per_label=12, size_pixels=32, missing_share=0, wrong_share=0)
    assert all((row.text or "").count(",") == 6 for row in perfect)
    missing = read(patients_per_label=12, size_pixels=32, missing_share=0.15, wrong_share=0)
    shares = [((row.text or "").count(",") + (row.text is not None)) / 7 for row in missing]
    # 7 attributes of 384 tiles: the standard error is 0.007.
    assert np.mean(shares) == pytest.approx(0.85, abs=0.03)
    assert [row.text for row in read(size_pixels=32, missing_share=0, wrong_share=1)] != [
        row.text for row in read(size_pixels=32, missing_share=0, wrong_share=0)
    ]


def test_labels_can_be_chosen_and_unknown_ones_are_named() -> None:
    chosen = SimulatedTissue(SimulatedTissue.Config(label_ids=("TISSUE:testis", "TISSUE:liver"))).labels()
    assert [(label.id, label.name) for label in chosen] == [("TISSUE:testis", "testis"), ("TISSUE:liver", "liver")]
    assert len(SimulatedTissue(SimulatedTissue.Config()).labels()) == 8
    source = SimulatedTissue(SimulatedTissue.Config(label_ids=("TISSUE:moon", "TISSUE:liver")))
    with pytest.raises(InvalidInput, match=r"TISSUE:moon cannot be simulated.*TISSUE:breast"):
        source.labels()


def test_prepare_cases_default_tissue_splits_by_patient_and_says_that_it_is_drawn(store: Store) -> None:
    config = {"patients_per_label": 10, "tiles_per_patient": 2, "size_pixels": 32}
    values = {"name": "tissue", "seed": 1, "source": "simulated_tissue", "config": config}
    reference = prepare_cases(DataConfig.model_validate(values), store=store)
    groups = [{case.group_id for case in store.read_rows(reference, split, Case)} for split in SPLITS]
    assert sum(map(len, groups)) == len(set().union(*groups)) == 80
    assert "not real histology" in store.record(reference).notes[0]


def test_draw_tile_is_quick() -> None:
    """At most 8 ms a tile on an idle core; twice that here, because the cores of a test machine are shared."""
    config = VariationConfig()
    rng = np.random.default_rng(0)
    patients = [draw_patient(profile, config=config, rng=rng) for profile in PROFILES[:8]]
    draw_tile(patients[0], draw_attributes(patients[0], config=config, rng=rng), size_pixels=128, rng=rng)
    started = time.process_time()
    for patient in patients * 5:
        draw_tile(patient, draw_attributes(patient, config=config, rng=rng), size_pixels=128, rng=rng)
    assert (time.process_time() - started) / 40 < 0.016


class Baselines(NamedTuple):
    """Features of the same tiles by what they see, label and patient's number within the label."""

    colour: np.ndarray
    texture: np.ndarray
    oracle: np.ndarray
    labels: np.ndarray
    patients: np.ndarray


@pytest.fixture(scope="module")
def baselines() -> Baselines:
    """768 tiles of 192 patients at the default variation."""
    pytest.importorskip("sklearn")
    pytest.importorskip("skimage")
    config = VariationConfig()
    found: list[tuple[list[float], list[float], list[float], int, int]] = []
    for label in range(NUM_LABELS):
        for number in range(NUM_PATIENTS):
            rng = np.random.default_rng([0, label, number])
            patient = draw_patient(PROFILES[label], config=config, rng=rng)
            for _ in range(NUM_TILES):
                tile = draw_attributes(patient, config=config, rng=rng)
                encoded, _ = draw_tile(patient, tile, size_pixels=128, rng=rng)
                pixels = np.asarray(Image.open(io.BytesIO(encoded)))
                latent = [*np.log(tile[:3]), *tile[3:6], *(float(tile.arrangement == item) for item in ARRANGEMENTS)]
                found.append((measure_colour(pixels), measure_texture(pixels), latent, label, number))
    return Baselines(*(np.array(column) for column in zip(*found, strict=True)))


def measure_colour(pixels: np.ndarray) -> list[float]:
    """Means and deviations of the optical density, and a histogram of each channel: nothing of place."""
    density = -np.log((pixels.reshape(-1, 3) + 1.0) / 256)
    histograms = [np.histogram(pixels[..., c], 8, (0, 256))[0] / pixels[..., c].size for c in range(3)]
    return [*density.mean(0), *density.std(0), *np.concatenate(histograms)]


def measure_texture(pixels: np.ndarray) -> list[float]:
    """LBP and GLCM of the red channel's density (haematoxylin absorbs red, eosin hardly), and what Otsu segments."""
    from skimage.feature import graycomatrix, graycoprops, local_binary_pattern
    from skimage.filters import threshold_otsu
    from skimage.measure import label, regionprops_table

    density = -np.log((pixels[..., 0] + 1.0) / 256)
    reach = np.quantile(density, 0.99) - density.min() + 1e-6
    grey = (np.clip((density - density.min()) / reach, 0, 1) * 255).astype(np.uint8)
    features: list[float] = []
    for radius in (1, 3):
        patterns = local_binary_pattern(grey, 8, radius, "uniform")
        features += list(np.histogram(patterns, 10, (0, 10))[0] / grey.size)
    matrix = graycomatrix(grey // 16, [1, 3, 6], [0, np.pi / 2], 16, symmetric=True, normed=True)
    for name in ("contrast", "homogeneity", "energy", "correlation"):
        features += list(graycoprops(matrix, name).mean(1))
    nuclei = regionprops_table(label(grey > threshold_otsu(grey)), properties=("area", "eccentricity"))
    large = nuclei["area"] >= 12
    areas = nuclei["area"][large]
    return [*features, float(large.sum()), areas.mean(), areas.std(), nuclei["eccentricity"][large].mean()]


def score(features: np.ndarray, labels: np.ndarray, is_train: np.ndarray, *, memorises: bool = False) -> float:
    """Top-1 of a logistic regression on the tiles that are not for training, or of a kernel machine that memorises."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVC

    model = make_pipeline(StandardScaler(), SVC(C=10) if memorises else LogisticRegression(C=0.3, max_iter=500))
    return float(model.fit(features[is_train], labels[is_train]).score(features[~is_train], labels[~is_train]))


def test_tiles_are_as_hard_as_they_should_be(baselines: Baselines) -> None:
    """By patient: colour at most twice the majority's 1/8, texture .4 to .6, the oracle at most .95."""
    by_patient = baselines.patients < 0.7 * NUM_PATIENTS
    assert score(baselines.colour, baselines.labels, by_patient) <= 0.25
    assert 0.4 <= score(baselines.texture, baselines.labels, by_patient) <= 0.6
    assert 0.75 <= score(baselines.oracle, baselines.labels, by_patient) <= 0.95


def test_random_tile_split_flatters_every_classifier_that_sees_the_stain(baselines: Baselines) -> None:
    """Stain tells the patient, and so, in a random split of tiles, the tissue."""
    by_patient = baselines.patients < 0.7 * NUM_PATIENTS
    at_random = np.random.default_rng(0).random(len(by_patient)) < 0.7
    both = np.concatenate([baselines.colour, baselines.texture], axis=1)
    for features, least in ((baselines.colour, 0.3), (both, 0.1)):
        honest = score(features, baselines.labels, by_patient, memorises=True)
        leaking = score(features, baselines.labels, at_random, memorises=True)
        assert leaking > honest + least
