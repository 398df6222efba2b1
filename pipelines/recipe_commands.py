"""Commands of `mint` on a recipe, here: the whole flow, its plan, and one stage alone."""

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from pipelines.options import Overrides, RecipePath, load, log_to_stderr, make_console

if TYPE_CHECKING:
    from rich.console import Console

    from mint_lib.recipe import Recipe
    from mint_lib.store import Store

CasesText = Annotated[
    str | None,
    typer.Option(
        "--cases", help="Retrain on these cases of the store (see mint data add) instead of reading a source."
    ),
]


def run(
    recipe: RecipePath,
    overrides: Overrides = None,
    serve: Annotated[
        bool, typer.Option("--serve", help="Then serve the registered model, as mint serve does.")
    ] = False,
    cases: CasesText = None,
) -> None:
    """Run a recipe's whole flow on this machine and show the result."""
    from pipelines.local_run import run_recipe
    from pipelines.result import print_result
    from pipelines.stores import LOCAL_FOLDER, open_store

    loaded = load(recipe, overrides)
    console = make_console()
    with open_store() as store:
        console.print(f"[bold]{loaded.name}[/bold]: {loaded.description}", highlight=False)
        console.print(f"store: {store.location}", highlight=False)
        loaded = _retrain(loaded, cases, store=store, console=console)
        log_path = LOCAL_FOLDER / "logs" / f"{loaded.name}.log"
        planned = run_recipe(loaded, store=store, console=console, log_path=log_path)
        print_result(planned, store=store, console=console, folder=LOCAL_FOLDER / "reports")
        if serve:
            from pipelines.serve import serve_here

            log_to_stderr()
            model = next(str(item.reference) for item in planned if item.step.stage == "registry")
            serve_here([model], store=store, config=loaded.serving, has_page=True, console=console)


def plan(
    recipe: RecipePath,
    overrides: Overrides = None,
    gpu: Annotated[
        list[str] | None,
        typer.Option("--gpu", help="Will it fit? Estimates alignment on this type: a100-80gb, ..., all."),
    ] = None,
    cases: CasesText = None,
) -> None:
    """Show every step of a recipe: config, inputs, what is cached, what would be written. Nothing runs."""
    from pipelines.forecast import print_forecasts
    from pipelines.planning import describe_placement, plan_steps
    from pipelines.stores import open_store

    loaded = load(recipe, overrides)
    console = make_console()
    with open_store() as store:
        loaded = _retrain(loaded, cases, store=store, console=console)
        planned = plan_steps(loaded, store=store)
        for item in planned:
            kind_and_name = f"{item.step.stage} -> {item.step.name}"
            state = f"cached as {item.reference}" if item.reference else "would run and write a new version"
            console.print(f"\n[bold]{item.step.id}[/bold]  {kind_and_name}  [green]{state}[/green]", highlight=False)
            if item.estimate:
                console.print(f"  estimate: {item.estimate}", highlight=False)
            for name, source in item.step.inputs.items():
                console.print(f"  input {name}: {json.dumps(source)}", highlight=False, markup=False)
            config = item.step.config.model_dump_json()
            console.print(f"  config: {config}", highlight=False, markup=False, soft_wrap=True)
            console.print(f"  on a cluster: {describe_placement(loaded, item.step)}", highlight=False)
        print_forecasts(planned, gpu or (), store=store, console=console)
    num_cached = sum(item.reference is not None for item in planned)
    console.print(f"\n{len(planned)} steps, {num_cached} cached, {len(planned) - num_cached} would run.")


def make_stage_command(stage: str, doc: str) -> Callable[..., None]:
    """The command that runs `stage` of a recipe alone; `doc` is its help."""

    def run_one(
        recipe: RecipePath,
        inputs: Annotated[
            list[str] | None,
            typer.Option("--input", metavar="NAME=REFERENCE", help="Use this input instead of the recipe's own output"),
        ] = None,
        step: Annotated[
            str | None, typer.Option(help="Which step, where the recipe has several: see mint plan")
        ] = None,
        overrides: Overrides = None,
    ) -> None:
        from pipelines.single_step import run_single_step
        from pipelines.stores import open_store

        loaded = load(recipe, overrides)
        log_to_stderr()
        with open_store() as store:
            reference = run_single_step(loaded, stage, step_id=step, inputs=tuple(inputs or ()), store=store)
        typer.echo(str(reference))

    run_one.__doc__ = doc
    return run_one


def _retrain(recipe: "Recipe", cases: str | None, *, store: "Store", console: "Console") -> "Recipe":
    """The recipe on the cases asked for, saying what is taken over from an earlier run."""
    if cases is None:
        return recipe
    from pipelines.retrain import prepare_retraining

    recipe = prepare_retraining(recipe, cases, store=store)
    found = recipe.retrain
    assert found is not None
    for name, text in (("cases", found.cases), ("rankings", found.rankings), ("preferences", found.preferences)):
        shown = text.partition("#")[0] if text else "none to go on from: made anew"
        console.print(f"retrain: {name:<12} {shown}", highlight=False)
    return recipe
