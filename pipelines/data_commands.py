"""Commands of `mint` on data: add cases, show the gate's verdict or the card, hand data out."""

import pathlib
import sys
from typing import Annotated, Any, Literal

import typer
import typer.core

from pipelines.options import ReferenceText, log_to_stderr, make_console
from pipelines.recipe_commands import make_stage_command

DataReference = Annotated[
    str, typer.Argument(help="cases/NAME or preferences/NAME, with @v000001, @latest or in full if wanted")
]


class _StageGroup(typer.core.TyperGroup):
    """`mint data RECIPE` runs the stage alone; other words are commands of their own."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the stage's command before what is no command's name."""
        if args and args[0] not in (*self.commands, "--help"):
            args = ["stage", *args]
        return super().parse_args(ctx, args)


data_app = typer.Typer(
    cls=_StageGroup,
    no_args_is_help=True,
    help="Read a source, validate, split by patient and write cases: mint data RECIPE. Or add cases: mint data add.",
)


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


data_app.command(name="stage")(make_stage_command("data", "Read a source, validate, split by patient and write cases."))


def gate(reference: ReferenceText) -> None:
    """Show what the data gate said of cases, preferences or quarantined data; exit code 1 if it refused them."""
    from pipelines.gate_command import show_verdict
    from pipelines.stores import LOCAL_FOLDER, open_store

    with open_store() as store:
        found = store.resolve(reference)
        passed = show_verdict(found, store=store, console=make_console(), folder=LOCAL_FOLDER / "reports")
    if not passed:
        raise typer.Exit(1)


def card(
    reference: DataReference,
    croissant: Annotated[bool, typer.Option("--croissant", help="Print Croissant JSON-LD, for machines.")] = False,
) -> None:
    """Print the card of a data set: sources, licence, consent, counts, splits, teacher, limits, lineage."""
    from mint_lib.dataset_card.beside import README, render_beside
    from mint_lib.dataset_card.croissant import CROISSANT
    from mint_lib.dataset_card.description import describe_dataset
    from pipelines.stores import open_store

    with open_store() as store:
        files = render_beside(describe_dataset(store, store.resolve(reference)))
    sys.stdout.write(files[CROISSANT if croissant else README].decode())


def export(
    reference: DataReference,
    out: Annotated[pathlib.Path, typer.Option(help="The folder; it must be empty or not be there.")],
    to: Annotated[
        Literal["hf", "jsonl"],
        typer.Option(help="hf: Parquet for datasets.load_dataset(FOLDER). jsonl: lines of JSON, images as files."),
    ] = "hf",
    split: Annotated[list[str] | None, typer.Option(help="Only this split; may be repeated.")] = None,
) -> None:
    """Write a version of cases or preferences to a folder that other tools read, with its card."""
    from mint_lib.export import export_dataset
    from pipelines.stores import open_store

    with open_store() as store:
        description = export_dataset(store, store.resolve(reference), out, to=to, splits=tuple(split or ()))
    for name, figures in description.splits.items():
        typer.echo(f"{name}: {figures.num_rows} rows")
    typer.echo(str(out.resolve()))
