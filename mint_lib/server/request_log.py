"""The outermost layer: an id for each request, one line of log, its figures, and an answer whatever goes wrong within.

Goes in: every request. Comes out: the answer with `x-request-id` and headers that keep it out of caches. The line holds
the id, the route's template, the status, the time and the tenant: no path, no query, no name that a client chose.
"""

import json
import logging
import re
import secrets
import time
import traceback
from typing import TYPE_CHECKING

from mint_lib.server.calls import Call, entered, find_route
from mint_lib.server.http_errors import describe_error, send_problem

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from mint_lib.server.lifecycle import Readiness
    from mint_lib.server.metrics import ServingMetrics

logger = logging.getLogger(__name__)
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
_ABANDONED_STATUS = 499  # what nginx logs for a client that went away; it is never sent


class RequestLog:
    """ASGI layer around everything else."""

    def __init__(self, inner: "ASGIApp", *, deadline_seconds: float, metrics: "ServingMetrics", readiness: "Readiness"):
        self._inner = inner
        self._deadline_seconds = deadline_seconds
        self._metrics = metrics
        self._readiness = readiness

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        """Answer one request."""
        if scope["type"] == "lifespan":
            await self._inner(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        started = time.monotonic()
        call = Call(
            request_id=_choose_id(scope["headers"]),
            route=find_route(scope["method"], scope["path"]),
            started=started,
            deadline=started + self._deadline_seconds,
        )
        answer = _Answer(call, send, is_last=lambda: self._readiness.is_draining)
        with entered(call):
            try:
                await self._inner(scope, receive, answer.send)
            except Exception as error:
                problem = describe_error(error)
                call.problem = problem.code
                if problem.code == "internal_error":
                    logger.error("request %s failed: %s", call.request_id, _describe_bug(error))
                if not answer.status and not call.is_abandoned:
                    await send_problem(answer.send, problem, path=scope["path"])
        self._note(call, _ABANDONED_STATUS if call.is_abandoned else answer.status)

    def _note(self, call: Call, status: int) -> None:
        """Log and count a request that is over."""
        seconds = time.monotonic() - call.started
        route = call.route.path if call.route else "other"
        self._metrics.see_request(route=route, model=call.model, status=status, problem=call.problem, seconds=seconds)
        line = {
            "request_id": call.request_id,
            "route": route,
            "status": status,
            "milliseconds": round(seconds * 1000, 1),
            "tenant": call.tenant,
            "problem": call.problem,
        }
        # Probes ask every few seconds.
        is_probe = call.route is not None and call.route.needs == "nothing"
        logger.log(logging.DEBUG if is_probe else logging.INFO, "%s", json.dumps(line))


class _Answer:
    """Adds our headers to an answer and notes its status."""

    def __init__(self, call: Call, send: "Send", *, is_last: "Callable[[], bool]"):
        self._call = call
        self._send = send
        self._is_last = is_last
        self.status = 0

    async def send(self, message: "Message") -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = [
                *message.get("headers", ()),
                (b"x-request-id", self._call.request_id.encode()),
                (b"x-content-type-options", b"nosniff"),
                (b"cache-control", b"no-store"),
            ]
            if self._is_last() or self.status == 413:
                headers.append((b"connection", b"close"))
            message = {**message, "headers": headers}
        await self._send(message)


def _choose_id(headers: list[tuple[bytes, bytes]]) -> str:
    """The client's id if it is one plain word, else a fresh one."""
    given = [value for name, value in headers if name == b"x-request-id"]
    if len(given) == 1 and _REQUEST_ID.fullmatch(given[0]):
        return given[0].decode()
    return secrets.token_hex(16)


def _describe_bug(error: Exception) -> str:
    """Type and places of an unforeseen error. Its message may hold anything, so it is left out."""
    frames = traceback.extract_tb(error.__traceback__)[-3:]
    places = " < ".join(f"{frame.filename.rpartition('/')[2]}:{frame.lineno}" for frame in reversed(frames))
    return f"{type(error).__name__} at {places}"
