"""The alignment stage: trains the student on preference pairs, with validation, early stop and resume.

Goes in: a version of `preferences`. Comes out: a version of `student` with the best adapter that validation met, its
history, the template and the label set. The method is a plug-in; the training always runs inside a Ray Train
`TorchTrainer`, with one CPU worker on a laptop and many accelerators on a cluster. The student never sees an image.
"""

import abc
import hashlib
import json
import pathlib
import shutil
import tempfile
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from mint_lib.errors import InvalidInput, MintError
from mint_lib.plugins import load_plugin, parse_plugin_config
from mint_lib.records import Label, Name, PreferencePair, Reference, StageRecord, code_version
from mint_lib.student import StudentConfig, load_student, load_tokenizer, student_digest
from mint_lib.template import Template
from mint_lib.training.adapter import LoraConfig, add_adapter
from mint_lib.training.frozen_layers import cache_frozen_layers
from mint_lib.training.on_ray import WorkerResources, train_on_ray
from mint_lib.training.watch import TrainingState, Validation, draw_cases, watch_training

if TYPE_CHECKING:
    import torch
    import transformers

    from mint_lib.store import Store

_LOGS_PER_VALIDATION = 5


class AlignmentConfig(BaseModel):
    """How the student is trained."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    name: Name
    """Name of the student version in the store."""
    seed: int = Field(ge=0, lt=2**32)
    """Seed of the adapter's start, the order of the data and dropout."""
    student: StudentConfig
    method: str = "orpo"
    """File of `mint_lib/alignment_methods`."""
    method_config: dict[str, Any] = {}
    """Settings of the method; see its `Config`."""
    lora: LoraConfig = LoraConfig()
    frozen_layers: Literal["recompute", "cache"] = "recompute"
    """`cache` computes the layers below the adapted ones once per training row instead of once per epoch; needs
    `lora.last_layers`, and memory for tokens x hidden size x 4 bytes (SmolLM2-135M: 2.3 KB a token)."""
    learning_rate: float = Field(default=5e-5, gt=0.0)
    """Peak learning rate of AdamW. MINT's released run: 5e-5 at rank 256; small ranks want about 1e-3."""
    warmup_share: float = Field(default=0.1, ge=0.0, lt=1.0)
    """Share of the steps in which the rate rises; it then falls along a cosine to 0. MINT: 0.1."""
    epochs: int = Field(default=3, ge=1)
    """Passes over the training pairs. MINT's 26 over-fitted."""
    trees_per_batch: int = Field(default=8, ge=1)
    """Prompts of one optimiser step over all workers, each with all its pairs; pairs, for methods without trees."""
    accumulation_steps: int = Field(default=1, ge=1)
    """Forward and backward passes that one optimiser step is split into, where memory is short."""
    max_gradient_norm: float = Field(default=1.0, gt=0.0)
    """Gradients are scaled down to this norm. MINT: 0.3."""
    weight_decay: float = Field(default=0.0, ge=0.0)
    """AdamW's weight decay."""
    validate_every_steps: int = Field(default=50, ge=1)
    """Optimiser steps between two validations; there is one at the end as well."""
    validation_cases: int = Field(default=32, ge=1)
    """Validation cases whose pairs and label ranking are measured each time, drawn by the seed."""
    keep_best: Literal["agreement_mrr", "agreement_top_1", "reward_margin", "reward_accuracy", "loss"] = "agreement_mrr"
    """Validation figure that decides which adapter is kept. Agreement is that of the student's exact label ranking with
    the teacher's first label; loss is the chosen answers' negative log-probability per token."""
    early_stop_patience: int = Field(default=5, ge=1)
    """Stop after so many validations without a better figure."""
    num_workers: int = Field(default=1, ge=1)
    """Training processes."""
    cpus_per_worker: int = Field(default=2, ge=1)
    """CPU cores, and so threads, of each."""
    use_gpu: bool = False
    """One accelerator for each worker."""
    deepspeed: dict[str, Any] | None = None
    """DeepSpeed's own configuration; None trains without it."""
    max_failures: int = Field(default=2, ge=0)
    """How often dead workers are replaced; training goes on from the last checkpoint."""
    checkpoint_every_steps: int = Field(default=100, ge=1)
    """Optimiser steps between two checkpoints to the store."""

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if self.frozen_layers == "cache" and self.lora.last_layers is None:
            raise ValueError("frozen_layers: cache needs lora.last_layers, as only layers below the adapted are frozen")
        if self.trees_per_batch % (self.num_workers * self.accumulation_steps):
            raise ValueError(
                f"trees_per_batch {self.trees_per_batch} is no multiple of num_workers {self.num_workers} x "
                f"accumulation_steps {self.accumulation_steps}"
            )
        return self


