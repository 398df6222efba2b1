"""Kubeflow component of the evaluation stage."""

from kfp import dsl

from components.component import component


@component
def evaluation(
    config: str,
    cases: str,
    rankings: str,
    preferences: str,
    students: str,
    baselines: str,
    metrics: dsl.Output[dsl.Metrics],
    version: dsl.Output[dsl.Artifact],
    html: dsl.Output[dsl.HTML],
) -> str:
    """Measure every system on the same test cases and write the report."""
    from components.component import run_component

    inputs = {
        "cases": cases,
        "rankings": rankings,
        "preferences": preferences,
        "students": students,
        "baselines": baselines,
    }
    return run_component("evaluation", config, inputs, metrics, version, html)
