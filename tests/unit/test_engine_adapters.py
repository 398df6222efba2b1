"""Adapters on one base: each request gets its own, and what does not fit is refused and leaves nothing behind."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from mint_lib.engine.adapters import Adapters
from mint_lib.engine.forward import BASE, ForwardPass, Segment
from mint_lib.engine.key_values import KeyValues
from mint_lib.errors import InvalidInput
from mint_lib.student import StudentConfig, load_student
from mint_lib.training.adapter import LoraConfig, add_adapter

TINY = StudentConfig(model="tiny")
PROMPT = (5, 6, 7, 8, 9)
# Logits of the tiny student are of the order of 1.
ROUNDING = 1e-5


def write_adapter(folder, *, seed, lora):
    torch.manual_seed(seed)
    model = add_adapter(load_student(TINY), lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    return {
        "all": write_adapter(root / "all", seed=1, lora=LoraConfig(rank=4)),
        "last": write_adapter(root / "last", seed=2, lora=LoraConfig(rank=8, last_layers=1)),
    }


@pytest.fixture(scope="module")
def expected(folders):
    return {
        "base": own_logits(load_student(TINY)),
        **{name: own_logits(load_student(TINY, folder)) for name, folder in folders.items()},
    }


def own_logits(model):
    with torch.inference_mode():
        return model(torch.tensor([PROMPT])).logits[0]


def compute(forward_pass, names):
    segments = []
    for name in names:
        key_values = KeyValues(forward_pass.geometry)
        key_values.reserve(len(PROMPT))
        wanted = tuple(range(len(PROMPT)))
        segments.append(Segment(key_values=key_values, start=0, token_ids=PROMPT, wanted=wanted, adapter=name))
    return forward_pass.run(segments)


def load_base():
    model = load_student(TINY)
    forward_pass = ForwardPass(model)
    return forward_pass, Adapters(model, forward_pass)


def test_adapters_mixed_in_one_pass_equal_each_alone(folders, expected):
    forward_pass, adapters = load_base()
    adapters.add("all", folders["all"])
    adapters.add("clinic.v1", folders["last"])
    adapters.add("base", None)
    order = ["all", "clinic.v1", "base", "all"]
    results = compute(forward_pass, [adapters.names[key] for key in order])
    for key, logits in zip(order, results, strict=True):
        reference = expected["last" if key == "clinic.v1" else key]
        torch.testing.assert_close(logits, reference, atol=ROUNDING, rtol=ROUNDING)
    assert (expected["all"] - expected["base"]).abs().max() > 0.1
    assert (expected["last"] - expected["base"]).abs().max() > 0.1


def test_adapters_removed_and_added_again_leave_the_others_as_they_are(folders, expected):
    forward_pass, adapters = load_base()
    for _ in range(3):
        adapters.add("one", folders["all"])
        adapters.add("two", folders["last"])
        first = adapters.names["one"]
        adapters.remove("one")
        adapters.add("one", folders["last"])
        assert adapters.names["one"] != first
        for key in ("one", "two"):
            (logits,) = compute(forward_pass, [adapters.names[key]])
            torch.testing.assert_close(logits, expected["last"], atol=ROUNDING, rtol=ROUNDING)
        adapters.remove("one")
        adapters.remove("two")
        (logits,) = compute(forward_pass, [BASE])
        torch.testing.assert_close(logits, expected["base"], atol=ROUNDING, rtol=ROUNDING)
    assert adapters.names == {}


def test_adapters_key_in_use_is_refused(folders):
    _, adapters = load_base()
    adapters.add("one", None)
    with pytest.raises(InvalidInput, match="key one is loaded already"):
        adapters.add("one", folders["all"])


def edit_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder, change):
    path = folder / "adapter_model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path)


def spoil_number(weights):
    weights[min(weights)][0, 0] = float("nan")


def drop_tensor(weights):
    del weights[min(weights)]


def grow_tensor(weights):
    key = min(weights)
    weights[key] = torch.zeros(weights[key].shape[0], weights[key].shape[1] + 1)


def rename_layer(weights):
    key = min(weights)
    weights[key.replace("layers.0", "layers.7")] = weights.pop(key)


BROKEN = {
    "no config": (lambda folder: (folder / "adapter_config.json").unlink(), "no adapter_config.json"),
    "not json": (lambda folder: (folder / "adapter_config.json").write_text("{"), "no adapter_config.json"),
    "other method": (lambda folder: edit_config(folder, peft_type="IA3"), "Only peft_type LORA"),
    "dora": (lambda folder: edit_config(folder, use_dora=True), "uses use_dora"),
    "whole modules": (lambda folder: edit_config(folder, modules_to_save=["lm_head"]), "uses modules_to_save"),
    "base changed": (lambda folder: edit_config(folder, init_lora_weights="pissa"), "changes the base"),
    "bias": (lambda folder: edit_config(folder, bias="all"), "changes the base"),
    "pattern": (lambda folder: edit_config(folder, target_modules=".*"), "must be a list"),
    "output layer": (lambda folder: edit_config(folder, target_modules=["lm_head"]), "adapts lm_head"),
    "rank": (lambda folder: edit_config(folder, r=16), "does not fit this base"),
    "fewer layers named": (lambda folder: edit_config(folder, target_modules=["q_proj"]), "not name the same layers"),
    "pickle": (
        lambda folder: (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin"),
        "no adapter_model.safetensors",
    ),
    "cut file": (
        lambda folder: (folder / "adapter_model.safetensors").write_bytes(
            (folder / "adapter_model.safetensors").read_bytes()[:-9]
        ),
        "not a whole safetensors file",
    ),
    "not finite": (lambda folder: edit_weights(folder, spoil_number), "not finite"),
    "tensor missing": (lambda folder: edit_weights(folder, drop_tensor), "not name the same layers"),
    "other size": (lambda folder: edit_weights(folder, grow_tensor), "another base"),
    "other layers": (lambda folder: edit_weights(folder, rename_layer), "no layer model.layers.7"),
}


@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("case", BROKEN)
def test_adapters_folder_that_does_not_fit_is_refused_and_leaves_nothing_behind(
    folders, expected, tmp_path, case, is_first
):
    change, message = BROKEN[case]
    broken = tmp_path / "broken"
    shutil.copytree(folders["all"], broken)
    change(broken)
    forward_pass, adapters = load_base()
    if not is_first:
        adapters.add("good", folders["all"])
    with pytest.raises(InvalidInput, match=message):
        adapters.add("bad", broken)
    assert "bad" not in adapters.names
    if is_first:
        adapters.add("good", folders["all"])
    adapters.add("bad", folders["last"])
    for key, name in (("good", "all"), ("bad", "last")):
        (logits,) = compute(forward_pass, [adapters.names[key]])
        torch.testing.assert_close(logits, expected[name], atol=ROUNDING, rtol=ROUNDING)
