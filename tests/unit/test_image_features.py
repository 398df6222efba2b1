"""The image baselines: what each kind of figure sees and does not see, and that a read-back model scores alike."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from mint_lib.errors import IntegrityError, InvalidInput
from mint_lib.records import Case, Label
from mint_lib.teachers.image_features import ImageFeaturesTeacher
from mint_lib.vision.colour_texture import describe_colours, describe_texture
from mint_lib.vision.tile_variation import vary_tile
from mint_lib.vision.tower import FrozenTower

LABELS = [Label(id=f"T:{number}", name=f"tissue {number}") for number in range(3)]
PURPLE, PINK = np.array([90, 50, 140]), np.array([235, 180, 205])


def draw_tile(rng, *, radius, share=0.12, stain=1.0):
    """Round nuclei of one radius on stroma, about the same share of the tile whatever the radius."""
    down, right = np.mgrid[:96, :96]
    mask = np.zeros((96, 96), dtype=bool)
    while mask.mean() < share:
        y, x = rng.integers(radius, 96 - radius, size=2)
        mask |= (down - y) ** 2 + (right - x) ** 2 <= radius**2
    pixels = np.where(mask[..., None], PURPLE, PINK) + rng.normal(0, 4, size=(96, 96, 3))
    faded = 255 * (np.clip(pixels, 1, 255) / 255) ** stain
    return faded.clip(0, 255).astype(np.uint8).transpose(2, 0, 1)


def encode(tile):
    buffer = io.BytesIO()
    Image.fromarray(tile.transpose(1, 2, 0)).save(buffer, "png")
    return buffer.getvalue()


def make_cases(count, *, seed, by):
    """The label is the nuclei's size, or the strength of the stain."""
    rng = np.random.default_rng(seed)
    cases = []
    for number in range(count):
        column = number % 3
        tile = draw_tile(rng, radius=(3, 6, 12)[column]) if by == "size" else None
        tile = draw_tile(rng, radius=6, stain=(0.7, 1.0, 1.4)[column]) if tile is None else tile
        cases.append(
            Case(
                case_id=f"case-{seed}-{number}",
                group_id=f"case-{seed}-{number}",
                image=encode(tile),
                label_id=LABELS[column].id,
                source="toy",
                synthetic=True,
            )
        )
    return cases


def make_teacher(*, labels=LABELS, **config):
    return ImageFeaturesTeacher(
        ImageFeaturesTeacher.Config.model_validate({"image_size": 96, **config}), labels, seed=1
    )


def share_right(teacher, cases):
    truth = np.array([int(case.label_id[-1]) for case in cases])
    return float((teacher.score(cases).argmax(axis=1) == truth).mean())


@pytest.mark.parametrize("features", ["texture", "tower"])
def test_image_features_of_places_tell_the_size_of_nuclei(features):
    teacher = make_teacher(features=features)
    report = teacher.fit(make_cases(36, seed=1, by="size"), make_cases(15, seed=2, by="size"))
    assert share_right(teacher, make_cases(30, seed=3, by="size")) > 0.9
    assert report["validation_nll"][f"{report['penalty']:g}"] == min(report["validation_nll"].values())


def test_image_features_colour_tells_the_stain():
    teacher = make_teacher(features="colour")
    teacher.fit(make_cases(36, seed=1, by="stain"), make_cases(15, seed=2, by="stain"))
    assert share_right(teacher, make_cases(30, seed=3, by="stain")) > 0.9


def test_image_features_colour_does_not_change_where_pixels_change_places():
    rng = np.random.default_rng(0)
    tile = draw_tile(rng, radius=6)
    shuffled = rng.permutation(tile.reshape(3, -1), axis=1).reshape(tile.shape)
    assert np.allclose(describe_colours(tile), describe_colours(shuffled), rtol=1e-9)
    assert not np.allclose(describe_texture(tile), describe_texture(shuffled), rtol=0.1)


def test_image_features_texture_hardly_changes_with_the_strength_of_the_stain():
    rng = np.random.default_rng(0)
    small, large = (draw_tile(rng, radius=radius) for radius in (3, 12))
    pale = (255 * (small / 255) ** 0.8).astype(np.uint8)
    figures = [describe_texture(tile) for tile in (small, pale, large)]
    scale = np.abs(figures[0]) + 1e-3
    by_stain, by_size = (np.median(np.abs(other - figures[0]) / scale) for other in figures[1:])
    assert by_stain < by_size / 2


@pytest.mark.parametrize("tile", [np.full((3, 64, 64), 200, dtype=np.uint8), np.zeros((3, 64, 64), dtype=np.uint8)])
def test_image_features_of_a_tile_without_nuclei_are_finite(tile):
    assert np.isfinite(describe_texture(tile)).all()
    assert np.isfinite(describe_colours(tile)).all()


def test_image_features_nuclei_are_counted_and_measured():
    tile = np.full((3, 96, 96), 235, dtype=np.uint8)
    for y, x in ((20, 20), (20, 70), (70, 45)):
        tile[:, y - 6 : y + 6, x - 6 : x + 6] = PURPLE[:, None, None]
    share, count, mean_area = describe_texture(tile)[-12:-9]
    assert count == 3
    assert 12**2 <= mean_area * 96**2 <= 14**2  # smoothing moves an edge by less than a pixel
    assert share == pytest.approx(3 * mean_area)


