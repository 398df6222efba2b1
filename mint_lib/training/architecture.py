"""What a student's `config.json` says of its size: layers, widths and parameters, without any weights.

Goes in: a folder with a config. Comes out: an `Architecture`, read off a model that is built on PyTorch's meta device,
where tensors have shapes and no memory; so every count is the real model's. It does not know how the student is
trained.
"""

import dataclasses
import pathlib
import re
from typing import Any, Literal

from mint_lib.errors import InvalidInput
from mint_lib.training.adapter import IMAGE_PARTS

Part = Literal["language", "vision", "projector"]
_NEEDED = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
_BLOCK = re.compile(r".*\.(?:layers|blocks)\.(\d+)\.")


@dataclasses.dataclass(frozen=True)
class LinearLayer:
    """One matrix, without the output layer's."""

    name: str
    """Last part of its path, such as `q_proj`."""
    num_inputs: int
    num_outputs: int
    part: Part
    block: str
    """Path of the transformer layer that it belongs to; empty outside of any."""
    layer: int | None
    """Number of the decoder layer that it belongs to; None outside the decoder."""


@dataclasses.dataclass(frozen=True)
class Tower:
    """What turns pixels into features."""

    hidden: int
    feed_forward: int
    num_layers: int
    patches_per_place: int | None
    """Patches behind each image token in the prompt; None if images take no places and are attended to instead."""
    patches_per_image: int
    """Patches of one image where images take no places (all tiles, padding included); otherwise 0."""


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A student's sizes."""

    num_parameters: int
    num_projector_parameters: int
    num_layers: int
    """Decoder layers."""
    num_cross_layers: int
    """Those of them that attend to images instead of to the text."""
    hidden: int
    num_heads: int
    query: int
    """Outputs of `q_proj`: heads x their size."""
    key_value: int
    """Outputs of `k_proj`."""
    feed_forward: int
    """Inputs of `down_proj`."""
    vocabulary: int
    head_is_tied: bool
    norm_widths: tuple[int, ...]
    """For each norm of a decoder layer, the values of a place that it normalises."""
    linear_layers: tuple[LinearLayer, ...]
    tower: Tower | None

    @property
    def head_size(self) -> int:
        """Values of a query's head."""
        return self.query // self.num_heads


def read_architecture(folder: pathlib.Path, *, reads: Literal["text", "image"], num_layers: int | None) -> Architecture:
    """The sizes of the model whose `config.json` lies in `folder`; only its first `num_layers` if that is given.

    Raises:
        InvalidInput: the model is of a family whose layers are built otherwise than these sizes can say.
    """
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if num_layers is not None:
        config.get_text_config().num_hidden_layers = num_layers
    auto = transformers.AutoModelForCausalLM if reads == "text" else transformers.AutoModelForImageTextToText
    level = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    try:
        with torch.device("meta"):
            model = auto.from_config(config)
    finally:
        transformers.utils.logging.set_verbosity(level)
    return measure_architecture(model)


def measure_architecture(model: Any) -> Architecture:
    """The sizes of a `transformers` model without an adapter. Raises as `read_architecture` does."""
    import torch

    text_config, decoder, head = model.config.get_text_config(), model.get_decoder(), model.get_output_embeddings()
    decoder_path = next(path for path, module in model.named_modules() if module is decoder)
    parts = IMAGE_PARTS.get(model.config.model_type)
    if parts is None and text_config is not model.config:
        raise InvalidInput(
            f"{type(model).__name__} is of a family that cannot be estimated. Image students are of the families "
            f"{', '.join(IMAGE_PARTS)}."
        )
    projector_path = parts.projector if parts else None
    linear_layers = tuple(
        _describe(path, module, decoder_path=decoder_path, projector_path=projector_path)
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    )
    projector = model.get_submodule(projector_path).parameters() if projector_path else ()
    by_name = {layer.name: layer for layer in linear_layers if layer.part == "language"}
    if set(by_name) != _NEEDED:
        raise InvalidInput(
            f"{type(model).__name__} is of a family that cannot be estimated: its decoder has the linear layers "
            f"{', '.join(sorted(by_name)) or '(none)'}. Estimated are decoders of {', '.join(sorted(_NEEDED))}."
        )
    return Architecture(
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        num_projector_parameters=sum(parameter.numel() for parameter in projector),
        num_layers=len(decoder.layers),
        num_cross_layers=sum(index < len(decoder.layers) for index in _list_cross_layers(text_config)),
        hidden=text_config.hidden_size,
        num_heads=text_config.num_attention_heads,
        query=by_name["q_proj"].num_outputs,
        key_value=by_name["k_proj"].num_outputs,
        feed_forward=by_name["down_proj"].num_inputs,
        vocabulary=head.out_features,
        head_is_tied=head.weight is model.get_input_embeddings().weight,
        norm_widths=_list_norm_widths(decoder.layers[0], by_name),
        linear_layers=linear_layers,
        tower=_measure_tower(model, linear_layers),
    )


def _describe(path: str, module: Any, *, decoder_path: str, projector_path: str | None) -> LinearLayer:
    part: Part = "language" if path.startswith(f"{decoder_path}.") else "vision"
    if projector_path and f"{path}.".startswith(f"{projector_path}."):
        part = "projector"
    found = _BLOCK.match(path)
    layer = int(found[1]) if found and part == "language" else None
    name = path.rpartition(".")[2]
    return LinearLayer(name, module.in_features, module.out_features, part, found[0] if found else "", layer)


def _list_cross_layers(text_config: Any) -> list[int]:
    return list(getattr(text_config, "cross_attention_layers", None) or [])


def _list_norm_widths(layer: Any, by_name: dict[str, LinearLayer]) -> tuple[int, ...]:
    """A norm of queries or keys runs over all heads of a place."""
    widths = []
    for name, module in layer.named_modules():
        if "Norm" in type(module).__name__:
            per_head = {"q_norm": by_name["q_proj"], "k_norm": by_name["k_proj"]}.get(name.rpartition(".")[2])
            widths.append(per_head.num_outputs if per_head else module.weight.numel())
    return tuple(widths)


def _measure_tower(model: Any, linear_layers: tuple[LinearLayer, ...]) -> Tower | None:
    vision = getattr(model.config, "vision_config", None)
    inside = [layer for layer in linear_layers if layer.part == "vision"]
    if vision is None or not inside:
        return None
    patches_per_image, patches_per_place = 0, None
    if _list_cross_layers(model.config.get_text_config()):
        patches_per_image = vision.max_num_tiles * ((vision.image_size // vision.patch_size) ** 2 + 1)
    else:
        side = getattr(vision, "spatial_merge_size", None) or getattr(model.config, "scale_factor", None) or 1
        patches_per_place = side**2
    return Tower(
        hidden=inside[0].num_inputs,
        feed_forward=max(layer.num_inputs for layer in inside),
        num_layers=len({layer.block for layer in inside if layer.block}),
        patches_per_place=patches_per_place,
        patches_per_image=patches_per_image,
    )
