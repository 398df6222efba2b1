"""The adapter's options: what is trained, what stays as it is, the numbers, and what serving makes of them."""

import hashlib
import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tiny_preferences import TINY, make_pair
from tiny_training import build_tiny_trainer

from mint_lib.engine.adapters import Adapters
from mint_lib.engine.forward import ForwardPass, Segment
from mint_lib.engine.key_values import KeyValues
from mint_lib.errors import InvalidInput
from mint_lib.server.safe_adapter import check_adapter
from mint_lib.server.safe_files import check_safetensors
from mint_lib.student import load_reader, load_student
from mint_lib.student_weights import fetch_student_folder
from mint_lib.training.adapter import LoraConfig, add_adapter

RANK, ALPHA = 4, 12.0
TOKENS = (5, 6, 7, 8, 9)
# Logits of the tiny student are of the order of 1, and float32 sums are made in another order.
ROUNDING = 2e-5
OPTIONS = {
    "plain": LoraConfig(rank=RANK, alpha=ALPHA),
    "rank_stabilised": LoraConfig(rank=RANK, alpha=ALPHA, scaling="rank_stabilised"),
    "weight_decomposed": LoraConfig(rank=RANK, alpha=ALPHA, update="weight_decomposed"),
    "both": LoraConfig(rank=RANK, alpha=ALPHA, scaling="rank_stabilised", update="weight_decomposed"),
    "last_layer": LoraConfig(rank=RANK, alpha=ALPHA, update="weight_decomposed", last_layers=1),
}
# A layer of the tiny student has linear layers (inputs, outputs): q and o (64, 64), k and v (64, 32), gate and up
# (64, 128), down (128, 64). Together 1024 inputs and outputs, and 512 outputs.
NUM_TRAINABLE = {
    "plain": 2 * RANK * 1024,
    "rank_stabilised": 2 * RANK * 1024,
    "weight_decomposed": 2 * (RANK * 1024 + 512),
    "both": 2 * (RANK * 1024 + 512),
    "last_layer": RANK * 1024 + 512,
}


def hash_frozen(model):
    hasher = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if ".lora_" not in name:
            hasher.update(name.encode() + parameter.detach().numpy().tobytes())
    return hasher.hexdigest()


def train(option, folder):
    torch.manual_seed(1)
    model = add_adapter(load_student(TINY), OPTIONS[option])
    pairs = [make_pair("case-1", "Boy with tall stature.", "Marfan", "Noonan")]
    options = {"method": "simpo", "max_steps": 5, "learning_rate": 3e-2}
    trainer = build_tiny_trainer(model, pairs, folder, reader=load_reader(TINY), **options)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    frozen = hash_frozen(model)
    trainer.train()
    model.save_pretrained(folder / "adapter")
    return model, before, frozen


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    made = {}

    def make(option):
        if option not in made:
            folder = tmp_path_factory.mktemp(option)
            made[option] = (*train(option, folder), folder / "adapter")
        return made[option]

    return make


def logits_of(model):
    with torch.inference_mode():
        return model.eval()(torch.tensor([TOKENS])).logits[0]


def serve(forward_pass, name):
    key_values = KeyValues(forward_pass.geometry)
    key_values.reserve(len(TOKENS))
    wanted = tuple(range(len(TOKENS)))
    return Segment(key_values=key_values, start=0, token_ids=TOKENS, wanted=wanted, adapter=name)


