"""Alignment without Ray: every method's trainer, and what all of them are watched with."""

import json

import pytest
import torch

from mint_lib.alignment import AlignmentConfig, AlignmentMethod, _trainer_arguments
from mint_lib.errors import PromptTooLong, RefusedData
from mint_lib.plugins import list_plugins, load_plugin
from mint_lib.records import Label, PreferencePair
from mint_lib.student import StudentConfig, load_student, load_tokenizer
from mint_lib.template import Template
from mint_lib.training.adapter import LoraConfig, add_adapter
from mint_lib.training.frozen_layers import cache_frozen_layers
from mint_lib.training.watch import TrainingState, Validation, draw_cases, watch_training

TINY = StudentConfig(model="tiny")
TEMPLATE = Template.load("rare_disease").with_num_answers(1)
LABELS = [Label(id=f"OMIM:{index}", name=name) for index, name in enumerate(["Noonan", "Kabuki", "Marfan"])]
SIGNS = ["short stature", "long eyelashes", "tall stature"]


def make_pairs(num_cases):
    pairs = []
    for case in range(num_cases):
        truth = case % len(LABELS)
        for other in range(len(LABELS)):
            if other != truth:
                pairs.append(
                    PreferencePair(
                        case_id=f"case-{case}",
                        prompt=TEMPLATE.prompt(f"Child of {case} years, {SIGNS[truth]}."),
                        chosen=TEMPLATE.answer([LABELS[truth].name]),
                        rejected=TEMPLATE.answer([LABELS[other].name]),
                        chosen_label_ids=(LABELS[truth].id,),
                        rejected_label_ids=(LABELS[other].id,),
                        teacher_digest="sha256:0",
                        template_digest=TEMPLATE.digest,
                        policy="test",
                    )
                )
    return pairs


PAIRS = make_pairs(12)


def config_of(**values):
    defaults = {
        "name": "test",
        "seed": 1,
        "student": TINY,
        "learning_rate": 1e-2,
        "trees_per_batch": 4,
        "validate_every_steps": 2,
        "lora": LoraConfig(rank=8),
    }
    return AlignmentConfig(**(defaults | values))


def build(method_name, folder, config=None, pairs=PAIRS):
    config = config or config_of(method=method_name)
    torch.manual_seed(config.seed)
    tokenizer = load_tokenizer(config.student)
    model = add_adapter(load_student(config.student), config.lora)
    plugin = load_plugin("alignment_methods", method_name, base=AlignmentMethod)
    method = plugin(plugin.Config(), tokenizer=tokenizer, window_tokens=config.student.window_tokens)
    return method.build_trainer(model, pairs=pairs, arguments=_trainer_arguments(config, folder)), tokenizer


def watch(trainer, tokenizer, folder, state, **changes):
    validation = Validation(pairs=PAIRS, labels=LABELS, template=TEMPLATE, tokenizer=tokenizer, window_tokens=512)
    options = {
        "base_name": "tiny",
        "validate_every_steps": 2,
        "keep_best": "loss",
        "patience": 99,
        "tell": lambda *_: None,
        "report": lambda *_: None,
    }
    watch_training(trainer, validation=validation, state=state, folder=folder, **(options | changes))
    return validation


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method_name", list_plugins("alignment_methods"))
def test_alignment_method_trains_the_adapter_only_and_learns(method_name, tmp_path):
    config = config_of(method=method_name, epochs=8)
    trainer, tokenizer = build(method_name, tmp_path, config)
    frozen = {name: value.clone() for name, value in trainer.model.state_dict().items() if "lora_" not in name}
    state = TrainingState()
    watch(trainer, tokenizer, tmp_path, state, validate_every_steps=1000)
    trainer.train()
    first, last = (row for row in state.history if row["kind"] == "validation")
    assert last["reward_margin"] > first["reward_margin"]
    after = trainer.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in frozen.items())
    assert (tmp_path / "best" / "adapter_model.safetensors").is_file()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method_name", list_plugins("alignment_methods"))
def test_alignment_method_refuses_what_exceeds_the_window(method_name, tmp_path):
    config = config_of(student=StudentConfig(model="tiny", window_tokens=20))
    with pytest.raises(PromptTooLong, match=r"case-0 have \d+ tokens.*window is 20"):
        build(method_name, tmp_path, config)


