"""One ORPO step, ours against TRL's, on the same tokens: seconds of wall and CPU, interleaved, and the peak of memory.

    OMP_NUM_THREADS=2 python tests/benchmarks/orpo_step.py --rounds 7

Losses and gradients are compared first; where they differ nothing is timed. The model has SmolLM2-135M's shape with
random weights, as speed does not depend on their values. Memory is each side's alone, in a process of its own.
"""

import argparse
import gc
import multiprocessing
import resource
import statistics
import time
import types
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

BETA = 0.1
_VOCABULARY = 49152


class Shape(NamedTuple):
    """What a batch looks like."""

    name: str
    num_trees: int
    pairs_per_tree: int
    prompt_tokens: int
    answer_tokens: int
    raggedness: float
    """Largest relative deviation of a length from its mean."""


SHAPES = (
    Shape("one pair, prompt 16 x answer, ragged", 4, 1, 256, 16, 0.5),
    Shape("one pair, uniform", 2, 1, 256, 48, 0.0),
    Shape("tree of 4 pairs", 1, 4, 256, 24, 0.0),
)


def build_model() -> Any:
    """A random model of SmolLM2-135M's shape with a LoRA adapter on every linear layer."""
    import peft
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=_VOCABULARY,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            tie_word_embeddings=True,
        )
    )
    config = peft.LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False)
    return peft.get_peft_model(model, config).train()


def draw_rows(shape: Shape) -> list[tuple[list[int], list[int], list[list[int]]]]:
    """Prompt, chosen answer and rejected answers of each tree, as random tokens."""
    import numpy

    rng = numpy.random.default_rng(1)

    def draw(mean: int) -> list[int]:
        length = max(2, round(mean * (1 + rng.uniform(-shape.raggedness, shape.raggedness))))
        return rng.integers(3, _VOCABULARY, length).tolist()

    return [
        (
            draw(shape.prompt_tokens),
            draw(shape.answer_tokens),
            [draw(shape.answer_tokens) for _ in range(shape.pairs_per_tree)],
        )
        for _ in range(shape.num_trees)
    ]


def make_ours(model: Any, shape: Shape, *, with_prompt: bool) -> Callable[[], Any]:
    """A function that gives our loss."""
    from mint_lib.alignment_methods.orpo import orpo_loss
    from mint_lib.packing import pack_tree, predict_edges
    from mint_lib.training.preference_trees import PairTree, collate_pairs

    trees = []
    for prompt, chosen, rejected in draw_rows(shape):
        tree = pack_tree(prompt, [chosen, *rejected], with_prompt_edges=with_prompt)
        places = tuple(range(1, 1 + len(rejected)))
        trees.append(PairTree("", tree, chosen=(0,) * len(rejected), rejected=places))
    batch = collate_pairs(trees, pad_token_id=0)
    return lambda: orpo_loss(predict_edges(model, batch), batch, beta=BETA, nll_weight=1.0)[0]


