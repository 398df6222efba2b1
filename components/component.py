"""The one decorator of our Kubeflow components, and what each of them does around its stage.

A component is a lightweight Python component on our own image: nothing is installed at run time. Its config crosses
Kubeflow as one JSON string and its inputs as reference strings, so Kubeflow's cache key holds the content digests.
"""

import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

from kfp import dsl

from mint_lib.errors import MintError
from mint_lib.progress import tell_event, wants_events
from mint_lib.records import Reference
from mint_lib.stages import run_stage
from mint_lib.store import Store

IMAGE = os.environ.get("MINT_IMAGE", "mint-python:dev")


def component(function: Callable[..., str]) -> Any:
    """`function` as a component on our image; set `MINT_IMAGE` before compiling for a cluster."""
    return dsl.component(function, base_image=IMAGE, install_kfp_package=False)


def run_component(
    stage: str,
    config: str,
    inputs: Mapping[str, str],
    metrics: dsl.Output[dsl.Metrics],
    html: dsl.Output[dsl.HTML] | None = None,
) -> str:
    """Run `stage`, show its figures in the Kubeflow UI and return the output's reference as text.

    Raises:
        MintError: as the stage raises it, after telling it to the process that draws the progress.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s", force=True)
    store = Store.from_environment()
    try:
        outcome = run_stage(stage, config, inputs, store=store)
    except Exception as error:
        if wants_events():
            # The message of an error that is not ours may hold the content of a case.
            message = str(error) if isinstance(error, MintError) else "not foreseen; its traceback is in the log"
            tell_event("error", stage=stage, type=type(error).__name__, message=message)
        raise
    if wants_events():
        tell_event("output", stage=stage, reference=str(outcome.reference), was_cached=outcome.was_cached)
    record = store.record(outcome.reference)
    metrics.metadata["reference"] = str(outcome.reference)
    for name, value in {**record.counts, **record.metrics}.items():
        if "/label/" not in name:
            metrics.log_metric(name, float(value))
    if html is not None:
        _copy_report(store, outcome.reference, html.path)
    return str(outcome.reference)


def _copy_report(store: Store, reference: Reference, path: str) -> None:
    with open(path, "wb") as file:
        file.write(store.read_bytes(reference, "report.html"))
