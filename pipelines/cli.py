"""The `mint` command.

Every command loads what it needs when it runs, so that `--help` answers at once. Their order here is that of `--help`.
"""

import json
import os
import sys
from collections.abc import Callable

import typer

from pipelines.cluster_commands import compile_pipeline, submit
from pipelines.data_commands import card, data_app, export, gate
from pipelines.diff import diff
from pipelines.model_commands import ask, base, promote, rollback, serve, token
from pipelines.options import ClusterPath, load_cluster_file, make_console
from pipelines.recipe_commands import make_stage_command, plan, run
from pipelines.store_commands import gc, list_versions, show, verify

_STAGES = {
    "teacher": "Fit and qualify a teacher, then rank the labels for every case.",
    "preferences": "Turn rankings into preference pairs.",
    "alignment": "Align a student on preference pairs.",
    "evaluation": "Measure every system on the same test cases and write the report.",
    "registry": "Publish a student with its card and report as a model version.",
}


def main() -> None:
    """Run the command; errors a user can mend are shown without a traceback. Exit code: 2 (input), 75 (go on) or 1."""
    from mint_lib.errors import Interrupted, InvalidInput, MintError

    try:
        app()
    except MintError as error:
        sys.stderr.write(f"mint: {type(error).__name__}: {error}\n")
        if isinstance(error, Interrupted):
            sys.exit(os.EX_TEMPFAIL)
        sys.exit(2 if isinstance(error, InvalidInput) else 1)


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


def schema() -> None:
    """Print the JSON schema of recipes, for editors."""
    from mint_lib.recipe import recipe_json_schema

    typer.echo(json.dumps(recipe_json_schema(), indent=2))


app = typer.Typer(
    help="MINT: move what a multimodal teacher knows into a student that sees one modality only.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
_COMMANDS: dict[str, Callable[..., None]] = {
    "run": run,
    "plan": plan,
    "doctor": doctor,
    "ls": list_versions,
    "show": show,
    "gate": gate,
    "promote": promote,
    "rollback": rollback,
    "serve": serve,
    "ask": ask,
    "base": base,
    "token": token,
    "schema": schema,
    "compile": compile_pipeline,
    "submit": submit,
    "diff": diff,
    "verify": verify,
    "gc": gc,
    "card": card,
    "export": export,
}
for _name, _command in _COMMANDS.items():
    app.command(name=_name)(_command)
app.add_typer(data_app, name="data", rich_help_panel="One stage alone")
for _stage, _doc in _STAGES.items():
    app.command(name=_stage, rich_help_panel="One stage alone")(make_stage_command(_stage, _doc))


if __name__ == "__main__":
    main()
