"""A stage as a Ray job: the step's pod only creates the job, follows it and takes its output from the store."""

import os
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from kfp import dsl

from components.component import component
from mint_lib.cluster import ClusterConfig
from mint_lib.errors import ClusterError
from mint_lib.placement import StepOnCluster
from mint_lib.records import Reference
from mint_lib.store import Store

if TYPE_CHECKING:
    from components.api_server import ApiServer

_MARGIN_SECONDS = 120.0
"""The follower gives up so long before Kubeflow ends its pod, so that it can say why and clean up."""


@component
def ray_job(
    stage: str,
    config: str,
    inputs: str,
    cluster: str,
    step: str,
    metrics: dsl.Output[dsl.Metrics],
    version: dsl.Output[dsl.Artifact],
) -> str:
    """Run a stage as a Ray job on the cluster."""
    from components.ray_job import run_on_ray

    return run_on_ray(stage, config, inputs, cluster, step, metrics, version)


def run_on_ray(
    stage: str,
    config: str,
    inputs: str,
    cluster: str,
    step: str,
    metrics: dsl.Output[dsl.Metrics],
    version: dsl.Output[dsl.Artifact],
) -> str:
    """Run `stage` as a Ray job, show what it made in the Kubeflow UI and return the output's reference as text.

    Args:
        stage: One of `mint_lib.stages.STAGES`.
        config: The stage's config as JSON.
        inputs: `NAME=REFERENCE` and `NAME=KEY=REFERENCE` words.
        cluster: A `ClusterConfig` as JSON.
        step: A `StepOnCluster` as JSON.
        metrics: Gets the output's figures.
        version: Gets the output's place.

    Raises:
        MintError: the stage's own error, or a ClusterError.
    """
    from components.component import show_output, start_logging, tell_error

    start_logging()
    store = Store.from_environment()
    try:
        reference, was_cached = find_or_make(
            stage,
            config,
            inputs,
            cluster=ClusterConfig.model_validate_json(cluster),
            step=StepOnCluster.model_validate_json(step),
            store=store,
            environment=os.environ,
            tell=_tell,
        )
    except Exception as error:
        tell_error(stage, error)
        raise
    show_output(stage, reference, was_cached, store, metrics, version)
    return str(reference)


def find_or_make(
    stage: str,
    config_json: str,
    inputs: str,
    *,
    cluster: ClusterConfig,
    step: StepOnCluster,
    store: Store,
    environment: Mapping[str, str],
    tell: Callable[[str], None],
    api: "ApiServer | None" = None,
    **options: float,
) -> tuple[Reference, bool]:
    """The output's reference, and whether it was in the store already; the rest is as `run_ray_job` takes it.

    `environment` says who the step is: MINT_RUN_ID, and MINT_POD_NAME, MINT_POD_UID, MINT_POD_NAMESPACE.
    """
    from components.api_server import connect
    from components.cluster import run_ray_job
    from mint_lib.ray_job import name_ray_job, render_ray_job
    from mint_lib.stages import group_words, output_key, parse_config, parse_inputs

    stage_config = parse_config(stage, config_json)
    references = parse_inputs(stage, group_words(stage, inputs.split()))
    key = output_key(stage, stage_config, references)
    known = store.find_output(key)
    if known is not None:
        return known, True
    manifest = render_ray_job(
        stage,
        stage_config,
        {
            name: str(value) if isinstance(value, Reference) else {part: str(item) for part, item in value.items()}
            for name, value in references.items()
        },
        cluster=cluster,
        step=step,
        name=name_ray_job(stage, key),
        run_id=environment.get("MINT_RUN_ID") or None,
    )
    manifest["metadata"]["ownerReferences"] = _name_owner(cluster.namespace, environment)
    deadline_seconds = step.timeout_hours * 3600 - _MARGIN_SECONDS
    try:
        run_ray_job(manifest, api=api or connect(), tell=tell, deadline_seconds=deadline_seconds, **options)
    except ClusterError:
        # The job of another run that did the same work is deleted by that run when it is done.
        made = store.find_output(key)
        if made is None:
            raise
        return made, False
    made = store.find_output(key)
    if made is None:
        raise ClusterError(
            f"The Ray job of {stage} succeeded, and its output is not in {store.location}. Its pods write to another "
            "store than this step reads, or run other code: give both the same cluster file and the same image."
        )
    return made, False


def _name_owner(namespace: str, environment: Mapping[str, str]) -> list[dict[str, Any]]:
    """The step's pod as the job's owner: Kubernetes deletes the job with it, which works in one namespace only."""
    name, uid = environment.get("MINT_POD_NAME"), environment.get("MINT_POD_UID")
    if not name or not uid or environment.get("MINT_POD_NAMESPACE") != namespace:
        return []
    return [{"apiVersion": "v1", "kind": "Pod", "name": name, "uid": uid}]


def _tell(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
