"""What every alignment method is watched with: validation, the best weights, early stop, checkpoints, the guard.

Goes in: a `transformers.Trainer` and what to validate it with. Comes out: the same trainer, watched: the history and
the best of the trained weights lie in a working folder. It does not know the method.
"""

import dataclasses
import json
import logging
import math
import pathlib
import shutil
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from mint_lib.errors import InvalidInput, RefusedData
from mint_lib.reading import OverLong, encode_answer, fit_prompt
from mint_lib.records import Label, PreferencePair
from mint_lib.student import rank_labels
from mint_lib.template import Template
from mint_lib.training.guard import Guard
from mint_lib.training.log_sums import read_sums, write_sums
from mint_lib.training.preference_trees import grow_trees, score_pairs
from mint_lib.training.tuning import save_tuned

if TYPE_CHECKING:
    import torch
    import transformers

    from mint_lib.reading import Reader

logger = logging.getLogger(__name__)
_LOWER_IS_BETTER = ("loss",)
_SHOWN_CASE_IDS = 20
_BATCH_TOKENS = 1024  # of one validation batch; larger ones are no faster on a CPU and cost memory


@dataclasses.dataclass
class TrainingState:
    """What a run has found out so far. It travels with the checkpoints, so a resumed run goes on with it."""

    history: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """One row per logged step, validation and skipped step; `kind` says which."""
    best_step: int = -1
    best_value: float | None = None
    validations_without_gain: int = 0

    def write(self, folder: pathlib.Path) -> None:
        """Write `state.json` in `folder`."""
        (folder / "state.json").write_text(json.dumps(dataclasses.asdict(self), sort_keys=True))

    @classmethod
    def read(cls, folder: pathlib.Path) -> "TrainingState":
        """The state that `write` left in `folder`."""
        return cls(**json.loads((folder / "state.json").read_text()))


class Validation:
    """Measures a student on validation pairs: preference between the sides, likelihood, agreement with the teacher."""

    def __init__(
        self,
        *,
        pairs: Sequence[PreferencePair],
        labels: Sequence[Label],
        template: Template,
        reader: "Reader",
        window_tokens: int,
        over_long: OverLong,
        batch_tokens: int = _BATCH_TOKENS,
    ):
        first_pairs = {pair.case_id: pair for pair in reversed(pairs)}
        self._case_ids = list(first_pairs)
        self._trees = grow_trees(pairs, reader, window_tokens=window_tokens, over_long=over_long)
        self._prompts = []
        for pair in first_pairs.values():
            sides = {text for other in pairs if other.prompt == pair.prompt for text in (other.chosen, other.rejected)}
            longest = max(len(encode_answer(reader.tokenizer, text)) for text in sides)
            fitted = fit_prompt(
                reader,
                pair.prompt,
                pair.images,
                room_tokens=window_tokens - longest,
                over_long=over_long,
                case_id=pair.case_id,
            )
            self._prompts.append(fitted.turns)
        self._images = [pair.images for pair in first_pairs.values()]
        self._labels = labels
        self._template = template
        self._reader = reader
        self._batch_tokens = batch_tokens
        columns = {label.id: column for column, label in enumerate(labels)}
        # Captions name no label: of them only the preference and the likelihood are measured.
        self._teacher_columns = [
            columns[pair.chosen_label_ids[0]] for pair in first_pairs.values() if pair.chosen_label_ids
        ]

    def check_measures(self, keep_best: str) -> None:
        """Refuse a figure to choose by that these pairs do not give. Raises InvalidInput."""
        if keep_best.startswith("agreement") and not self._teacher_columns:
            raise InvalidInput(
                f"alignment.keep_best is {keep_best}, and pairs of captions name no label to agree on. Set it to loss, "
                "reward_margin or reward_accuracy."
            )

    def measure(self, model: Any) -> dict[str, float]:
        """Figures of `model`; margins and loss in nats per token of an answer.

        Agreement compares the student's exact ranking of all labels with the teacher's first label, since pairs do
        not hold the diagnosis: it is no accuracy.
        """
        import numpy

        was_training = model.training
        model.eval()
        chosen_P, rejected_P = score_pairs(model, self._trees, reader=self._reader, batch_tokens=self._batch_tokens)
        scores = numpy.zeros((0, len(self._labels)))
        if self._teacher_columns:
            scores = rank_labels(
                model,
                self._reader,
                self._template,
                self._labels,
                self._prompts,
                images=self._images,
                batch_tokens=self._batch_tokens,
            )
        model.train(was_training)
        self._check_finite(scores, chosen_P, rejected_P)
        figures = {
            "loss": -chosen_P.mean().item(),
            "reward_margin": (chosen_P - rejected_P).mean().item(),
            "reward_accuracy": (chosen_P > rejected_P).float().mean().item(),
        }
        if self._teacher_columns:
            targets = scores[numpy.arange(len(scores)), self._teacher_columns]
            ranks = 1 + (scores > targets[:, None]).sum(axis=1)
            figures["agreement_top_1"] = float((ranks == 1).mean())
            figures["agreement_mrr"] = float((1.0 / ranks).mean())
        return figures

    def _check_finite(self, scores: Any, chosen_P: "torch.Tensor", rejected_P: "torch.Tensor") -> None:
        """Refuse numbers that are none: compared with others, they would look like perfect agreement."""
        import numpy

        is_good = numpy.isfinite(scores).all(axis=1)
        if is_good.all() and bool(chosen_P.isfinite().all()) and bool(rejected_P.isfinite().all()):
            return
        ranked = self._case_ids if self._teacher_columns else []
        bad = [case_id for case_id, good in zip(ranked, is_good, strict=True) if not good]
        raise RefusedData(
            "Validation gave numbers that are not finite; no version was written. Cases: "
            f"{', '.join(bad[:_SHOWN_CASE_IDS]) or 'some pairs'}. Lower learning_rate, or look at these cases.",
            {"not_finite": max(1, len(bad))},
            {"not_finite": bad},
        )


