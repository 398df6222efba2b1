"""One ORPO step on the same tokens: ours on packed prompt trees, TRL's and Liger's on padded rows.

Goes in: the shape of a model and of a batch. Comes out: for each side a function that runs a step, that is a forward
and a backward pass, and gives its loss; the check that all sides compute the same; the memory that a step takes.

Ours is what the trainer of packed methods does with a step: passes over trees of similar length, each with its share of
the loss. TRL's side is its ORPOTrainer's own functions, in float32 and without checkpointed activations. Its likelihood
is that of prompt and answer; for the answer's alone its own pieces are put together. Liger's side is what its
LigerORPOTrainer does: the model's body over TRL's rows, then LigerFusedLinearORPOLoss, run eagerly, as its compiled
form needs a compiler and its kernels a GPU.
"""

import gc
import multiprocessing
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

from mint_lib.training.settings import AlignmentConfig

BETA = 0.1
BATCH_TOKENS = AlignmentConfig.model_fields["batch_tokens"].default
LOSS_TOLERANCE = 1e-5
"""Relative: sums of some thousand float32 terms in another order."""
LEAST_COSINE = 0.9999
Likelihood = Literal["prompt_and_answer", "answer"]
Step = Callable[[], float]
Row = tuple[list[int], list[tuple[list[int], list[int]]]]
"""A prompt, and the chosen and rejected answer of each of its pairs."""


class BatchShape(NamedTuple):
    """What a batch looks like."""

    num_prompts: int
    pairs_per_prompt: int
    prompt_tokens: int
    answer_tokens: int
    raggedness: float
    """Largest relative deviation of a length from its mean."""


RAGGED_PAIRS = BatchShape(num_prompts=4, pairs_per_prompt=1, prompt_tokens=192, answer_tokens=12, raggedness=0.5)
TREE = BatchShape(num_prompts=1, pairs_per_prompt=4, prompt_tokens=256, answer_tokens=24, raggedness=0.0)

SMOLLM2_135M = types.MappingProxyType(
    {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    }
)
"""Speed does not depend on the values of weights, so they are random."""


def build_model(shape: types.MappingProxyType[str, Any] = SMOLLM2_135M) -> Any:
    """A random model with a LoRA adapter of rank 8 on every linear layer but the output one."""
    import peft
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = peft.LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False)
    return peft.get_peft_model(LlamaForCausalLM(LlamaConfig(**shape)), config).train()


def draw_rows(shape: BatchShape, *, vocabulary: int) -> list[Row]:
    """Random tokens in the shape of a batch; no two answers of a prompt are alike."""
    import numpy

    rng = numpy.random.default_rng(1)

    def draw(mean: int) -> list[int]:
        length = max(2, round(mean * (1 + rng.uniform(-shape.raggedness, shape.raggedness))))
        return rng.integers(3, vocabulary, length).tolist()

    return [
        (
            draw(shape.prompt_tokens),
            [(draw(shape.answer_tokens), draw(shape.answer_tokens)) for _ in range(shape.pairs_per_prompt)],
        )
        for _ in range(shape.num_prompts)
    ]


def make_ours(model: Any, rows: list[Row], likelihood: Likelihood) -> Step:
    """Our step."""
    from mint_lib.alignment_methods.orpo import orpo_loss
    from mint_lib.packing import group_by_length, pack_tree, predict_edges
    from mint_lib.training.preference_trees import PairTree, collate_pairs

    trees = []
    for prompt, pairs in rows:
        answers = [answer for pair in pairs for answer in pair]
        tree = pack_tree(prompt, answers, with_prompt_edges=likelihood == "prompt_and_answer")
        trees.append(PairTree("", tree, tuple(range(0, len(answers), 2)), tuple(range(1, len(answers), 2))))
    groups = group_by_length([len(item.tree.input_ids) for item in trees], max_tokens=BATCH_TOKENS)
    batches = [collate_pairs([trees[index] for index in group], pad_token_id=0) for group in groups]
    pair_total, nll_total = (sum(batch[name] for batch in batches) for name in ("pair_total", "nll_total"))

    def run() -> float:
        model.zero_grad()
        loss = 0.0
        for batch in batches:
            batch |= {"pair_total": pair_total, "nll_total": nll_total}
            share = orpo_loss(predict_edges(model, batch), batch, beta=BETA, nll_weight=1.0)[0]
            share.backward()
            loss += share.item()
        return loss

    return run


