"""Which weights of a student are trained, an adapter's or all, and the files that they become.

Goes in: a loaded student, and later its trainer. Comes out: the student ready for a trainer with the number of its
trained weights, a folder of the weights as they are, and a digest of those that must not change. A folder of an adapter
holds `adapter_model.safetensors` and `adapter_config.json`; one of a whole model is complete in itself, with config and
tokenizer. It does not know how the student is trained.
"""

import contextlib
import hashlib
import json
import pathlib
import shutil
from typing import TYPE_CHECKING, Any, NamedTuple

from mint_lib.errors import InvalidInput
from mint_lib.student_weights import TOKENIZER_PATTERNS, TUNED_FOLDERS, WEIGHT_PATTERNS, Tuning, fetch_student_folder
from mint_lib.training.adapter import LoraConfig, add_adapter

if TYPE_CHECKING:
    import torch
    import transformers

    from mint_lib.student import StudentConfig

_ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json")
_HASHED_BYTES = 2**26  # copied from a device at a time


class Tuned(NamedTuple):
    """A student that is ready to be trained."""

    model: Any
    num_trained: int
    """Weights that are trained."""
    num_parameters: int
    """All weights, the trained ones among them."""


def prepare_tuning(model: "transformers.PreTrainedModel", *, tuning: Tuning, lora: LoraConfig) -> Tuned:
    """`model` with a fresh adapter, or with all of its weights to be trained.

    Weights that are all trained are kept in float32, because an update of bfloat16 weights is mostly lost in rounding;
    the trainer computes in bfloat16 from them, and they are saved in the precision that the student was loaded in.

    Raises:
        InvalidInput: `lora` does not fit the student.
    """
    if tuning == "adapter":
        adapted = add_adapter(model, lora)
        return Tuned(adapted, *adapted.get_nb_trainable_parameters())
    # Its config forgets it: whatever saves the model, a checkpoint too, writes the precision in training there.
    model.loaded_dtype = model.dtype
    model.float().requires_grad_(True)
    # DeepSpeed's third stage leaves an empty tensor in a weight's place, and its size beside it.
    num_parameters = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in model.parameters())
    return Tuned(model, num_parameters, num_parameters)


def start_from(adapted: "torch.nn.Module", folder: pathlib.Path) -> None:
    """Put the trained weights of the adapter in `folder` in place of the fresh ones.

    Raises:
        InvalidInput: it holds a weight for which `adapted` has no place, as of a part that is not trained here.
    """
    import peft
    from safetensors.torch import load_file

    given = load_file(folder / _ADAPTER_FILES[0])
    places = {name: value.shape for name, value in peft.get_peft_model_state_dict(adapted).items()}
    homeless = sorted(name for name, value in given.items() if places.get(name) != value.shape)
    if homeless:
        raise InvalidInput(
            f"The student that the training starts from has {len(homeless)} trained weights without a place here, the "
            f"first {homeless[0]} {list(given[homeless[0]].shape)}. Train the same parts: give both stages the same "
            "alignment.lora, or more in the later one."
        )
    peft.set_peft_model_state_dict(adapted, given)


def hash_frozen(model: "torch.nn.Module") -> str:
    """`sha256:...` over the weights that are not trained, in the order of their names, without a copy of them all.

    Quantised weights are hashed as they are held. Every process must call it, as sharded weights are gathered.
    """
    import torch

    hasher = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            continue
        with _gather(parameter):
            hasher.update(f"{name} {parameter.dtype} {list(parameter.shape)}\n".encode())
            # numpy has no bfloat16, so the bytes are looked at as such.
            for chunk in parameter.detach().reshape(-1).view(torch.uint8).split(_HASHED_BYTES):
                hasher.update(chunk.cpu().numpy())
    return f"sha256:{hasher.hexdigest()}"


def _gather(parameter: "torch.nn.Parameter") -> contextlib.AbstractContextManager[Any]:
    """The whole of a weight that DeepSpeed's third stage has spread over the workers, while the context lasts."""
    if not hasattr(parameter, "ds_id"):
        return contextlib.nullcontext()
    import deepspeed

    gathered: contextlib.AbstractContextManager[Any] = deepspeed.zero.GatheredParameters([parameter])
    return gathered


def save_tuned(trainer: "transformers.Trainer", folder: pathlib.Path, *, base_name: str) -> None:
    """What is trained, as it is, in `folder`: safetensors, and configs with sorted keys; nothing names this machine.

    Every process must call it, as sharded weights are gathered; the first one writes.
    """
    scratch = folder.with_name("scratch")
    trainer.save_model(str(scratch))
    if not trainer.is_world_process_zero():
        return
    folder.mkdir(parents=True, exist_ok=True)
    if (scratch / _ADAPTER_FILES[0]).is_file():
        for name in _ADAPTER_FILES:
            (scratch / name).replace(folder / name)
        # PEFT keeps modules in sets, whose order differs from process to process.
        _rewrite_config(folder / _ADAPTER_FILES[1], {"base_model_name_or_path": base_name})
    else:
        loaded_dtype = trainer.model.loaded_dtype
        _cast_weights(scratch, loaded_dtype)
        for path in (path for pattern in WEIGHT_PATTERNS for path in sorted(scratch.glob(pattern))):
            path.replace(folder / path.name)
        _rewrite_config(folder / "config.json", {"dtype": str(loaded_dtype).removeprefix("torch.")})
    shutil.rmtree(scratch)


def place_tuned(folder: pathlib.Path, version: pathlib.Path, *, student: "StudentConfig") -> None:
    """Copy what `save_tuned` left in `folder` to where a version holds it: `version/adapter` or `version/weights`.

    A whole model gets the tokenizer of `student`, its base, so that it can be read without the base.
    """
    if (folder / _ADAPTER_FILES[0]).is_file():
        shutil.copytree(folder, version / TUNED_FOLDERS["adapter"])
        return
    target = version / TUNED_FOLDERS["full"]
    shutil.copytree(folder, target)
    base = fetch_student_folder(student.model, revision=student.revision)
    for path in (path for pattern in TOKENIZER_PATTERNS for path in base.glob(pattern)):
        shutil.copyfile(path, target / path.name)


def _cast_weights(folder: pathlib.Path, dtype: "torch.dtype") -> None:
    """Rewrite the weight files of `folder` in `dtype`, one after another."""
    import safetensors.torch

    num_bytes = 0
    for path in sorted(folder.glob("*.safetensors")):
        tensors = {name: tensor.to(dtype) for name, tensor in safetensors.torch.load_file(path).items()}
        safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
        num_bytes += sum(tensor.nbytes for tensor in tensors.values())
    for path in folder.glob("*.safetensors.index.json"):
        index = json.loads(path.read_text())
        path.write_text(json.dumps(index | {"metadata": {"total_size": num_bytes}}, indent=1, sort_keys=True) + "\n")


def _rewrite_config(path: pathlib.Path, changes: dict[str, Any]) -> None:
    """Change values of a JSON file; keys and lists of names in it are sorted."""
    config = json.loads(path.read_text()) | changes
    for key in ("target_modules", "modules_to_save"):
        if config.get(key):
            config[key] = sorted(config[key])
    path.write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
