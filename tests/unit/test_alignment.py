"""Alignment without Ray: every method's trainer, and what all of them are watched with."""

import json

import pytest
import torch
from tiny_alignment import PAIRS, TINY, build, config_of, watch

from mint_lib.alignment import check_method
from mint_lib.errors import InvalidInput
from mint_lib.plugins import list_plugins, load_plugin
from mint_lib.student import load_student
from mint_lib.training.adapter import LoraConfig
from mint_lib.training.frozen_layers import cache_frozen_layers
from mint_lib.training.method import AlignmentMethod
from mint_lib.training.watch import TrainingState, draw_cases


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method_name", list_plugins("alignment_methods"))
def test_alignment_method_trains_the_adapter_only_and_learns(method_name, tmp_path):
    config = config_of(method=method_name, epochs=8)
    trainer, reader = build(method_name, tmp_path, config)
    frozen = {name: value.clone() for name, value in trainer.model.state_dict().items() if "lora_" not in name}
    state = TrainingState()
    watch(trainer, reader, tmp_path, state, validate_every_steps=1000)
    trainer.train()
    first, last = (row for row in state.history if row["kind"] == "validation")
    assert last["reward_margin"] > first["reward_margin"]
    after = trainer.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in frozen.items())
    assert (tmp_path / "best" / "adapter_model.safetensors").is_file()


def test_alignment_best_adapter_is_that_of_the_best_validation(tmp_path):
    config = config_of(epochs=4)
    trainer, reader = build("orpo", tmp_path, config)
    state = TrainingState()
    validation, _ = watch(trainer, reader, tmp_path, state)
    trainer.train()
    values = {row["step"]: row["loss"] for row in state.history if row["kind"] == "validation"}
    assert list(values) == [0, 2, 4, 6, 8, 10, 12]
    assert state.best_step == min(values, key=lambda step: values[step])
    kept = load_student(TINY, tmp_path / "best")
    assert validation.measure(kept)["loss"] == pytest.approx(values[state.best_step], abs=1e-5)


def test_alignment_stops_early_when_nothing_gets_better(tmp_path):
    config = config_of(epochs=20, learning_rate=1e-12)
    trainer, reader = build("orpo", tmp_path, config)
    state = TrainingState()
    watch(trainer, reader, tmp_path, state, keep_best="agreement_top_1", patience=2)
    trainer.train()
    assert trainer.state.global_step == 4
    assert state.best_step == 0


def test_alignment_adapter_config_names_no_folder_and_is_sorted(tmp_path):
    trainer, reader = build("orpo", tmp_path, config_of(lora=LoraConfig(rank=2, last_layers=1)))
    watch(trainer, reader, tmp_path, TrainingState())
    trainer.train()
    config = json.loads((tmp_path / "best" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny"
    assert config["target_modules"] == sorted(config["target_modules"])
    assert all("layers.1." in name for name in config["target_modules"])


def test_alignment_backward_pass_ends_at_the_adapted_layers(tmp_path):
    trainer, _ = build("orpo", tmp_path, config_of(lora=LoraConfig(rank=2, last_layers=1)))
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert trained
    assert all(".layers.1." in name for name in trained)


def test_alignment_validation_cases_are_drawn_whole():
    drawn = draw_cases(PAIRS, 5, seed=3)
    assert len({pair.case_id for pair in drawn}) == 5
    assert len(drawn) == 10
    assert drawn == draw_cases(PAIRS, 5, seed=3)
    assert draw_cases(PAIRS, 99, seed=3) == PAIRS


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ({"num_workers": 3}, "4 is no multiple of 3 workers x accumulation_steps 1"),
        ({"num_workers": 4, "min_workers": 2}, "4 is no multiple of 3 workers"),
        ({"accumulation_steps": 3}, "4 is no multiple of 1 workers x accumulation_steps 3"),
    ],
    ids=str,
)
def test_alignment_batch_of_pairs_that_does_not_split_is_refused(values, wanted):
    with pytest.raises(InvalidInput, match=wanted):
        check_method(config_of(method="dpo", **values), load_plugin("alignment_methods", "dpo", base=AlignmentMethod))
    check_method(config_of(method="orpo", **values), load_plugin("alignment_methods", "orpo", base=AlignmentMethod))


