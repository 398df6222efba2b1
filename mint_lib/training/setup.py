"""What an alignment method is told about the run that its trainer is for."""

import dataclasses
import pathlib
from typing import Any, Self

from mint_lib.training.deepspeed import render_deepspeed
from mint_lib.training.settings import AlignmentConfig

_LOGS_PER_VALIDATION = 5


@dataclasses.dataclass(frozen=True)
class TrainingSetup:
    """One worker's place in a run, and the settings that every method shares."""

    arguments: dict[str, Any]
    """Keyword arguments of `transformers.TrainingArguments`."""
    scratch: pathlib.Path
    """Folder on the worker's own disk; it is gone after the run."""
    trees_per_batch: int
    """Prompts of one optimiser step over all workers; pairs, for methods without trees."""
    batch_tokens: int
    """Most places, padding included, of one forward pass of a method on prompt trees."""
    seed: int
    """Seed of the order of the data."""
    rank: int = 0
    """This worker's number."""
    num_workers: int = 1

    @classmethod
    def of_config(
        cls, config: AlignmentConfig, scratch: pathlib.Path, *, rank: int = 0, num_workers: int = 1, **arguments: Any
    ) -> Self:
        """The setup that a recipe asks for; `arguments` overrides those of the trainer."""
        return cls(
            arguments=_trainer_arguments(config, scratch / "trainer", num_workers=num_workers) | arguments,
            scratch=scratch,
            trees_per_batch=config.trees_per_batch,
            batch_tokens=config.batch_tokens,
            seed=config.seed,
            rank=rank,
            num_workers=num_workers,
        )


def _trainer_arguments(config: AlignmentConfig, folder: pathlib.Path, *, num_workers: int) -> dict[str, Any]:
    """The `transformers.TrainingArguments` that every method shares."""
    arguments: dict[str, Any] = {
        "output_dir": str(folder),
        "num_train_epochs": config.epochs,
        "per_device_train_batch_size": max(1, config.trees_per_batch // (num_workers * config.accumulation_steps)),
        "gradient_accumulation_steps": config.accumulation_steps,
        "gradient_checkpointing": config.activations == "recompute",
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": config.warmup_share,
        "max_grad_norm": config.max_gradient_norm,
        "weight_decay": config.weight_decay,
        "seed": config.seed,
        "data_seed": config.seed,
        "eval_strategy": "no",
        "save_strategy": "steps",
        "save_steps": config.checkpoint_every_steps,
        "logging_steps": max(1, config.validate_every_steps // _LOGS_PER_VALIDATION),
        "logging_nan_inf_filter": False,
        "report_to": "none",
        "disable_tqdm": True,
        "log_level": "error",
        "use_cpu": not config.use_gpu,
        "bf16": config.use_gpu and config.student.dtype == "bfloat16",
        "dataloader_pin_memory": config.use_gpu,
        # Some vision towers have a last layer that nothing reads.
        "ddp_find_unused_parameters": config.student.reads == "image"
        and (config.tuning == "full" or config.lora.towers == "language_and_vision"),
    }
    if config.activations == "recompute":
        arguments["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    if config.deepspeed is not None:
        arguments["deepspeed"] = render_deepspeed(config.deepspeed, use_gpu=config.use_gpu, dtype=config.student.dtype)
    return arguments
