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
    with torch.inference_mode():
        features = load_embedded_tower(pixel_values.shape[-1])(pixel_values).last_hidden_state
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
    assert found.last_hidden_state.shape == (2, (side // 32) ** 2, 320)
    assert found.hidden_states[-1] is found.last_hidden_state


def test_tower_in_training_keeps_the_statistics_of_its_normalisation():
    tower = load_embedded_tower(64).train()
    before = {name: value.clone() for name, value in tower.state_dict().items()}
    tower(torch.randn(4, 3, 64, 64))
    assert all(torch.equal(value, before[name]) for name, value in tower.state_dict().items())