def make_trl(model: Any, shape: Shape, *, with_prompt: bool) -> Callable[[], Any]:
    """A function that gives TRL's loss; for answer-only likelihood its own pieces are put together."""
    import torch
    from trl.experimental.orpo import ORPOTrainer

    trainer = types.SimpleNamespace(
        is_encoder_decoder=False,
        padding_value=0,
        label_pad_token_id=-100,
        aux_loss_enabled=False,
        beta=BETA,
        accelerator=types.SimpleNamespace(device=torch.device("cpu"), gather_for_metrics=lambda value: value),
        concatenated_inputs=ORPOTrainer.concatenated_inputs,
        get_batch_logps=ORPOTrainer.get_batch_logps,
    )
    for name in ("concatenated_forward", "odds_ratio_loss", "get_batch_loss_metrics"):
        setattr(trainer, name, types.MethodType(getattr(ORPOTrainer, name), trainer))
    pairs = [(prompt, chosen, answer) for prompt, chosen, rejected in draw_rows(shape) for answer in rejected]
    batch = {}
    for side, column in (("chosen", 1), ("rejected", 2)):
        width = max(len(pair[0]) + len(pair[column]) for pair in pairs)
        ids = torch.zeros((len(pairs), width), dtype=torch.long)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for row, pair in enumerate(pairs):
            end = len(pair[0]) + len(pair[column])
            ids[row, :end], mask[row, :end] = torch.tensor(pair[0] + pair[column]), 1
            labels[row, len(pair[0]) : end] = torch.tensor(pair[column])
        batch |= {f"{side}_input_ids": ids, f"{side}_attention_mask": mask, f"{side}_labels": labels}
    lengths = torch.tensor([len(chosen) for _, chosen, _ in pairs])

    def loss() -> Any:
        if with_prompt:
            return trainer.get_batch_loss_metrics(model, batch)[0]
        chosen, rejected, *_ = trainer.concatenated_forward(model, batch)
        ratio = trainer.odds_ratio_loss(chosen, rejected)[0]
        return -(chosen * lengths).sum() / lengths.sum() - ratio.mean()

    return loss


def run_step(model: Any, loss_of: Callable[[], Any]) -> tuple[float, Any]:
    """The loss and the gradient of one step."""
    import torch

    model.zero_grad()
    loss = loss_of()
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


def measure_peak(side: str, shape: Shape, with_prompt: bool) -> float:
    """GiB that a step of one side adds to the loaded model's peak."""
    model = build_model()
    gc.collect()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run_step(model, (make_ours if side == "ours" else make_trl)(model, shape, with_prompt=with_prompt))
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20


def compare(shape: Shape, *, with_prompt: bool, num_rounds: int) -> str:
    """One line of the table.

    Raises:
        AssertionError: losses or gradients differ.
    """
    import torch

    model = build_model()
    sides = {"ours": make_ours(model, shape, with_prompt=with_prompt)}
    sides["trl"] = make_trl(model, shape, with_prompt=with_prompt)
    results = {side: run_step(model, loss_of) for side, loss_of in sides.items()}
    difference = abs(results["ours"][0] - results["trl"][0])
    cosine = torch.cosine_similarity(results["ours"][1].double(), results["trl"][1].double(), dim=0).item()
    if difference > 1e-5 or cosine < 0.9999:
        raise AssertionError(f"{shape.name}: losses differ by {difference}, gradient cosine {cosine}")
    wall: dict[str, list[float]] = {side: [] for side in sides}
    cpu: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(num_rounds):
        for side, loss_of in sides.items():
            started, cpu_started = time.perf_counter(), time.process_time()
            run_step(model, loss_of)
            wall[side].append(time.perf_counter() - started)
            cpu[side].append(time.process_time() - cpu_started)
    ratios = sorted(trl / ours for trl, ours in zip(wall["trl"], wall["ours"], strict=True))
    cpu_ratio = statistics.median(cpu["trl"]) / statistics.median(cpu["ours"])
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        peaks = {side: pool.apply(measure_peak, (side, shape, with_prompt)) for side in sides}
    return (
        f"| {shape.name} | {'prompt and answer' if with_prompt else 'answer'} | {statistics.median(wall['trl']):.2f} | "
        f"{statistics.median(wall['ours']):.2f} | {statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f}) | "
        f"{cpu_ratio:.2f} | {peaks['ours'] / peaks['trl']:.2f} | {difference:.0e} | {cosine:.6f} |"
    )


def main() -> None:
    """Print the table."""
    import sys

    import torch

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    warnings.filterwarnings("ignore")
    write = sys.stdout.write
    write(f"{torch.get_num_threads()} threads, {rounds} rounds\n")
    write("| batch | likelihood | TRL s | ours s | ratio (range) | CPU ratio | memory | loss diff | grad cos |\n")
    write("|---|---|---|---|---|---|---|---|---|\n")
    for shape in SHAPES:
        for with_prompt in (True, False):
            write(compare(shape, with_prompt=with_prompt, num_rounds=rounds) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
