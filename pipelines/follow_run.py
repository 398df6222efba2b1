"""Waits for a run of Kubeflow and says what becomes of its steps.

Goes in: a run that was submitted. Comes out: nothing if it succeeded, else an error with the names of the steps that
failed. Waiting is all it does: whoever stops it leaves the run as it is.
"""

import random
import time
from collections.abc import Callable
from typing import Any

from mint_lib.errors import MintError
from pipelines.kubeflow import REQUEST_SECONDS, Address, KubeflowRefused, connect, explain_failures
from pipelines.submit import Submitted

_ENDS = {"SUCCEEDED", "SKIPPED", "FAILED", "CANCELED"}
_OF_NO_USE = ("root", "executor")
"""Nodes that Kubeflow adds to each graph and each step."""
_MAX_SILENT_SECONDS = 900.0
"""How long Kubeflow may not answer before waiting ends; an upgrade takes minutes."""


class RunFailed(MintError):
    """A run on the cluster did not succeed."""


def follow_run(
    run: Submitted,
    address: Address,
    *,
    tell: Callable[[str], None],
    timeout_hours: float,
    poll_seconds: float = 10.0,
) -> None:
    """Wait until `run` has ended, telling each step's state as it changes.

    Raises:
        RunFailed: it failed or was cancelled, or goes on after `timeout_hours`.
        KubeflowRefused: Kubeflow did not answer for a quarter of an hour.
    """
    client = connect(address)
    give_up, silent_since = time.monotonic() + timeout_hours * 3600, None
    told: dict[str, str] = {}
    while True:
        try:
            with explain_failures(address, "read the run"):
                found = client.runs.run_service_get_run(run_id=run.id, _request_timeout=REQUEST_SECONDS)
        except KubeflowRefused:
            silent_since = silent_since or time.monotonic()
            if time.monotonic() - silent_since > _MAX_SILENT_SECONDS:
                raise
        else:
            silent_since = None
            states = _read_states(found, run)
            for step, state in states.items():
                if told.get(step) != state:
                    tell(f"{state.lower():<10} {step}")
            told |= states
            if found.state in _ENDS:
                _check_end(found, run, states)
                return
        if time.monotonic() > give_up:
            raise RunFailed(f"The run is not over after {timeout_hours:g} hours. It goes on: {run.url}")
        # Many waiting processes shall not ask in the same moment.
        time.sleep(poll_seconds * random.uniform(0.8, 1.2))  # noqa: S311


def _read_states(found: Any, run: Submitted) -> dict[str, str]:
    """Step, by the recipe's name, to its state. A failed attempt is forgotten when a later one is under way."""
    states: dict[str, str] = {}
    details = (found.run_details.task_details if found.run_details else None) or []
    for detail in sorted(details, key=lambda item: item.create_time.timestamp() if item.create_time else 0.0):
        name = detail.display_name or ""
        # A step's driver resolves its inputs; if it fails, the step has failed.
        task = name.removesuffix("-driver")
        if task in _OF_NO_USE or task not in run.tasks or not detail.state:
            continue
        if name == task or detail.state == "FAILED":
            states[run.tasks[task]] = detail.state
    return states


def _check_end(found: Any, run: Submitted, states: dict[str, str]) -> None:
    if found.state in ("SUCCEEDED", "SKIPPED"):
        return
    failed = [step for step, state in states.items() if state == "FAILED" and step != "flow"]
    word = "was cancelled" if found.state == "CANCELED" else "failed"
    at = f" at {', '.join(failed)}" if failed else ""
    raise RunFailed(f"The run {word}{at}. Its log: {run.url}")
