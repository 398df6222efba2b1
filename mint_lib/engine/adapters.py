"""Adapters: several LoRA adapters on one base, added and removed while the base stays where it is.

Goes in: folders of PEFT adapters. Comes out: the names by which a forward pass applies them. Only plain LoRA on linear
layers inside the decoder is taken, from safetensors, and a folder that does not fit the base leaves nothing behind. It
knows no requests; all calls come from one thread.
"""

import contextlib
import itertools
import json
import pathlib
from typing import TYPE_CHECKING, Any

from mint_lib.engine.forward import BASE, ForwardPass
from mint_lib.engine.image_features import sees_images
from mint_lib.errors import InvalidInput

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_WEIGHTS_FILE = "adapter_model.safetensors"
_KEY_PREFIX = "base_model.model."
# What plain LoRA needs, and fields that say something about it without changing it. Any other field that is set stands
# for a method that the engine has not been tried with.
_PLAIN_FIELDS = {
    "alpha_pattern",
    "base_model_name_or_path",
    "bias",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_dropout",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "target_modules",
    "task_type",
    "use_rslora",
}


class Adapters:
    """The adapters on one base, by the keys that requests name."""

    def __init__(self, model: "PreTrainedModel", forward_pass: ForwardPass | None):
        """`forward_pass` is told of every adapter; None where there can be none but the base."""
        self._model = model
        self._forward_pass = forward_pass
        self._peft_model: Any = None
        self._numbers = itertools.count()
        self._followed: set[int] = set()
        self.names: dict[str, str] = {}
        """PEFT's name of each key's adapter. A name is never used twice."""

    def add(self, key: str, folder: pathlib.Path | None) -> None:
        """Load the adapter of `folder` as `key`; None stands for the base itself.

        Raises:
            InvalidInput: the key is taken, or the folder holds no plain LoRA adapter for this base.
        """
        if key in self.names:
            raise InvalidInput(
                f"An adapter with the key {key} is loaded already. Remove it first or choose another key."
            )
        if folder is None:
            self.names[key] = BASE
            return
        if self._forward_pass is None or sees_images(self._model):
            raise InvalidInput("Adapters of an image student are put into its weights before the engine gets them.")
        # A number and not the key: PEFT allows no dots in names.
        name = f"adapter{next(self._numbers)}"
        _check_config(folder, self._model)
        weights = _read_weights(folder, self._model)
        try:
            self._load(folder, name)
        except Exception as error:
            self._forget(name)
            raise InvalidInput(f"{folder} does not fit this base ({type(error).__name__} from PEFT).") from error
        self._check_loaded(folder, name, weights)
        self.names[key] = name

    def remove(self, key: str) -> str | None:
        """Free the adapter of `key`; its former PEFT name, or None if there was none."""
        name = self.names.pop(key, None)
        if name is not None and name != BASE:
            self._forget(name)
        return name

    def _load(self, folder: pathlib.Path, name: str) -> None:
        import peft

        options = {"adapter_name": name, "low_cpu_mem_usage": True, "torch_device": str(self._model.device)}
        if self._peft_model is None:
            self._peft_model = peft.PeftModel.from_pretrained(self._model, str(folder), **options)
        else:
            self._peft_model.load_adapter(str(folder), **options)
        self._model.eval()
        assert self._forward_pass is not None, "adapters without a forward pass are refused"
        fresh = [layer for layer in self._list_layers() if id(layer) not in self._followed]
        self._forward_pass.follow_adapters(fresh)
        self._followed |= {id(layer) for layer in fresh}

    def _check_loaded(self, folder: pathlib.Path, name: str, weights: "dict[str, torch.Tensor]") -> None:
        """Every tensor of the file must stand in the model as it stands in the file, and no other."""
        import peft
        import torch

        loaded = peft.get_peft_model_state_dict(self._peft_model, adapter_name=name, save_embedding_layers=False)
        if loaded.keys() != weights.keys():
            wrong = sorted(loaded.keys() ^ weights.keys())
            self._forget(name)
            raise InvalidInput(
                f"{folder}: its config and its {_WEIGHTS_FILE} do not name the same layers, for instance {wrong[0]}. "
                "Save the adapter again with PEFT's save_pretrained."
            )
        if any(not torch.equal(tensor.cpu().to(weights[key].dtype), weights[key]) for key, tensor in loaded.items()):
            self._forget(name)
            raise InvalidInput(f"{folder}: PEFT did not load its weights unchanged. Save it again in float32.")

    def _forget(self, name: str) -> None:
        if self._peft_model is not None and name in self._peft_model.peft_config:
            with contextlib.suppress(ValueError):
                self._peft_model.delete_adapter(name)
        for layer in self._list_layers():
            if name in layer.lora_A:
                layer.delete_adapter(name)

    def _list_layers(self) -> list[Any]:
        from peft.tuners.lora import LoraLayer

        return [module for module in self._model.modules() if isinstance(module, LoraLayer)]


