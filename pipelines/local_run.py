"""Runs the Kubeflow pipeline of a recipe on this machine, with bars that show how far it is.

Goes in: a recipe and the store. Comes out: the planned steps, all with their outputs. Everything the stages log goes to
one file; on the screen stand the steps, their progress and, if one fails, its error in the stage's own words.
"""

import contextlib
import io
import json
import os
import pathlib
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from typing import Any

import psutil
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from mint_lib.errors import Interrupted, MintError
from mint_lib.progress import PREFIX
from mint_lib.recipe import Recipe
from mint_lib.records import Reference
from mint_lib.store import Store
from pipelines.planning import PlannedStep, plan_steps

PLAIN_INTERVAL_SECONDS = 15.0


class StepFailed(MintError):
    """A step of a local run failed; what is finished stays in the store."""


def run_recipe(recipe: Recipe, *, store: Store, console: Console, log_path: pathlib.Path) -> list[PlannedStep]:
    """Run what is not in the store yet and return all steps with their references.

    Raises:
        StepFailed: a stage failed; the message is the stage's own, and names the log.
        Interrupted: this process got SIGTERM, and the training that ran wrote a checkpoint.
        SystemExit: this process got SIGTERM, and nothing but finished steps is kept.
    """
    planned = plan_steps(recipe, store=store)
    missing = [item.step.id for item in planned if item.reference is None]
    if not missing:
        console.print(f"Nothing to do: all {len(planned)} steps are in the store for this recipe, code and data.")
        return planned
    for item in planned:
        if item.reference is not None:
            console.print(
                f"[dim]cached  {item.step.id:<28} {item.reference.kind}/{item.reference.name}", highlight=False
            )
    log_path.parent.mkdir(parents=True, exist_ok=True)
    with log_path.open("w", encoding="utf-8") as log:
        view = _RunView(console, log)
        with view, _local_kubeflow(view, log_path.parent.parent / "kfp"), _pass_on_sigterm(console) as received:
            from pipelines.mint import build_pipeline

            try:
                build_pipeline(recipe)()
            except RuntimeError as error:
                if view.is_interrupted:
                    raise Interrupted(view.explain(error, log_path)) from None
                if received:
                    console.print("Stopped. Finished steps are kept: run the same command again to go on.")
                    sys.exit(128 + signal.SIGTERM)
                raise StepFailed(view.explain(error, log_path)) from None
    return [item._replace(reference=view.outputs[item.step.stage, item.step.name]) for item in planned]


@contextlib.contextmanager
def _local_kubeflow(view: "_RunView", pipeline_root: pathlib.Path) -> Iterator[None]:
    """Kubeflow's own subprocess runner, its output and log lines going to `view`."""
    from kfp import local

    local.init(runner=local.SubprocessRunner(use_venv=False), pipeline_root=str(pipeline_root), raise_on_error=True)
    before = os.environ.get("MINT_PROGRESS")
    os.environ["MINT_PROGRESS"] = "json"
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(view), contextlib.redirect_stderr(view):
            warnings.simplefilter("ignore")
            yield
    finally:
        if before is None:
            del os.environ["MINT_PROGRESS"]
        else:
            os.environ["MINT_PROGRESS"] = before


@contextlib.contextmanager
def _pass_on_sigterm(console: Console) -> Iterator[list[int]]:
    """Let the step that runs end, which may write a checkpoint first; yields the signals that came."""
    received: list[int] = []

    def stop(number: int, frame: Any) -> None:
        received.append(number)
        processes = _list_step_processes()
        if not processes:
            sys.exit(128 + number)
        console.print("told to stop: the running step ends first; a second SIGTERM ends it at once", highlight=False)
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate()

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, before)


def _list_step_processes() -> list[psutil.Process]:
    """The processes of the step that runs, without the shell that Kubeflow starts it from: that passes no signal on."""
    group = os.getpgrp()  # the local store, a child too, has one of its own
    found: list[psutil.Process] = []
    for shell in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            if os.getpgid(shell.pid) == group:
                found += shell.children() or [shell]
    return found


class _RunView(io.TextIOBase):
    """Takes every line of the run: progress events become bars (or sparse lines), the rest goes to the log."""

    def __init__(self, console: Console, log: Any):
        self._log = log
        self._rest = ""
        self._error = ""
        self.is_interrupted = False
        self.outputs: dict[tuple[str, str], Reference] = {}
        self._tasks: dict[str, Any] = {}
        self._told: dict[str, float] = {}
        self._console = console
        self._bars = Progress(
            TextColumn("{task.description:<34}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[figures]}"),
            console=console,
            redirect_stdout=False,
            redirect_stderr=False,
        )

    def __enter__(self) -> "_RunView":
        if self._console.is_terminal:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            start = line.find(PREFIX)
            event = _parse_event(line[start + len(PREFIX) :]) if start >= 0 else None
            if event is None:
                self._log.write(line + "\n")
                self._log.flush()
            else:
                self._show(event)
        return len(text)

    def explain(self, error: RuntimeError, log_path: pathlib.Path) -> str:
        """What to tell the user of a run that failed."""
        reason = self._error or f"{error}. A step ended without saying why."
        return f"{reason}\nFinished steps are kept: run the same command again to go on. All output: {log_path}"

    def _show(self, event: dict[str, Any]) -> None:
        if event["event"] == "error":
            self._error = f"{event['stage']}: {event['type']}: {event['message']}"
            self.is_interrupted = event["type"] == Interrupted.__name__
        elif event["event"] == "output":
            reference = Reference.parse(event["reference"])
            self.outputs[event["stage"], reference.name] = reference
            word = "cached" if event["was_cached"] else "written"
            self._console.print(f"[green]{word:<8}[/green]{event['reference'].partition('#')[0]}", highlight=False)
        elif event["event"] == "note":
            self._console.print(f"        {event['text']}", highlight=False, markup=False)
        elif event["event"] == "progress":
            figures = " ".join(f"{key}={value:.4g}" for key, value in event["figures"].items())
            if self._console.is_terminal:
                self._draw_bar(event, figures)
            else:
                self._print_sparsely(event, figures)

    def _draw_bar(self, event: dict[str, Any], figures: str) -> None:
        name = event["description"]
        if name not in self._tasks:
            self._tasks[name] = self._bars.add_task(name, total=event["total"], figures="")
        task = self._tasks[name]
        self._bars.update(task, completed=event["done"], total=event["total"])
        if figures:
            self._bars.update(task, figures=figures)
        if event["finished"]:
            self._bars.stop_task(task)

    def _print_sparsely(self, event: dict[str, Any], figures: str) -> None:
        name = event["description"]
        is_edge = event["finished"] or name not in self._told
        if is_edge or time.monotonic() - self._told[name] >= PLAIN_INTERVAL_SECONDS:
            self._told[name] = time.monotonic()
            self._console.print(
                f"        {name:<34} {event['done']}/{event['total']} {event['seconds']:.0f} s {figures}",
                highlight=False,
            )


def _parse_event(text: str) -> dict[str, Any] | None:
    try:
        event = json.loads(text)
    except json.JSONDecodeError:
        return None
    return event if isinstance(event, dict) and "event" in event else None
