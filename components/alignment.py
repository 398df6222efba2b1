"""Kubeflow component of the alignment stage."""

from kfp import dsl

from components.component import component


@component
def alignment(
    config: str, preferences: str, metrics: dsl.Output[dsl.Metrics], version: dsl.Output[dsl.Artifact]
) -> str:
    """Align a student on preference pairs."""
    from components.component import run_component

    return run_component("alignment", config, {"preferences": preferences}, metrics, version)