def draw_cases(pairs: Iterable[PreferencePair], num_cases: int, *, seed: int) -> list[PreferencePair]:
    """All pairs of at most `num_cases` cases, which `seed` draws. `pairs` is read twice and not held."""
    import numpy

    case_ids = list(dict.fromkeys(pair.case_id for pair in pairs))
    drawn = numpy.random.default_rng(seed).permutation(len(case_ids))[:num_cases]
    kept = {case_ids[place] for place in drawn}
    return [pair for pair in pairs if pair.case_id in kept]


def watch_training(
    trainer: "transformers.Trainer",
    *,
    validation: Validation,
    state: TrainingState,
    folder: pathlib.Path,
    base_name: str,
    validate_every_steps: int,
    keep_best: str,
    patience: int,
    on_not_finite: Literal["stop", "skip"] = "stop",
    is_stop_asked: Callable[[], bool] = lambda: False,
    tell: Callable[[int, int, dict[str, float]], None],
    save: Callable[[int, pathlib.Path], None],
    publish: Callable[[dict[str, float]], None] = lambda _: None,
    started: pathlib.Path | None = None,
) -> Guard:
    """Add validation, best weights, early stop, progress, checkpoints and the guard to `trainer`; returns the guard.

    The best weights are kept in `folder/best`, and `state` is kept up to date. `tell` is called on the first process
    with the steps done, all steps, and figures; `publish` there with the figures of each logged step; `save` on every
    process with the step and a folder of its own, which it may keep. Where `is_stop_asked`, the run ends after a
    checkpoint. `started` is the folder of the checkpoint that it goes on from.
    """
    import transformers

    class Watch(transformers.TrainerCallback):
        """Sees every step; validates before the step's checkpoint is written, so that both agree."""

        def on_train_begin(self, args: Any, trainer_state: Any, control: Any, **_: Any) -> None:
            if args.gradient_checkpointing and hasattr(trainer.model, "disable_input_require_grads"):
                # Inputs that want a gradient would carry the backward pass through layers that are not trained.
                trainer.model.disable_input_require_grads()
            if started is not None:
                read_sums(trainer, started)
            if trainer_state.is_world_process_zero:
                tell(trainer_state.global_step, trainer_state.max_steps, {})
            if state.best_value is None:
                validate(control)

        def on_pre_optimizer_step(self, args: Any, trainer_state: Any, control: Any, **_: Any) -> None:
            step = trainer_state.global_step + 1
            skipped = guard.check_step(step)
            if skipped is not None:
                state.history.append({"kind": "skipped", "step": step, "case_ids": skipped})
                latest["skipped"] = count_skipped(state)

        def on_step_end(self, args: Any, trainer_state: Any, control: Any, **_: Any) -> None:
            step = trainer_state.global_step
            if step % validate_every_steps == 0 or step == trainer_state.max_steps:
                validate(control)
            if guard.must_stop and not control.should_training_stop and step < trainer_state.max_steps:
                control.should_save = control.should_training_stop = True
            if trainer_state.is_world_process_zero:
                tell(step, trainer_state.max_steps, latest)

        def on_log(self, args: Any, trainer_state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
            kept = {key: value for key, value in logs.items() if _is_figure(key, value)}
            if "loss" in kept:
                latest.update({key: kept[key] for key in ("loss", "padding_share") if key in kept})
                state.history.append({"kind": "train", "step": trainer_state.global_step, **kept})
                if trainer_state.is_world_process_zero:
                    publish({"step": trainer_state.global_step, "num_skipped": count_skipped(state), **kept})

        def on_save(self, args: Any, trainer_state: Any, control: Any, **_: Any) -> None:
            checkpoint = pathlib.Path(args.output_dir) / f"checkpoint-{trainer_state.global_step}"
            if trainer_state.is_world_process_zero:
                state.write(checkpoint)
                shutil.copytree(folder / "best", checkpoint / "best", dirs_exist_ok=True)
            write_sums(trainer, checkpoint)
            save(trainer_state.global_step, checkpoint)

    latest: dict[str, float] = {}
    guard = Guard(trainer, on_not_finite=on_not_finite, is_stop_asked=is_stop_asked)

    def validate(control: Any) -> None:
        step = trainer.state.global_step
        figures = validation.measure(trainer.model)
        figures = _broadcast(figures)
        state.history.append({"kind": "validation", "step": step, "epoch": trainer.state.epoch or 0.0, **figures})
        value = figures[keep_best] * (-1 if keep_best in _LOWER_IS_BETTER else 1)
        latest.update({key: figures[key] for key in ("reward_margin", keep_best)})
        if state.best_value is None or value > state.best_value:
            state.best_value, state.best_step, state.validations_without_gain = value, step, 0
            save_tuned(trainer, folder / "best", base_name=base_name)
        else:
            state.validations_without_gain += 1
            if state.validations_without_gain >= patience:
                # No checkpoint here: a run that went on from it would train on. From the one before it stops here.
                control.should_training_stop, control.should_save = True, False

    trainer.remove_callback(transformers.PrinterCallback)  # it prints every logged step to standard output
    trainer.add_callback(Watch())
    return guard


def count_skipped(state: TrainingState) -> int:
    """Steps of the whole run that were skipped, however often it was interrupted."""
    return sum(row["kind"] == "skipped" for row in state.history)


def _broadcast(figures: dict[str, float]) -> dict[str, float]:
    """The first process's figures on every process, so that all of them decide alike."""
    import torch.distributed

    if not torch.distributed.is_initialized():
        return figures
    box = [figures]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def _is_figure(key: str, value: Any) -> bool:
    """Whether a logged value belongs in the history: a finite number that is not a time."""
    is_time = key.endswith(("_runtime", "_per_second")) or key == "total_flos"
    return isinstance(value, int | float) and math.isfinite(value) and not is_time
