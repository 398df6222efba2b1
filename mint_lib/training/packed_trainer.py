"""The trainer of every method on packed prompt trees: the method gives the loss of a batch, the rest is here.

Goes in: a student with its adapter, preference pairs and a loss. Comes out: a `transformers.Trainer` whose batches are
prompt trees, with the loss's figures in its log. It does not know what the loss is.

Shape suffixes: as in `mint_lib/packing.py`, and P pairs in a batch.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from mint_lib.packing import predict_edges
from mint_lib.records import PreferencePair
from mint_lib.training.preference_trees import PackedPairs, collate_pairs, grow_trees

if TYPE_CHECKING:
    import torch
    import transformers

PackedLoss = Callable[["torch.Tensor", PackedPairs], tuple["torch.Tensor", dict[str, "torch.Tensor"]]]
"""From the float32 log-probability of each edge, [N], and its batch: the loss and, detached, its figures."""


def build_packed_trainer(
    model: "torch.nn.Module",
    *,
    pairs: Sequence[PreferencePair],
    tokenizer: "transformers.PreTrainedTokenizerBase",
    window_tokens: int,
    with_prompt_edges: bool,
    loss: PackedLoss,
    arguments: dict[str, Any],
) -> "transformers.Trainer":
    """A trainer of `model` on the pairs' prompt trees, with `arguments` of `transformers.TrainingArguments`.

    `with_prompt_edges` predicts the prompt's tokens too, for losses that want their likelihood.

    Raises:
        PromptTooLong: prompt and answer of a pair together exceed `window_tokens`.
    """
    import transformers

    trees = grow_trees(pairs, tokenizer, window_tokens=window_tokens, with_prompt_edges=with_prompt_edges)
    pad_token_id = tokenizer.pad_token_id
    return _make_trainer_class(loss)(
        model=model,
        args=transformers.TrainingArguments(**arguments, remove_unused_columns=False),
        train_dataset=trees,
        data_collator=lambda items: collate_pairs(items, pad_token_id=pad_token_id),
    )


def average_chosen_nll(log_probability_N: "torch.Tensor", batch: PackedPairs) -> "torch.Tensor":
    """Negative log-probability of a token of the chosen side, averaged over all such tokens of the batch's pairs."""
    return -(log_probability_N * batch["nll_weight_N"]).sum() / batch["nll_weight_N"].sum()


def compare_sides(chosen_P: "torch.Tensor", rejected_P: "torch.Tensor") -> dict[str, "torch.Tensor"]:
    """The figures reward_accuracy and reward_margin of both sides' average log-probabilities of a token, in nats.

    A margin is the chosen side's less the rejected side's, without a method's own factor: methods can be compared.
    """
    margin_P = (chosen_P - rejected_P).detach()
    return {"reward_accuracy": (margin_P > 0).float().mean(), "reward_margin": margin_P.mean()}


def _make_trainer_class(loss: PackedLoss) -> type["transformers.Trainer"]:
    """The Trainer of `loss`, defined late because transformers is heavy to import."""
    import torch
    import transformers

    class PackedTrainer(transformers.Trainer):
        """Sums its figures on the device and moves them to the host only when they are logged."""

        def __init__(self, **arguments: Any):
            super().__init__(**arguments)
            self.model_accepts_loss_kwargs = False  # the loss is a mean already: the Trainer divides by accumulation
            self._figures: dict[str, torch.Tensor] = {}
            self._num_batches = 0

        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            value, figures = loss(predict_edges(model, inputs), inputs)
            figures["padding_share"] = 1.0 - inputs["num_real_tokens"] / inputs["input_ids"].numel()
            for name, figure in figures.items():
                self._figures[name] = self._figures.get(name, 0.0) + figure
            self._num_batches += 1
            return (value, None) if return_outputs else value

        def log(self, logs: dict[str, float], *arguments: Any, **options: Any) -> None:
            if self._num_batches:
                means = torch.stack(list(self._figures.values())) / self._num_batches
                means = self.accelerator.reduce(means, reduction="mean")
                logs.update(zip(self._figures, means.tolist(), strict=True))
                self._figures, self._num_batches = {}, 0
            super().log(logs, *arguments, **options)

    return PackedTrainer
