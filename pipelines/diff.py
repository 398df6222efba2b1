"""`mint diff`: what two versions of data differ in, for people or as JSON: numbers and case ids, never content."""

import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from pipelines.options import make_console

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from mint_lib.data_difference.difference import Affected, DataDifference, SplitDifference

EXIT_DIFFERENT = 1
EXIT_ERROR = 2
SHOWN_CLASSES = 10
_FIGURES = {
    "num_rows": "rows",
    "num_cases": "cases",
    "num_patients": "patients",
    "num_labelled": "labelled",
    "num_with_image": "with image",
    "num_synthetic": "synthetic",
}
_VERSION_HELP = (
    "kind/name, kind/name@v000001, kind/name@champion or a full reference, of cases, rankings or preferences"
)


def diff(
    a: Annotated[str, typer.Argument(metavar="A", help=_VERSION_HELP)],
    b: Annotated[str, typer.Argument(metavar="B", help=_VERSION_HELP)],
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    ids: Annotated[bool, typer.Option("--ids", help="Give all case ids, not the first ten of each entry.")] = False,
    read_shared: Annotated[
        bool,
        typer.Option("--read-shared", help="Read also the files that both have: lengths and patients of all rows."),
    ] = False,
) -> None:
    """Compare two versions of cases, of rankings or of preferences, from A to B.

    Exit code 0: the same rows in the same splits, and the same labels. 1: they differ. 2: they cannot be compared.
    Other settings and other code are shown and are no difference; neither is another order of the rows.
    """
    from mint_lib.data_difference.comparison import SHOWN_IDS, compare_versions
    from mint_lib.errors import MintError
    from pipelines.stores import open_store

    try:
        with open_store() as store:
            found = compare_versions(
                store.resolve(a),
                store.resolve(b),
                store=store,
                read_shared=read_shared,
                max_ids=None if ids else SHOWN_IDS,
            )
    except MintError as error:  # the code 1 that other commands end with means "different" here
        sys.stderr.write(f"mint: {type(error).__name__}: {error}\n")
        raise typer.Exit(EXIT_ERROR) from None
    if as_json:
        typer.echo(found.model_dump_json(indent=2))
    else:
        print_difference(found, make_console())
    if not found.is_same_data:
        raise typer.Exit(EXIT_DIFFERENT)


def print_difference(found: "DataDifference", console: "Console") -> None:
    """The whole comparison as tables."""
    console.print(f"A  {found.before}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"B  {found.after}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"\n[bold]{_summarise(found)}[/bold]", highlight=False)
    if found.leaked.num_rows:
        console.print(
            f"WARNING: {found.leaked.num_rows} rows of train in B are of patients who were in test in A: what was "
            f"tested on them no longer counts. Cases: {_list_ids(found.leaked)}",
            style="bold red",
            highlight=False,
        )
    tables = (_rows_table, _splits_table, _classes_table, _lengths_table, _teachers_table, _labels_table)
    for table in (make(found) for make in (*tables, _settings_table)):
        if table.row_count:
            console.print()
            console.print(table)
    console.print()
    for line in _list_remarks(found):
        console.print(line, highlight=False, markup=False)


def _summarise(found: "DataDifference") -> str:
    if found.is_same_data:
        return "The data are the same."
    added, removed = (sum(item.num_rows for item in rows.values()) for rows in (found.added, found.removed))
    moved = sum(item.num_rows for item in found.moves.values())
    text = f"The data differ: {added} rows added, {removed} removed, {found.changed.num_rows} changed"
    text += f", {moved} of them moved to another split" if moved else ""
    return text + (f"; {len(found.labels)} labels of the label set differ." if found.labels else ".")


def _rows_table(found: "DataDifference") -> "Table":
    table = _make_table("rows", "number", "case ids", right=(1,))
    for verb, rows in (("added to", found.added), ("removed from", found.removed)):
        for split, affected in rows.items():
            table.add_row(f"{verb} {split}", str(affected.num_rows), _list_ids(affected))
    for name, affected in found.moves.items():
        table.add_row(f"moved: {name}", str(affected.num_rows), _list_ids(affected))
    for name, affected in found.changes.items():
        if name != "split":
            table.add_row(f"changed: {name}", str(affected.num_rows), _list_ids(affected))
    return table


def _splits_table(found: "DataDifference") -> "Table":
    table = _make_table("A -> B", *found.splits, right=range(1, 4))
    for field, title in _FIGURES.items():
        values = [
            (getattr(item.before, field, None), getattr(item.after, field, None)) for item in found.splits.values()
        ]
        if any(value is not None for pair in values for value in pair):
            table.add_row(title, *(_change(*pair) for pair in values))
    table.add_row("class shift", *(_show_number(item.shift, "{:.3f}") for item in found.splits.values()))
    if any(item.p_value is not None for item in found.splits.values()):
        table.add_row("p of new rows", *(_show_number(item.p_value, "{:.2g}") for item in found.splits.values()))
    return table