def pad_rows(rows: list[Row]) -> dict[str, Any]:
    """A batch as TRL's collator makes it: one row for each side of each pair, padded to the longest of its side."""
    import torch

    batch: dict[str, Any] = {}
    pairs = [(prompt, pair) for prompt, pairs in rows for pair in pairs]
    for column, side in enumerate(("chosen", "rejected")):
        width = max(len(prompt) + len(pair[column]) for prompt, pair in pairs)
        ids = torch.zeros((len(pairs), width), dtype=torch.long)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for row, (prompt, pair) in enumerate(pairs):
            end = len(prompt) + len(pair[column])
            ids[row, :end], mask[row, :end] = torch.tensor(prompt + pair[column]), 1
            labels[row, len(prompt) : end] = torch.tensor(pair[column])
        batch |= {f"{side}_input_ids": ids, f"{side}_attention_mask": mask, f"{side}_labels": labels}
    return batch


def make_trl(model: Any, rows: list[Row], likelihood: Likelihood) -> Step:
    """TRL's step."""
    import torch
    from trl.experimental.orpo import ORPOTrainer

    trainer = types.SimpleNamespace(
        is_encoder_decoder=False,
        padding_value=0,
        aux_loss_enabled=False,
        beta=BETA,
        accelerator=types.SimpleNamespace(device=torch.device("cpu"), gather_for_metrics=lambda value: value),
        concatenated_inputs=ORPOTrainer.concatenated_inputs,
        get_batch_logps=ORPOTrainer.get_batch_logps,
    )
    for name in ("concatenated_forward", "odds_ratio_loss", "get_batch_loss_metrics"):
        setattr(trainer, name, types.MethodType(getattr(ORPOTrainer, name), trainer))
    batch = pad_rows(rows)
    lengths_P = torch.tensor([len(chosen) for _, pairs in rows for chosen, _ in pairs])

    def run() -> float:
        model.zero_grad()
        if likelihood == "prompt_and_answer":
            loss = trainer.get_batch_loss_metrics(model, batch)[0]
        else:
            chosen_P, rejected_P, *_ = trainer.concatenated_forward(model, batch)
            log_ratios_P = trainer.odds_ratio_loss(chosen_P, rejected_P)[0]
            loss = -(chosen_P * lengths_P).sum() / lengths_P.sum() - log_ratios_P.mean()
        loss.backward()
        return float(loss.item())

    return run


def make_liger(model: Any, rows: list[Row], likelihood: Likelihood) -> Step:
    """Liger's step, on the rows that TRL's functions make."""
    import torch
    from liger_kernel.chunked_loss import LigerFusedLinearORPOLoss
    from trl.experimental.orpo import ORPOTrainer

    inner = model.get_base_model()
    loss_of = LigerFusedLinearORPOLoss(beta=BETA, compiled=False)
    batch = pad_rows(rows)

    def run() -> float:
        model.zero_grad()
        padded = ORPOTrainer.concatenated_inputs(batch)
        input_ids_BT, mask_BT = padded["concatenated_input_ids"], padded["concatenated_attention_mask"]
        hidden_BTH = inner.model(input_ids_BT, attention_mask=mask_BT, use_cache=False).last_hidden_state[:, :-1]
        answer_BT = padded["concatenated_labels"][:, 1:]
        whole_BT = torch.where(mask_BT == 1, input_ids_BT, -100)[:, 1:]
        likelihood_BT = whole_BT if likelihood == "prompt_and_answer" else answer_BT
        head = inner.lm_head
        loss, _ = loss_of(head.weight, hidden_BTH, answer_BT, head.bias, nll_target=likelihood_BT)
        loss.backward()
        return float(loss.item())

    return run


MAKERS: dict[str, Callable[[Any, list[Row], Likelihood], Step]] = {
    "ours": make_ours,
    "TRL": make_trl,
    "Liger": make_liger,
}


def check_equal(model: Any, step: Step, reference: Step, *, what: str) -> None:
    """Check that two steps have the same loss and gradient.

    Raises:
        AssertionError: they differ.
    """
    import torch

    def run(side: Step) -> tuple[float, Any]:
        loss = side()
        return loss, torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]).double()

    (loss, gradient), (expected_loss, expected_gradient) = run(step), run(reference)
    difference = abs(loss - expected_loss) / abs(expected_loss)
    cosine = torch.cosine_similarity(gradient, expected_gradient, dim=0).item()
    if not (difference <= LOSS_TOLERANCE and cosine > LEAST_COSINE):
        raise AssertionError(f"{what}: losses differ by {difference:.1e}, the gradients' cosine is {cosine:.6f}")


def measure_peak(side: str, shape: BatchShape, likelihood: Likelihood) -> float:
    """GiB that a step of one side adds to the memory of a process that has loaded the model, at its peak."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measure_peak, (side, shape, likelihood))


def _measure_peak(side: str, shape: BatchShape, likelihood: Likelihood) -> float:
    model = build_model()
    run = MAKERS[side](model, draw_rows(shape, vocabulary=SMOLLM2_135M["vocab_size"]), likelihood)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten: Linux, proc(5)
    before = _read_kib("VmRSS")
    run()
    return (_read_kib("VmHWM") - before) / 2**20


def _read_kib(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1])
