"""The base of the alignment methods: what a file of `mint_lib/alignment_methods` defines."""

import abc
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel

from mint_lib.reading import Reader
from mint_lib.training.setup import TrainingSetup
from mint_lib.training.tree_file import TreeFile

if TYPE_CHECKING:
    import torch
    import transformers


class AlignmentMethod(abc.ABC):
    """Base of the plug-ins: turns pairs into a `transformers.Trainer` whose loss is the method's."""

    Config: ClassVar[type[BaseModel]]

    splits_by_tokens: ClassVar[bool] = False
    """Divides a step into passes by `batch_tokens`, so that any number of workers will do. Methods that count pairs
    want `trees_per_batch` to be a multiple of workers x `accumulation_steps`."""

    def __init__(self, config: Any, *, reader: Reader):
        self.config = config
        self.reader = reader

    @abc.abstractmethod
    def build_trainer(
        self, model: "torch.nn.Module", *, trees: TreeFile, setup: TrainingSetup
    ) -> "transformers.Trainer":
        """A trainer of `model` on the pairs in `trees`, the step's gradients averaged over the batch."""