def _check_config(folder: pathlib.Path, model: "PreTrainedModel") -> None:
    """Refuse what is not plain LoRA on layers inside the decoder."""
    try:
        config = json.loads((folder / "adapter_config.json").read_bytes())
    except (OSError, ValueError):
        raise InvalidInput(f"{folder} holds no adapter_config.json. Give the folder of a PEFT adapter.") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise InvalidInput(f"{folder} is not a LoRA adapter. Only peft_type LORA is served.")
    if extras := sorted(field for field, value in config.items() if value and field not in _PLAIN_FIELDS):
        raise InvalidInput(f"{folder} uses {', '.join(extras)}. Only plain LoRA is served: train it without.")
    if config.get("bias", "none") != "none" or not isinstance(config.get("init_lora_weights", True), bool):
        raise InvalidInput(
            f"{folder} changes the base (bias or init_lora_weights). Train it with the defaults of both."
        )
    targets = config.get("target_modules")
    if not isinstance(targets, list) or not targets:
        raise InvalidInput(f"{folder}: target_modules must be a list of module names. Save the adapter with one.")
    outside = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if module in (model.get_input_embeddings(), model.get_output_embeddings())
    }
    if adapted := outside.intersection(str(target).rpartition(".")[2] for target in targets):
        raise InvalidInput(f"{folder} adapts {min(adapted)}. Only linear layers inside the decoder are served.")


def _read_weights(folder: pathlib.Path, model: "PreTrainedModel") -> "dict[str, torch.Tensor]":
    """The adapter's tensors, checked against the layers they are for."""
    import safetensors
    import safetensors.torch
    import torch

    path = folder / _WEIGHTS_FILE
    if not path.is_file():
        raise InvalidInput(f"{folder} holds no {_WEIGHTS_FILE}. Weights in other formats are never loaded.")
    try:
        weights: dict[str, torch.Tensor] = safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise InvalidInput(f"{path} is not a whole safetensors file ({error}). Fetch it again.") from None
    for key, tensor in weights.items():
        place, _, kind = key.removesuffix(".weight").removeprefix(_KEY_PREFIX).rpartition(".")
        try:
            layer = model.get_submodule(place)
        except AttributeError:
            raise InvalidInput(f"{folder} is for another base: this one has no layer {place}.") from None
        size = {"lora_A": getattr(layer, "in_features", None), "lora_B": getattr(layer, "out_features", None)}.get(kind)
        if tensor.ndim != 2 or tensor.shape[1 if kind == "lora_A" else 0] != size:
            raise InvalidInput(
                f"{folder} is for another base: {place} takes {kind} of size {size}, not {list(tensor.shape)}."
            )
        if not bool(torch.isfinite(tensor).all()):
            raise InvalidInput(f"{folder}: {key} holds numbers that are not finite. Train it again.")
    return weights
