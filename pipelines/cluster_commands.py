"""Commands of `mint` that make a pipeline for a cluster and send it there."""

import pathlib
from typing import Annotated

import typer

from pipelines.options import ClusterPath, Overrides, RecipePath, load, load_cluster_file, log_to_stderr, make_console


def compile_pipeline(
    recipe: RecipePath,
    output: Annotated[pathlib.Path, typer.Option("--output", "-o", help="Where to write the IR YAML")],
    cluster: ClusterPath = None,
    overrides: Overrides = None,
) -> None:
    """Compile a recipe's pipeline to Kubeflow IR YAML for a cluster."""
    from pipelines.submit import compile_recipe

    compile_recipe(load(recipe, overrides), load_cluster_file(cluster), output)
    make_console().print(f"wrote {output}", highlight=False, soft_wrap=True)


def submit(
    recipe: RecipePath,
    cluster: ClusterPath = None,
    overrides: Overrides = None,
    host: Annotated[
        str | None, typer.Option(help="Kubeflow Pipelines; else kubeflow.host of the cluster file.")
    ] = None,
    namespace: Annotated[str | None, typer.Option(help="Your profile's namespace; else kubeflow.namespace.")] = None,
    token_file: Annotated[
        pathlib.Path | None, typer.Option(help="File with a token; in a pod, its own is found by itself.")
    ] = None,
    ca_file: Annotated[pathlib.Path | None, typer.Option(help="PEM file of the authority of --host.")] = None,
    experiment: Annotated[str | None, typer.Option(help="Made if it is not there; else mint-RECIPE.")] = None,
    run_name: Annotated[str | None, typer.Option(help="Name of the run or schedule; else mint-RECIPE.")] = None,
    pipeline_root: Annotated[str | None, typer.Option(help="Where Kubeflow keeps artifacts; else its own.")] = None,
    cron: Annotated[
        str | None, typer.Option(help="Run on a schedule, in UTC: '0 3 * * 1' is Mondays at 3:00.", metavar="CRON")
    ] = None,
    catchup: Annotated[bool, typer.Option("--catchup/--no-catchup", help="With --cron: make up missed times.")] = False,
    max_concurrency: Annotated[int, typer.Option(min=1, max=10, help="With --cron: runs at the same time.")] = 1,
    replace: Annotated[bool, typer.Option("--replace", help="With --cron: replace a schedule of this name.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the end; exit code 1 if the run failed.")] = False,
    timeout_hours: Annotated[float, typer.Option(help="With --wait: stop waiting; the run goes on.")] = 72.0,
) -> None:
    """Run a recipe on a cluster's Kubeflow Pipelines, once or on a schedule."""
    from mint_lib.errors import InvalidInput
    from pipelines.kubeflow import find_address
    from pipelines.submit import Schedule, submit_run, submit_schedule

    if wait and cron:
        raise InvalidInput("--wait waits for one run, and --cron starts none at once. Leave out one of them.")
    loaded, target, console = load(recipe, overrides), load_cluster_file(cluster), make_console()
    log_to_stderr()
    address = find_address(target, host=host, namespace=namespace, token_file=token_file, ca_file=ca_file)
    if cron:
        schedule = Schedule(cron, catch_up=catchup, max_concurrency=max_concurrency, replace=replace)
        sent = submit_schedule(
            loaded, target, address, schedule, experiment=experiment, run_name=run_name, pipeline_root=pipeline_root
        )
    else:
        sent = submit_run(
            loaded, target, address, experiment=experiment, run_name=run_name, pipeline_root=pipeline_root
        )
    console.print(f"{'schedule' if cron else 'run'} {sent.id}  {sent.url}", highlight=False, soft_wrap=True)
    if wait:
        from pipelines.follow_run import follow_run

        try:
            follow_run(sent, address, tell=console.print, timeout_hours=timeout_hours)
        except KeyboardInterrupt:
            console.print(f"No longer waiting. The run goes on: {sent.url}", highlight=False, soft_wrap=True)
            raise typer.Exit(130) from None
