"""ORPO on packed trees against TRL's ORPOTrainer on padded rows, and its gradient where a probability reaches 1."""

import types

import pytest
import torch
from tiny_alignment import build, config_of
from tiny_preferences import TINY, gradient_of, make_adapted_model, make_pair

from mint_lib.alignment_methods.orpo import log1mexp, orpo_loss
from mint_lib.packing import predict_edges
from mint_lib.reading import TextReader, encode_answer, encode_prompt
from mint_lib.student import load_tokenizer
from mint_lib.training.preference_trees import average_pairs, collate_pairs, grow_trees, score_pairs

BETA = 0.1

RAGGED = [
    make_pair("c1", "Boy with short stature.", "LIST:\n1. 'Noonan'\n2. 'Costello'", "LIST:\n1. 'Kabuki'"),
    make_pair("c1", "Boy with short stature.", "LIST:\n1. 'Noonan'\n2. 'Costello'", "No"),
    make_pair(
        "c2", "A far longer text about a girl of 3 years with seizures and a heart defect.", "B", "Beta of the x"
    ),
    make_pair("c3", "Man.", "LIST:\n1. 'Marfan syndrome'", "LIST:\n1. 'Marfan-like'\n2. 'Sotos'"),
]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TINY)


@pytest.fixture(scope="module")
def model():
    return make_adapted_model(seed=3)


def packed_loss(model, tokenizer, *, with_prompt_edges):
    trees = grow_trees(RAGGED, TextReader(tokenizer), window_tokens=512, with_prompt_edges=with_prompt_edges)
    batch = collate_pairs(trees, pad_token_id=tokenizer.pad_token_id)
    return orpo_loss(predict_edges(model, batch), batch, beta=BETA, nll_weight=1.0)


def trl_forward(model, tokenizer):
    """TRL's own loss functions on the same token ids, padded as its collator pads them."""
    from trl.experimental.orpo import ORPOTrainer

    oracle = types.SimpleNamespace(
        is_encoder_decoder=False,
        padding_value=tokenizer.pad_token_id,
        label_pad_token_id=-100,
        aux_loss_enabled=False,
        beta=BETA,
        accelerator=types.SimpleNamespace(device=torch.device("cpu"), gather_for_metrics=lambda value: value),
        concatenated_inputs=ORPOTrainer.concatenated_inputs,
        get_batch_logps=ORPOTrainer.get_batch_logps,
    )
    for name in ("concatenated_forward", "odds_ratio_loss", "get_batch_loss_metrics"):
        setattr(oracle, name, types.MethodType(getattr(ORPOTrainer, name), oracle))
    batch = {}
    for side in ("chosen", "rejected"):
        rows = [
            (encode_prompt(tokenizer, item.prompt), encode_answer(tokenizer, getattr(item, side))) for item in RAGGED
        ]
        width = max(len(prompt) + len(answer) for prompt, answer in rows)
        ids = torch.full((len(rows), width), tokenizer.pad_token_id)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for row, (prompt, answer) in enumerate(rows):
            end = len(prompt) + len(answer)
            ids[row, :end] = torch.tensor(prompt + answer)
            mask[row, :end] = 1
            labels[row, len(prompt) : end] = torch.tensor(answer)
        batch |= {f"{side}_input_ids": ids, f"{side}_attention_mask": mask, f"{side}_labels": labels}
    return oracle, batch


