"""Kubeflow component of the teacher stage."""

from kfp import dsl

from components.component import component


@component
def teacher(config: str, cases: str, metrics: dsl.Output[dsl.Metrics], version: dsl.Output[dsl.Artifact]) -> str:
    """Fit and qualify a teacher, then rank the labels for every case."""
    from components.component import run_component

    return run_component("teacher", config, {"cases": cases}, metrics, version)
