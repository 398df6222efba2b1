"""Supervised fine-tuning on the chosen answers, with TRL's trainer: the baseline that never sees a rejected answer."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict

from mint_lib.alignment import AlignmentMethod
from mint_lib.reading import check_window, encode_answer, encode_prompt
from mint_lib.records import PreferencePair

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
        """Tokens whose likelihood is raised: the chosen answer's only, or the prompt's too."""

    def build_trainer(
        self, model: "torch.nn.Module", *, pairs: Sequence[PreferencePair], arguments: dict[str, Any]
    ) -> "transformers.Trainer":
        """A trainer on each case's chosen answers, every one once however many pairs hold it."""
        import datasets
        import trl

        rows = []
        for pair in {(pair.case_id, pair.chosen): pair for pair in pairs}.values():
            prompt_ids = encode_prompt(self.tokenizer, pair.prompt)
            answer_ids = encode_answer(self.tokenizer, pair.chosen)
            check_window(len(prompt_ids) + len(answer_ids), window_tokens=self.window_tokens, case_id=pair.case_id)
            labels = prompt_ids if self.config.nll == "prompt_and_answer" else [_NOT_LABELLED] * len(prompt_ids)
            rows.append({"input_ids": prompt_ids + answer_ids, "labels": labels + answer_ids})
        return trl.SFTTrainer(
            model=model,
            args=trl.SFTConfig(
                **arguments,
                gradient_checkpointing=False,
                max_length=None,
                dataset_kwargs={"skip_prepare_dataset": True},
            ),
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=self.tokenizer,
        )
