"""Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290) with TRL's trainer.

The frozen reference is the student without its adapter; where all weights are trained it is a copy of the student,
which takes its memory again. TRL runs the prompt, and the images, once for each side, for the student and for the
reference; a batch counts pairs. It trains without dropout, so that both log-probabilities differ by the weights alone:
`lora.dropout` has no effect.
"""

import copy
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from mint_lib.training.method import AlignmentMethod
from mint_lib.training.padded_rows import build_row_trainer
from mint_lib.training.setup import TrainingSetup
from mint_lib.training.tree_file import TreeFile

if TYPE_CHECKING:
    import torch
    import transformers


class Dpo(AlignmentMethod):
    """Direct preference optimisation against the student's own start."""

    class Config(BaseModel):
        """Settings of the loss."""

        model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

        beta: float = Field(default=0.1, gt=0.0)
        """Strength of the pull back to the reference; 0.1 is the paper's and MINT's."""

    def build_trainer(
        self, model: "torch.nn.Module", *, trees: TreeFile, setup: TrainingSetup
    ) -> "transformers.Trainer":
        """A trainer on every pair by itself."""
        import peft
        import trl

        has_adapter = isinstance(model, peft.PeftModel)
        trainer = build_row_trainer(
            trl.DPOTrainer,
            trl.DPOConfig,
            model,
            trees=trees,
            reader=self.reader,
            setup=setup,
            list_rows=lambda tree: zip(tree.chosen, tree.rejected, strict=True),
            settings={"beta": self.config.beta},
            ref_model=None if has_adapter else _copy_frozen(model),
        )
        if has_adapter:
            # TRL copies the adapter as its reference; without the copy it turns the adapter off instead.
            model.delete_adapter("ref")
        return trainer


def _copy_frozen(model: Any) -> Any:
    """A copy of `model` that shares no weight with it and is not trained."""
    return copy.deepcopy(model).requires_grad_(False).eval()
