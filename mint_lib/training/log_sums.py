"""What a trainer has added up since its last logged step, so that a resumed run logs what the unbroken one would.

Goes in: a trainer, and the folder of a checkpoint. Comes out: a small file for each worker, and the same sums again in
another process's trainer. transformers keeps none of this in its checkpoints.
"""

import json
import pathlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import transformers

_PATTERN = "sums-*.json"


def write_sums(trainer: "transformers.Trainer", checkpoint: pathlib.Path) -> None:
    """Write this worker's sums to its folder of a checkpoint."""
    checkpoint.mkdir(parents=True, exist_ok=True)
    figures = getattr(trainer, "_figures", {})
    sums = {
        "since_step": trainer._globalstep_last_logged,
        "loss": trainer._tr_loss.item(),
        "num_steps": getattr(trainer, "_num_steps", 0),
        "figures": {name: value.item() for name, value in figures.items()},
        # TRL's trainers keep lists of numbers, and count tokens.
        "trl": getattr(trainer, "_metrics", {}).get("train", {}),
        "trl_tokens": getattr(trainer, "_total_train_tokens", 0),
    }
    (checkpoint / f"sums-{trainer.args.process_index}.json").write_text(json.dumps(sums, sort_keys=True))


def read_sums(trainer: "transformers.Trainer", checkpoint: pathlib.Path) -> None:
    """Put the sums of a restored checkpoint into `trainer`, which has just begun to train.

    With another number of workers each gets the mean over those that wrote; sums over workers are then as they were.
    """
    import torch

    parts: list[dict[str, Any]] = [json.loads(path.read_text()) for path in sorted(checkpoint.glob(_PATTERN))]
    if not parts:
        return
    own = checkpoint / f"sums-{trainer.args.process_index}.json"
    if len(parts) == trainer.args.world_size:
        parts = [json.loads(own.read_text())]
    trainer._globalstep_last_logged = parts[0]["since_step"]
    trainer._tr_loss.fill_(sum(part["loss"] for part in parts) / len(parts))
    if parts[0]["num_steps"]:
        trainer._num_steps = parts[0]["num_steps"]
        trainer._figures = {
            name: torch.tensor(sum(part["figures"][name] for part in parts) / len(parts), device=trainer.args.device)
            for name in parts[0]["figures"]
        }
    if hasattr(trainer, "_total_train_tokens"):
        trainer._total_train_tokens = parts[0]["trl_tokens"]
    if len(parts) == 1:
        for name, values in parts[0]["trl"].items():
            trainer._metrics["train"][name] = list(values)