def merge_by_definition(folder, lora):
    """The student with the papers' updated weights in place of an adapter.

    W + s BA, s = alpha / r or alpha / sqrt(r); decomposed: m (W + s BA) / ||W + s BA||, one norm for each output.
    Shape suffixes: O outputs, I inputs.
    """
    model, scale = load_student(TINY), lora.alpha / lora.rank
    if lora.scaling == "rank_stabilised":
        scale = lora.alpha / lora.rank**0.5
    tensors = {name: tensor.double() for name, tensor in load_file(folder / "adapter_model.safetensors").items()}
    for place in (name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")):
        weight = model.get_submodule(place.removeprefix("base_model.model.")).weight
        updated_OI = weight.double() + scale * tensors[f"{place}.lora_B.weight"] @ tensors[f"{place}.lora_A.weight"]
        if lora.update == "weight_decomposed":
            magnitude_O = tensors[f"{place}.lora_magnitude_vector"]
            updated_OI = magnitude_O[:, None] * updated_OI / updated_OI.norm(dim=1, keepdim=True)
        weight.data = updated_OI.float()
    return model


@pytest.mark.parametrize("option", OPTIONS)
def test_adapter_trains_as_many_parameters_as_its_definition_says(option, caplog):
    with caplog.at_level(logging.INFO, logger="mint_lib.training.adapter"):
        model = add_adapter(load_student(TINY), OPTIONS[option])
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == NUM_TRAINABLE[option]
    (record,) = caplog.records
    assert record.args == (NUM_TRAINABLE[option], sum(p.numel() for p in model.parameters()))


@pytest.mark.parametrize(
    ("values", "adapted"),
    [
        ({"target_modules": ("q_proj",)}, {"model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"}),
        ({"target_modules": ("mlp.up_proj",), "last_layers": 1}, {"model.layers.1.mlp.up_proj"}),
        (
            {"target_modules": ("1.mlp.up_proj", "o_proj"), "last_layers": 1},
            {"model.layers.1.mlp.up_proj", "model.layers.1.self_attn.o_proj"},
        ),
    ],
)
def test_adapter_of_named_layers_adapts_these_only(values, adapted):
    model = add_adapter(load_student(TINY), LoraConfig(rank=2, **values))
    names = {name.partition(".lora_")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert names == {f"base_model.model.{name}" for name in adapted}


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens", "proj", "0.mlp.up_proj"])
def test_adapter_of_a_name_that_is_no_adapted_layer_is_refused(name):
    with pytest.raises(InvalidInput, match=rf"names {name}, which is no linear layer.*They have down_proj, gate_proj"):
        add_adapter(load_student(TINY), LoraConfig(target_modules=("q_proj", name), last_layers=1))


def test_adapter_of_more_layers_than_there_are_is_refused():
    with pytest.raises(InvalidInput, match="last_layers is 3, but the student has 2 layers"):
        add_adapter(load_student(TINY), LoraConfig(last_layers=3))


@pytest.mark.parametrize("option", OPTIONS)
def test_adapter_untrained_changes_no_answer(option):
    model = add_adapter(load_student(TINY), OPTIONS[option])
    torch.testing.assert_close(logits_of(model), logits_of(load_student(TINY)), atol=ROUNDING, rtol=ROUNDING)


@pytest.mark.parametrize("option", OPTIONS)
def test_adapter_training_changes_all_of_it_and_no_frozen_weight(option, trained):
    model, before, frozen, _ = trained(option)
    assert hash_frozen(model) == frozen
    after = dict(model.named_parameters())
    assert all(not torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize("option", OPTIONS)
def test_adapter_saved_and_loaded_gives_the_logits_of_its_definition(option, trained):
    model, _, _, folder = trained(option)
    logits = logits_of(load_student(TINY, folder))
    torch.testing.assert_close(logits, logits_of(model), atol=ROUNDING, rtol=ROUNDING)
    expected = logits_of(merge_by_definition(folder, OPTIONS[option]))
    torch.testing.assert_close(logits, expected, atol=ROUNDING, rtol=ROUNDING)
    assert (logits - logits_of(load_student(TINY))).abs().max() > 0.1


def test_adapter_rank_stabilised_in_the_engine_beside_a_plain_one_equals_its_definition(trained):
    base = load_student(TINY)
    forward_pass = ForwardPass(base)
    adapters = Adapters(base, forward_pass)
    for option in ("plain", "rank_stabilised"):
        adapters.add(option, trained(option)[3])
    order = ["rank_stabilised", "plain", "rank_stabilised"]
    results = forward_pass.run([serve(forward_pass, adapters.names[option]) for option in order])
    for option, logits in zip(order, results, strict=True):
        expected = logits_of(merge_by_definition(trained(option)[3], OPTIONS[option]))
        torch.testing.assert_close(logits, expected, atol=ROUNDING, rtol=ROUNDING)


@pytest.mark.parametrize("option", ["weight_decomposed", "both"])
def test_adapter_weight_decomposed_is_refused_by_the_engine_in_words(option, trained):
    base = load_student(TINY)
    adapters = Adapters(base, ForwardPass(base))
    with pytest.raises(InvalidInput, match=r"uses use_dora\. Only plain LoRA is served"):
        adapters.add("one", trained(option)[3])
    assert adapters.names == {}


def copy_for_server(folder, target, **changes):
    """What a student's version holds: both files, the config with the base's name in the recipe."""
    target.mkdir()
    shutil.copy(folder / "adapter_model.safetensors", target)
    config = json.loads((folder / "adapter_config.json").read_text()) | {"base_model_name_or_path": "tiny"} | changes
    (target / "adapter_config.json").write_text(json.dumps(config))
    return target


def check_for_server(folder):
    base_tensors = check_safetensors(fetch_student_folder("tiny") / "model.safetensors")
    check_adapter(folder, base_model="tiny", num_layers=2, base_tensors=base_tensors)


@pytest.mark.parametrize("option", ["plain", "rank_stabilised"])
def test_adapter_with_low_rank_sides_only_is_taken_by_the_server(option, trained, tmp_path):
    check_for_server(copy_for_server(trained(option)[3], tmp_path / "adapter"))


@pytest.mark.parametrize("option", ["weight_decomposed", "both", "last_layer"])
def test_adapter_weight_decomposed_is_refused_by_the_server_in_words(option, trained, tmp_path):
    folder = copy_for_server(trained(option)[3], tmp_path / "adapter")
    with pytest.raises(InvalidInput, match=r"weight-decomposed \(DoRA\), which is not served.*lora\.update: additive"):
        check_for_server(folder)


def test_adapter_weight_decomposed_that_its_config_hides_is_served_nowhere(trained, tmp_path):
    folder = copy_for_server(trained("both")[3], tmp_path / "adapter", use_dora=False)
    with pytest.raises(InvalidInput, match="not the A or B side of a linear layer"):
        check_for_server(folder)
    base = load_student(TINY)
    adapters = Adapters(base, ForwardPass(base))
    with pytest.raises(InvalidInput, match="lora_magnitude_vector"):
        adapters.add("one", folder)
    assert adapters.names == {}
