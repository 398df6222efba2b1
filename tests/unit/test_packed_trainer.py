"""The trainer on prompt trees: a step's gradient is that of its whole batch, however it is divided into passes."""

import pytest
import torch
from tiny_alignment import PAIRS, build, config_of

from mint_lib.alignment_methods.orpo import orpo_loss
from mint_lib.packing import predict_edges
from mint_lib.reading import TextReader
from mint_lib.student import StudentConfig, load_tokenizer
from mint_lib.training.preference_trees import collate_pairs, grow_trees

UNEVEN = [*PAIRS[:8], *PAIRS[9:]]  # one prompt has one pair, the others two


def first_gradient(folder, *, batch_tokens, idle=False, **values):
    """Loss, gradient, logged figures, batches and model of the first step, with an adapter that does something."""
    config = config_of(batch_tokens=batch_tokens, trees_per_batch=12, **values)
    trainer, _ = build("orpo", folder, config, UNEVEN)
    generator = torch.Generator().manual_seed(4)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    if config.activations == "recompute":  # transformers turns it on when a training begins
        trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
        trainer.model.train()
        assert trainer.model.is_gradient_checkpointing
    step = next(iter(trainer.get_train_dataloader()))
    if idle:
        step["passes"].append(step["passes"][0])
        step["counts"].append(False)
    loss = trainer.training_step(trainer.model, step)
    logs = {}
    trainer.log(logs)
    gradient = torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.requires_grad])
    return loss.item(), gradient, logs, step, trainer.model


def test_packed_step_is_the_whole_batch_s_however_it_is_divided(tmp_path):
    whole_loss, whole, whole_logs, step, _ = first_gradient(tmp_path / "whole", batch_tokens=10**6)
    assert len(step["passes"]) == 1
    for batch_tokens in (16, 400):
        loss, gradient, logs, step, _ = first_gradient(tmp_path / str(batch_tokens), batch_tokens=batch_tokens)
        assert len(step["passes"]) > 1
        assert loss == pytest.approx(whole_loss, rel=1e-6)  # float32 sums in another order
        torch.testing.assert_close(gradient, whole, rtol=1e-4, atol=1e-7)
        same = [name for name in logs if name != "padding_share"]
        assert {"nll", "odds_ratio_loss", "reward_accuracy", "reward_margin"} <= set(same)
        assert [logs[name] for name in same] == pytest.approx([whole_logs[name] for name in same], rel=1e-5)
        assert logs["padding_share"] <= whole_logs["padding_share"]


def test_packed_step_equals_the_loss_of_one_batch_by_hand(tmp_path):
    loss, gradient, _, _, model = first_gradient(tmp_path, batch_tokens=16)
    reader = TextReader(load_tokenizer(StudentConfig(model="tiny")))
    trees = grow_trees(UNEVEN, reader, window_tokens=512, with_prompt_edges=True)
    batch = collate_pairs(trees, pad_token_id=reader.tokenizer.pad_token_id, reader=reader)
    model.zero_grad()
    expected, _ = orpo_loss(predict_edges(model, batch), batch, beta=0.1, nll_weight=1.0)
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    by_hand = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
    torch.testing.assert_close(gradient, by_hand, rtol=1e-4, atol=1e-7)


def test_packed_pass_that_does_not_count_changes_nothing(tmp_path):
    loss, gradient, logs, _, _ = first_gradient(tmp_path / "alone", batch_tokens=400)
    again, found, more, step, _ = first_gradient(tmp_path / "idle", batch_tokens=400, idle=True)
    assert step["counts"][-1] is False
    assert again == pytest.approx(loss, rel=1e-6)
    torch.testing.assert_close(found, gradient, rtol=1e-6, atol=1e-9)
    assert more["reward_margin"] == pytest.approx(logs["reward_margin"], rel=1e-6)
    assert more["padding_share"] > logs["padding_share"], "it was computed for nothing"


def test_packed_activations_computed_again_give_the_same_gradient(tmp_path):
    _, kept, *_ = first_gradient(tmp_path / "keep", batch_tokens=400)
    _, again, *_ = first_gradient(tmp_path / "recompute", batch_tokens=400, activations="recompute")
    torch.testing.assert_close(again, kept, rtol=1e-5, atol=1e-8)


def test_packed_padding_share_is_that_of_the_places(tmp_path):
    _, _, logs, step, _ = first_gradient(tmp_path, batch_tokens=400)
    places = sum(batch["input_ids"].numel() for batch in step["passes"])
    real = sum(int(batch["num_real_tokens"]) for batch in step["passes"])
    assert logs["padding_share"] == pytest.approx(1 - real / places)
    assert 0 < logs["padding_share"] < 0.2
