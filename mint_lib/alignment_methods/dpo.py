"""Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290) with TRL's trainer.

The frozen reference is the student without its adapter. TRL runs the prompt once for each side and has no prompt
trees; its batch counts pairs.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from mint_lib.alignment import AlignmentMethod
from mint_lib.reading import check_window, encode_answer, encode_prompt
from mint_lib.records import PreferencePair

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
        self, model: "torch.nn.Module", *, pairs: Sequence[PreferencePair], arguments: dict[str, Any]
    ) -> "transformers.Trainer":
        """A trainer on every pair by itself."""
        import datasets
        import trl

        class PreparedDpoTrainer(trl.DPOTrainer):
            """Takes token ids as they are, so that both sides have the tokens that ORPO trains and serving makes."""

            def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
                return dataset

        rows = []
        for pair in pairs:
            prompt_ids = encode_prompt(self.tokenizer, pair.prompt)
            chosen_ids = encode_answer(self.tokenizer, pair.chosen)
            rejected_ids = encode_answer(self.tokenizer, pair.rejected)
            check_window(
                len(prompt_ids) + max(len(chosen_ids), len(rejected_ids)),
                window_tokens=self.window_tokens,
                case_id=pair.case_id,
            )
            rows.append({"prompt_ids": prompt_ids, "chosen_ids": chosen_ids, "rejected_ids": rejected_ids})
        return PreparedDpoTrainer(
            model=model,
            args=trl.DPOConfig(**arguments, gradient_checkpointing=False, max_length=None, beta=self.config.beta),
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=self.tokenizer,
        )
