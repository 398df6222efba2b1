"""Fitting a small network with the best epoch kept: AdamW under warm-up and cosine, stopped by validation.

Goes in: a network, a plan, how batches are drawn and what a batch costs. Comes out: the weights of the best epoch, in
the network, and a history. Knows neither what the network is nor what a batch holds. It imports torch at its top, so
import it where it is needed.
"""

import copy
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch

from mint_lib.progress import Progress

_MAX_GRADIENT_NORM = 1.0


class TrainingPlan(NamedTuple):
    """How to fit."""

    learning_rate: float
    """Peak of AdamW's learning rate."""
    weight_decay: float
    """On matrices; vectors and scalars have none."""
    num_epochs: int
    """Most passes."""
    patience_epochs: int
    """Epochs without a better validation likelihood before it stops."""
    warmup_share: float
    """Share of the steps in which the rate rises; then it falls as a cosine."""


def fit_best_epoch(
    network: torch.nn.Module,
    plan: TrainingPlan,
    *,
    draw_epoch: Callable[[], Iterable[Any]],
    compute_loss: Callable[[Any], torch.Tensor],
    num_batches: int,
    evaluate: Callable[[], dict[str, float]],
    description: str,
) -> list[dict[str, float]]:
    """Fit what of `network` asks for gradients; it ends with the weights of its best epoch, in evaluation mode.

    Args:
        network: changed in place.
        plan: rates and lengths.
        draw_epoch: gives the batches of one pass.
        compute_loss: mean loss of a batch.
        num_batches: batches of a pass.
        evaluate: figures on validation, with `validation_nll` in nats, lower is better.
        description: what the progress bar says.

    Returns:
        One dictionary per epoch: `epoch`, `train_loss` and the figures of `evaluate`.
    """
    trained = [value for value in network.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(
        [
            {"params": [value for value in trained if value.ndim > 1], "weight_decay": plan.weight_decay},
            {"params": [value for value in trained if value.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=plan.learning_rate,
    )
    num_steps = plan.num_epochs * num_batches
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: _rate_share(step, num_steps, plan.warmup_share)
    )
    history: list[dict[str, float]] = []
    best_epoch, best_weights = 0, copy.deepcopy(network.state_dict())
    with Progress(description, total=num_steps) as progress:
        for epoch in range(1, plan.num_epochs + 1):
            network.train()
            losses = []
            for batch in draw_epoch():
                loss = compute_loss(batch)
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(trained, _MAX_GRADIENT_NORM)
                optimizer.step()
                schedule.step()
                losses.append(loss.item())
                progress.advance(loss=losses[-1])
            network.eval()
            history.append({"epoch": epoch, "train_loss": float(np.mean(losses)), **evaluate()})
            if best_epoch == 0 or history[-1]["validation_nll"] < history[best_epoch - 1]["validation_nll"]:
                best_epoch, best_weights = epoch, copy.deepcopy(network.state_dict())
            elif epoch - best_epoch >= plan.patience_epochs:
                break
    network.load_state_dict(best_weights)
    network.eval()
    return history


def _rate_share(step: int, num_steps: int, warmup_share: float) -> float:
    """Share of the peak learning rate at `step`."""
    num_warmup = warmup_share * num_steps
    if step < num_warmup:
        return (step + 1) / (num_warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - num_warmup) / max(1.0, num_steps - num_warmup)))
