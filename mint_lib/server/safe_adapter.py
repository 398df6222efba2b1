"""An adapter's files, looked at before they are loaded: only a plain LoRA that fits its base is let through.

Goes in: the folder of a PEFT adapter and the facts of its base. Comes out: nothing, or the reason for refusing it. An
image student's projector may be trained too, as a whole. It loads no tensor and imports neither torch nor PEFT.
"""

import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from mint_lib.server.safe_files import TensorFacts, check_safetensors, read_json_object, refuse

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MAX_RANK = 4096
_MAX_LAYERS = 10_000
_TENSOR = re.compile(r"base_model\.model\.(?P<module>\w+(?:\.\w+)*)\.lora_(?P<side>[AB])\.weight", re.ASCII)
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_NAME = re.compile(r"\w+(?:\.\w+)*", re.ASCII)


def _is_names(value: object) -> bool:
    """A list of module names. PEFT takes a string for a regular expression, which is not let through."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(item, str) and _NAME.fullmatch(item) for item in value)
    )


def _is_layers(value: object) -> bool:
    items = value if isinstance(value, list) else [value]
    return value is None or all(type(item) is int and 0 <= item < _MAX_LAYERS for item in items)


def _is_number(value: object) -> bool:
    return type(value) in (int, float)


_CHECKS: Mapping[str, Callable[[Any], bool]] = {
    "peft_type": lambda value: value == "LORA",
    "task_type": lambda value: value == "CAUSAL_LM",
    "base_model_name_or_path": lambda value: isinstance(value, str),
    "peft_version": lambda value: value is None or isinstance(value, str),
    "revision": lambda value: value is None or isinstance(value, str),
    "inference_mode": lambda value: isinstance(value, bool),
    "init_lora_weights": lambda value: isinstance(value, bool),
    "use_rslora": lambda value: isinstance(value, bool),
    "r": lambda value: type(value) is int and 1 <= value <= MAX_RANK,
    "lora_alpha": lambda value: _is_number(value) and value > 0,
    "lora_dropout": lambda value: _is_number(value) and 0 <= value < 1,
    "target_modules": _is_names,
    "layers_to_transform": _is_layers,
    "layers_pattern": lambda value: value is None or value == "layers",
}
_REQUIRED = ("peft_type", "base_model_name_or_path", "r", "lora_alpha", "target_modules")
_INERT: Mapping[str, tuple[object, ...]] = {
    "bias": ("none",),
    "megatron_core": ("megatron.core",),
    "qalora_group_size": (16,),
}
"""Keys that do nothing at these values. At others some of them name modules to import or files to read."""
_OFF = frozenset(
    [
        "alora_invocation_tokens",
        "alpha_pattern",
        "arrow_config",
        "auto_mapping",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "fan_in_fan_out",
        "kasa_config",
        "layer_replication",
        "loftq_config",
        "lora_bias",
        "lora_ga_config",
        "megatron_config",
        "monteclora_config",
        "rank_pattern",
        "target_parameters",
        "trainable_token_indices",
        "use_bdlora",
        "use_dora",
        "use_qalora",
        "velora_config",
    ]
)
"""Further fields of PEFT 0.21's LoraConfig, which must be null, false or empty."""


class ImageParts(NamedTuple):
    """Where in an image student its parts lie."""

    decoder: str
    """Beginning of the names in it, with the dot."""
    projector: str
    """Name of the module."""


