import pytest
import torch
from PIL import Image
from skimage import data

from mint_lib.vision.efficientnet_lite import (
    PIXEL_DEVIATION,
    PIXEL_MEAN,
    EfficientNetLiteConfig,
    EfficientNetLiteModel,
    find_embedded_weights,
    load_embedded_tower,
)

CATS = range(281, 286)  # ImageNet's classes of domestic cats
CUPS = (504, 967, 968)  # coffee mug, espresso, cup


def to_pixels(image, side):
    pixels = torch.tensor(list(Image.fromarray(image).convert("RGB").resize((side, side)).tobytes())) / 255
    pixels = pixels.view(side, side, 3).permute(2, 0, 1)
    return ((pixels - torch.tensor(PIXEL_MEAN)[:, None, None]) / torch.tensor(PIXEL_DEVIATION)[:, None, None])[None]


def classify(pixel_values):
    """ImageNet's class by our features and the package's own last layers."""
    weights = torch.load(find_embedded_weights(), weights_only=True)
    tower = EfficientNetLiteConfig(image_size=pixel_values.shape[-1], read_stages=(6,), hidden_size=640)
    with torch.inference_mode():
        # A square of the last stage is one place, so that its mean is what the stage gives.
        features = load_embedded_tower(tower)(pixel_values).last_hidden_state[..., :320] / 3
        features = features * weights["_blocks.15._bn2.weight"].abs() + weights["_blocks.15._bn2.bias"]
        x = features @ weights["_conv_head.weight"][:, :, 0, 0].T
        names = ("running_mean", "running_var", "weight", "bias")
        mean, variance, weight, bias = (weights[f"_bn1.{name}"] for name in names)
        x = torch.nn.functional.relu6((x - mean) / (variance + 1e-3).sqrt() * weight + bias).mean(dim=1)
        return int((x @ weights["_fc.weight"].T + weights["_fc.bias"]).argmax())


def test_embedded_tower_names_what_imagenet_pictures_show():
    assert classify(to_pixels(data.chelsea(), 224)) in CATS
    assert classify(to_pixels(data.coffee(), 224)) in CUPS


@pytest.mark.parametrize("side", [64, 128, 96])
def test_tower_gives_one_vector_for_each_square_of_32_pixels(side):
    tower = EfficientNetLiteModel(EfficientNetLiteConfig(image_size=side)).eval()
    found = tower(torch.zeros(2, 3, side, side))
    assert found.last_hidden_state.shape == (2, (side // 32) ** 2, 464)
    assert found.hidden_states[-1] is found.last_hidden_state


def test_tower_in_training_keeps_the_statistics_of_its_normalisation():
    tower = load_embedded_tower(EfficientNetLiteConfig(image_size=64)).train()
    before = {name: value.clone() for name, value in tower.state_dict().items()}
    tower(torch.randn(4, 3, 64, 64))
    assert all(torch.equal(value, before[name]) for name, value in tower.state_dict().items())


def test_tower_gives_mean_and_deviation_within_each_square():
    tower = load_embedded_tower(EfficientNetLiteConfig(image_size=64))
    pixels = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        found = tower(pixels).last_hidden_state / 3
        x = tower.stem(pixels)
        for block in tower.blocks:
            x = block(x)
        branches = [block.project.normalisation for block in tower.blocks[8:]]  # the last stage: one block, two added
        centre = sum(branch.bias for branch in branches)
        scale = sum(branch.weight**2 for branch in branches).sqrt()
        x = (x - centre[:, None, None]) / scale[:, None, None]
    assert x.shape == (1, 112, 4, 4)
    squares = x.unfold(2, 2, 2).unfold(3, 2, 2).flatten(4).flatten(2, 3)  # image, channel, square, place
    wanted_mean, wanted_deviation = squares.mean(dim=-1), squares.std(dim=-1, correction=0)
    means, deviations = found.split(232, dim=2)
    assert torch.allclose(means[..., -112:].transpose(1, 2), wanted_mean, atol=1e-5)
    assert torch.allclose(deviations[..., -112:].transpose(1, 2), wanted_deviation, atol=1e-2)


def test_tower_gives_figures_of_about_one_size_for_real_pictures():
    tower = load_embedded_tower(EfficientNetLiteConfig(image_size=128))
    with torch.inference_mode():
        found = torch.cat([tower(to_pixels(image, 128)).last_hidden_state for image in (data.chelsea(), data.coffee())])
    sizes = found.flatten(0, 1).pow(2).mean(dim=0).sqrt()
    assert 1 < sizes.median() < 6
    assert sizes.quantile(0.95) < 10 * sizes.quantile(0.05)