@pytest.mark.filterwarnings("ignore")
def test_orpo_on_ragged_trees_equals_trl(model, tokenizer):
    loss, figures = packed_loss(model, tokenizer, with_prompt_edges=True)
    oracle, batch = trl_forward(model, tokenizer)
    expected, metrics = oracle.get_batch_loss_metrics(model, batch)
    assert abs(loss.item() - expected.item()) <= 1e-5  # float32 sums in another order
    assert figures["reward_accuracy"].item() == pytest.approx(metrics["rewards/accuracies"])
    assert BETA * figures["reward_margin"].item() == pytest.approx(metrics["rewards/margins"], abs=1e-6)
    ours, theirs = gradient_of(model, loss), gradient_of(model, expected)
    assert torch.cosine_similarity(ours.double(), theirs.double(), dim=0).item() > 0.9999
    assert (ours.norm() / theirs.norm()).item() == pytest.approx(1.0, abs=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_orpo_with_answer_only_likelihood_equals_its_definition(model, tokenizer):
    loss, _ = packed_loss(model, tokenizer, with_prompt_edges=False)
    oracle, batch = trl_forward(model, tokenizer)
    chosen, rejected, *_ = oracle.concatenated_forward(model, batch)
    lengths = torch.tensor([len(encode_answer(tokenizer, item.chosen)) for item in RAGGED])
    ratio = oracle.odds_ratio_loss(chosen, rejected)[0]
    expected = -(chosen * lengths).sum() / lengths.sum() - ratio.mean()
    assert abs(loss.item() - expected.item()) <= 1e-5
    ours, theirs = gradient_of(model, loss), gradient_of(model, expected)
    assert torch.cosine_similarity(ours.double(), theirs.double(), dim=0).item() > 0.9999


@pytest.mark.parametrize("value", [0.0, -1e-12, -6e-8, -1e-4, -0.6931472, -1.0, -30.0, -1e4])
def test_orpo_log1mexp_and_its_gradient_are_finite(value):
    x = torch.tensor(value, requires_grad=True)
    y = log1mexp(x)
    y.backward()
    assert torch.isfinite(y)
    assert torch.isfinite(x.grad)
    if -20 < value < -1e-5:
        reference = torch.log(-torch.expm1(torch.tensor(value, dtype=torch.float64)))
        assert y.item() == pytest.approx(reference.item(), rel=1e-6)


@pytest.mark.parametrize("certain", ["chosen", "rejected", "both"])
def test_orpo_gradient_is_finite_when_an_answer_is_certain(tokenizer, certain):
    trees = grow_trees([make_pair("c", "Boy.", "yes", "no")], TextReader(tokenizer), window_tokens=99)
    batch = collate_pairs(trees, pad_token_id=0)
    log_p = torch.full((len(batch["target_N"]),), -2.0)
    for side in ("chosen", "rejected"):
        if certain in (side, "both"):
            log_p[list(trees[0].tree.paths[getattr(trees[0], side)[0]])] = 0.0
    log_p.requires_grad_()
    loss, _ = orpo_loss(log_p, batch, beta=BETA, nll_weight=1.0)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(log_p.grad).all()
    if certain == "rejected":
        assert log_p.grad[list(trees[0].tree.paths[trees[0].rejected[0]])].sum() > 0, "it is still pushed down"


def test_orpo_trees_hold_each_case_once_with_all_its_pairs(tokenizer):
    trees = grow_trees(RAGGED, TextReader(tokenizer), window_tokens=512)
    assert [tree.case_id for tree in trees] == ["c1", "c2", "c3"]
    assert [len(tree.chosen) for tree in trees] == [2, 1, 1]
    assert len(trees[0].tree.paths) == 3, "the chosen answer of both pairs is one branch"


def test_orpo_scores_do_not_depend_on_the_grouping(model, tokenizer):
    trees = grow_trees(RAGGED, TextReader(tokenizer), window_tokens=512)
    one_by_one = score_pairs(model, trees, reader=TextReader(tokenizer), batch_tokens=1)
    batch = collate_pairs(trees, pad_token_id=0)
    with torch.inference_mode():
        together = average_pairs(predict_edges(model, batch), batch)
    for side, expected in zip(one_by_one, together, strict=True):
        torch.testing.assert_close(side, expected, atol=1e-5, rtol=0)


def test_orpo_adapter_overfits_a_pair(tmp_path):
    config = config_of(method="orpo", method_config={"nll": "answer"}, epochs=30, validate_every_steps=50)
    trainer, _ = build("orpo", tmp_path, config, RAGGED[2:3])
    trainer.train()
    logged = [row for row in trainer.state.log_history if "reward_margin" in row]
    assert logged[-1]["nll"] < logged[0]["nll"] - 0.5
    assert logged[-1]["reward_margin"] > logged[0]["reward_margin"] + 0.5
    assert logged[-1]["padding_share"] == 0.0
