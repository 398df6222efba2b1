"""The alignment stage: trains the student on preference pairs, with validation, early stop and resume.

Goes in: a version of `preferences`. Comes out: a version of `student` with the best weights that validation met (an
adapter, or all of them), its history, the template and the label set. The method is a plug-in; the training always runs
inside a Ray Train `TorchTrainer`, with one CPU worker on a laptop and many accelerators on a cluster.
"""

import hashlib
import json
import pathlib
import tempfile
from typing import TYPE_CHECKING, Any, cast

from mint_lib.code_version import code_version
from mint_lib.errors import InvalidInput
from mint_lib.gate.verdict import require_passed
from mint_lib.plugins import load_plugin, parse_plugin_config
from mint_lib.records import Reference, StageRecord
from mint_lib.student_weights import TUNED_FOLDERS
from mint_lib.template import Template
from mint_lib.training.deepspeed import check_deepspeed
from mint_lib.training.method import AlignmentMethod
from mint_lib.training.on_ray import WorkerResources, forget_run, train_on_ray
from mint_lib.training.settings import AlignmentConfig
from mint_lib.training.worker import OUTCOME, train_on_worker

if TYPE_CHECKING:
    from mint_lib.store import Store


def align_student(
    config: AlignmentConfig, *, store: "Store", preferences: Reference, start: Reference | None = None
) -> Reference:
    """A version of `student` trained on `preferences`. On one CPU worker the same seed and pairs give the same digest.

    Training begins with the base, or with what `start`, a version of `student`, trained on it. The result holds both.

    Raises:
        InvalidInput: the gate never judged the pairs, there are none for training or validation, they hold images and
            the student reads none or the other way round, the batch cannot be divided over the workers, or `start` is
            of another base or holds trained weights that this training has no place for.
        GateFailed: the gate refused the pairs.
        PromptTooLong: a prompt and its answer exceed the student's window, and such prompts are not to be cut.
        RefusedData: a loss or gradient is not finite; carries the case ids.
        OutOfMemory: a pass does not fit the memory; names its shape.
        Interrupted: told to stop; the same call goes on from the checkpoint.
    """
    method = load_plugin("alignment_methods", config.method, base=AlignmentMethod)
    parse_plugin_config(method, config.method_config, where="alignment.method_config")
    check_method(config, method)
    if config.deepspeed is not None:
        check_deepspeed(config.deepspeed)
    require_passed(store, preferences)
    if start is not None:
        check_start(config, start, store)
    key = f"{config.model_dump_json()} {preferences.digest} {code_version()}"
    if start is not None:
        key += f" {start.digest}"
    run_id = f"alignment-{hashlib.sha256(key.encode()).hexdigest()[:24]}"
    with tempfile.TemporaryDirectory(prefix="mint-student-") as scratch:
        folder = train_on_ray(
            train_on_worker,
            {
                "config": config,
                "method": method,
                "store": store,
                "preferences": str(preferences),
                "start": str(start) if start is not None else None,
            },
            resources=WorkerResources(
                num_workers=config.num_workers,
                min_workers=config.min_workers or config.num_workers,
                cpus_per_worker=config.cpus_per_worker,
                use_gpu=config.use_gpu,
                max_failures=config.max_failures,
            ),
            store=store,
            run_id=run_id,
            description=f"alignment: {config.name}",
            target=pathlib.Path(scratch) / "result",
            result_file=OUTCOME,
        )
        student = _write_student(config, store, preferences, start, folder)
    forget_run(store, run_id)
    return student


def check_method(config: AlignmentConfig, method: type[AlignmentMethod]) -> None:
    """Refuse settings that `method` cannot follow, and a batch that its workers cannot share.

    Raises:
        InvalidInput: with the values.
    """
    if method.splits_by_tokens:
        return
    if config.attention == "flex":
        raise InvalidInput(
            f"alignment.attention is flex, which is for methods on prompt trees, and {config.method} has none. Set it "
            "to auto or sdpa."
        )
    for num_workers in range(config.min_workers or config.num_workers, config.num_workers + 1):
        if config.trees_per_batch % (num_workers * config.accumulation_steps):
            raise InvalidInput(
                f"alignment.trees_per_batch {config.trees_per_batch} is no multiple of {num_workers} workers x "
                f"accumulation_steps {config.accumulation_steps}, and {config.method} counts pairs. Change one of them."
            )


