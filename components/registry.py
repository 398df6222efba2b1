"""Kubeflow component of the registry stage."""

from kfp import dsl

from components.component import component


@component
def registry(
    config: str, student: str, report: str, metrics: dsl.Output[dsl.Metrics], version: dsl.Output[dsl.Artifact]
) -> str:
    """Publish a student with its card and report as a model version."""
    from components.component import run_component

    return run_component("registry", config, {"student": student, "report": report}, metrics, version)