def test_alignment_best_adapter_is_that_of_the_best_validation(tmp_path):
    config = config_of(epochs=4)
    trainer, tokenizer = build("orpo", tmp_path, config)
    state = TrainingState()
    validation = watch(trainer, tokenizer, tmp_path, state)
    trainer.train()
    values = {row["step"]: row["loss"] for row in state.history if row["kind"] == "validation"}
    assert list(values) == [0, 2, 4, 6, 8, 10, 12]
    assert state.best_step == min(values, key=lambda step: values[step])
    kept = load_student(TINY, tmp_path / "best")
    assert validation.measure(kept)["loss"] == pytest.approx(values[state.best_step], abs=1e-5)


def test_alignment_stops_early_when_nothing_gets_better(tmp_path):
    config = config_of(epochs=20, learning_rate=1e-12)
    trainer, tokenizer = build("orpo", tmp_path, config)
    state = TrainingState()
    watch(trainer, tokenizer, tmp_path, state, keep_best="agreement_top_1", patience=2)
    trainer.train()
    assert trainer.state.global_step == 4
    assert state.best_step == 0


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_alignment_value_that_is_no_number_stops_before_the_weights_change(tmp_path, where):
    trainer, tokenizer = build("orpo", tmp_path)
    compute_loss, calls = trainer.compute_loss, []

    def poisoned(model, inputs, *arguments, **options):
        loss = compute_loss(model, inputs, *arguments, **options)
        calls.append([p.detach().clone() for p in model.parameters() if p.requires_grad])
        if len(calls) < 3:
            return loss
        if where == "gradient":
            loss.register_hook(lambda gradient: gradient * float("nan"))
            return loss
        return loss * float("nan")

    trainer.compute_loss = poisoned
    watch(trainer, tokenizer, tmp_path, TrainingState())
    with pytest.raises(RefusedData, match="stopped at step 3") as caught:
        trainer.train()
    assert len(caught.value.case_ids["not_finite"]) == 4
    assert set(caught.value.case_ids["not_finite"]) <= {pair.case_id for pair in PAIRS}
    now = [p for p in trainer.model.parameters() if p.requires_grad]
    assert all(torch.equal(before, after) for before, after in zip(calls[-1], now, strict=True))


def test_alignment_adapter_config_names_no_folder_and_is_sorted(tmp_path):
    trainer, tokenizer = build("orpo", tmp_path, config_of(lora=LoraConfig(rank=2, last_layers=1)))
    watch(trainer, tokenizer, tmp_path, TrainingState())
    trainer.train()
    config = json.loads((tmp_path / "best" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny"
    assert config["target_modules"] == sorted(config["target_modules"])
    assert config["layers_to_transform"] == [1]


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


def test_alignment_batch_that_does_not_split_is_refused():
    with pytest.raises(ValueError, match="trees_per_batch 4 is no multiple of num_workers 3"):
        config_of(num_workers=3)


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
        trainer, tokenizer = build(method_name, tmp_path / mode, config)
        calls = []
        trainer.model.get_base_model().get_decoder().layers[0].mlp.register_forward_hook(
            lambda module, _inputs, _output, calls=calls: calls.append(module.training)
        )
        if mode == "cache":
            cache_frozen_layers(
                trainer, last_layers=1, pad_token_id=tokenizer.pad_token_id, tell=lambda done, total: None
            )
        watch(trainer, tokenizer, tmp_path / mode, TrainingState(), validate_every_steps=1000)
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
    trainer, tokenizer = build("simpo", tmp_path, config)
    state = TrainingState()
    validation = watch(trainer, tokenizer, tmp_path, state, keep_best="reward_margin")
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
        trainer, tokenizer = build("simpo", tmp_path / mode, config)
        if mode == "cache":
            cache_frozen_layers(
                trainer, last_layers=1, pad_token_id=tokenizer.pad_token_id, tell=lambda done, total: None
            )
        trainer.train()
        losses[mode] = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses["cache"]) > 1
    assert losses["cache"] == pytest.approx(losses["recompute"], abs=1e-4)  # Adam enlarges rounding


def test_alignment_cache_without_frozen_layers_is_refused():
    with pytest.raises(ValueError, match=r"needs lora\.last_layers"):
        config_of(frozen_layers="cache")
