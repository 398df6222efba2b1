"""Figures of a running training for Prometheus: Ray's agent exports them on every node as `ray_mint_alignment_*`.

Goes in: figures by their names in the history. Comes out: gauges with the student's name as their only label; nothing
of a case is in them.
"""

from collections.abc import Mapping

_GAUGES = {
    "step": ("mint_alignment_steps", "Optimiser steps done."),
    "loss": ("mint_alignment_loss_nats", "Loss since the last logged step."),
    "nll": ("mint_alignment_nll_nats", "Negative log-probability of a labelled token."),
    "grad_norm": ("mint_alignment_gradient_norm", "Norm of the gradient before it is scaled down."),
    "learning_rate": ("mint_alignment_learning_rate", "Learning rate of the last step."),
    "reward_accuracy": ("mint_alignment_reward_accuracy_ratio", "Pairs whose chosen side is more probable."),
    "reward_margin": ("mint_alignment_reward_margin_nats", "Chosen less rejected log-probability of a token."),
    "padding_share": ("mint_alignment_padding_ratio", "Places computed that are padding."),
    "num_skipped": ("mint_alignment_skipped_steps", "Steps left out because a number was not finite."),
    "num_cut_prompts": ("mint_alignment_cut_prompts", "Prompts that were too long and lost words."),
    "num_failed_checkpoints": ("mint_alignment_failed_checkpoints", "Checkpoints that could not be stored."),
}


class RunMetrics:
    """The gauges of one run, made in a process of Ray's."""

    def __init__(self, student: str):
        """Gauges with the label `student`, the name of the version that is being made."""
        from ray.util.metrics import Gauge

        self._gauges = {
            name: Gauge(metric, description=text, tag_keys=("student",)) for name, (metric, text) in _GAUGES.items()
        }
        self._tags = {"student": student}

    def publish(self, figures: Mapping[str, float]) -> None:
        """Set those of `figures` that have a gauge."""
        for name, value in figures.items():
            if name in self._gauges:
                self._gauges[name].set(value, tags=self._tags)
