"""Looks at every optimiser step before it reaches the weights: is every number finite, and has somebody asked to stop?

Goes in: a `transformers.Trainer`. Comes out: the same trainer, whose steps are refused or skipped when a loss or a
gradient is not finite. All workers decide alike, by one exchange of two numbers a step. It does not know the method.
"""

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from mint_lib.errors import RefusedData

if TYPE_CHECKING:
    import torch
    import transformers

logger = logging.getLogger(__name__)
_SHOWN_CASE_IDS = 20
MOST_SKIPS_IN_A_ROW = 5
"""More steps than that in a row are no bad cases but a training that diverged."""


class Guard:
    """Watches the losses and gradients of one trainer."""

    def __init__(
        self,
        trainer: "transformers.Trainer",
        *,
        on_not_finite: Literal["stop", "skip"],
        is_stop_asked: Callable[[], bool],
    ):
        """Guard `trainer`; `is_stop_asked` is looked at once a step and must be quick."""
        self._trainer = trainer
        self._on_not_finite = on_not_finite
        self._is_stop_asked = is_stop_asked
        self._losses: list[torch.Tensor] = []
        self._case_ids: list[str] = []
        self._skips_in_a_row = 0
        self.num_skipped = 0
        """Steps that this process has skipped."""
        self.must_stop = False
        """Some worker was asked to stop."""
        run_step = trainer.training_step

        def guarded(model: Any, inputs: Any, *arguments: Any, **options: Any) -> Any:
            import torch

            self._case_ids += inputs.get("case_ids", [])
            loss = run_step(model, inputs, *arguments, **options)
            self._losses.append(loss.detach())
            # Logged averages add losses up over many steps: a skipped one must not spoil them.
            return torch.where(loss.isfinite(), loss, 0.0) if on_not_finite == "skip" else loss

        trainer.training_step = guarded

    def check_step(self, step: int) -> list[str] | None:
        """Look at what step number `step` has computed, before the optimiser does.

        Returns:
            None where all is well; the ids of the step's cases (empty if the method does not know them) where it was
            skipped: its gradients are gone, so the optimiser leaves every weight as it is.

        Raises:
            RefusedData: a loss or gradient is not finite, and such steps are not to be skipped, or too many were.
        """
        losses, case_ids, self._losses, self._case_ids = self._losses, self._case_ids, [], []
        is_bad, self.must_stop = self._agree(self._has_bad_number(losses), self._is_stop_asked())
        if not is_bad:
            self._skips_in_a_row = 0
            return None
        case_ids = _gather(case_ids)
        self.num_skipped += 1
        self._skips_in_a_row += 1
        if self._on_not_finite == "skip" and self._skips_in_a_row <= MOST_SKIPS_IN_A_ROW:
            for parameter in self._trainer.model.parameters():
                parameter.grad = None
            logger.warning("step %d was skipped: its loss or gradient is not finite", step)
            return case_ids
        cause = "the loss or its gradient is not finite"
        if self._on_not_finite == "skip":
            cause += f", {self._skips_in_a_row} times in a row"
        shown = ", ".join(case_ids[:_SHOWN_CASE_IDS]) or "not known to this method"
        kept = (
            "DeepSpeed has taken the step already, so go on from the last checkpoint"
            if self._trainer.is_deepspeed_enabled
            else "The weights are as before this step"
        )
        raise RefusedData(
            f"Training stopped at step {step}: {cause}. {kept}; no version was written. Cases of the step: "
            f"{shown}. Lower learning_rate, look at these cases, or set on_not_finite: skip.",
            {"not_finite": max(1, len(case_ids))},
            {"not_finite": case_ids},
        )

    def _has_bad_number(self, losses: "list[torch.Tensor]") -> "torch.Tensor":
        """Whether a loss or gradient of this worker is not finite, as a number on the device."""
        import torch

        values = list(losses)
        if self._trainer.is_deepspeed_enabled:
            norm = self._trainer.model_wrapped.get_global_grad_norm()
            values += [torch.as_tensor(norm, device=self._trainer.args.device)] if norm is not None else []
        else:
            # The norm that the trainer clips by may overflow where no gradient does, so the largest value is looked at.
            gradients = [p.grad for p in self._trainer.model.parameters() if p.grad is not None]
            values += torch._foreach_norm(gradients, float("inf"))
        return (~torch.stack([value.float() for value in values]).isfinite()).any().float()

    def _agree(self, is_bad: "torch.Tensor", is_stop_asked: bool) -> tuple[bool, bool]:
        """Whether it is so on any worker. The one place of a step where the host waits for the device."""
        import torch

        flags = torch.stack([is_bad, is_bad.new_tensor(float(is_stop_asked))])
        found_bad, found_stop = self._trainer.accelerator.reduce(flags, reduction="sum").tolist()
        return found_bad > 0, found_stop > 0


def _gather(case_ids: list[str]) -> list[str]:
    """Those of all workers; all of them call it, since they have agreed that the step is bad."""
    import torch.distributed

    if not torch.distributed.is_initialized():
        return case_ids
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, case_ids)
    return [case_id for part in found for case_id in part]
