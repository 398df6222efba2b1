"""SimPO on packed prompt trees: the average log-probability of a token is the reward, and no reference is needed.

The loss is that of Meng et al. 2024 (arXiv 2405.14734, equation 6): the chosen answer's reward shall exceed the
rejected one's by a target margin. Its numbers equal TRL's `CPOTrainer` with `loss_type="simpo"`; as each prompt is
computed once and logits exist only where a token is to be predicted, its cost does not.

Shape suffixes: as in `mint_lib/packing.py`, and P pairs in a batch.
"""

from typing import TYPE_CHECKING

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


class Simpo(AlignmentMethod):
    """Simple preference optimisation with a length-normalised reward and a target margin."""

    splits_by_tokens = True

    class Config(BaseModel):
        """Settings of the loss; the defaults are those of the paper's Llama-3-Base."""

        model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

        beta: float = Field(default=2.0, gt=0.0)
        """A reward is beta times the average log-probability of a token. The paper: 2.0 to 2.5; its authors later: up
        to 10. DPO's values, near 0.1, are far too small here."""
        gamma: float = Field(default=1.0, ge=0.0)
        """Target margin between both rewards: gamma itself, not the ratio gamma / beta of the authors' code. In nats
        per token the margin asked for is gamma / beta; the authors search that ratio between 0 and 1, from 0.5."""
        nll_weight: float = Field(default=0.0, ge=0.0)
        """Weight of the chosen answer's negative log-likelihood per token; 0 is SimPO, more is CPO-SimPO."""

    def build_trainer(
        self, model: "torch.nn.Module", *, trees: TreeFile, setup: TrainingSetup
    ) -> "transformers.Trainer":
        """A trainer on the pairs' prompt trees."""
        config = self.config
        return build_packed_trainer(
            model,
            trees=trees,
            reader=self.reader,
            with_prompt_edges=False,
            loss=lambda log_probability_N, batch: simpo_loss(
                log_probability_N, batch, beta=config.beta, gamma=config.gamma, nll_weight=config.nll_weight
            ),
            setup=setup,
        )


def simpo_loss(
    log_probability_N: "torch.Tensor", batch: PackedPairs, *, beta: float, gamma: float, nll_weight: float
) -> tuple["torch.Tensor", dict[str, "torch.Tensor"]]:
    """A batch's share of the step's loss and, detached, its figures: nll, simpo_loss, reward_accuracy, reward_margin.

    `log_probability_N` is the float32 log-probability of each edge, as `predict_edges` gives it. The figure
    reward_margin is in nats per token, without beta.
    """
    import torch

    chosen_P, rejected_P = average_pairs(log_probability_N, batch)
    margin_loss = average_over_pairs(-torch.nn.functional.logsigmoid(beta * (chosen_P - rejected_P) - gamma), batch)
    nll = average_chosen_nll(log_probability_N, batch)
    figures = {"nll": nll.detach(), "simpo_loss": margin_loss.detach(), **compare_sides(chosen_P, rejected_P, batch)}
    return margin_loss + nll_weight * nll, figures
