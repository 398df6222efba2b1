"""Kubeflow component of the alignment stage."""

from kfp import dsl

from components.component import component


@component
def alignment(
    config: str,
    preferences: str,
    metrics: dsl.Output[dsl.Metrics],
    version: dsl.Output[dsl.Artifact],
    start: str = "",
) -> str:
    """Align a student on preference pairs, from its base or from what an earlier stage made of it."""
    from components.component import run_component

    return run_component("alignment", config, {"preferences": preferences, "start": start}, metrics, version)
