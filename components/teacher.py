"""Kubeflow component of the teacher stage."""

from kfp import dsl

from components.component import component


@component
def teacher(
    config: str,
    cases: str,
    metrics: dsl.Output[dsl.Metrics],
    version: dsl.Output[dsl.Artifact],
    previous: str = "",
) -> str:
    """Fit and qualify a teacher, then rank the labels for every case; with `previous`, only for those added since."""
    from components.component import run_component

    return run_component("teacher", config, {"cases": cases, "previous": previous}, metrics, version)
