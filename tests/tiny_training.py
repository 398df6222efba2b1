"""What tests of training share: a method's own trainer of any model, for a few steps on the CPU."""

import pathlib
from collections.abc import Sequence
from typing import Any

from mint_lib.plugins import load_plugin
from mint_lib.reading import Reader
from mint_lib.records import PreferencePair
from mint_lib.training.method import AlignmentMethod
from mint_lib.training.setup import TrainingSetup
from mint_lib.training.tree_file import write_trees


def build_tiny_trainer(
    model: Any,
    pairs: Sequence[PreferencePair],
    folder: pathlib.Path,
    *,
    reader: Reader,
    method: str = "orpo",
    **arguments: Any,
) -> Any:
    """The trainer of `method` on `pairs`, all in one step; `arguments` are of `transformers.TrainingArguments`."""
    trees = write_trees(pairs, folder / "trees.arrow", reader=reader, window_tokens=512)
    defaults = {
        "output_dir": str(folder / "trainer"),
        "max_steps": 3,
        "learning_rate": 1e-2,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "log_level": "error",
        "use_cpu": True,
    }
    setup = TrainingSetup(
        arguments=defaults | arguments,
        scratch=folder,
        trees_per_batch=len(trees),
        batch_tokens=100_000,
        seed=1,
    )
    plugin = load_plugin("alignment_methods", method, base=AlignmentMethod)
    return plugin(plugin.Config(), reader=reader).build_trainer(model, trees=trees, setup=setup)
