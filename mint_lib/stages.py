"""Runs one stage by its name, and never twice for the same inputs.

Goes in: a stage's name, its config as JSON and its input references. Comes out: the reference of the output, and
whether it had been made before. The key of an output is the sha256 of stage, resolved config, input digests and code
version, so an unchanged step is found in the store wherever it ran first.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from pydantic import BaseModel, ValidationError

from mint_lib import alignment, data, evaluation, preferences, registry, teacher
from mint_lib.code_version import code_version
from mint_lib.errors import InvalidInput, RecipeError
from mint_lib.pairing.settings import PreferencesConfig
from mint_lib.plugins import describe_validation_error
from mint_lib.records import Reference
from mint_lib.reporting.settings import EvaluationConfig
from mint_lib.store import Store
from mint_lib.training.settings import AlignmentConfig

logger = logging.getLogger(__name__)
Inputs = Mapping[str, Reference | Mapping[str, Reference]]


class Stage(NamedTuple):
    """What a stage needs to run."""

    config_type: type[BaseModel]
    run: Callable[..., Reference]
    inputs: tuple[str, ...] = ()
    """Inputs that are one reference each."""
    input_maps: tuple[str, ...] = ()
    """Inputs that are several named references each."""
    optional_inputs: tuple[str, ...] = ()
    """Inputs that may be missing, or empty as Kubeflow hands them on."""
    digest_outside: Callable[[Any], str] | None = None
    """Digest of what the stage reads from outside the store, by its config."""


STAGES: dict[str, Stage] = {
    "data": Stage(data.DataConfig, data.prepare_cases, optional_inputs=("base",), digest_outside=data.digest_sources),
    "teacher": Stage(teacher.TeacherConfig, teacher.rank_cases, ("cases",), optional_inputs=("previous",)),
    "preferences": Stage(
        PreferencesConfig, preferences.build_pairs, ("cases", "rankings"), optional_inputs=("previous",)
    ),
    "alignment": Stage(AlignmentConfig, alignment.align_student, ("preferences",), optional_inputs=("start",)),
    "evaluation": Stage(
        EvaluationConfig,
        evaluation.evaluate_students,
        ("cases", "rankings", "preferences"),
        ("students", "baselines"),
    ),
    "registry": Stage(registry.RegistryConfig, registry.register_model, ("student", "report")),
}


class Outcome(NamedTuple):
    """What a stage gave."""

    reference: Reference
    was_cached: bool


def run_stage(stage_name: str, config_json: str, inputs: Mapping[str, str], *, store: Store) -> Outcome:
    """The output of a stage, made now or found in the store.

    Args:
        stage_name: one of `STAGES`.
        config_json: the stage's config as JSON text.
        inputs: input name to a reference, or to `name=reference` words for an input that takes several.
        store: where inputs lie and the output goes.

    Raises:
        RecipeError: the config is not valid for this stage.
        InvalidInput: an input is missing, unknown or not a reference.
    """
    stage, config = STAGES[stage_name], parse_config(stage_name, config_json)
    parsed = parse_inputs(stage_name, inputs)
    key = output_key(stage_name, config, parsed)
    known = store.find_output(key)
    if known is not None:
        logger.info("%s: unchanged, already in the store as %s", stage_name, known)
        return Outcome(known, True)
    logger.info("%s: start", stage_name)
    reference = stage.run(config, store=store, **parsed)
    store.remember_output(key, reference)
    logger.info("%s: done, %s", stage_name, reference)
    return Outcome(reference, False)


def parse_config(stage_name: str, config_json: str) -> BaseModel:
    """A stage's config; RecipeError if it is not valid."""
    config_type = STAGES[stage_name].config_type
    try:
        return config_type.model_validate_json(config_json)
    except ValidationError as error:
        raise RecipeError(describe_validation_error(error, config_type, where=stage_name)) from None


def group_words(stage_name: str, words: Iterable[str]) -> dict[str, str]:
    """`NAME=REFERENCE` and `NAME=KEY=REFERENCE` words as the inputs that `run_stage` takes.

    Raises:
        InvalidInput: a word has no `=`, or an input of one reference is given twice.
    """
    stage = STAGES[stage_name]
    inputs = dict.fromkeys(stage.input_maps, "")
    for word in words:
        name, separator, value = word.partition("=")
        if not separator:
            raise InvalidInput(f"{word[:200]!r} is not an input. Write NAME=REFERENCE or NAME=KEY=REFERENCE.")
        if name in inputs and name not in stage.input_maps:
            raise InvalidInput(f"{stage_name} takes one reference as {name} and was given several. Give one.")
        inputs[name] = f"{inputs.get(name, '')} {value}".strip()
    return inputs


def parse_inputs(stage_name: str, inputs: Mapping[str, str]) -> Inputs:
    """`inputs` as references, checked against what the stage takes."""
    stage = STAGES[stage_name]
    expected = {*stage.inputs, *stage.input_maps}
    inputs = {name: text for name, text in inputs.items() if text or name not in stage.optional_inputs}
    if set(inputs) - set(stage.optional_inputs) != expected:
        optional = f" and, if wanted, {', '.join(stage.optional_inputs)}" if stage.optional_inputs else ""
        raise InvalidInput(
            f"{stage_name} takes the inputs {', '.join(sorted(expected)) or 'none'}{optional}, "
            f"and was given {', '.join(sorted(inputs)) or 'none'}."
        )
    parsed: dict[str, Reference | Mapping[str, Reference]] = {}
    for name, text in inputs.items():
        if name in (*stage.inputs, *stage.optional_inputs):
            parsed[name] = Reference.parse(text)
            continue
        pairs = [word.partition("=") for word in text.split()]
        parsed[name] = {key: Reference.parse(value) for key, _, value in pairs}
    return parsed


def output_key(stage_name: str, config: BaseModel, inputs: Inputs) -> str:
    """sha256 hex digest that says what an output is made from."""

    def digest(value: Reference | Mapping[str, Reference]) -> Any:
        return value.digest if isinstance(value, Reference) else {name: item.digest for name, item in value.items()}

    digest_outside = STAGES[stage_name].digest_outside
    parts = {
        "stage": stage_name,
        "outside": digest_outside(config) if digest_outside else None,
        "config": config.model_dump(mode="json"),
        "inputs": {name: digest(value) for name, value in inputs.items()},
        "code": code_version(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
