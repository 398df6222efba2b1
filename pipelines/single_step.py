"""Runs one step of a recipe in this process, its inputs taken from the store or from the command line."""

from mint_lib.errors import InvalidInput
from mint_lib.flow import is_step
from mint_lib.recipe import Recipe
from mint_lib.records import Reference
from mint_lib.stages import run_stage
from mint_lib.store import Store
from pipelines.planning import PlannedStep, plan_steps


def run_single_step(
    recipe: Recipe, stage: str, *, step_id: str | None, inputs: tuple[str, ...], store: Store
) -> Reference:
    """The output of the recipe's step of `stage`.

    Args:
        recipe: where the step's config comes from.
        stage: the stage's name.
        step_id: which of the recipe's steps of that stage; None takes the first that is not the captioning's.
        inputs: `name=reference` (or `name=key=reference` for an input that takes several), used instead of the
            recipe's own outputs. References may be short (`cases/quickstart`).
        store: where everything lies.

    Raises:
        InvalidInput: there is no such step, or an input is neither given nor in the store.
    """
    planned = plan_steps(recipe, store=store)
    candidates = [item for item in planned if item.step.stage == stage and step_id in (None, item.step.id)]
    if not candidates:
        known = ", ".join(item.step.id for item in planned if item.step.stage == stage)
        raise InvalidInput(f"The recipe has no step {step_id!r} of {stage}. It has: {known}.")
    # The captions of image students come first in the flow, and are not what somebody means who names a stage.
    chosen = min(candidates, key=lambda item: item.step.id == f"{stage}-captioning")
    texts = _known_inputs(chosen, planned) | _given_inputs(inputs, store)
    missing = sorted(set(chosen.step.inputs) - set(texts))
    if missing:
        raise InvalidInput(
            f"{chosen.step.id} needs {', '.join(missing)}, which this recipe has not made yet. Run the stages before "
            f"it, or name a version: --input {missing[0]}=kind/name@v000001 (`mint ls` lists them)."
        )
    return run_stage(stage, chosen.step.config.model_dump_json(), texts, store=store).reference


def _known_inputs(chosen: PlannedStep, planned: list[PlannedStep]) -> dict[str, str]:
    known = {item.step.id: str(item.reference) for item in planned if item.reference is not None}
    texts: dict[str, str] = {}
    for name, source in chosen.step.inputs.items():
        if isinstance(source, str):
            if source in known or not is_step(source):
                texts[name] = known.get(source, source)
        elif all(step_id in known for step_id in source.values()):
            texts[name] = " ".join(f"{key}={known[step_id]}" for key, step_id in source.items())
    return texts


def _given_inputs(inputs: tuple[str, ...], store: Store) -> dict[str, str]:
    texts: dict[str, str] = {}
    for item in inputs:
        name, _, rest = item.partition("=")
        key, separator, text = rest.partition("=")
        reference = f"{key}={store.resolve(text)}" if separator else str(store.resolve(key))
        texts[name] = f"{texts[name]} {reference}" if name in texts else reference
    return texts
