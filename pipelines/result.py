"""What the `mint` command prints of versions and of a finished run."""

import json
import os
import pathlib

from rich.console import Console
from rich.table import Table
from rich.tree import Tree

from mint_lib.errors import NotFound
from mint_lib.records import Kind, Reference
from mint_lib.report_records import Estimate, EvaluationReport
from mint_lib.store import Store
from pipelines.planning import PlannedStep

ALIASES = ("champion", "candidate")
SHOWN_METRICS = ("top_1", "top_3", "mrr", "coverage", "car", "generated_top_1")


def print_result(planned: list[PlannedStep], *, store: Store, console: Console, folder: pathlib.Path) -> None:
    """The numbers of every system, the verdict, and where the report and the student are."""
    outputs = {item.step.stage: item.reference for item in reversed(planned) if item.reference is not None}
    report_reference = outputs["evaluation"]
    report = EvaluationReport.model_validate(store.read_json(report_reference, "report.json"))
    console.print()
    console.print(_systems_table(report))
    for statement in (report.headline, *report.statements):
        console.print(f"- {statement}", highlight=False, markup=False)
    html_path = folder / f"{report_reference.name}-{report_reference.version}.html"
    _write_file(html_path, store.read_bytes(report_reference, "report.html"))
    gate = "passed" if report.gate.passed else "failed: this model cannot be promoted"
    console.print(f"\ngate     {gate}", highlight=False)
    console.print(f"report   {html_path.resolve()}", highlight=False, soft_wrap=True)
    student = store.record(outputs["registry"]).inputs["student"]
    console.print(f"student  {student}", highlight=False, soft_wrap=True)
    console.print(f"model    {outputs['registry']}", highlight=False, soft_wrap=True)


def print_versions(kind: Kind, name: str, *, store: Store, console: Console) -> None:
    """One line a version: reference, time, aliases."""
    pointed: dict[Reference, list[str]] = {}
    for alias in ALIASES:
        found = store.alias(kind, name, alias)
        if found is not None:
            pointed.setdefault(found.reference, []).append(alias)
    for version in store.list_versions(kind, name):
        reference = store.resolve(f"{kind}/{name}@{version}")
        created = store.created_at(reference).strftime("%Y-%m-%d %H:%M:%S")
        marks = " ".join(pointed.get(reference, []))
        console.print(f"{created}  {reference}  [green]{marks}[/green]", highlight=False, soft_wrap=True)


def print_version(reference: Reference, *, store: Store, console: Console) -> None:
    """A version's record, files and lineage."""
    record = store.record(reference)
    created = store.created_at(reference).strftime("%Y-%m-%d %H:%M:%S %Z")
    console.print(f"[bold]{reference}[/bold]", highlight=False, soft_wrap=True)
    console.print(f"made by {record.stage}, code {record.code_version}, {created}", highlight=False)
    console.print(f"counts   {json.dumps(record.counts)}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"metrics  {json.dumps(record.metrics)}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"config   {json.dumps(record.config)}", highlight=False, markup=False, soft_wrap=True)
    for note in record.notes:
        console.print(f"note     {note}", highlight=False, markup=False)
    for path, entry in sorted(store.files(reference).items()):
        console.print(f"file     {path}  {entry.size} bytes  sha256:{entry.sha256[:12]}…", highlight=False)
    tree = Tree("lineage", highlight=False)
    _grow_lineage(tree, reference, store, set())
    console.print(tree, soft_wrap=True)


def _grow_lineage(tree: Tree, reference: Reference, store: Store, seen: set[Reference]) -> None:
    if reference in seen:
        tree.add(f"{reference} (above)")
        return
    seen.add(reference)
    branch = tree.add(str(reference))
    try:
        inputs = store.record(reference).inputs
    except NotFound:
        branch.add("no longer in the store")
        return
    for name, text in inputs.items():
        if "@" in text:
            _grow_lineage(branch, Reference.parse(text), store, seen)
        else:
            branch.add(f"{name} {text}")


def _systems_table(report: EvaluationReport) -> Table:
    shown = [name for name in SHOWN_METRICS if name in report.metrics]
    titles = [("free " if name.startswith("generated_") else "") + report.metrics[name].title for name in shown]
    table = Table("system", "role", *titles, box=None, pad_edge=False)
    for system in report.order:
        values = report.systems[system]
        row = [_format(values.get(name), report.metrics[name].unit) for name in shown]
        style = "bold" if system == report.main else None
        table.add_row(system, report.roles[system], *row, style=style)
    return table


def _format(estimate: Estimate | None, unit: str) -> str:
    if estimate is None or estimate.value is None:
        return "-"
    scale, digits = (100, 0) if unit == "percent" else (1, 2)
    text = f"{estimate.value * scale:.{digits}f}"
    if estimate.low is not None and estimate.high is not None:
        text += f" [{estimate.low * scale:.{digits}f}, {estimate.high * scale:.{digits}f}]"
    return text


def _write_file(path: pathlib.Path, data: bytes) -> None:
    """Write whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    temporary.write_bytes(data)
    os.replace(temporary, path)
