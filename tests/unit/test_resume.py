"""A training that goes on from a checkpoint between two logged steps, and what its backward pass runs through."""

import os
import shutil
import subprocess
import tempfile

import pytest
import torch
from tiny_alignment import PAIRS, build, config_of, watch

from mint_lib.errors import RefusedData
from mint_lib.training.adapter import LoraConfig
from mint_lib.training.watch import TrainingState
from mint_lib.training.worker import remove_left_scratch


def run(folder, config, *, saved=None, started=None):
    """Weights and history of one training; its checkpoints are copied to `saved`."""
    trainer, reader = build(config.method, folder, config)
    state = TrainingState.read(started) if started else TrainingState()
    if started:
        shutil.copytree(started / "best", folder / "best")
    save = (lambda step, path: shutil.copytree(path, saved / str(step))) if saved else (lambda *_: None)
    watch(trainer, reader, folder, state, validate_every_steps=100, save=save, started=started)
    if started:
        shutil.rmtree(started / "best")
    trainer.train(resume_from_checkpoint=str(started) if started else None)
    return {name: p.detach() for name, p in trainer.model.named_parameters() if p.requires_grad}, state.history


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["orpo", "dpo", "sft"])
def test_resumed_training_logs_what_the_unbroken_one_logs(method, tmp_path):
    # 100 // 5 = 20 steps between two logged ones; checkpoints fall in between.
    config = config_of(
        method=method,
        epochs=8,
        trees_per_batch=2,
        checkpoint_every_steps=15,
        validate_every_steps=100,
        lora=LoraConfig(rank=4, dropout=0.2),
    )
    weights, history = run(tmp_path / "unbroken", config, saved=tmp_path / "saved")
    again, same = run(tmp_path / "resumed", config, started=tmp_path / "saved" / "30")
    assert [row["step"] for row in history if row["kind"] == "train"] == [
        row["step"] for row in same if row["kind"] == "train"
    ]
    assert len([row for row in history if row["kind"] == "train"]) >= 2
    assert same == history
    assert all(torch.equal(weights[name], again[name]) for name in weights)


def test_scratch_of_a_killed_worker_is_removed_by_the_next(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with subprocess.Popen(["true"]) as gone:
        gone.wait()
    names = [f"mint-training-{gone.pid}-a", f"mint-training-{os.getpid()}-b", "mint-training-c-d", "mint-other-1-e"]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "trees.arrow").write_text("x")
    remove_left_scratch()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names[1:])


def test_recomputed_activations_leave_frozen_layers_alone(tmp_path):
    config = config_of(lora=LoraConfig(rank=4, last_layers=1), activations="recompute", epochs=1)
    trainer, reader = build("orpo", tmp_path, config)
    watch(trainer, reader, tmp_path, TrainingState(), validate_every_steps=100)
    calls = []
    trainer.model.get_base_model().get_decoder().layers[0].self_attn.register_forward_hook(
        lambda module, _inputs, _output: calls.append(torch.is_grad_enabled())
    )
    trainer.train()
    num_passes = sum(calls)  # validation runs without gradients
    assert num_passes == trainer.state.global_step, "once for each pass, and not again for the backward pass"


def test_validation_that_is_no_number_is_refused_with_its_cases(tmp_path):
    trainer, reader = build("orpo", tmp_path)
    validation, _ = watch(trainer, reader, tmp_path, TrainingState())
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(float("nan"))
    with pytest.raises(RefusedData, match="Validation gave numbers that are not finite") as caught:
        validation.measure(trainer.model)
    assert set(caught.value.case_ids["not_finite"]) == {pair.case_id for pair in PAIRS}
