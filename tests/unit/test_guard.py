"""The guard: numbers that are none, steps that are skipped, a run that is asked to stop, memory that is not enough."""

import os
import pathlib
import subprocess
import sys

import pytest
import torch
from tiny_alignment import PAIRS, build, config_of, watch

from mint_lib.errors import RefusedData
from mint_lib.training import guard as guard_module
from mint_lib.training.watch import TrainingState


def poison(trainer, where, steps):
    """Make the loss or a gradient of the given steps (from 1) no number; collects the weights before each step."""
    compute_loss, weights = trainer.compute_loss, []

    def poisoned(model, inputs, **options):
        loss, figures = compute_loss(model, inputs, **options)
        weights.append([p.detach().clone() for p in model.parameters() if p.requires_grad])
        if len(weights) not in steps:
            return loss, figures
        if where == "gradient":
            loss.register_hook(lambda gradient: gradient * float("nan"))
            return loss, figures
        return loss * float("inf"), figures

    trainer.compute_loss = poisoned
    return weights


def weights_of(trainer):
    return [p.detach() for p in trainer.model.parameters() if p.requires_grad]


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_guard_value_that_is_no_number_stops_before_the_weights_change(tmp_path, where):
    trainer, reader = build("orpo", tmp_path)
    weights = poison(trainer, where, {3})
    watch(trainer, reader, tmp_path, TrainingState())
    with pytest.raises(RefusedData, match="stopped at step 3") as caught:
        trainer.train()
    assert len(caught.value.case_ids["not_finite"]) == 4
    assert set(caught.value.case_ids["not_finite"]) <= {pair.case_id for pair in PAIRS}
    assert all(torch.equal(before, after) for before, after in zip(weights[-1], weights_of(trainer), strict=True))


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_guard_skipped_step_leaves_the_weights_and_is_counted(tmp_path, where):
    trainer, reader = build("orpo", tmp_path, config_of(weight_decay=0.1, epochs=2))
    weights = poison(trainer, where, {3})
    state = TrainingState()
    _, guard = watch(trainer, reader, tmp_path, state, on_not_finite="skip")
    trainer.train()
    assert trainer.state.global_step == 6
    assert all(torch.equal(before, after) for before, after in zip(weights[2], weights[3], strict=True))
    assert not all(torch.equal(before, after) for before, after in zip(weights[3], weights[4], strict=True))
    skipped = [row for row in state.history if row["kind"] == "skipped"]
    assert guard.num_skipped == len(skipped) == 1
    assert skipped[0]["step"] == 3
    assert len(skipped[0]["case_ids"]) == 4
    logged = [row for row in state.history if row["kind"] == "train"]
    assert logged
    assert all(torch.tensor([value for value in row.values() if value != "train"]).isfinite().all() for row in logged)


def test_guard_that_skips_too_often_in_a_row_stops(tmp_path, monkeypatch):
    monkeypatch.setattr(guard_module, "MOST_SKIPS_IN_A_ROW", 2)
    trainer, reader = build("orpo", tmp_path, config_of(epochs=4))
    poison(trainer, "loss", {2, 4, 5, 6})
    watch(trainer, reader, tmp_path, TrainingState(), on_not_finite="skip")
    with pytest.raises(RefusedData, match=r"stopped at step 6.*3 times in a row"):
        trainer.train()


def test_guard_asked_to_stop_validates_if_it_is_time_and_writes_a_checkpoint(tmp_path):
    trainer, reader = build("orpo", tmp_path, config_of(epochs=4, checkpoint_every_steps=100))
    saved, state = [], TrainingState()
    options = {
        "save": lambda step, folder: saved.append((step, sorted(path.name for path in folder.iterdir()))),
        "is_stop_asked": lambda: trainer.state.global_step >= 3,
    }
    _, guard = watch(trainer, reader, tmp_path, state, validate_every_steps=4, **options)
    trainer.train()
    assert guard.must_stop
    assert [step for step, _ in saved] == [4]
    assert [row["step"] for row in state.history if row["kind"] == "validation"] == [0, 4]
    assert {"adapter_model.safetensors", "optimizer.pt", "state.json", "best"} <= set(saved[0][1])


_OUT_OF_MEMORY = """
import pathlib, resource, sys, tempfile
import torch
from tiny_alignment import build, config_of, make_pairs
from mint_lib.errors import OutOfMemory
config = config_of(batch_tokens=100000, trees_per_batch=64)
trainer, _ = build("orpo", pathlib.Path(tempfile.mkdtemp()), config, make_pairs(64))
loader = trainer.get_train_dataloader()
step = next(iter(loader))
trainer.create_optimizer()
used = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**23, used + 2**23))
try:
    trainer.training_step(trainer.model, step)
except OutOfMemory as error:
    print(error)
"""


def test_guard_memory_that_is_not_enough_names_the_shape():
    root = pathlib.Path(__file__).parents[2]
    found = subprocess.run(
        [sys.executable, "-c", _OUT_OF_MEMORY],
        capture_output=True,
        text=True,
        cwd=root,
        env={**os.environ, "PYTHONPATH": f"{root}:{root / 'tests'}", "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert "not enough for a pass of 64 rows x" in found.stdout, found.stderr[-2000:]
    assert "64 prompts, 128 pairs" in found.stdout
    assert "alignment.batch_tokens" in found.stdout
