"""The model server: KServe's server and handlers with our application around them.

Goes in: a lineup of students, who may ask what, limits, metrics. Comes out: a `StudentServer`, a `kserve.ModelServer`
that listens at once, loads in the background, and drains at its end. It knows no store and does not load students
itself.
"""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mint_lib.errors import InvalidInput
from mint_lib.server.access import AccessConfig, AccessGate, is_loopback
from mint_lib.server.answers import Answerer
from mint_lib.server.lifecycle import Readiness
from mint_lib.server.limits import LimitsGate, RequestLimits
from mint_lib.server.metrics import ServingMetrics
from mint_lib.server.request_log import RequestLog
from mint_lib.server.students import Lineup

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from mint_lib.server.kserve_server import StudentServer

_PAGE = Path(__file__).parent / "page.html"


@contextlib.contextmanager
def import_kserve() -> Iterator[None]:
    """A context within which KServe can be imported: its import parses the process's arguments as its own."""
    arguments = sys.argv
    sys.argv = arguments[:1]
    try:
        yield
    finally:
        sys.argv = arguments


def build_server(
    lineup: Lineup,
    *,
    access: AccessConfig,
    limits: RequestLimits,
    metrics: ServingMetrics,
    readiness: Readiness,
    page: bool,
    host: str,
    port: int,
    drain_seconds: float,
    grace_seconds: float,
) -> "StudentServer":
    """A server for the students of `lineup`, which may be empty and fill later. Nothing is opened yet.

    Args:
        lineup: Which student answers to which name.
        access: Who may ask what.
        limits: What one request may cost.
        metrics: Where it is counted.
        readiness: Shared with whoever loads the students.
        page: Whether the page is served at `/`.
        host: Address to listen on.
        port: Its port; 0 takes a free one.
        drain_seconds: How long the server goes on answering after the first signal, while it reports "not ready".
        grace_seconds: How long accepted requests may take after that.

    Raises:
        InvalidInput: access is off on an address that other machines reach, or the tokens file is wrong.
    """
    if access.mode == "off" and not is_loopback(host):
        raise InvalidInput(
            f"Without tokens the server may listen on a loopback address only, not on {host}. Give a tokens file, or "
            "use 127.0.0.1."
        )
    with import_kserve():
        from mint_lib.server.kserve_dataplane import StudentDataPlane, StudentRepository
        from mint_lib.server.kserve_server import StudentServer
        from mint_lib.server.routes import make_routes

    answerer = Answerer(lineup, limits=limits, metrics=metrics, readiness=readiness)
    repository = StudentRepository(answerer=answerer, readiness=readiness)
    dataplane = StudentDataPlane(repository, readiness=readiness)
    routes = make_routes(
        dataplane, answerer, metrics=metrics, readiness=readiness, page=_PAGE.read_text() if page else None
    )
    return StudentServer(
        add_layers(routes, lineup, access=access, limits=limits, metrics=metrics, readiness=readiness),
        dataplane,
        routes=routes,
        readiness=readiness,
        host=host,
        port=port,
        drain_seconds=drain_seconds,
        grace_seconds=grace_seconds,
    )


def add_layers(
    routes: Any,
    lineup: Lineup,
    *,
    access: AccessConfig,
    limits: RequestLimits,
    metrics: ServingMetrics,
    readiness: Readiness,
) -> "ASGIApp":
    """The routes within limits, within access, within the log of requests."""

    def reads_images() -> bool:
        return any(student.modality == "image" for student in lineup.students())

    limited = LimitsGate(routes, limits, reads_images=reads_images)
    guarded = AccessGate(limited, access, tell_failure=metrics.see_tokens_file_failure)
    return RequestLog(guarded, deadline_seconds=limits.deadline_seconds, metrics=metrics, readiness=readiness)