def test_alignment_state_survives_a_checkpoint(tmp_path):
    state = TrainingState(history=[{"kind": "validation", "step": 0, "loss": 1.25}], best_step=0, best_value=-1.25)
    state.write(tmp_path)
    assert TrainingState.read(tmp_path) == state


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method_name", list_plugins("alignment_methods"))
def test_alignment_cached_frozen_layers_change_no_number(method_name, tmp_path):
    config = config_of(method=method_name, lora=LoraConfig(rank=4, last_layers=1), frozen_layers="cache", epochs=3)
    weights = {}
    for mode in ("recompute", "cache"):
        trainer, reader = build(method_name, tmp_path / mode, config)
        calls = []
        trainer.model.get_base_model().get_decoder().layers[0].mlp.register_forward_hook(
            lambda module, _inputs, _output, calls=calls: calls.append(module.training)
        )
        if mode == "cache":
            cache_frozen_layers(
                trainer, last_layers=1, pad_token_id=reader.tokenizer.pad_token_id, tell=lambda done, total: None
            )
        watch(trainer, reader, tmp_path / mode, TrainingState(), validate_every_steps=1000)
        trainer.train()
        assert (True in calls) == (mode == "recompute"), "in training the frozen layers run only where nothing is kept"
        assert False in calls, "validation runs all layers"
        weights[mode] = {name: p.detach() for name, p in trainer.model.named_parameters() if p.requires_grad}
    for name, expected in weights["recompute"].items():
        torch.testing.assert_close(weights["cache"][name], expected, atol=2e-3, rtol=1e-2)  # Adam enlarges 1e-7


@pytest.mark.parametrize(
    "values",
    [
        {"scaling": "rank_stabilised"},
        {"update": "weight_decomposed"},
        {"scaling": "rank_stabilised", "update": "weight_decomposed", "last_layers": 1},
    ],
    ids=str,
)
def test_alignment_adapter_option_is_kept_and_answers_as_it_was_validated(values, tmp_path):
    config = config_of(method="simpo", lora=LoraConfig(rank=4, **values))
    trainer, reader = build("simpo", tmp_path, config)
    state = TrainingState()
    validation, _ = watch(trainer, reader, tmp_path, state, keep_best="reward_margin")
    trainer.train()
    assert state.best_step > 0
    kept = json.loads((tmp_path / "best" / "adapter_config.json").read_text())
    assert kept["use_rslora"] == ("scaling" in values)
    assert kept["use_dora"] == ("update" in values)
    measured = validation.measure(load_student(TINY, tmp_path / "best"))["reward_margin"]
    assert measured == pytest.approx(state.best_value, abs=1e-5)  # float32 sums in another order


@pytest.mark.filterwarnings("ignore")
def test_alignment_cached_frozen_layers_change_no_weight_decomposed_number(tmp_path):
    lora = LoraConfig(rank=4, last_layers=1, update="weight_decomposed")
    config = config_of(method="simpo", lora=lora, frozen_layers="cache")
    losses = {}
    for mode in ("recompute", "cache"):
        trainer, reader = build("simpo", tmp_path / mode, config)
        if mode == "cache":
            cache_frozen_layers(
                trainer, last_layers=1, pad_token_id=reader.tokenizer.pad_token_id, tell=lambda done, total: None
            )
        trainer.train()
        losses[mode] = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses["cache"]) > 1
    assert losses["cache"] == pytest.approx(losses["recompute"], abs=1e-4)  # Adam enlarges rounding


def test_alignment_cache_without_frozen_layers_is_refused():
    with pytest.raises(ValueError, match=r"needs lora\.last_layers"):
        config_of(frozen_layers="cache")
