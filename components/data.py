"""Kubeflow component of the data stage."""

from kfp import dsl

from components.component import component


@component
def data(config: str, metrics: dsl.Output[dsl.Metrics], version: dsl.Output[dsl.Artifact], base: str = "") -> str:
    """Read a source, validate, split by patient and write cases."""
    from components.component import run_component

    return run_component("data", config, {"base": base}, metrics, version)
