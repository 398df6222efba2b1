"""SimPO on packed trees against TRL's CPOTrainer on padded rows, and against the paper's formula."""

import math
import types

import pytest
import torch
from pydantic import ValidationError
from tiny_alignment import build, config_of
from tiny_preferences import TINY, gradient_of, make_adapted_model, make_pair

from mint_lib.alignment_methods.simpo import Simpo, simpo_loss
from mint_lib.packing import predict_edges
from mint_lib.reading import TextReader, encode_answer, encode_prompt
from mint_lib.student import load_tokenizer
from mint_lib.training.preference_trees import collate_pairs, grow_trees

BETA, GAMMA = 2.5, 1.4

RAGGED = [
    make_pair("c1", "Girl with hearing loss.", "LIST:\n1. 'Usher syndrome'\n2. 'Sotos'", "LIST:\n1. 'Usher-like'"),
    make_pair("c2", "Man.", "Yes", "No, and for many a reason that takes longer to say"),
    make_pair("c1", "Girl with hearing loss.", "LIST:\n1. 'Usher syndrome'", "No"),
    make_pair("c3", "A text of more words about a boy of 2 years with seizures and low muscle tone.", "B", "Beta of x"),
]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TINY)


@pytest.fixture(scope="module")
def model():
    return make_adapted_model(seed=5)


def pack(tokenizer, pairs=RAGGED):
    trees = grow_trees(pairs, TextReader(tokenizer), window_tokens=512)
    return trees, collate_pairs(trees, pad_token_id=tokenizer.pad_token_id)


def trl_loss(model, tokenizer, *, nll_weight):
    """TRL's own loss on the same token ids, padded by its own collator."""
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.utils import DPODataCollatorWithPadding

    oracle = types.SimpleNamespace(
        loss_type="simpo",
        beta=BETA,
        simpo_gamma=GAMMA,
        cpo_alpha=nll_weight,
        alpha=0.0,
        label_smoothing=0.0,
        is_encoder_decoder=False,
        pad_token_id=tokenizer.pad_token_id,
        aux_loss_enabled=False,
        accelerator=types.SimpleNamespace(device=torch.device("cpu"), gather_for_metrics=lambda value: value),
        concatenated_inputs=CPOTrainer.concatenated_inputs,
        get_batch_logps=CPOTrainer.get_batch_logps,
    )
    for name in ("concatenated_forward", "cpo_loss", "get_batch_loss_metrics"):
        setattr(oracle, name, types.MethodType(getattr(CPOTrainer, name), oracle))
    rows = []
    for item in RAGGED:
        prompt_ids, row = encode_prompt(tokenizer, item.prompt), {}
        for side in ("chosen", "rejected"):
            answer_ids = encode_answer(tokenizer, getattr(item, side))
            row[f"{side}_input_ids"] = prompt_ids + answer_ids
            row[f"{side}_attention_mask"] = [1] * len(prompt_ids + answer_ids)
            row[f"{side}_labels"] = [-100] * len(prompt_ids) + answer_ids
        rows.append(row)
    batch = DPODataCollatorWithPadding(pad_token_id=tokenizer.pad_token_id)(rows)
    return oracle.get_batch_loss_metrics(model, batch)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("nll_weight", [0.0, 0.7])
def test_simpo_on_ragged_trees_equals_trl(model, tokenizer, nll_weight):
    _, batch = pack(tokenizer)
    loss, figures = simpo_loss(predict_edges(model, batch), batch, beta=BETA, gamma=GAMMA, nll_weight=nll_weight)
    expected, metrics = trl_loss(model, tokenizer, nll_weight=nll_weight)
    assert abs(loss.item() - expected.item()) <= 1e-5  # float32 sums in another order
    assert figures["reward_accuracy"].item() == pytest.approx(metrics["rewards/accuracies"])
    assert BETA * figures["reward_margin"].item() == pytest.approx(metrics["rewards/margins"], abs=1e-5)
    if nll_weight:
        assert figures["nll"].item() == pytest.approx(metrics["nll_loss"], abs=1e-5)
    ours, theirs = gradient_of(model, loss).double(), gradient_of(model, expected).double()
    # Relative to the largest entry: an entry near 0 is a difference of larger float32 numbers.
    torch.testing.assert_close(ours, theirs, atol=1e-5 * theirs.abs().max().item(), rtol=1e-3)


def test_simpo_loss_equals_the_paper_with_gamma_outside_beta(tokenizer):
    trees, batch = pack(tokenizer, RAGGED[:1])
    log_p = torch.linspace(-3.0, -0.1, len(batch["target_N"]))
    loss, _ = simpo_loss(log_p, batch, beta=BETA, gamma=GAMMA, nll_weight=0.0)
    paths = [list(trees[0].tree.paths[side[0]]) for side in (trees[0].chosen, trees[0].rejected)]
    chosen, rejected = (log_p[path].double().sum().item() / len(path) for path in paths)
    # Equation 6. The rounding is that of float32 sums of about ten numbers.
    expected = -math.log(1 / (1 + math.exp(-(BETA * chosen - BETA * rejected - GAMMA))))
    assert loss.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("certain", ["chosen", "rejected", "both", "neither"])
@pytest.mark.parametrize("beta", [2.0, 10.0])
def test_simpo_gradient_is_finite_and_pushes_apart_however_certain_an_answer_is(tokenizer, certain, beta):
    trees, batch = pack(tokenizer, [make_pair("c", "Boy.", "yes", "no")])
    paths = {side: list(trees[0].tree.paths[getattr(trees[0], side)[0]]) for side in ("chosen", "rejected")}
    # A token that float32 gives no chance at all has a log-probability near -1e4 where logits are that far apart.
    log_p = torch.full((len(batch["target_N"]),), -1e4 if certain == "neither" else -2.0)
    for side in paths:
        if certain in (side, "both"):
            log_p[paths[side]] = 0.0
    shared = set(paths["chosen"]) & set(paths["rejected"])
    log_p.requires_grad_()
    loss, _ = simpo_loss(log_p, batch, beta=beta, gamma=1.0, nll_weight=0.0)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(log_p.grad).all()
    assert all(log_p.grad[edge] < 0 for edge in paths["chosen"] if edge not in shared)
    assert all(log_p.grad[edge] > 0 for edge in paths["rejected"] if edge not in shared)


def test_simpo_adapter_overfits_a_pair(tmp_path):
    settings = {"beta": BETA, "gamma": GAMMA}
    config = config_of(method="simpo", method_config=settings, epochs=40, validate_every_steps=50)
    trainer, _ = build("simpo", tmp_path, config, RAGGED[3:])
    trainer.train()
    logged = [row for row in trainer.state.log_history if "reward_margin" in row]
    assert logged[-1]["simpo_loss"] < 0.1 < logged[0]["simpo_loss"]
    assert logged[-1]["reward_margin"] > GAMMA / BETA, "the target margin is reached"
    assert logged[-1]["reward_accuracy"] == 1.0
    assert logged[-1]["padding_share"] == 0.0


@pytest.mark.parametrize("values", [{"beta": 0.0}, {"gamma": -0.1}, {"nll_weight": -1.0}, {"gamma_beta_ratio": 0.5}])
def test_simpo_setting_that_is_not_allowed_is_refused(values):
    with pytest.raises(ValidationError, match=next(iter(values))):
        Simpo.Config(**values)