def _classes_table(found: "DataDifference") -> "Table":
    """The classes whose shares changed most, in percent."""
    shifted = {split: item for split, item in found.splits.items() if item.shift}
    shares = {split: _class_shares(item) for split, item in shifted.items()}
    largest: dict[str, float] = {}
    for classes in shares.values():
        for label, (before, after) in classes.items():
            largest[label] = max(largest.get(label, 0.0), abs(before - after))
    labels = sorted(largest, key=lambda label: (-largest[label], label))
    shown = f"{min(SHOWN_CLASSES, len(labels))} of {len(labels)} classes, % of rows"
    table = _make_table(shown, *shifted, right=range(1, 4))
    for label in labels[:SHOWN_CLASSES]:
        cells = (classes.get(label, (0.0, 0.0)) for classes in shares.values())
        table.add_row(_escape(label), *(_change(*(f"{100 * share:.1f}" for share in cell)) for cell in cells))
    return table


def _class_shares(item: "SplitDifference") -> dict[str, tuple[float, float]]:
    """Share of every class before and after."""
    before, after = ((figures.classes or {}) if figures else {} for figures in (item.before, item.after))
    totals = sum(before.values()), sum(after.values())
    return {
        label: (before.get(label, 0) / totals[0], after.get(label, 0) / totals[1])
        for label in sorted({*before, *after})
    }


def _lengths_table(found: "DataDifference") -> "Table":
    table = _make_table("characters, A -> B", "rows read", "mean", "median", "95 %", "longest", right=range(1, 6))
    for part, (before, after) in found.lengths.items():
        if before or after:
            fields = ("num_rows", "mean", "median", "p95", "max")
            values = [(getattr(before, field, None), getattr(after, field, None)) for field in fields]
            table.add_row(part, *(_change(*(_show_number(value, "{:.0f}") for value in pair)) for pair in values))
    return table


def _teachers_table(found: "DataDifference") -> "Table":
    before, after = found.teachers
    table = _make_table("teacher", "rows read", right=(1,))
    for digest in sorted({*before, *after}):
        if before.get(digest, 0) != after.get(digest, 0):
            table.add_row(_escape(digest[:19]) or "none", _change(before.get(digest, 0), after.get(digest, 0)))
    return table


def _labels_table(found: "DataDifference") -> "Table":
    table = _make_table("label", "A", "B")
    for label, names in found.labels.items():
        table.add_row(_escape(label), *("-" if name is None else _escape(name) for name in names))
    return table


def _settings_table(found: "DataDifference") -> "Table":
    table = _make_table("setting", "A", "B")
    for key, values in found.settings.items():
        table.add_row(_escape(key), *("-" if value is None else _escape(value, 200) for value in values))
    return table


def _list_remarks(found: "DataDifference") -> Iterator[str]:
    from rich.filesize import decimal

    if any(item.p_value is not None for item in found.splits.values()):
        yield "p of new rows: chi-square test that the rows that are new in a split have the class balance of A"
    if found.agreement is not None:
        text = f"first choice changed in {100 * found.agreement.first_label_changed:.1f} % of "
        text += f"{found.agreement.num_rows} rows read that both have"
        overlap = found.agreement.overlap
        yield text + ("" if overlap is None else f"; average overlap of the first 10 labels {overlap:.3f}")
    files = found.files
    unread = ", not read" if found.num_unread_files else ""
    yield (
        f"files of rows: {files.num_shared} in both ({decimal(files.shared_bytes)}{unread}), {files.num_new} only in B "
        f"({decimal(files.new_bytes)}), {files.num_gone} only in A ({decimal(files.gone_bytes)})"
    )
    if found.num_unread_files:
        yield "Lengths, teachers and warnings are of the rows read; --read-shared reads all."
    if found.bytes_per_row:
        yield f"held in memory: {found.bytes_per_row:.0f} bytes a row read"


def _make_table(*columns: str, right: Sequence[int] = ()) -> "Table":
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for index, title in enumerate(columns):
        table.add_column(title, justify="right" if index in right else "left", overflow="fold")
    return table


def _change(before: object, after: object) -> str:
    if before == after:
        return "-" if before is None else str(before)
    return f"{'?' if before is None else before} -> {'?' if after is None else after}"


def _show_number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _list_ids(affected: "Affected") -> str:
    text = ", ".join(_escape(case_id) for case_id in affected.case_ids)
    return text + (", ..." if affected.num_cases > len(affected.case_ids) else "")


def _escape(text: str, most: int = 80) -> str:
    """`text` without control characters, line breaks and markup, which a source could have put into an id."""
    from rich.markup import escape

    shown = "".join(character if character.isprintable() else "?" for character in text[:most])
    return escape(shown + ("..." if len(text) > most else ""))
