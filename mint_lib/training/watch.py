"""What every alignment method is watched with: validation, the best adapter, early stop, checkpoints, a NaN guard.

Goes in: a `transformers.Trainer` of a PEFT model and what to validate it with. Comes out: the same trainer, watched:
the history and the best adapter lie in a working folder. It does not know the method.
"""

import dataclasses
import json
import logging
import math
import pathlib
import shutil
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from mint_lib.errors import RefusedData
from mint_lib.records import Label, PreferencePair
from mint_lib.student import rank_labels
from mint_lib.template import Template
from mint_lib.training.preference_trees import grow_trees, score_pairs

if TYPE_CHECKING:
    import transformers

logger = logging.getLogger(__name__)
_LOWER_IS_BETTER = ("loss",)
_ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json")
_BATCH_TOKENS = 1024  # of one validation batch; larger ones are no faster on a CPU and cost memory


@dataclasses.dataclass
class TrainingState:
    """What a run has found out so far. It travels with the checkpoints, so a resumed run goes on with it."""

    history: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """One row per logged step and per validation; `kind` says which."""
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
        tokenizer: "transformers.PreTrainedTokenizerBase",
        window_tokens: int,
    ):
        first_pairs = {pair.case_id: pair for pair in reversed(pairs)}
        self._trees = grow_trees(pairs, tokenizer, window_tokens=window_tokens)
        self._prompts = [pair.prompt for pair in first_pairs.values()]
        self._labels = labels
        self._template = template
        self._tokenizer = tokenizer
        columns = {label.id: column for column, label in enumerate(labels)}
        self._teacher_columns = [columns[pair.chosen_label_ids[0]] for pair in first_pairs.values()]

    def measure(self, model: Any) -> dict[str, float]:
        """Figures of `model`; margins and loss in nats per token of an answer.

        Agreement compares the student's exact ranking of all labels with the teacher's first label, since pairs do
        not hold the diagnosis: it is no accuracy.
        """
        import numpy

        pad_token_id = self._tokenizer.pad_token_id
        was_training = model.training
        model.eval()
        chosen_P, rejected_P = score_pairs(model, self._trees, pad_token_id=pad_token_id, batch_tokens=_BATCH_TOKENS)
        scores = rank_labels(
            model, self._tokenizer, self._template, self._labels, self._prompts, batch_tokens=_BATCH_TOKENS
        )
        model.train(was_training)
        targets = scores[numpy.arange(len(scores)), self._teacher_columns]
        ranks = 1 + (scores > targets[:, None]).sum(axis=1)
        return {
            "loss": -chosen_P.mean().item(),
            "reward_margin": (chosen_P - rejected_P).mean().item(),
            "reward_accuracy": (chosen_P > rejected_P).float().mean().item(),
            "agreement_top_1": float((ranks == 1).mean()),
            "agreement_mrr": float((1.0 / ranks).mean()),
        }


