"""One worker's whole training, as Ray Train runs it: from the store's pairs to the checkpoint that holds the result.

Goes in: an `AlignmentConfig`, its method, the store and a version of `preferences`. Comes out: a last checkpoint with
`outcome.json` and the best weights. It goes on from the newest whole checkpoint of its run, if there is one.
"""

import json
import os
import pathlib
import secrets
import shutil
import tempfile
from typing import TYPE_CHECKING, Any

from mint_lib.attention import check_attention_window, choose_attention
from mint_lib.errors import IntegrityError, Interrupted, InvalidInput, MintError, RefusedData, StoreUnreachable
from mint_lib.label_set import read_labels
from mint_lib.plugins import parse_plugin_config
from mint_lib.records import PreferencePair, Reference, Split
from mint_lib.student import load_reader, load_student, student_digest
from mint_lib.student_weights import TUNED_FOLDERS
from mint_lib.template import Template
from mint_lib.training.checkpoint_writer import CheckpointWriter
from mint_lib.training.checkpoints import Checkpoint, RunCheckpoints
from mint_lib.training.deepspeed import restrict_checkpoint_loading
from mint_lib.training.frozen_layers import cache_frozen_layers
from mint_lib.training.method import AlignmentMethod
from mint_lib.training.on_ray import Driver
from mint_lib.training.run_metrics import RunMetrics
from mint_lib.training.settings import AlignmentConfig
from mint_lib.training.setup import TrainingSetup
from mint_lib.training.tree_file import TreeFile, write_trees
from mint_lib.training.tuning import Tuned, hash_frozen, place_tuned, prepare_tuning, start_from
from mint_lib.training.watch import TrainingState, Validation, count_skipped, draw_cases, watch_training

if TYPE_CHECKING:
    from mint_lib.store import Store

_PROCESS_GROUP_VARIABLES = ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "RANK", "WORLD_SIZE")
_SCRATCH_PREFIX = "mint-training-"
OUTCOME = "outcome.json"
"""Only the checkpoint of a finished run holds it."""


def train_on_worker(payload: dict[str, Any]) -> None:
    """Train; an error that a new attempt would meet again goes to the driver and ends the run."""
    import ray.train

    driver: Driver = payload["driver"]
    try:
        remove_left_scratch()
        with tempfile.TemporaryDirectory(prefix=f"{_SCRATCH_PREFIX}{os.getpid()}-") as scratch:
            _train(payload, pathlib.Path(scratch))
    except StoreUnreachable:
        raise  # Ray tries again: a store that was away may be back
    except MintError as error:
        driver.fail(error)
        if ray.train.get_context().get_world_size() > 1 and not isinstance(error, RefusedData | Interrupted):
            raise  # not all workers may have met it, and others would wait for this one: Ray ends them


def remove_left_scratch() -> None:
    """Remove the folders of workers that were killed: they hold prompts and images of patients."""
    for folder in pathlib.Path(tempfile.gettempdir()).glob(f"{_SCRATCH_PREFIX}*-*"):
        pid = folder.name.removeprefix(_SCRATCH_PREFIX).partition("-")[0]
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            shutil.rmtree(folder, ignore_errors=True)
        except (ValueError, PermissionError):
            continue  # not one of these, or somebody else's


