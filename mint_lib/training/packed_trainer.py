"""The trainer of every method on packed prompt trees: the method gives the loss of a batch, the rest is here.

Goes in: a student, preference pairs and a loss. Comes out: a `transformers.Trainer` whose step is a number of forward
and backward passes over trees of similar length, with the loss's figures in its log. Whatever the number of workers and
passes, a step's gradient is that of its whole batch. It does not know what the loss is.

Shape suffixes: as in `mint_lib/packing.py`, and P pairs in a batch.
"""

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mint_lib.errors import OutOfMemory
from mint_lib.packing import predict_edges
from mint_lib.training.preference_trees import PackedPairs, collate_pairs
from mint_lib.training.setup import TrainingSetup
from mint_lib.training.step_order import Pass, StepOrder
from mint_lib.training.tree_file import TreeFile

if TYPE_CHECKING:
    import torch
    import transformers

    from mint_lib.reading import Reader

PackedLoss = Callable[["torch.Tensor", PackedPairs], tuple["torch.Tensor", dict[str, "torch.Tensor"]]]
"""From the float32 log-probability of each edge, [N], and its batch: the batch's share of the step's loss and,
detached, of its figures. Sums over pairs are divided by `pair_total`, sums over labelled tokens by `nll_total`."""


def build_packed_trainer(
    model: "torch.nn.Module",
    *,
    trees: TreeFile,
    reader: "Reader",
    with_prompt_edges: bool,
    loss: PackedLoss,
    setup: TrainingSetup,
) -> "transformers.Trainer":
    """A trainer of `model` on `trees`.

    `with_prompt_edges` predicts the prompt's tokens too, for losses that want their likelihood.
    """
    import transformers

    trees = TreeFile(trees.path, with_prompt_edges=with_prompt_edges, unpredicted_ids=reader.unpredicted_ids)
    in_one_row = model.config.get_text_config()._attn_implementation == "flex_attention"
    return _make_trainer_class(loss, trees, reader, setup)(
        model=model,
        args=transformers.TrainingArguments(
            **(setup.arguments | {"gradient_accumulation_steps": 1}), remove_unused_columns=False
        ),
        train_dataset=trees,
        data_collator=lambda items: collate_pairs(
            items, pad_token_id=reader.tokenizer.pad_token_id, reader=reader, one_row=in_one_row
        ),
    )


def average_chosen_nll(log_probability_N: "torch.Tensor", batch: PackedPairs) -> "torch.Tensor":
    """Negative log-probability of a token of the chosen side: this batch's share of the step's average."""
    return -(log_probability_N * batch["nll_weight_N"]).sum() / batch["nll_total"]


def average_over_pairs(value_P: "torch.Tensor", batch: PackedPairs) -> "torch.Tensor":
    """This batch's share of the average over the step's pairs."""
    return value_P.sum() / batch["pair_total"]


def compare_sides(
    chosen_P: "torch.Tensor", rejected_P: "torch.Tensor", batch: PackedPairs
) -> dict[str, "torch.Tensor"]:
    """The figures reward_accuracy and reward_margin of both sides' average log-probabilities of a token, in nats.

    A margin is the chosen side's less the rejected side's, without a method's own factor: methods can be compared.
    """
    margin_P = (chosen_P - rejected_P).detach()
    return {
        "reward_accuracy": average_over_pairs((margin_P > 0).float(), batch),
        "reward_margin": average_over_pairs(margin_P, batch),
    }


