"""The one decorator of our Kubeflow components, and what each of them does around its stage.

A component is a lightweight Python component on our own image: nothing is installed at run time. Its config crosses
Kubeflow as one JSON string and its inputs as reference strings, so Kubeflow's cache key holds the content digests.
"""

import logging
import math
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

from kfp import dsl

from mint_lib.errors import MintError
from mint_lib.progress import tell_event, wants_events
from mint_lib.records import Reference
from mint_lib.stages import run_stage
from mint_lib.store import Store

IMAGE = os.environ.get("MINT_IMAGE", "mint-python:dev")
_NO_METRIC_NAME = re.compile(r"[^A-Za-z0-9_.-]+")


def component(function: Callable[..., str | None]) -> Any:
    """`function` as a component on our image: `MINT_IMAGE` for a local runner, the cluster file's on a cluster."""
    return dsl.component(function, base_image=IMAGE, install_kfp_package=False)


def run_component(
    stage: str,
    config: str,
    inputs: Mapping[str, str],
    metrics: dsl.Output[dsl.Metrics],
    version: dsl.Output[dsl.Artifact],
    html: dsl.Output[dsl.HTML] | None = None,
) -> str:
    """Run `stage`, show what it made in the Kubeflow UI and return the output's reference as text.

    Raises:
        MintError: as the stage raises it, after telling it to the process that draws the progress.
    """
    start_logging()
    store = Store.from_environment()
    try:
        outcome = run_stage(stage, config, inputs, store=store)
    except Exception as error:
        tell_error(stage, error)
        raise
    show_output(stage, outcome.reference, outcome.was_cached, store, metrics, version)
    if html is not None:
        with open(html.path, "wb") as file:
            file.write(store.read_bytes(outcome.reference, "report.html"))
    return str(outcome.reference)


def start_logging() -> None:
    """Log to the step's own log."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s", force=True)


def tell_error(stage: str, error: Exception) -> None:
    """Tell the process that draws the progress why a stage failed."""
    if wants_events():
        # The message of an error that is not ours may hold the content of a case.
        message = str(error) if isinstance(error, MintError) else "not foreseen; its traceback is in the log"
        tell_event("error", stage=stage, type=type(error).__name__, message=message)


def show_output(
    stage: str,
    reference: Reference,
    was_cached: bool,
    store: Store,
    metrics: dsl.Output[dsl.Metrics],
    version: dsl.Output[dsl.Artifact],
) -> None:
    """Write the artifacts that Kubeflow shows of a stage's output: its figures, and the version itself."""
    if wants_events():
        tell_event("output", stage=stage, reference=str(reference), was_cached=was_cached)
    record, settings = store.record(reference), store.settings
    metrics.metadata["reference"] = str(reference)
    for name, value in {**record.counts, **record.metrics}.items():
        # Kubeflow's launcher reads the metadata as strict JSON, which knows neither NaN nor infinity.
        if "/label/" not in name and math.isfinite(value):
            metrics.log_metric(_NO_METRIC_NAME.sub("_", name), float(value))
    # The launcher uploads what lies under a scheme that it knows, and fails where that is outside the run's own root.
    version.uri = f"mint:{reference}"
    folder = "/".join(part for part in (settings.prefix, reference.kind, reference.name, reference.version) if part)
    version.metadata.update(
        reference.model_dump(mode="json")
        | {
            "reference": str(reference),
            "location": f"s3://{settings.bucket}/{folder}/",
            "endpoint": settings.endpoint_url,
            "was_cached": str(was_cached).lower(),
        }
    )
