"""The flow as one Kubeflow pipeline: the recipe's steps, each a component, joined by references.

The same pipeline object runs under `kfp.local` on a laptop and compiles to IR YAML for a cluster.
"""

import importlib
from collections.abc import Mapping
from typing import Any

from kfp import dsl

from mint_lib.flow import Step, list_steps
from mint_lib.recipe import Recipe


def build_pipeline(recipe: Recipe) -> Any:
    """The `@dsl.pipeline` of `recipe`."""

    @dsl.pipeline(name=f"mint-{recipe.name}", description=recipe.description or "MINT: align a student on a teacher")
    def mint() -> None:
        outputs: dict[str, Any] = {}
        for step in list_steps(recipe):
            outputs[step.id] = _add_task(step, outputs).outputs["Output"]

    return mint


def _add_task(step: Step, outputs: Mapping[str, Any]) -> Any:
    component = getattr(importlib.import_module(f"components.{step.stage}"), step.stage)
    inputs: dict[str, Any] = {}
    for name, source in step.inputs.items():
        if isinstance(source, str):
            inputs[name] = outputs[source]
        else:
            inputs[name] = " ".join(f"{key}={outputs[step_id]}" for key, step_id in source.items())
    task = component(config=step.config.model_dump_json(), **inputs).set_display_name(step.id)
    # Kubeflow's cache key holds the digests of inputs that are references, but cannot know a source's content.
    return task if inputs else task.set_caching_options(False)
