"""What several `mint` commands share: options, and how a recipe, a cluster file and the console come from them."""

import logging
import os
import pathlib
import sys
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from mint_lib.cluster import ClusterConfig
    from mint_lib.recipe import Recipe

RecipePath = Annotated[pathlib.Path, typer.Argument(help="A recipe, for instance pipelines/recipes/quickstart.yaml")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one value: --set alignment.epochs=2")
]
ReferenceText = Annotated[
    str, typer.Argument(help="kind/name, kind/name@v000001, kind/name@champion or a full reference")
]
ClusterPath = Annotated[
    pathlib.Path | None, typer.Option("--cluster", help="Cluster file; the chart installs one as mint-cluster.")
]


def load(path: pathlib.Path, overrides: list[str] | None) -> "Recipe":
    """The recipe with `--set` applied."""
    from mint_lib.recipe import load_recipe

    return load_recipe(path, overrides=tuple(overrides or ()))


def load_cluster_file(path: pathlib.Path | None) -> "ClusterConfig":
    """The cluster file. Raises InvalidInput with the way to get one where none was given."""
    from mint_lib.cluster import load_cluster
    from mint_lib.errors import InvalidInput

    if path is None:
        raise InvalidInput(
            "--cluster is missing: that file names images by digest and secrets by name. The chart installs one: "
            "kubectl -n mint get configmap mint-cluster -o jsonpath='{.data.cluster\\.yaml}' > cluster.yaml"
        )
    return load_cluster(path)


def make_console() -> "Console":
    """What commands print to."""
    from rich.console import Console

    # An explicit file: a run redirects sys.stdout to collect what the steps print.
    return Console(file=sys.stdout, width=None if sys.stdout.isatty() else int(os.environ.get("COLUMNS", "120")))


def log_to_stderr() -> None:
    """Log what our code says, and nothing that libraries say to their developers."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    logging.captureWarnings(True)
    for name in ("py.warnings", "botocore", "urllib3", "uvicorn"):
        logging.getLogger(name).setLevel(logging.ERROR)