def _train(payload: dict[str, Any], folder: pathlib.Path) -> None:
    import ray.train
    import torch
    import transformers

    config: AlignmentConfig = payload["config"]
    store, preferences = payload["store"], Reference.parse(payload["preferences"])
    driver: Driver = payload["driver"]
    context = ray.train.get_context()
    rank, num_workers = context.get_world_rank(), context.get_world_size()
    if not config.use_gpu:
        torch.set_num_threads(config.cpus_per_worker)
    transformers.utils.logging.set_verbosity_error()
    if config.deepspeed is not None:
        restrict_checkpoint_loading()
    elif num_workers == 1:
        train_alone()
    started = folder / "started"
    attempt, resumed, is_stop_asked = agree_on_start(store, payload["run_id"], started, driver, rank=rank)
    if is_stop_asked:
        raise Interrupted("Training was told to stop before its first step. Run the same command again to go on.")
    if resumed and (started / OUTCOME).is_file():
        return  # it had finished, and the driver died before it took the result
    transformers.set_seed(config.seed)
    reader = load_reader(config.student)
    validation_pairs = draw_cases(
        store.open_rows(preferences, "validation", PreferencePair), config.validation_cases, seed=config.seed
    )
    _refuse_none(len(validation_pairs), "validation", preferences)
    trees = write_trees(
        store.open_rows(preferences, "train", PreferencePair),
        folder / "trees.arrow",
        reader=reader,
        window_tokens=config.student.window_tokens,
        over_long=config.student.over_long,
    )
    _refuse_none(trees.num_pairs, "train", preferences)
    validation = Validation(
        pairs=validation_pairs,
        labels=read_labels(store, preferences),
        template=Template.from_bytes(store.read_bytes(preferences, "template.yaml")),
        reader=reader,
        window_tokens=config.student.window_tokens,
        over_long=config.student.over_long,
    )
    validation.check_measures(config.keep_best)
    tuned = _prepare_student(config, payload["method"], _fetch_start(payload, folder))
    # In bfloat16 DeepSpeed casts every weight when it begins, the frozen ones too.
    is_cast = config.deepspeed is not None and config.use_gpu
    frozen = hash_frozen(tuned.model) if rank == 0 and not is_cast else ""
    method_config = parse_plugin_config(payload["method"], config.method_config, where="alignment.method_config")
    trainer = payload["method"](method_config, reader=reader).build_trainer(
        tuned.model, trees=trees, setup=TrainingSetup.of_config(config, folder, rank=rank, num_workers=num_workers)
    )
    if config.frozen_layers == "cache" and config.lora.last_layers is not None:
        cache_frozen_layers(
            trainer,
            last_layers=config.lora.last_layers,
            pad_token_id=reader.tokenizer.pad_token_id,
            tell=lambda done, total: None if rank else driver.tell(done, total, {}, activity="frozen layers"),
        )
    state = TrainingState()
    if resumed:
        state = TrainingState.read(started)
        # Moved, not copied: the trainer would load an adapter that lies in its checkpoint as a second one.
        (started / "best").rename(folder / "best")
    metrics = RunMetrics(config.name)
    with CheckpointWriter(store, payload["run_id"], attempt=attempt, rank=rank, num_ranks=num_workers) as writer:
        guard = watch_training(
            trainer,
            validation=validation,
            state=state,
            folder=folder,
            validate_every_steps=config.validate_every_steps,
            base_name=config.student.model,
            keep_best=config.keep_best,
            patience=config.early_stop_patience,
            on_not_finite=config.on_not_finite,
            is_stop_asked=driver.watch_for_stop() if rank == 0 else lambda: False,
            tell=driver.tell,
            save=writer.save,
            started=started if resumed else None,
            publish=lambda figures: metrics.publish(figures | {"num_failed_checkpoints": writer.num_failed}),
        )
        if rank == 0:
            metrics.publish({"num_cut_prompts": trees.num_cut_prompts})
            driver.say(describe_start(config, tuned, trees, num_workers=num_workers, resumed=resumed))
        trainer.train(resume_from_checkpoint=str(started) if resumed else None)
        has_stopped_early = state.validations_without_gain >= config.early_stop_patience
        if guard.must_stop and trainer.state.global_step < trainer.state.max_steps and not has_stopped_early:
            writer.close()
            place = "its checkpoint is in the store" if not writer.num_failed else "the last whole checkpoint is older"
            raise Interrupted(
                f"Training was told to stop and did so after step {trainer.state.global_step} of "
                f"{trainer.state.max_steps}; {place}. Run the same command again to go on."
            )
        result = folder / "result"
        result.mkdir()
        is_same = is_cast or hash_frozen(tuned.model) == frozen  # a collective call where weights are spread
        if rank == 0:
            if not is_same:
                raise IntegrityError("weights that are not to be trained have changed; no version was written")
            place_tuned(folder / "best", result, student=config.student)
            outcome = {
                "history": state.history,
                "best_step": state.best_step,
                "base_digest": student_digest(config.student),
                "counts": _count(trees, validation_pairs, tuned, trainer, state),
            }
            (result / OUTCOME).write_text(json.dumps(outcome, sort_keys=True))
            driver.tell(trainer.state.max_steps, trainer.state.max_steps, {})
            if writer.num_failed:
                driver.say(f"{writer.num_failed} checkpoints could not be written to the store; the result is whole")
        writer.save(trainer.state.max_steps + 1, result, wait=True)