def check_start(config: AlignmentConfig, start: Reference, store: "Store") -> None:
    """Refuse a start that is no student of this base and this kind of tuning.

    Raises:
        InvalidInput: with both.
    """
    if start.kind != "student":
        raise InvalidInput(f"{start} is no student. Alignment can start from its base, or from a version of student.")
    facts = cast(dict[str, Any], store.read_json(start, "student.json"))
    adapted = config.tuning == "adapter"
    wanted = {"student": config.student.model_dump(mode="json"), "tuning": config.tuning}
    # The update of a matrix is scaled by these, so that the same numbers mean another one under other settings.
    scales = ("rank", "alpha", "scaling", "update")
    wanted |= {f"lora.{name}": getattr(config.lora, name) for name in scales if adapted}
    given = {"student": facts["student"], "tuning": facts["tuning"]}
    given |= {f"lora.{name}": facts["lora"][name] for name in scales if adapted}
    different = [name for name in wanted if wanted[name] != given[name]]
    if different:
        raise InvalidInput(
            f"Training cannot start from {start.kind}/{start.name}@{start.version}: its "
            + ", ".join(f"{name} is {given[name]} and not {wanted[name]}" for name in different)
            + ". Give both stages the same."
        )


def _write_student(
    config: AlignmentConfig, store: "Store", preferences: Reference, start: Reference | None, folder: pathlib.Path
) -> Reference:
    """Commit what the workers left in `folder`."""
    outcome = json.loads((folder / OUTCOME).read_text())
    history, counts = outcome["history"], outcome["counts"]
    validations = [row for row in history if row["kind"] == "validation"]
    best = next(row for row in validations if row["step"] == outcome["best_step"])
    metrics = {f"best_{name}": value for name, value in best.items() if name not in ("kind", "step", "epoch")}
    metrics |= {f"start_{name.removeprefix('best_')}": validations[0][name.removeprefix("best_")] for name in metrics}
    template = Template.from_bytes(store.read_bytes(preferences, "template.yaml"))
    with store.write("student", config.name) as version:
        version.add_folder(TUNED_FOLDERS[config.tuning], folder / TUNED_FOLDERS[config.tuning])
        version.add_json(
            "student.json",
            {
                "student": config.student.model_dump(mode="json"),
                "method": config.method,
                "method_config": config.method_config,
                "tuning": config.tuning,
                "quantisation": config.quantisation,
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
                inputs={"preferences": str(preferences)} | ({"start": str(start)} if start is not None else {}),
                code_version=code_version(),
                counts=counts,
                metrics=metrics,
                notes=tuple(_write_notes(config, outcome)),
            )
        )


def _write_notes(config: AlignmentConfig, outcome: dict[str, Any]) -> list[str]:
    """What a reader of the student's record must know."""
    counts = outcome["counts"]
    notes = []
    if "agreement_mrr" in outcome["history"][0]:
        notes = [f"agreement is with the teacher's first label on {counts['num_validation_cases']} validation cases"]
    if outcome["best_step"] == 0:
        notes.append(f"no validation found a better {config.keep_best} than before the training: that student was kept")
    if counts.get("num_cut_prompts"):
        notes.append(f"{counts['num_cut_prompts']} prompts were too long and lost {counts['num_cut_tokens']} tokens")
    if counts["num_skipped_steps"]:
        notes.append(f"{counts['num_skipped_steps']} steps were skipped: their loss or gradient was not finite")
    if config.quantisation != "none":
        notes.append(f"trained and validated on a base in {config.quantisation}; served on the base's own weights")
    return notes