def test_image_features_scores_are_those_of_scikit_learn():
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    train, other = make_cases(36, seed=1, by="stain"), make_cases(15, seed=2, by="stain")
    teacher = make_teacher(features="colour", penalties=[10.0])
    teacher.fit(train, other)
    figures, unseen = (
        [describe_colours(np.asarray(Image.open(io.BytesIO(case.image))).transpose(2, 0, 1)) for case in cases]
        for cases in (train, other)
    )
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
    wanted = model.fit(figures, [case.label_id for case in train]).predict_log_proba(unseen)
    scores = teacher.score(other)
    # Histogram bins that are constant in train are divided by 1 there and by a tiny number here; others agree.
    assert np.allclose(scores - np.log(np.exp(scores).sum(axis=1, keepdims=True)), wanted, atol=1e-6)


def test_image_features_label_without_a_training_case_never_comes_first_and_two_labels_are_enough():
    train = [case for case in make_cases(36, seed=1, by="stain") if case.label_id != "T:1"]
    teacher = make_teacher(features="colour")
    teacher.fit(train, [case for case in make_cases(15, seed=2, by="stain") if case.label_id != "T:1"])
    cases = [case for case in make_cases(30, seed=3, by="stain") if case.label_id != "T:1"]
    assert share_right(teacher, cases) > 0.9
    scores = teacher.score(cases)
    assert np.allclose(scores[:, 1], -np.log(24))
    assert not (scores.argmax(axis=1) == 1).any()


@pytest.mark.parametrize("features", ["colour", "tower"])
def test_image_features_read_back_scores_alike_to_the_bit(features, tmp_path):
    teacher = make_teacher(features=features)
    teacher.fit(make_cases(12, seed=1, by="stain"), make_cases(6, seed=2, by="stain"))
    teacher.save(tmp_path)
    cases = make_cases(6, seed=3, by="stain")
    loaded = ImageFeaturesTeacher.load(tmp_path, LABELS)
    assert np.array_equal(loaded.score(cases), teacher.score(cases))
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    again = tmp_path / "again"
    again.mkdir()
    loaded.save(again)
    assert all(
        (again / name).read_bytes() == (tmp_path / name).read_bytes() for name in ("config.json", "model.safetensors")
    )
    with pytest.raises(InvalidInput, match="not the 3 given"):
        ImageFeaturesTeacher.load(tmp_path, LABELS[::-1])
    if features == "tower":
        path = tmp_path / "config.json"
        path.write_text(path.read_text().replace(teacher._tower.digest, "sha256:" + "0" * 64))
        with pytest.raises(IntegrityError, match="fitted with sha256:000"):
            ImageFeaturesTeacher.load(tmp_path, LABELS)


def test_image_features_case_without_an_image_is_left_open():
    train = make_cases(12, seed=1, by="stain")
    train.append(train[0].model_copy(update={"image": None, "text": "no picture"}))
    teacher = make_teacher(features="colour")
    assert teacher.fit(train, make_cases(6, seed=2, by="stain"))["num_train"] == 12
    assert not teacher.score(train[-1:]).any()


def test_image_features_without_labelled_images_are_refused():
    with pytest.raises(InvalidInput, match="needs labelled images of 2 labels"):
        make_teacher(features="colour").fit(make_cases(1, seed=1, by="stain"), make_cases(3, seed=2, by="stain"))


@pytest.mark.parametrize(
    "config",
    [
        {"features": "shape"},
        {"features": "tower", "image_size": 100},
        {"features": "colour", "tower": "somebody/model"},
        {"features": "colour", "penalties": []},
        {"features": "colour", "penalties": [0.0]},
    ],
)
def test_image_features_config_that_fits_no_model_is_refused(config):
    with pytest.raises(ValidationError):
        make_teacher(**config)


def test_embedded_tower_describes_a_tile_by_the_mean_over_its_squares():
    tiles = [draw_tile(np.random.default_rng(seed), radius=6) for seed in range(3)]
    tower = FrozenTower(None, revision=None, image_size=96)
    described = tower.describe(tiles)
    assert described.shape == (3, tower.num_figures)
    with torch.no_grad():
        vectors = tower._model((torch.tensor(np.stack(tiles)).float() - 127) / 128).last_hidden_state
    assert vectors.shape[1] == 9
    assert np.allclose(described, vectors.mean(dim=1), atol=1e-4)


def test_tower_of_a_clip_folder_gives_the_mean_of_its_last_vectors(tmp_path):
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

    torch.manual_seed(0)
    layers = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**layers, "image_size": 32, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config={**layers, "vocab_size": 9}, vision_config=vision)).save_pretrained(tmp_path)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor.save_pretrained(tmp_path)
    tiles = [draw_tile(np.random.default_rng(seed), radius=6) for seed in range(2)]
    tower = FrozenTower(str(tmp_path), revision=None, image_size=96)
    pixels = processor(images=[Image.fromarray(tile.transpose(1, 2, 0)) for tile in tiles], return_tensors="pt")
    with torch.no_grad():
        vectors = CLIPModel.from_pretrained(tmp_path).vision_model(**pixels).last_hidden_state
    assert np.allclose(tower.describe(tiles), vectors.mean(dim=1), atol=1e-5)


def test_tower_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(InvalidInput, match="cannot be read as a vision model"):
        FrozenTower(str(tmp_path), revision=None, image_size=96)


def test_varied_tile_keeps_shape_and_nuclei_and_changes_stain():
    tile = draw_tile(np.random.default_rng(0), radius=6)
    varied = [vary_tile(tile, np.random.default_rng(seed)) for seed in range(6)]
    assert all(item.shape == tile.shape and item.dtype == np.uint8 for item in varied)
    assert len({item.tobytes() for item in varied}) == 6
    share = describe_texture(tile)[-12]
    assert [describe_texture(item)[-12] for item in varied] == pytest.approx([share] * 6, rel=0.1)
    colours = np.array([describe_colours(item)[0] for item in varied])
    assert 0.02 < np.ptp(colours) / colours.mean() < 0.3