def draw_cases(pairs: Sequence[PreferencePair], num_cases: int, *, seed: int) -> list[PreferencePair]:
    """All pairs of at most `num_cases` cases, which `seed` draws."""
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
    tell: Callable[[int, int, dict[str, float]], None],
    report: Callable[[pathlib.Path], None],
) -> None:
    """Add validation, best adapter, early stop, progress, checkpoints and the NaN guard to `trainer`.

    The best adapter is kept in `folder/best`, and `state` is kept up to date. `tell` is called on the first process
    with the steps done, all steps, and figures; `report` on every process with a folder that holds a whole checkpoint.
    """
    import transformers

    class Watch(transformers.TrainerCallback):
        """Sees every step; validates before the step's checkpoint is written, so that both agree."""

        def on_train_begin(self, args: Any, trainer_state: Any, control: Any, **_: Any) -> None:
            if trainer_state.is_world_process_zero:
                tell(trainer_state.global_step, trainer_state.max_steps, {})
            if state.best_value is None:
                validate(control)

        def on_pre_optimizer_step(self, args: Any, trainer_state: Any, control: Any, **_: Any) -> None:
            guard.check_gradients(trainer_state.global_step + 1)

        def on_step_end(self, args: Any, trainer_state: Any, control: Any, **_: Any) -> None:
            step = trainer_state.global_step
            if step % validate_every_steps == 0 or step == trainer_state.max_steps:
                validate(control)
            if trainer_state.is_world_process_zero:
                tell(step, trainer_state.max_steps, latest)

        def on_log(self, args: Any, trainer_state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
            kept = {key: value for key, value in logs.items() if _is_figure(key, value)}
            if "loss" in kept:
                latest["loss"] = kept["loss"]
                state.history.append({"kind": "train", "step": trainer_state.global_step, **kept})

        def on_save(self, args: Any, trainer_state: Any, control: Any, **_: Any) -> None:
            checkpoint = pathlib.Path(args.output_dir) / f"checkpoint-{trainer_state.global_step}"
            if trainer_state.is_world_process_zero:
                state.write(checkpoint)
                shutil.copytree(folder / "best", checkpoint / "best", dirs_exist_ok=True)
            report(checkpoint)

    latest: dict[str, float] = {}
    guard = _Guard(trainer)

    def validate(control: Any) -> None:
        step = trainer.state.global_step
        figures = validation.measure(trainer.model)
        figures = _broadcast(figures)
        state.history.append({"kind": "validation", "step": step, "epoch": trainer.state.epoch or 0.0, **figures})
        value = figures[keep_best] * (-1 if keep_best in _LOWER_IS_BETTER else 1)
        latest.update({key: figures[key] for key in ("reward_margin", keep_best)})
        if state.best_value is None or value > state.best_value:
            state.best_value, state.best_step, state.validations_without_gain = value, step, 0
            _save_adapter(trainer, folder / "best", base_name=base_name)
        else:
            state.validations_without_gain += 1
            control.should_training_stop |= state.validations_without_gain >= patience

    trainer.add_callback(Watch())


class _Guard:
    """Stops a run at the first loss or gradient that is not a number, before it reaches the weights."""

    def __init__(self, trainer: "transformers.Trainer"):
        import torch

        self._trainer = trainer
        self._bad_case_ids: list[str] = []
        self._recent: list[str] = []
        self._is_bad = False
        compute_loss = trainer.compute_loss

        def guarded(model: Any, inputs: Any, *arguments: Any, **options: Any) -> Any:
            case_ids = list(inputs.get("case_ids", []))
            result = compute_loss(model, inputs, *arguments, **options)
            loss = result[0] if isinstance(result, tuple) else result
            if not bool(torch.isfinite(loss.detach())):
                self._is_bad = True
                self._bad_case_ids += case_ids
            self._recent = case_ids
            return result

        trainer.compute_loss = guarded

    def check_gradients(self, step: int) -> None:
        """Raise on every process if any of them saw a value that is not finite.

        Raises:
            RefusedData: with the ids of the cases in the batch.
        """
        import torch

        gradients = [p.grad for p in self._trainer.model.parameters() if p.grad is not None]
        norms = torch.stack([gradient.detach().abs().max() for gradient in gradients]) if gradients else torch.zeros(1)
        bad = torch.tensor(float(self._is_bad or not bool(torch.isfinite(norms).all())))
        bad = self._trainer.accelerator.reduce(bad.to(self._trainer.args.device), reduction="sum")
        if bad.item() == 0:
            return
        case_ids = self._bad_case_ids or self._recent
        raise RefusedData(
            f"Training stopped at step {step}: the loss or its gradient is not finite. The weights are as before this "
            f"step and no version was written. Cases: {', '.join(case_ids) or 'not known to this method'}. Lower "
            "learning_rate, or look at these cases.",
            {"not_finite": max(1, len(case_ids))},
            {"not_finite": case_ids},
        )


def _save_adapter(trainer: "transformers.Trainer", folder: pathlib.Path, *, base_name: str) -> None:
    """The adapter as it is, in `folder`: weights and config with sorted keys, nothing that names this machine."""
    scratch = folder.with_name("scratch")
    trainer.save_model(str(scratch))  # a collective call: sharded weights are gathered
    if not trainer.is_world_process_zero():
        return
    folder.mkdir(parents=True, exist_ok=True)
    for name in _ADAPTER_FILES:
        (scratch / name).replace(folder / name)
    shutil.rmtree(scratch)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    # PEFT keeps the modules in a set, whose order differs from process to process.
    config["base_model_name_or_path"] = base_name
    config["target_modules"] = sorted(config["target_modules"])
    path.write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")


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
