"""What an alignment method is told about the run that its trainer is for."""

import dataclasses
import pathlib
from typing import Any


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
    rank: int
    """This worker's number."""
    num_workers: int
