"""Commands of `mint` on the store: what is there, is all of it still what was committed, and what may go.

Goes in: a reference, or a kind and a name. Comes out: lines for people and an exit code. They change nothing but what
`mint gc` is told to delete.
"""

import re
from typing import TYPE_CHECKING, Annotated, cast

import typer

from pipelines.options import ReferenceText, make_console

if TYPE_CHECKING:
    from rich.console import Console

    from mint_lib.records import Kind
    from mint_lib.store import Store

_NAME = re.compile(r"(?P<kind>[a-z]+)/(?P<name>[a-z0-9][a-z0-9-]{0,62})")


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


def show(reference: ReferenceText) -> None:
    """Show a version: record, files, aliases and the versions it was made from."""
    from pipelines.result import print_version
    from pipelines.stores import open_store

    with open_store() as store:
        print_version(store.resolve(reference), store=store, console=make_console())


def verify(
    reference: ReferenceText,
    lineage: Annotated[bool, typer.Option("--lineage", help="Read the versions it was made from, too.")] = False,
) -> None:
    """Read every byte of a version again; exit code 1 if one is not what was committed."""
    from pipelines.stores import open_store

    console = make_console()
    with open_store() as store:
        found = store.verify(store.resolve(reference), with_lineage=lineage)
    for damage in found.damages:
        console.print(f"damaged  {damage.reference}  {damage.path}", highlight=False, markup=False, soft_wrap=True)
        console.print(f"         {damage.problem}", highlight=False, markup=False, soft_wrap=True)
    read = f"{found.num_versions} versions, {found.num_files} files, {found.num_bytes} bytes read"
    console.print(f"{read}: {len(found.damages)} damages." if found.damages else f"{read}: whole.", highlight=False)
    if not found.is_whole:
        raise typer.Exit(1)


def gc(
    name: Annotated[
        str | None, typer.Argument(metavar="[KIND/NAME]", help="Whose old versions to remove, with --keep-last.")
    ] = None,
    older_than_hours: Annotated[float, typer.Option(help="Leave younger orphans: their writer may be alive.")] = 24.0,
    keep_last: Annotated[
        int | None, typer.Option(help="Remove older versions that no alias and no kept version needs.")
    ] = None,
    delete: Annotated[bool, typer.Option("--delete", help="Delete them; without it they are only listed.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list them, as without --delete.")] = False,
) -> None:
    """List or delete what crashed writers left, or old versions of one name."""
    from mint_lib.errors import InvalidInput
    from pipelines.stores import open_store

    if (name is None) != (keep_last is None):
        raise InvalidInput("--keep-last and KIND/NAME belong together: mint gc --keep-last 3 preferences/quickstart.")
    if delete and dry_run:
        raise InvalidInput(
            "--delete and --dry-run exclude each other. Leave one out; without both, nothing is deleted."
        )
    console = make_console()
    with open_store() as store:
        if name is None or keep_last is None:
            _collect_orphans(store, console, seconds=older_than_hours * 3600, delete=delete)
        else:
            _remove_old_versions(store, console, name, keep_last=keep_last, delete=delete)


def _collect_orphans(store: "Store", console: "Console", *, seconds: float, delete: bool) -> None:
    orphans = store.collect_orphans(older_than_seconds=seconds) if delete else store.list_orphans()
    for orphan in orphans:
        place = f"{orphan.kind}/{orphan.name}@{orphan.version}"
        text = f"{place}  {orphan.num_objects} objects, {orphan.size_bytes} bytes, last written {orphan.modified:%F %T}"
        console.print(text, highlight=False, soft_wrap=True)
    console.print(f"{len(orphans)} unfinished versions {'deleted' if delete else 'found; --delete removes old ones'}.")


def _remove_old_versions(store: "Store", console: "Console", text: str, *, keep_last: int, delete: bool) -> None:
    from mint_lib.errors import Conflict, InvalidInput
    from mint_lib.records import KINDS

    match = _NAME.fullmatch(text)
    if match is None or match["kind"] not in KINDS:
        raise InvalidInput(f"{text[:200]!r} is not KIND/NAME with a kind of {', '.join(KINDS)}; `mint ls` prints them.")
    num_removed = num_bytes = 0
    for old in store.list_old_versions(cast("Kind", match["kind"]), match["name"], keep_last=keep_last):
        if old.needed_by:
            console.print(f"stays    {old.reference}  needed by {old.needed_by}", highlight=False, soft_wrap=True)
            continue
        if delete:
            try:
                num_bytes += store.remove_old_version(old).size_bytes
            except (Conflict, InvalidInput) as error:
                console.print(f"stays    {error}", highlight=False, markup=False, soft_wrap=True)
                continue
        console.print(f"{'removed ' if delete else 'would go'} {old.reference}", highlight=False, soft_wrap=True)
        num_removed += 1
    done = f"removed, {num_bytes} bytes freed" if delete else "may go; --delete removes them"
    console.print(f"{num_removed} old versions {done}.", highlight=False)
