"""Kubeflow component of the preferences stage."""

from kfp import dsl

from components.component import component


@component
def preferences(
    config: str,
    cases: str,
    rankings: str,
    metrics: dsl.Output[dsl.Metrics],
    version: dsl.Output[dsl.Artifact],
    previous: str = "",
) -> str:
    """Turn rankings into preference pairs, and let the gate judge them."""
    from components.component import run_component

    return run_component(
        "preferences", config, {"cases": cases, "rankings": rankings, "previous": previous}, metrics, version
    )