class AlignmentMethod(abc.ABC):
    """Base of the plug-ins: turns pairs into a `transformers.Trainer` whose loss is the method's."""

    Config: ClassVar[type[BaseModel]]

    def __init__(self, config: Any, *, tokenizer: "transformers.PreTrainedTokenizerBase", window_tokens: int):
        self.config = config
        self.tokenizer = tokenizer
        self.window_tokens = window_tokens

    @abc.abstractmethod
    def build_trainer(
        self, model: "torch.nn.Module", *, pairs: Sequence[PreferencePair], arguments: dict[str, Any]
    ) -> "transformers.Trainer":
        """A trainer of `model` (with its adapter) on `pairs`, the step's gradients averaged over the batch.

        `arguments` are the keyword arguments of `transformers.TrainingArguments` that every method shares.
        """


def align_student(config: AlignmentConfig, *, store: "Store", preferences: Reference) -> Reference:
    """A version of `student` trained on `preferences`. One worker, the same seed and pairs give the same digest.

    Raises:
        InvalidInput: there are no training or no validation pairs.
        PromptTooLong: a prompt and its answer exceed the student's window.
        RefusedData: a loss or gradient is not finite; carries the case ids.
    """
    method = load_plugin("alignment_methods", config.method, base=AlignmentMethod)
    parse_plugin_config(method, config.method_config, where="alignment.method_config")
    key = f"{config.model_dump_json()} {preferences.digest} {code_version()}"
    with tempfile.TemporaryDirectory(prefix="mint-student-") as scratch:
        folder = train_on_ray(
            _train_on_worker,
            {"config": config, "store": store, "preferences": str(preferences)},
            resources=WorkerResources(
                num_workers=config.num_workers,
                cpus_per_worker=config.cpus_per_worker,
                use_gpu=config.use_gpu,
                max_failures=config.max_failures,
            ),
            store=store,
            run_id=f"alignment-{hashlib.sha256(key.encode()).hexdigest()[:24]}",
            description=f"alignment: {config.name}",
            target=pathlib.Path(scratch) / "result",
        )
        return _write_student(config, store, preferences, folder)


def _write_student(config: AlignmentConfig, store: "Store", preferences: Reference, folder: pathlib.Path) -> Reference:
    """Commit what the workers left in `folder`."""
    outcome = json.loads((folder / "outcome.json").read_text())
    history, counts = outcome["history"], outcome["counts"]
    validations = [row for row in history if row["kind"] == "validation"]
    best = next(row for row in validations if row["step"] == outcome["best_step"])
    metrics = {f"best_{name}": value for name, value in best.items() if name not in ("kind", "step", "epoch")}
    metrics |= {f"start_{name.removeprefix('best_')}": validations[0][name.removeprefix("best_")] for name in metrics}
    notes = [f"agreement is with the teacher's first label on {counts['num_validation_cases']} validation cases"]
    if outcome["best_step"] == 0:
        notes.append(f"no validation found a better {config.keep_best} than the untrained student's: it was kept")
    template = Template.from_bytes(store.read_bytes(preferences, "template.yaml"))
    with store.write("student", config.name) as version:
        version.add_folder("adapter", folder / "adapter")
        version.add_json(
            "student.json",
            {
                "student": config.student.model_dump(mode="json"),
                "method": config.method,
                "method_config": config.method_config,
                "lora": config.lora.model_dump(mode="json"),
                "base_digest": outcome["base_digest"],
                "template_digest": template.digest,
                "best_step": outcome["best_step"],
                "keep_best": config.keep_best,
                "num_trainable_parameters": counts["num_trainable_parameters"],
            },
        )
        version.add_bytes("template.yaml", template.data)
        version.add_json("labels.json", store.read_json(preferences, "labels.json"))
        version.add_json("history.json", history)
        return version.commit(
            StageRecord(
                stage="alignment",
                config=config.model_dump(mode="json"),
                inputs={"preferences": str(preferences)},
                code_version=code_version(),
                counts=counts,
                metrics=metrics,
                notes=tuple(notes),
            )
        )


def _train_on_worker(payload: dict[str, Any]) -> None:
    """One worker's whole training. An error that a new attempt would meet again goes to the driver and ends the run."""
    try:
        _train(payload)
    except MintError as error:
        payload["progress"].fail(error)


