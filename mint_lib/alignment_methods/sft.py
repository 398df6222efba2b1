"""Supervised fine-tuning on the chosen answers, with TRL's trainer: the baseline that never sees a rejected answer."""

from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict

from mint_lib.training.method import AlignmentMethod
from mint_lib.training.padded_rows import build_row_trainer
from mint_lib.training.setup import TrainingSetup
from mint_lib.training.tree_file import TreeFile

if TYPE_CHECKING:
    import torch
    import transformers

_NOT_LABELLED = -100  # what PyTorch's cross-entropy skips


class Sft(AlignmentMethod):
    """Supervised fine-tuning."""

    class Config(BaseModel):
        """Settings of the loss."""

        model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

        nll: Literal["answer", "prompt_and_answer"] = "answer"
        """Tokens whose likelihood is raised: the chosen answer's only, or the prompt's too, images left out."""

    def build_trainer(
        self, model: "torch.nn.Module", *, trees: TreeFile, setup: TrainingSetup
    ) -> "transformers.Trainer":
        """A trainer on each prompt's chosen answers, every one once however many pairs hold it."""
        import trl

        # A text student has none. An image's places stand for pixels; an output layer may not even know their token.
        image_token_id = getattr(model.config, "image_token_id", None)
        return build_row_trainer(
            trl.SFTTrainer,
            trl.SFTConfig,
            model,
            trees=trees,
            reader=self.reader,
            setup=setup,
            list_rows=lambda tree: [(answer,) for answer in dict.fromkeys(tree.chosen)],
            finish_batch=lambda batch: self._label(batch, image_token_id),
        )

    def _label(self, batch: dict[str, Any], image_token_id: int | None) -> dict[str, Any]:
        """`batch` with `labels` in place of the answers' mask."""
        is_answer_BT = batch.pop("completion_mask")
        is_labelled_BT = is_answer_BT if self.config.nll == "answer" else batch["attention_mask"]
        labels_BT = batch["input_ids"].masked_fill(is_labelled_BT == 0, _NOT_LABELLED)
        if image_token_id is not None:
            labels_BT[labels_BT == image_token_id] = _NOT_LABELLED
        return {**batch, "labels": labels_BT}
