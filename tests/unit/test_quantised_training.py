"""QLoRA: an adapter trained over a base in 4 bits, on the packed trees of every student, and read without them."""

import importlib.util

import pytest
import torch
from tiny_image_students import make_student, write_folder
from tiny_preferences import TINY, make_pair
from tiny_training import build_tiny_trainer

from mint_lib.errors import MissingDependency
from mint_lib.student import StudentConfig, load_reader, load_student
from mint_lib.training.adapter import LoraConfig
from mint_lib.training.frozen_layers import cache_frozen_layers
from mint_lib.training.preference_trees import grow_trees, score_pairs
from mint_lib.training.quantised import quantisation_config
from mint_lib.training.tuning import hash_frozen, prepare_tuning, save_tuned

HAS_BITSANDBYTES = importlib.util.find_spec("bitsandbytes") is not None
needs_bitsandbytes = pytest.mark.skipif(not HAS_BITSANDBYTES, reason="bitsandbytes, of the extra train, is not there")
PAIRS = [make_pair("c1", "Boy.", "Marfan", "Noonan"), make_pair("c2", "Girl of 3.", "Kabuki", "Noonan")]

# Appendix E of the QLoRA paper.
NF4_LEVELS = [-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0]
NF4_LEVELS += [0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0]


def prepare(config=TINY, **lora):
    torch.manual_seed(1)
    model = load_student(config, quantization_config=quantisation_config(config.dtype))
    return prepare_tuning(model, tuning="adapter", lora=LoraConfig(rank=4, **lora))


def list_quantised(model):
    import bitsandbytes

    return {name for name, module in model.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)}


def score(model, reader):
    trees = grow_trees(PAIRS, reader, window_tokens=512)
    return torch.cat(score_pairs(model.eval(), trees, reader=reader, batch_tokens=1000))


def losses_of(trainer):
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@needs_bitsandbytes
def test_quantised_base_holds_the_16_levels_of_nf4_in_blocks_and_computes_in_the_students_precision():
    import bitsandbytes

    model = load_student(TINY, quantization_config=quantisation_config("bfloat16"))
    layer = model.model.layers[0].mlp.up_proj
    assert layer.weight.quant_state.nested, "the blocks' own scales are quantised too"
    assert layer.compute_dtype == torch.bfloat16
    weight = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    blocks = weight.float().view(-1, 64)
    scaled = blocks / blocks.abs().amax(dim=1, keepdim=True)
    distance = (scaled[..., None] - torch.tensor(NF4_LEVELS)).abs().amin(dim=-1)
    assert distance.max() < 1e-5, "the levels are given to 7 digits"
    original = load_student(TINY).model.layers[0].mlp.up_proj.weight
    # Half the widest gap between levels, of each block's largest weight, and some for that being rounded itself.
    assert ((weight - original).abs().view(-1, 64) <= 0.2 * blocks.abs().amax(dim=1, keepdim=True)).all()


@needs_bitsandbytes
def test_quantised_training_learns_in_the_adapter_alone_and_leaves_the_4_bits_as_they_are(tmp_path):
    tuned = prepare()
    assert len(list_quantised(tuned.model)) == 2 * 7
    packed = [p for p in tuned.model.parameters() if p.dtype == torch.uint8]
    # Half a byte for each weight of 7 linear layers: q and o 64 x 64, k and v 64 x 32, gate, up and down 64 x 128.
    assert sum(p.numel() for p in packed) == 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128) // 2
    assert tuned.num_trained == 2 * 4 * 1024
    before, frozen = [p.clone() for p in packed], hash_frozen(tuned.model)
    started = {name: p.detach().clone() for name, p in tuned.model.named_parameters() if p.requires_grad}
    trainer = build_tiny_trainer(tuned.model, PAIRS, tmp_path, reader=load_reader(TINY))
    trainer.train()
    losses = losses_of(trainer)
    assert losses[-1] < losses[0]
    assert hash_frozen(tuned.model) == frozen
    assert all(torch.equal(p, kept) for p, kept in zip(packed, before, strict=True))
    after = dict(tuned.model.named_parameters())
    assert all(".lora_" in name and not torch.equal(after[name], value) for name, value in started.items())


@needs_bitsandbytes
def test_quantised_training_makes_an_adapter_of_the_base_as_it_is(tmp_path):
    tuned, reader = prepare(), load_reader(TINY)
    untrained = score(load_student(TINY), reader)
    trainer = build_tiny_trainer(tuned.model, PAIRS, tmp_path, reader=reader, max_steps=10)
    trainer.train()
    save_tuned(trainer, tmp_path / "best", base_name="tiny")
    served = load_student(TINY, tmp_path / "best")
    assert list_quantised(served) == set()
    exact, in_training = score(served, reader), score(tuned.model, reader)
    learnt = (in_training - untrained).abs().max()
    assert learnt > 1.0
    # NF4 moves each weight by up to a tenth of its block's largest: what was learnt must stand out of that.
    assert 0 < (exact - in_training).abs().max() < 0.5 * learnt


@needs_bitsandbytes
def test_quantised_training_with_cached_frozen_layers_changes_no_number(tmp_path):
    weights = {}
    for mode in ("recompute", "cache"):
        (tmp_path / mode).mkdir()
        tuned, reader = prepare(last_layers=1), load_reader(TINY)
        trainer = build_tiny_trainer(tuned.model, PAIRS, tmp_path / mode, reader=reader, learning_rate=1e-3)
        if mode == "cache":
            pad = reader.tokenizer.pad_token_id
            cache_frozen_layers(trainer, last_layers=1, pad_token_id=pad, tell=lambda done, total: None)
        trainer.train()
        weights[mode] = [p.detach() for p in tuned.model.parameters() if p.requires_grad]
        weights[f"{mode} losses"] = losses_of(trainer)
    assert weights["cache losses"] == pytest.approx(weights["recompute losses"], rel=1e-4)
    # Adam makes a whole step of a gradient of rounding errors: at most all 3 steps of 1e-3 apart, and few weights so.
    for cached, recomputed in zip(weights["cache"], weights["recompute"], strict=True):
        assert (cached - recomputed).abs().mean() < 1e-4


@needs_bitsandbytes
@pytest.mark.parametrize("projector", ["frozen", "trained"])
def test_quantised_training_of_an_image_student_keeps_vision_and_output_as_they_are(projector, tmp_path):
    write_folder(make_student("llava"), tmp_path / "base")
    config = StudentConfig(model=f"folder:{tmp_path / 'base'}", reads="image")
    tuned = prepare(config, projector=projector)
    quantised = list_quantised(tuned.model)
    assert len(quantised) == 2 * 7
    assert all(".language_model.layers." in name for name in quantised)
    trained = [p for name, p in tuned.model.named_parameters() if p.requires_grad and "multi_modal_projector" in name]
    assert len(trained) == (4 if projector == "trained" else 0)
    assert all(p.dtype == torch.float32 for p in trained)


def test_quantised_training_without_its_package_is_refused_in_words(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "bitsandbytes" else find_spec(name, *more)
    )
    with pytest.raises(MissingDependency, match=r"needs the package bitsandbytes.*quantisation: none"):
        quantisation_config("float32")