def _make_trainer_class(
    loss: PackedLoss, trees: TreeFile, reader: "Reader", setup: TrainingSetup
) -> type["transformers.Trainer"]:
    """The Trainer of `loss` on `trees`, defined late because transformers is heavy to import."""
    import torch
    import transformers

    class Passes(torch.utils.data.Dataset[list[Any]]):
        """The trees of one pass, whatever pass is asked for."""

        def __len__(self) -> int:
            return len(trees)

        def __getitem__(self, index: Pass) -> Any:
            return [trees[tree] for tree in index.trees], index.counts

    class StepLoader(torch.utils.data.DataLoader[Any]):
        """One item is one step of this worker: the batches of its passes."""

        def set_epoch(self, epoch: int) -> None:
            """Choose the order of that epoch."""
            self.batch_sampler.set_epoch(epoch)

    class PackedTrainer(transformers.Trainer):
        """Sums its figures on the device and moves them to the host only when they are logged."""

        def __init__(self, **arguments: Any):
            super().__init__(**arguments)
            self._figures: dict[str, torch.Tensor] = {}
            self._num_steps = 0

        def get_train_dataloader(self) -> Any:
            order = StepOrder(
                trees.lengths,
                trees_per_batch=setup.trees_per_batch,
                batch_tokens=setup.batch_tokens,
                seed=setup.seed,
                rank=setup.rank,
                num_workers=setup.num_workers,
            )
            return StepLoader(
                Passes(),
                batch_sampler=order,
                collate_fn=self._collate_step,
                pin_memory=self.args.dataloader_pin_memory,
            )

        def _collate_step(self, items: list[Any]) -> dict[str, Any]:
            passes = [(self.data_collator(members), counts) for members, counts in items]
            return {
                "passes": [batch for batch, _ in passes],
                "counts": [counts for _, counts in passes],
                "case_ids": [case_id for batch, counts in passes if counts for case_id in batch["case_ids"]],
            }

        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
            model.train()
            totals = self._count_totals(inputs)
            value = torch.zeros((), device=self.args.device)
            for index, (batch, counts) in enumerate(zip(inputs["passes"], inputs["counts"], strict=True)):
                is_last = index == len(inputs["passes"]) - 1
                self.accelerator.gradient_state._set_sync_gradients(is_last)
                with contextlib.nullcontext() if is_last else self.accelerator.no_sync(model), _say_shape(batch):
                    value += self._run_pass(model, self._prepare_inputs(batch), totals, counts=counts)
            self._num_steps += 1
            return value

        def _prepare_input(self, data: Any) -> Any:
            if isinstance(data, torch.Tensor) and not self.is_deepspeed_enabled:
                return data.to(self.args.device, non_blocking=True)  # or each tensor would wait for all queued work
            return super()._prepare_input(data)

        def _count_totals(self, step: dict[str, Any]) -> torch.Tensor:
            """What the step's sums over pairs and over labelled tokens are divided by, [2].

            Data parallelism averages gradients over workers, so each worker divides by its part of the whole.
            """
            totals = torch.zeros(2)
            for batch, counts in zip(step["passes"], step["counts"], strict=True):
                totals += counts * torch.stack([batch["pair_total"], batch["nll_total"]])
            return self.accelerator.reduce(totals.to(self.args.device), reduction="mean")

        def _run_pass(self, model: Any, batch: Any, totals: torch.Tensor, *, counts: bool) -> torch.Tensor:
            # A pass that does not count has no share in anything: dividing by infinity leaves zeros.
            batch["pair_total"], batch["nll_total"] = totals if counts else totals * torch.inf
            with self.compute_loss_context_manager():
                share, figures = self.compute_loss(model, batch, return_outputs=True)
            options = {"scale_wrt_gas": False} if self.is_deepspeed_enabled else {}
            self.accelerator.backward(share, **options)
            num_places = torch.full((), batch["input_ids"].numel(), device=self.args.device)
            figures |= {"num_places": num_places, "num_padded_places": num_places - counts * batch["num_real_tokens"]}
            for name, figure in figures.items():
                self._figures[name] = self._figures.get(name, 0.0) + torch.where(figure.isfinite(), figure, 0.0)
            return share.detach()

        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            value, figures = loss(predict_edges(model, inputs), inputs)
            return (value, figures) if return_outputs else value

        def floating_point_ops(self, inputs: Any) -> int:
            return 0  # the trainer's own count knows one matrix of tokens, not passes over trees

        def log(self, logs: dict[str, float], *arguments: Any, **options: Any) -> None:
            if self._num_steps:
                sums = self.accelerator.reduce(torch.stack(list(self._figures.values())), reduction="mean")
                found = dict(zip(self._figures, sums.tolist(), strict=True))
                padding_share = found.pop("num_padded_places") / found.pop("num_places")
                logs.update({name: value / self._num_steps for name, value in found.items()})
                logs["padding_share"] = padding_share
                self._figures, self._num_steps = {}, 0
            super().log(logs, *arguments, **options)

    return PackedTrainer


@contextlib.contextmanager
def _say_shape(batch: PackedPairs) -> Any:
    """Name the batch's shape where the memory is not enough for it."""
    import torch

    try:
        yield
    except (MemoryError, RuntimeError) as error:
        text = str(error)
        is_short = isinstance(error, MemoryError | torch.OutOfMemoryError) or any(
            sign in text for sign in ("can't allocate memory", "not enough memory", "bad_alloc")
        )
        if not is_short:
            raise
        num_rows, num_places = batch["input_ids"].shape
        raise OutOfMemory(
            f"The memory is not enough for a pass of {num_rows} rows x {num_places} places ({len(batch['case_ids'])} "
            f"prompts, {len(batch['chosen_P'])} pairs, {len(batch['target_N'])} predicted tokens). Lower "
            "alignment.batch_tokens (one prompt with its answers is the least), set alignment.activations: recompute, "
            "or shorten the prompts; `mint plan --gpu` estimates what fits. The last checkpoint is intact."
        ) from error
