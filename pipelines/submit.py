"""Sends a recipe's pipeline to Kubeflow: once, or on a schedule.

Goes in: a recipe, the cluster file's values and an address. Comes out: the run that Kubeflow started, or the schedule
that it keeps. Everything that can be checked is checked before anything is created there; what is there already under
the same name (an experiment, a pipeline, a version of the same content) is used again.
"""

import hashlib
import pathlib
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from mint_lib.cluster import ClusterConfig
from mint_lib.errors import InvalidInput
from mint_lib.recipe import Recipe
from pipelines.kubeflow import Address, connect, explain_failures
from pipelines.mint import build_pipeline, name_pipeline
from pipelines.schedule import parse_cron

_PAGE_SIZE = 100


class Schedule(NamedTuple):
    """When Kubeflow starts runs by itself."""

    cron: str
    catch_up: bool
    """Start runs for times that passed while it could not."""
    max_concurrency: int
    replace: bool
    """Take the place of a schedule of the same name."""


class Submitted(NamedTuple):
    """What Kubeflow took."""

    id: str
    name: str
    url: str
    tasks: dict[str, str]
    """Kubeflow's name of each task to the recipe's name of the step."""


def compile_recipe(recipe: Recipe, cluster: ClusterConfig, path: pathlib.Path) -> None:
    """Write the recipe's pipeline as Kubeflow IR YAML; the same input gives the same bytes.

    Raises:
        InvalidInput: the pipeline cannot run on that cluster, or `path` cannot be written.
    """
    from kfp import compiler

    if path.suffix not in (".yaml", ".yml"):
        raise InvalidInput(f"{path} must end with .yaml: Kubeflow knows a pipeline by it.")
    pipeline = build_pipeline(recipe, cluster)
    try:
        compiler.Compiler().compile(pipeline, str(path))
    except OSError as error:
        raise InvalidInput(f"{path} cannot be written ({error.strerror}).") from None


def submit_run(
    recipe: Recipe,
    cluster: ClusterConfig,
    address: Address,
    *,
    experiment: str | None = None,
    run_name: str | None = None,
    pipeline_root: str | None = None,
) -> Submitted:
    """Start one run of the recipe.

    Raises:
        InvalidInput: the recipe cannot run on that cluster.
        KubeflowRefused: Kubeflow cannot be reached or did not take it.
    """
    with tempfile.TemporaryDirectory() as folder:
        package = pathlib.Path(folder) / "pipeline.yaml"
        compile_recipe(recipe, cluster, package)
        client = connect(address)
        with explain_failures(address, "create an experiment"):
            home = client.create_experiment(experiment or name_pipeline(recipe), namespace=address.namespace)
        with explain_failures(address, "start a run"):
            run = client.run_pipeline(
                home.experiment_id,
                run_name or name_pipeline(recipe),
                str(package),
                pipeline_root=pipeline_root,
                service_account=cluster.kubeflow.service_account,
            )
        url = f"{address.host}/#/runs/details/{run.run_id}"
        return Submitted(run.run_id, run.display_name, url, _name_tasks(package))


def submit_schedule(
    recipe: Recipe,
    cluster: ClusterConfig,
    address: Address,
    schedule: Schedule,
    *,
    experiment: str | None = None,
    run_name: str | None = None,
    pipeline_root: str | None = None,
) -> Submitted:
    """Let Kubeflow run the recipe on a schedule, from a version of its pipeline that is kept there.

    Raises:
        InvalidInput: the recipe or the schedule cannot be, or one of this name is there and is not to be replaced.
        KubeflowRefused: Kubeflow cannot be reached or did not take it.
    """
    cron, name = parse_cron(schedule.cron), run_name or name_pipeline(recipe)
    with tempfile.TemporaryDirectory() as folder:
        package = pathlib.Path(folder) / "pipeline.yaml"
        compile_recipe(recipe, cluster, package)
        client = connect(address)
        with explain_failures(address, "list its schedules"):
            listed = _list_all(client.list_recurring_runs, "recurring_runs", namespace=address.namespace)
            before = [item.recurring_run_id for item in listed if item.display_name == name]
        if before and not schedule.replace:
            raise InvalidInput(
                f"A schedule called {name} is there already. Give --replace to take its place, or another --run-name."
            )
        with explain_failures(address, "create an experiment"):
            home = client.create_experiment(experiment or name_pipeline(recipe), namespace=address.namespace)
        with explain_failures(address, "keep a version of the pipeline"):
            pipeline_id, version_id = _keep_version(client, name_pipeline(recipe), package, address.namespace)
        with explain_failures(address, "create a schedule"):
            made = client.create_recurring_run(
                home.experiment_id,
                name,
                description=recipe.description,
                cron_expression=cron,
                max_concurrency=schedule.max_concurrency,
                no_catchup=not schedule.catch_up,
                pipeline_id=pipeline_id,
                version_id=version_id,
                pipeline_root=pipeline_root,
                service_account=cluster.kubeflow.service_account,
            )
        for recurring_run_id in before:
            with explain_failures(address, f"delete the schedule {recurring_run_id} that the new one replaces"):
                client.delete_recurring_run(recurring_run_id)
        url = f"{address.host}/#/recurringrun/details/{made.recurring_run_id}"
        return Submitted(made.recurring_run_id, made.display_name, url, _name_tasks(package))


def _keep_version(client: Any, name: str, package: pathlib.Path, namespace: str | None) -> tuple[str, str]:
    """Ids of the pipeline and of its version that holds exactly this package; made where they are not there."""
    version_name = f"sha256-{hashlib.sha256(package.read_bytes()).hexdigest()[:16]}"
    pipelines = _list_all(client.list_pipelines, "pipelines", namespace=namespace)
    pipeline_id = next((item.pipeline_id for item in pipelines if item.display_name == name), None)
    if pipeline_id is None:
        pipeline = client.api_models.V2beta1Pipeline(display_name=name, namespace=namespace)
        pipeline_id = client.pipelines.pipeline_service_create_pipeline(pipeline=pipeline).pipeline_id
    versions = _list_all(client.list_pipeline_versions, "pipeline_versions", pipeline_id=pipeline_id)
    version_id = next((item.pipeline_version_id for item in versions if item.display_name == version_name), None)
    if version_id is None:
        version = client.upload_pipeline_version(str(package), version_name, pipeline_id=pipeline_id)
        version_id = version.pipeline_version_id
    return pipeline_id, version_id


def _list_all(method: Callable[..., Any], key: str, **options: Any) -> Iterator[Any]:
    """Every item of a list that Kubeflow gives in pages."""
    token = ""
    while True:
        page = method(page_token=token, page_size=_PAGE_SIZE, **options)
        yield from getattr(page, key) or ()
        token = page.next_page_token
        if not token:
            return


def _name_tasks(package: pathlib.Path) -> dict[str, str]:
    import yaml

    document = next(yaml.safe_load_all(package.read_text(encoding="utf-8")))
    graphs = [document["root"], *document["components"].values()]
    return {
        key: task["taskInfo"]["name"] for graph in graphs for key, task in graph.get("dag", {}).get("tasks", {}).items()
    }