def check_adapter(
    folder: pathlib.Path,
    *,
    base_model: str,
    num_layers: int,
    base_tensors: Mapping[str, TensorFacts],
    image_parts: ImageParts | None = None,
) -> None:
    """Refuse an adapter that is not a plain LoRA of this base.

    `base_model` is the base's name as a student's config spells it, `num_layers` the decoder's layers that it is served
    with, and `base_tensors` what it consists of, by the model's names; `image_parts` are those of an image student.

    Raises:
        InvalidInput: another file lies in the folder, a key of the config is unknown or set to what could load
            something, or a tensor is neither the A or B side of a linear layer of the base nor of its projector.
    """
    foreign = sorted(path.name for path in folder.iterdir() if path.name not in (CONFIG, WEIGHTS))
    if foreign:
        refuse(folder / CONFIG, f"{len(foreign)} other files lie beside it and {WEIGHTS}")
    config = read_json_object(folder / CONFIG)
    _check_config(config, folder / CONFIG, projector=image_parts.projector if image_parts is not None else None)
    if config["base_model_name_or_path"] != base_model:
        refuse(folder / CONFIG, f"it was made for another base than {base_model}")
    if not (folder / WEIGHTS).is_file():
        refuse(folder / WEIGHTS, "it is missing; weights in other formats are never opened")
    found = {name: facts.shape for name, facts in check_safetensors(folder / WEIGHTS).items()}
    projector = _expect_projector(config, base_tensors)
    if not all(_TENSOR.fullmatch(name) or name in projector for name in found):
        refuse(folder / WEIGHTS, "it holds tensors that are not the A or B side of a linear layer")
    expected = _expect_tensors(
        config, num_layers=num_layers, base_tensors=base_tensors, decoder=image_parts.decoder if image_parts else ""
    )
    expected |= projector
    if found != expected:
        wrong = len(found.keys() ^ expected.keys()) + sum(
            found[name] != expected[name] for name in found.keys() & expected
        )
        refuse(
            folder / WEIGHTS,
            f"{wrong} of its tensors are missing, are of no adapted layer, or do not have the shape that rank "
            f"{config['r']} gives them on {base_model}",
        )


def _check_config(config: Mapping[str, Any], path: pathlib.Path, *, projector: str | None) -> None:
    missing = [key for key in _REQUIRED if key not in config]
    if missing:
        refuse(path, f"it lacks {', '.join(missing)}")
    if config.get("use_dora") is True:
        refuse(path, "it is weight-decomposed (DoRA), which is not served; align with lora.update: additive")
    if config.get("modules_to_save") and config["modules_to_save"] != [projector]:
        if projector is not None:
            refuse(path, f"it trains whole modules other than the projector ({projector})")
        refuse(path, "it trains whole modules too (lora.projector: trained), and its base reads text only")
    for key, value in config.items():
        if key == "modules_to_save":
            continue
        if key in _CHECKS:
            is_allowed = _CHECKS[key](value)
        elif key in _INERT:
            is_allowed = value in _INERT[key]
        elif key in _OFF:
            is_allowed = value is None or value is False or value == {} or value == []
        else:
            refuse(path, "it holds a key that is not on the list of known ones")
        if not is_allowed:
            refuse(path, f"{key} has a value that is not allowed")


def _expect_projector(config: Mapping[str, Any], base_tensors: Mapping[str, TensorFacts]) -> dict[str, tuple[int, ...]]:
    """Name and shape of the projector's tensors, if it was trained."""
    return {
        f"base_model.model.{name}": facts.shape
        for module in config.get("modules_to_save") or ()
        for name, facts in base_tensors.items()
        if name.startswith(f"{module}.")
    }


def _expect_tensors(
    config: Mapping[str, Any], *, num_layers: int, base_tensors: Mapping[str, TensorFacts], decoder: str
) -> dict[str, tuple[int, ...]]:
    """Name and shape of the tensors that PEFT looks for, given which layers the config adapts."""
    targets, rank = tuple(config["target_modules"]), config["r"]
    layers = config.get("layers_to_transform")
    adapted = range(_MAX_LAYERS) if layers is None else layers if isinstance(layers, list) else [layers]
    saved = tuple(f"{module}." for module in config.get("modules_to_save") or ())
    expected: dict[str, tuple[int, ...]] = {}
    for name, facts in base_tensors.items():
        module, _, kind = name.rpartition(".")
        is_target = any(module == target or module.endswith("." + target) for target in targets)
        layer = _LAYER.search(module)
        # A student that was cut lacks layers of its decoder; a vision tower stays whole.
        num_kept = num_layers if module.startswith(decoder) else _MAX_LAYERS
        in_layers = layers is None if layer is None else int(layer[1]) in adapted and int(layer[1]) < num_kept
        is_linear = kind == "weight" and len(facts.shape) == 2 and not name.startswith(saved)
        if is_linear and is_target and in_layers:
            num_outputs, num_inputs = facts.shape
            expected[f"base_model.model.{module}.lora_A.weight"] = (rank, num_inputs)
            expected[f"base_model.model.{module}.lora_B.weight"] = (num_outputs, rank)
    return expected
