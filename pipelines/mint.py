"""The flow as one Kubeflow pipeline: the recipe's steps, each a component, joined by references.

The same pipeline runs under `kfp.local` on a laptop and, with a cluster's config, compiles to IR YAML for a cluster.
There each step gets what the recipe's section `cluster` says, and a step with `ray` is a Ray job that its pod follows.
"""

import contextlib
import importlib
from collections.abc import Mapping
from typing import Any

from kfp import dsl

from mint_lib.cluster import ClusterConfig
from mint_lib.errors import InvalidInput
from mint_lib.flow import Step, is_step, list_steps
from mint_lib.recipe import Recipe


def build_pipeline(recipe: Recipe, cluster: ClusterConfig | None = None) -> Any:
    """The `@dsl.pipeline` of `recipe`.

    Args:
        recipe: The steps and what each needs.
        cluster: Where it will run; None builds it for a local runner.

    Raises:
        InvalidInput: a step cannot run with what the recipe gives it, or a value holds a Kubeflow placeholder.
    """
    steps = list_steps(recipe)
    if cluster is not None:
        _check(recipe, steps, cluster)

    @dsl.pipeline(name=name_pipeline(recipe), description=recipe.description or "MINT: align a student on a teacher")
    def mint() -> None:
        with _clean_up_after(recipe, cluster):
            outputs: dict[str, Any] = {}
            for step in steps:
                outputs[step.id] = _add_task(step, outputs, recipe, cluster).outputs["Output"]

    return mint


def name_pipeline(recipe: Recipe) -> str:
    """The pipeline's name in Kubeflow."""
    return f"mint-{recipe.name}"


def _add_task(step: Step, outputs: Mapping[str, Any], recipe: Recipe, cluster: ClusterConfig | None) -> Any:
    placement = getattr(recipe.cluster, step.stage)
    if cluster is not None and placement.ray is not None:
        task = _load("ray_job")(
            stage=step.stage,
            config=step.config.model_dump_json(),
            inputs=" ".join(_spell_input(name, source, outputs) for name, source in step.inputs.items()),
            # What a job does not depend on would change the key of Kubeflow's cache.
            cluster=cluster.model_dump_json(exclude={"serving", "kubeflow", "deidentification_secret", "chat_secret"}),
            step=placement.model_dump_json(),
        )
    else:
        inputs: dict[str, Any] = {}
        for name, source in step.inputs.items():
            if isinstance(source, str):
                inputs[name] = outputs[source] if is_step(source) else source
            else:
                inputs[name] = " ".join(f"{key}={outputs[step_id]}" for key, step_id in source.items())
        task = _load(step.stage)(config=step.config.model_dump_json(), **inputs)
    task.set_display_name(step.id)
    if not step.inputs:
        # Kubeflow's cache key holds the digests of inputs that are references, but cannot know a source's content.
        task.set_caching_options(False)
    if cluster is not None:
        from pipelines.on_cluster import place_step

        place_step(task, step, cluster=cluster, placement=placement)
    return task


def _spell_input(name: str, source: str | Mapping[str, str], outputs: Mapping[str, Any]) -> str:
    """An input as the words `NAME=REFERENCE` or `NAME=KEY=REFERENCE`, which `python -m mint_lib` takes."""
    if isinstance(source, str):
        return f"{name}={outputs[source] if is_step(source) else source}"
    return " ".join(f"{name}={key}={outputs[step_id]}" for key, step_id in source.items())


def _clean_up_after(recipe: Recipe, cluster: ClusterConfig | None) -> contextlib.AbstractContextManager[Any]:
    """Runs a last task whatever becomes of the others, where a step could leave something: a Ray job."""
    if cluster is None or not any(getattr(recipe.cluster, stage).ray for stage in type(recipe.cluster).model_fields):
        return contextlib.nullcontext()
    from pipelines.on_cluster import FOLLOWER, place_task

    task = _load("clean_up")(namespace=cluster.namespace).set_display_name("clean-up").set_caching_options(False)
    # No stage of its own: what it ends are jobs of this one.
    place_task(task, "alignment", cluster=cluster, placement=FOLLOWER.model_copy(update={"timeout_hours": 1.0}))
    handler: contextlib.AbstractContextManager[Any] = dsl.ExitHandler(exit_task=task, name="flow")
    return handler


def _check(recipe: Recipe, steps: list[Step], cluster: ClusterConfig) -> None:
    from pipelines.on_cluster import check_placement

    if "{{" in cluster.model_dump_json():
        raise InvalidInput("The cluster file holds '{{', which Kubeflow would replace. Keep it out of its values.")
    for step in steps:
        check_placement(step, cluster=cluster, placement=getattr(recipe.cluster, step.stage))


def _load(name: str) -> Any:
    return getattr(importlib.import_module(f"components.{name}"), name)