def _train(payload: dict[str, Any]) -> None:
    import ray.train
    import torch
    import transformers

    config: AlignmentConfig = payload["config"]
    store, preferences = payload["store"], Reference.parse(payload["preferences"])
    if not config.use_gpu:
        torch.set_num_threads(config.cpus_per_worker)
    transformers.utils.logging.set_verbosity_error()
    transformers.set_seed(config.seed)
    train_pairs = store.read_rows(preferences, "train.parquet", PreferencePair)
    validation_pairs = store.read_rows(preferences, "validation.parquet", PreferencePair)
    if not train_pairs or not validation_pairs:
        raise InvalidInput(
            f"{preferences} has {len(train_pairs)} training and {len(validation_pairs)} validation pairs; both must be "
            "more than 0. Give it more cases, or lower preferences.confidence_floor."
        )
    validation_pairs = draw_cases(validation_pairs, config.validation_cases, seed=config.seed)
    labels: Any = store.read_json(preferences, "labels.json")
    tokenizer = load_tokenizer(config.student)
    model = add_adapter(load_student(config.student), config.lora)
    num_trainable, _ = model.get_nb_trainable_parameters()
    plugin = load_plugin("alignment_methods", config.method, base=AlignmentMethod)
    method_config = parse_plugin_config(plugin, config.method_config, where="alignment.method_config")
    method = plugin(method_config, tokenizer=tokenizer, window_tokens=config.student.window_tokens)
    with tempfile.TemporaryDirectory(prefix="mint-training-") as scratch:
        folder = pathlib.Path(scratch)
        trainer = method.build_trainer(
            model, pairs=train_pairs, arguments=_trainer_arguments(config, folder / "trainer")
        )
        started = ray.train.get_checkpoint()
        if started:
            started.to_directory(str(folder / "started"))
            if (folder / "started" / "outcome.json").is_file():  # it had finished and died while saying so
                _report(folder / "started")
                return
            shutil.copytree(folder / "started" / "best", folder / "best")
        state = TrainingState.read(folder / "started") if started else TrainingState()
        progress = payload["progress"]
        if config.frozen_layers == "cache" and config.lora.last_layers is not None:
            cache_frozen_layers(
                trainer,
                last_layers=config.lora.last_layers,
                pad_token_id=tokenizer.pad_token_id,
                tell=lambda done, total: progress.tell(done, total, {}, activity="frozen layers"),
            )
        watch_training(
            trainer,
            validation=Validation(
                pairs=validation_pairs,
                labels=[Label.model_validate(label) for label in labels],
                template=Template.from_bytes(store.read_bytes(preferences, "template.yaml")),
                tokenizer=tokenizer,
                window_tokens=config.student.window_tokens,
            ),
            state=state,
            folder=folder,
            validate_every_steps=config.validate_every_steps,
            base_name=config.student.model,
            keep_best=config.keep_best,
            patience=config.early_stop_patience,
            tell=progress.tell,
            report=_report,
        )
        trainer.train(resume_from_checkpoint=str(folder / "started") if started else None)
        result = folder / "result"
        if trainer.is_world_process_zero():
            shutil.copytree(folder / "best", result / "adapter")
            outcome = {
                "history": state.history,
                "best_step": state.best_step,
                "base_digest": student_digest(config.student),
                "counts": {
                    "num_train_pairs": len(train_pairs),
                    "num_train_cases": len({pair.case_id for pair in train_pairs}),
                    "num_validation_pairs": len(validation_pairs),
                    "num_validation_cases": len({pair.case_id for pair in validation_pairs}),
                    "num_steps": trainer.state.global_step,
                    "num_trainable_parameters": num_trainable,
                },
            }
            (result / "outcome.json").write_text(json.dumps(outcome, sort_keys=True))
            progress.tell(trainer.state.max_steps, trainer.state.max_steps, {})
        _report(result)


def _report(folder: pathlib.Path) -> None:
    """Hand a checkpoint to Ray: the first worker uploads it, and every worker takes part."""
    import ray.train

    is_first = ray.train.get_context().get_world_rank() == 0
    ray.train.report({}, checkpoint=ray.train.Checkpoint.from_directory(str(folder)) if is_first else None)


def _trainer_arguments(config: AlignmentConfig, folder: pathlib.Path) -> dict[str, Any]:
    """The `transformers.TrainingArguments` that every method shares."""
    return {
        "output_dir": str(folder),
        "num_train_epochs": config.epochs,
        "per_device_train_batch_size": config.trees_per_batch // (config.num_workers * config.accumulation_steps),
        "gradient_accumulation_steps": config.accumulation_steps,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": config.warmup_share,
        "max_grad_norm": config.max_gradient_norm,
        "weight_decay": config.weight_decay,
        "seed": config.seed,
        "data_seed": config.seed,
        "eval_strategy": "no",
        "save_strategy": "steps",
        "save_steps": config.checkpoint_every_steps,
        "save_total_limit": 1,
        "logging_steps": max(1, config.validate_every_steps // _LOGS_PER_VALIDATION),
        "logging_nan_inf_filter": False,
        "report_to": "none",
        "disable_tqdm": True,
        "log_level": "error",
        "use_cpu": not config.use_gpu,
        "bf16": config.use_gpu and config.student.dtype == "bfloat16",
        "dataloader_pin_memory": config.use_gpu,
        "ddp_find_unused_parameters": False,
        "deepspeed": config.deepspeed,
    }
