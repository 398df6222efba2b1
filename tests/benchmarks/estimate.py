"""The estimate of a step's memory against the peak that one really takes on this CPU.

    OMP_NUM_THREADS=1 python tests/benchmarks/estimate.py

Each row is a fresh process: a student of SmolLM2-135M's shape with random weights and a LoRA adapter in float32, one
packed ORPO step with AdamW. Measured is the peak of resident memory above what the loaded model held before; estimated
are all terms but the weights. A ratio above 1 is an estimate on the safe side. The processes give freed memory back at
once (glibc's M_MMAP_THRESHOLD); by default glibc holds on to much of it, and peaks are 1.6 to 1.8 times as high.
"""

import argparse
import multiprocessing
import os
import pathlib
import sys
import warnings
from typing import NamedTuple

_VOCABULARY = 49152
_ANSWER_TOKENS = 24


class Shape(NamedTuple):
    """A pass and how it is trained."""

    num_trees: int
    prompt_tokens: int
    activations: str = "keep"
    last_layers: int | None = None
    rank: int = 8


SHAPES = (
    Shape(1, 200),
    Shape(4, 200),
    Shape(1, 800),
    Shape(4, 200, rank=64),
    Shape(4, 200, last_layers=6),
    Shape(4, 200, "recompute"),
)


def measure(shape: Shape) -> tuple[float, float]:
    """Estimated and measured bytes of one step beyond the weights, in a process that does nothing else."""
    import torch
    import transformers

    from mint_lib.alignment_methods.orpo import orpo_loss
    from mint_lib.packing import pack_tree, predict_edges
    from mint_lib.training.adapter import LoraConfig, add_adapter
    from mint_lib.training.architecture import measure_architecture
    from mint_lib.training.estimate import estimate_memory
    from mint_lib.training.estimate_setting import Setting
    from mint_lib.training.preference_trees import PairTree, collate_pairs

    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=_VOCABULARY,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            tie_word_embeddings=True,
        )
    )
    student, lora = measure_architecture(base), LoraConfig(rank=shape.rank, last_layers=shape.last_layers)
    model = add_adapter(base, lora)
    if shape.activations == "recompute":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    optimiser = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad])

    def draw(length: int) -> list[int]:
        return torch.randint(3, _VOCABULARY, (length,)).tolist()

    def take_step(num_trees: int, prompt_tokens: int) -> tuple[int, int, int]:
        trees = [
            pack_tree(draw(prompt_tokens), [draw(_ANSWER_TOKENS), draw(_ANSWER_TOKENS)], with_prompt_edges=True)
            for _ in range(num_trees)
        ]
        batch = collate_pairs([PairTree("", tree, chosen=(0,), rejected=(1,)) for tree in trees], pad_token_id=0)
        orpo_loss(predict_edges(model, batch), batch, beta=0.1, nll_weight=1.0)[0].backward()
        optimiser.step()
        return batch["input_ids"].numel(), batch["input_ids"].shape[1], len(batch["target_N"])

    # A first small forward pass loads code and workspaces, which are not the step's; optimiser and gradients are.
    with torch.no_grad():
        model(torch.zeros((1, 8), dtype=torch.long))
    before = _read_memory("VmRSS")
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew (man proc_pid_clear_refs)
    num_places, row_tokens, num_edges = take_step(shape.num_trees, shape.prompt_tokens)
    setting = Setting(
        lora=lora,
        activations=shape.activations,
        device="cpu",
        batch_tokens=num_places,
        row_tokens=row_tokens,
        mean_row_tokens=row_tokens,
        edge_share=num_edges / num_places,
    )
    terms = estimate_memory(student, setting)
    estimated = sum(term.num_bytes for term in terms if term.name not in ("base weights", "adapter"))
    return estimated, _read_memory("VmHWM") - before


def _read_memory(key: str) -> int:
    """Bytes that Linux tells of this process."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # for the processes of the measurements
    write = sys.stdout.write
    write("| trees x prompt | activations | adapted layers | rank | estimated MB | measured MB | ratio |\n")
    write("|---|---|---|---|---|---|---|\n")
    for shape in SHAPES:
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            estimated, measured = pool.apply(measure, (shape,))
        write(
            f"| {shape.num_trees} x {shape.prompt_tokens} | {shape.activations} | {shape.last_layers or 'all'} | "
            f"{shape.rank} | {estimated / 1e6:.0f} | {measured / 1e6:.0f} | {estimated / measured:.2f} |\n"
        )
        sys.stdout.flush()


if __name__ == "__main__":
    main()
