"""ORPO on packed prompt trees: each prompt is computed once, its chosen and rejected answers hang from it as branches.

The loss is that of Hong et al. 2024 (arXiv 2403.07691, equations 4 to 7): the likelihood of the chosen answer and the
log odds ratio between both sides, with the average log-probability of a token as log p. Its numbers equal TRL's
`ORPOTrainer`; its cost does not, because logits exist only where a token is to be predicted.

Shape suffixes: as in `mint_lib/packing.py`, and P pairs in a batch.
"""

import math
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field

from mint_lib.training.method import AlignmentMethod
from mint_lib.training.packed_trainer import (
    average_chosen_nll,
    average_over_pairs,
    build_packed_trainer,
    compare_sides,
)
from mint_lib.training.preference_trees import PackedPairs, average_pairs
from mint_lib.training.setup import TrainingSetup
from mint_lib.training.tree_file import TreeFile

if TYPE_CHECKING:
    import torch
    import transformers

_SMALLEST_SURPRISE = 2.0**-20  # of a float32 average log-probability: about 1e-6 nats, where 1 - p is still exact


class Orpo(AlignmentMethod):
    """Odds ratio preference optimisation without a reference model."""

    splits_by_tokens = True

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
        self, model: "torch.nn.Module", *, trees: TreeFile, setup: TrainingSetup
    ) -> "transformers.Trainer":
        """A trainer on the pairs' prompt trees."""
        config = self.config
        return build_packed_trainer(
            model,
            trees=trees,
            reader=self.reader,
            with_prompt_edges=config.nll == "prompt_and_answer",
            loss=lambda log_probability_N, batch: orpo_loss(
                log_probability_N, batch, beta=config.beta, nll_weight=config.nll_weight
            ),
            setup=setup,
        )


def orpo_loss(
    log_probability_N: "torch.Tensor", batch: PackedPairs, *, beta: float, nll_weight: float
) -> tuple["torch.Tensor", dict[str, "torch.Tensor"]]:
    """A batch's share of the step's loss and, detached, its figures.

    These are nll, odds_ratio_loss, reward_accuracy and reward_margin, the last in nats per token. `log_probability_N`
    is the float32 log-probability of each edge, as `predict_edges` gives it.
    """
    import torch

    chosen_P, rejected_P = average_pairs(log_probability_N, batch)
    log_odds_P = (chosen_P - rejected_P) - (log1mexp(chosen_P) - log1mexp(rejected_P))
    odds_ratio_loss = average_over_pairs(-torch.nn.functional.logsigmoid(log_odds_P), batch)
    nll = average_chosen_nll(log_probability_N, batch)
    figures = {
        "nll": nll.detach(),
        "odds_ratio_loss": odds_ratio_loss.detach(),
        **compare_sides(chosen_P, rejected_P, batch),
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
