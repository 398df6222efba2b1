"""ORPO on packed prompt trees: each prompt is computed once, its chosen and rejected answers hang from it as branches.

The loss is that of Hong et al. 2024 (arXiv 2403.07691, equations 4 to 7): the likelihood of the chosen answer and the
log odds ratio between both sides, with the average log-probability of a token as log p. Its numbers equal TRL's
`ORPOTrainer`; its cost does not, because logits exist only where a token is to be predicted.

Shape suffixes: as in `mint_lib/packing.py`, and P pairs in a batch.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from mint_lib.alignment import AlignmentMethod
from mint_lib.packing import predict_edges
from mint_lib.records import PreferencePair
from mint_lib.training.preference_trees import PackedPairs, average_pairs, collate_pairs, grow_trees

if TYPE_CHECKING:
    import torch
    import transformers

_SMALLEST_SURPRISE = 2.0**-20  # of a float32 average log-probability: about 1e-6 nats, where 1 - p is still exact


class Orpo(AlignmentMethod):
    """Odds ratio preference optimisation without a reference model."""

    class Config(BaseModel):
        """Settings of the loss."""

        model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

        beta: float = Field(default=0.1, ge=0.0)
        """Weight of the odds ratio term; 0.1 is the paper's lambda."""
        nll: Literal["answer", "prompt_and_answer"] = "prompt_and_answer"
        """Tokens whose likelihood is raised: the chosen answer's only, or the prompt's too as TRL does."""
        nll_weight: float = Field(default=1.0, ge=0.0)
        """Weight of the likelihood term."""

    def build_trainer(
        self, model: "torch.nn.Module", *, pairs: Sequence[PreferencePair], arguments: dict[str, Any]
    ) -> "transformers.Trainer":
        """A trainer on the pairs' prompt trees."""
        import transformers

        trees = grow_trees(
            pairs,
            self.tokenizer,
            window_tokens=self.window_tokens,
            with_prompt_edges=self.config.nll == "prompt_and_answer",
        )
        pad_token_id = self.tokenizer.pad_token_id
        trainer_class = _make_trainer_class(self.config)
        return trainer_class(
            model=model,
            args=transformers.TrainingArguments(**arguments, remove_unused_columns=False),
            train_dataset=trees,
            data_collator=lambda items: collate_pairs(items, pad_token_id=pad_token_id),
        )


def orpo_loss(
    log_probability_N: "torch.Tensor", batch: PackedPairs, *, beta: float, nll_weight: float
) -> tuple["torch.Tensor", dict[str, "torch.Tensor"]]:
    """The loss of a batch and, detached, its figures: nll, odds_ratio_loss, reward_accuracy, reward_margin.

    `log_probability_N` is the float32 log-probability of each edge, as `predict_edges` gives it. A margin is the chosen
    side's average log-probability of a token less the rejected side's, in nats.
    """
    import torch

    chosen_P, rejected_P = average_pairs(log_probability_N, batch)
    log_odds_P = (chosen_P - rejected_P) - (log1mexp(chosen_P) - log1mexp(rejected_P))
    odds_ratio_loss = -torch.nn.functional.logsigmoid(log_odds_P).mean()
    nll = -(log_probability_N * batch["nll_weight_N"]).sum() / batch["nll_weight_N"].sum()
    margin_P = (chosen_P - rejected_P).detach()
    figures = {
        "nll": nll.detach(),
        "odds_ratio_loss": odds_ratio_loss.detach(),
        "reward_accuracy": (margin_P > 0).float().mean(),
        "reward_margin": margin_P.mean(),
    }
    return nll_weight * nll + beta * odds_ratio_loss, figures


def log1mexp(x: "torch.Tensor") -> "torch.Tensor":
    """log(1 - exp(x)) for x <= 0, with a finite value and gradient at 0.

    Both forms are accurate on their side of -log 2 (Maechler 2012, "Accurately computing log(1 - exp(-|a|))"); each
    is computed from inputs of its side only, since `where` passes a NaN of the unused form on to the gradient.
    """
    import torch

    x = x.clamp(max=-_SMALLEST_SURPRISE)
    near = x > -math.log(2.0)
    from_near = torch.log(-torch.expm1(torch.where(near, x, -1.0)))
    from_far = torch.log1p(-torch.exp(torch.where(near, -1.0, x)))
    return torch.where(near, from_near, from_far)


def _make_trainer_class(config: Orpo.Config) -> type["transformers.Trainer"]:
    """The Trainer of this loss, defined late because transformers is heavy to import."""
    import torch
    import transformers

    class OrpoTrainer(transformers.Trainer):
        """Sums its figures on the device and moves them to the host only when they are logged."""

        def __init__(self, **arguments: Any):
            super().__init__(**arguments)
            self.model_accepts_loss_kwargs = False  # the loss is a mean already: the Trainer divides by accumulation
            self._figures: dict[str, torch.Tensor] = {}
            self._num_batches = 0

        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            log_probability_N = predict_edges(model, inputs)
            loss, figures = orpo_loss(log_probability_N, inputs, beta=config.beta, nll_weight=config.nll_weight)
            figures["padding_share"] = 1.0 - inputs["num_real_tokens"] / inputs["input_ids"].numel()
            for name, value in figures.items():
                self._figures[name] = self._figures.get(name, 0.0) + value
            self._num_batches += 1
            return (loss, None) if return_outputs else loss

        def log(self, logs: dict[str, float], *arguments: Any, **options: Any) -> None:
            if self._num_batches:
                means = torch.stack(list(self._figures.values())) / self._num_batches
                means = self.accelerator.reduce(means, reduction="mean")
                logs.update(zip(self._figures, means.tolist(), strict=True))
                self._figures, self._num_batches = {}, 0
            super().log(logs, *arguments, **options)

    return OrpoTrainer
