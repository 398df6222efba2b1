"""The serving stage: aligned students behind KServe's model server, until a signal ends it.

Goes in: a `ServingConfig`, a store, and which reference answers to which name. Comes out: answers over HTTP. The same
function runs on a laptop (`mint serve`) and as the predictor of a KServe InferenceService.
"""

import contextlib
import logging
import os
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from mint_lib.engine.requests import EngineLimits
from mint_lib.errors import InvalidInput
from mint_lib.server.access import AccessConfig
from mint_lib.server.engines import Engines
from mint_lib.server.follow import Follower, Outcome
from mint_lib.server.lifecycle import Readiness, install_early_exit
from mint_lib.server.limits import RequestLimits
from mint_lib.server.loading import LoadConfig, load_student
from mint_lib.server.students import Lineup, ServedStudent

if TYPE_CHECKING:
    from mint_lib.server.metrics import ServingMetrics
    from mint_lib.store import Store

logger = logging.getLogger(__name__)
_VERSIONED = re.compile(r"[^@]+(@v\d{6,}(#.*)?)?")
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_CGROUP_QUOTA = pathlib.Path("/sys/fs/cgroup/cpu.max")


class ServingConfig(BaseModel):
    """How students are served."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    load: LoadConfig = LoadConfig()
    engine: EngineLimits = EngineLimits()
    requests: RequestLimits = RequestLimits()
    num_threads: int | None = Field(default=None, ge=1)
    """CPU threads of the computation; None: OMP_NUM_THREADS, or as many as this process may use."""
    follow_seconds: float = Field(default=30.0, ge=0.0)
    """How often an alias (`model/name@champion`) is looked at for a new version; 0: only at the start."""
    drain_seconds: float = Field(default=0.0, ge=0.0)
    """How long the server goes on answering after SIGTERM, while it says that it is not ready. Behind a load balancer:
    longer than it takes to notice."""
    grace_seconds: float = Field(default=60.0, gt=0.0)
    """How long accepted requests may take after that."""


class Endpoint(NamedTuple):
    """Where the server listens, and for whom."""

    access: AccessConfig
    host: str = "127.0.0.1"
    port: int = 8080
    """0 takes a free one."""
    has_page: bool = False


def serve_models(
    config: ServingConfig,
    *,
    store: "Store",
    models: Mapping[str, str],
    endpoint: Endpoint,
    tell_ready: Callable[[str, list[ServedStudent]], None],
) -> None:
    """Answer requests until SIGTERM or SIGINT; returns when accepted requests are finished.

    Args:
        config: Limits and how students are loaded.
        store: Where they lie.
        models: Name in requests to what is served: a reference, `model/name`, or an alias, which is followed.
        endpoint: Where to listen.
        tell_ready: Called once with the server's address and the students, when all of them have given a warm answer.

    Raises:
        MintError: a model cannot be loaded; the address is taken; the tokens file is wrong.
    """
    from mint_lib.server.app import build_server
    from mint_lib.server.metrics import ServingMetrics

    check_names(models)
    install_early_exit()
    # Read when torch is imported. Its own default is all of the machine's cores, whatever a container may use of them.
    os.environ["OMP_NUM_THREADS"] = str(config.num_threads or os.environ.get("OMP_NUM_THREADS") or count_cpus())
    lineup, readiness = Lineup(), Readiness()
    metrics = ServingMetrics(lineup, readiness)
    engines = Engines(limits=config.engine, observer=metrics)
    followers: list[Follower] = []

    def load(name: str, text: str) -> ServedStudent:
        return load_student(store, text, name=name, engines=engines, options=config.load)

    server = build_server(
        lineup,
        access=endpoint.access,
        limits=config.requests,
        metrics=metrics,
        readiness=readiness,
        page=endpoint.has_page,
        host=endpoint.host,
        port=endpoint.port,
        drain_seconds=config.drain_seconds,
        grace_seconds=config.grace_seconds,
    )
    url = server.bind()

    def load_all() -> None:
        for name, text in models.items():
            lineup.put(load(name, text), retire=engines.retire)
        readiness.mark_ready()
        for name, text in models.items():
            if config.follow_seconds and is_alias(text):
                followers.append(_follow(name, text, config, store, lineup, engines, metrics, load))
        if readiness.is_ready:
            tell_ready(url, lineup.students())

    try:
        server.start(load_all)
    finally:
        for follower in followers:
            follower.stop()
        engines.stop()


def _follow(
    name: str,
    alias: str,
    config: ServingConfig,
    store: "Store",
    lineup: Lineup,
    engines: Engines,
    metrics: "ServingMetrics",
    load: Callable[[str, str], ServedStudent],
) -> Follower:
    def tell(model: str, outcome: Outcome) -> None:
        if outcome is Outcome.REFUSED:
            metrics.see_reload_failure(model)

    follower = Follower(
        store,
        lineup,
        name=name,
        alias=alias,
        load=lambda text: load(name, text),
        retire=engines.retire,
        interval_seconds=config.follow_seconds,
        tell=tell,
    )
    follower.start()
    return follower


def name_models(texts: list[str]) -> dict[str, str]:
    """Name to reference from `[name=]model/quickstart[@champion]`; without a name the model's own is taken.

    Raises:
        InvalidInput: a name stands twice or is not one that a route can hold.
    """
    models: dict[str, str] = {}
    for text in texts:
        name, separator, reference = text.partition("=")
        if not separator:
            name, reference = re.split(r"[@#]", text.partition("/")[2])[0], text
        if name in models:
            raise InvalidInput(f"Two students would be called {name!r}. Name one otherwise: other={reference}.")
        models[name] = reference
    check_names(models)
    return models


def check_names(models: Mapping[str, str]) -> None:
    """Refuse names that a route cannot hold. Raises InvalidInput."""
    for name, text in models.items():
        if not _NAME.fullmatch(name):
            raise InvalidInput(
                f"{name!r} (for {text}) cannot be a model's name in requests: lower-case letters, digits and hyphens, "
                "at most 63. Write name=model/..."
            )
    if not models:
        raise InvalidInput("There is nothing to serve. Name at least one model.")


def is_alias(text: str) -> bool:
    """Whether `text` may come to mean another version: `model/name@champion`."""
    return _VERSIONED.fullmatch(text) is None


def count_cpus() -> int:
    """CPUs that this process may use, by affinity and by the container's quota."""
    num_cpus = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError):
        quota, period = _CGROUP_QUOTA.read_text().split()
        num_cpus = min(num_cpus, max(1, round(int(quota) / int(period))))
    return num_cpus
