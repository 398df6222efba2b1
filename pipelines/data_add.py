"""`mint data add`: new cases of a source become the next version of cases that are in the store.

Goes in: a source, its config, and what is to grow. Comes out: the new version, and what it changed. How cases are
validated and split is what the version that grows says of itself.
"""

from typing import Any

from pydantic import ValidationError
from rich.console import Console

from mint_lib.data import DataConfig
from mint_lib.errors import InvalidInput, RecipeError
from mint_lib.plugins import describe_validation_error
from mint_lib.recipe import apply_override, resolve_section
from mint_lib.records import SPLITS, Reference
from mint_lib.stages import run_stage
from mint_lib.store import Store

_OF_THE_DELIVERY = ("source", "config", "batch", "test_source")


def add_data(source: str, to: str, *, overrides: tuple[str, ...], batch: str | None, store: Store) -> Reference:
    """The version of cases that is `to` with the cases of `source` added.

    Args:
        source: a file of `mint_lib/data_sources`.
        to: what grows, for instance `cases/tiles`: its newest version.
        overrides: `key=value` of the source's own config.
        batch: the delivery's name; None: the source's.
        store: where everything lies.

    Raises:
        InvalidInput: `to` is not a version of cases, or was not made by the data stage.
        RecipeError: the source or its config is not valid.
        RefusedData: see `mint_lib.data.prepare_cases`.
    """
    base = store.resolve(to)
    if base.kind != "cases":
        raise InvalidInput(f"{base} is not a version of cases. Name what is to grow: --to cases/NAME.")
    values: dict[str, Any] = {}
    for override in overrides:
        apply_override(values, override)
    before = {key: value for key, value in store.record(base).config.items() if key not in _OF_THE_DELIVERY}
    try:
        config = DataConfig.model_validate(before | {"source": source, "config": values, "batch": batch})
    except ValidationError as error:
        raise RecipeError(describe_validation_error(error, DataConfig, where="data")) from None
    config = resolve_section("data", config)
    return run_stage("data", config.model_dump_json(), {"base": str(base)}, store=store).reference


def print_addition(reference: Reference, *, store: Store, console: Console) -> None:
    """What the newest delivery brought, by split and label."""
    counts = store.record(reference).counts
    for split in SPLITS:
        added, total = counts.get(f"added/{split}/cases", 0), counts.get(f"{split}/cases", 0)
        console.print(f"{split:<12}{added:>9,} new of {total:>9,} cases", highlight=False)
    left_out = {
        key.removeprefix("added/"): count
        for key, count in counts.items()
        if key.startswith("added/") and ("refused/" in key or key == "added/already there") and count
    }
    for cause, count in sorted(left_out.items()):
        console.print(f"not added   {count:>9,} {cause}", highlight=False)