def _refuse_none(num_pairs: int, split: Split, preferences: Reference) -> None:
    """Raise InvalidInput where a split has no pair."""
    if not num_pairs:
        raise InvalidInput(
            f"{preferences} has no pair in {split}; training and validation need at least one each. Give it more "
            "cases, or lower preferences.confidence_floor."
        )


def train_alone() -> None:
    """Hide from the trainer that Ray made a process group of one: it would wrap the model to share its gradients."""
    for name in _PROCESS_GROUP_VARIABLES:
        os.environ.pop(name, None)


def agree_on_start(
    store: "Store", run_id: str, folder: pathlib.Path, driver: Driver, *, rank: int
) -> tuple[str, Checkpoint | None, bool]:
    """What all workers begin with, as the first one finds it.

    Returns:
        A random word for this attempt; the checkpoint to go on from, restored to `folder`, if there is one; and whether
        the run is to end at once.
    """
    import torch.distributed

    checkpoints = RunCheckpoints(store, run_id)
    found: list[Any] = ["", None, False]
    if rank == 0:
        found = [secrets.token_hex(8), checkpoints.restore(folder), driver.is_stop_asked()]
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(found, src=0)
    attempt, checkpoint, is_stop_asked = found
    if rank and checkpoint:
        checkpoints.download(checkpoint, folder)
    return attempt, checkpoint, is_stop_asked


def _fetch_start(payload: dict[str, Any], folder: pathlib.Path) -> pathlib.Path | None:
    """The trained weights that training begins with, if not with the base."""
    if payload["start"] is None:
        return None
    store: Store = payload["store"]
    prefix = TUNED_FOLDERS[payload["config"].tuning]
    return store.download(Reference.parse(payload["start"]), folder / "first", prefix=prefix)


def _prepare_student(
    config: AlignmentConfig, method: type[AlignmentMethod], start: pathlib.Path | None = None
) -> Tuned:
    """The student, ready to be trained."""
    quantization_config = None
    if config.quantisation == "nf4":
        from mint_lib.training.quantised import quantisation_config

        quantization_config = quantisation_config(config.student.dtype)
    can_flex = config.use_gpu and method.splits_by_tokens and config.student.reads == "text"
    model = load_student(
        config.student,
        start if config.tuning == "full" else None,
        attention=choose_attention(config.attention, use_gpu=can_flex),
        quantization_config=quantization_config,
    )
    if method.splits_by_tokens:
        check_attention_window(model.config, config.student.window_tokens)
    tuned = prepare_tuning(model, tuning=config.tuning, lora=config.lora)
    if start is not None and config.tuning == "adapter":
        start_from(tuned.model, start)
    return tuned


def describe_start(
    config: AlignmentConfig, tuned: Tuned, trees: TreeFile, *, num_workers: int, resumed: Checkpoint | None
) -> str:
    """One sentence for the person who started the run."""
    share = 100 * tuned.num_trained / tuned.num_parameters
    text = (
        f"trains {tuned.num_trained:,} of {tuned.num_parameters:,} parameters ({share:.2g} %) on {trees.num_pairs:,} "
        f"pairs of {len(trees):,} prompts with {num_workers} worker{'s' if num_workers > 1 else ''}"
    )
    if trees.num_cut_prompts:
        text += f"; {trees.num_cut_prompts} prompts were too long and lost {trees.num_cut_tokens} tokens"
    return text + (f"; goes on from step {resumed.step}" if resumed else "")


def _count(
    trees: TreeFile,
    validation_pairs: list[PreferencePair],
    tuned: Tuned,
    trainer: Any,
    state: TrainingState,
) -> dict[str, int]:
    """The counts of the student's record. They are the same however often the run was interrupted."""
    return {
        "num_train_pairs": trees.num_pairs,
        "num_train_cases": trees.num_cases,
        "num_validation_pairs": len(validation_pairs),
        "num_validation_cases": len({pair.case_id for pair in validation_pairs}),
        "num_cut_prompts": trees.num_cut_prompts,
        "num_cut_tokens": trees.num_cut_tokens,
        "num_steps": trainer.state.global_step,
        "num_skipped_steps": count_skipped(state),
        "num_trainable_parameters": tuned.num_trained,
    }
