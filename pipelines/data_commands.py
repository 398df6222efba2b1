"""The commands that show and hand out data: `mint card` and `mint export`."""

import pathlib
import sys
from typing import Annotated, Literal

import typer

DataReference = Annotated[
    str, typer.Argument(help="cases/NAME or preferences/NAME, with @v000001, @latest or in full if wanted")
]


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
