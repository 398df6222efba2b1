"""Adapters that are not a plain LoRA of their base are refused before PEFT sees them."""

import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import pytest

from mint_lib.errors import InvalidInput
from mint_lib.server.safe_adapter import check_adapter
from mint_lib.server.safe_files import check_safetensors
from mint_lib.student import StudentConfig, load_student
from mint_lib.student_weights import fetch_student_folder

NUM_LAYERS = 2


def save_adapter(folder: pathlib.Path, **values: Any) -> pathlib.Path:
    import peft
    import torch

    torch.manual_seed(1)
    config = peft.LoraConfig(**({"r": 4, "target_modules": ["q_proj", "down_proj"]} | values), task_type="CAUSAL_LM")
    peft.get_peft_model(load_student(StudentConfig(model="tiny")), config).save_pretrained(
        str(folder), save_embedding_layers=False
    )
    (folder / "README.md").unlink()
    change_config(folder, base_model_name_or_path="tiny")
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return save_adapter(tmp_path_factory.mktemp("plain"))


@pytest.fixture
def folder(plain: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(plain, tmp_path / "adapter"))


def change_config(folder: pathlib.Path, **values: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def check(folder: pathlib.Path, *, num_layers: int = NUM_LAYERS) -> None:
    weights = fetch_student_folder("tiny") / "model.safetensors"
    check_adapter(folder, base_model="tiny", num_layers=num_layers, base_tensors=check_safetensors(weights))


def change_tensors(folder: pathlib.Path, change: Callable[[dict[str, Any]], object]) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    "values",
    [{}, {"layers_to_transform": [1]}, {"layers_to_transform": 0}, {"target_modules": "all-linear"}, {"r": 1}],
    ids=str,
)
def test_adapter_that_peft_writes_is_taken(tmp_path: pathlib.Path, values: dict[str, Any]) -> None:
    check(save_adapter(tmp_path / "adapter", **values))


@pytest.mark.parametrize(
    "values",
    [
        {"auto_mapping": {"base_model_class": "Evil", "parent_library": "evil"}},
        {"modules_to_save": ["lm_head"]},
        {"custom_modules": {"torch.nn.Linear": "evil.Layer"}},
        {"_custom_modules": {}},
        {"trust_remote_code": True},
        {"peft_type": "IA3"},
        {"peft_type": "lora"},
        {"task_type": "FEATURE_EXTRACTION"},
        {"megatron_core": "evil.module"},
        {"megatron_config": {"a": 1}},
        {"target_modules": "(a+)+$"},
        {"target_modules": []},
        {"target_modules": ["q_proj", "(a+)+$"]},
        {"target_modules": ["q_proj", 3]},
        {"exclude_modules": ["k_proj"]},
        {"layers_pattern": "(a+)+$"},
        {"layers_to_transform": [-1]},
        {"rank_pattern": {".*": 8}},
        {"alpha_pattern": {".*": 8}},
        {"loftq_config": {"loftq_bits": 4}},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "eva"},
        {"use_dora": True},
        {"bias": "all"},
        {"fan_in_fan_out": True},
        {"trainable_token_indices": [1]},
        {"layer_replication": [[0, 2], [0, 2]]},
        {"arrow_config": {"top_k": 1}},
        {"r": 0},
        {"r": True},
        {"r": 10**9},
        {"r": "4"},
        {"lora_alpha": -1},
        {"lora_alpha": "1"},
        {"lora_dropout": 1.0},
        {"base_model_name_or_path": "somebody/else"},
        {"base_model_name_or_path": None},
    ],
    ids=str,
)
def test_adapter_config_beyond_a_plain_lora_is_refused(folder: pathlib.Path, values: dict[str, Any]) -> None:
    change_config(folder, **values)
    with pytest.raises(InvalidInput, match=r"adapter_config\.json is refused") as caught:
        check(folder)
    assert "evil" not in str(caught.value)


@pytest.mark.parametrize("key", ["peft_type", "base_model_name_or_path", "r", "lora_alpha", "target_modules"])
def test_adapter_config_that_lacks_a_key_is_refused(folder: pathlib.Path, key: str) -> None:
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    del config[key]
    path.write_text(json.dumps(config))
    with pytest.raises(InvalidInput, match="lacks"):
        check(folder)


def first(tensors: dict[str, Any]) -> str:
    return min(tensors)


CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "missing": lambda tensors: tensors.pop(first(tensors)),
    "other rank": lambda tensors: tensors.update({first(tensors): tensors[first(tensors)][:2]}),
    "transposed": lambda tensors: tensors.update({first(tensors): tensors[first(tensors)].T}),
    "renamed layer": lambda tensors: tensors.update(
        {first(tensors).replace("layers.0", "layers.7"): tensors.pop(first(tensors))}
    ),
    "embedding": lambda tensors: tensors.update(
        {"base_model.model.model.embed_tokens.weight": tensors[first(tensors)].clone()}
    ),
    "magnitude": lambda tensors: tensors.update(
        {first(tensors).replace("lora_A.weight", "lora_magnitude_vector"): tensors[first(tensors)].clone()}
    ),
    "path in a name": lambda tensors: tensors.update({"../../x": tensors[first(tensors)].clone()}),
    "layer that is not adapted": lambda tensors: tensors.update(
        {first(tensors).replace("down_proj", "up_proj"): tensors[first(tensors)].clone()}
    ),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_adapter_weights_that_do_not_fit_are_refused(
    folder: pathlib.Path, change: Callable[[dict[str, Any]], object]
) -> None:
    change_tensors(folder, change)
    with pytest.raises(InvalidInput, match=r"adapter_model\.safetensors is refused"):
        check(folder)


def test_adapter_of_layers_that_the_base_was_cut_off_is_refused(folder: pathlib.Path) -> None:
    with pytest.raises(InvalidInput, match="4 of its tensors"):
        check(folder, num_layers=1)


def test_adapter_in_another_format_is_refused(folder: pathlib.Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(InvalidInput, match="other files"):
        check(folder)
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(InvalidInput, match="never opened"):
        check(folder)
