"""Ready, draining, gone: what a server tells load balancers and how it ends.

Goes in: signals and the news that students are loaded. Comes out: `Readiness`, asked by the health routes, and a
uvicorn server that on SIGTERM first reports "not ready" while it goes on answering, then stops listening, then finishes
what it accepted, and ends with exit code 0. It knows no model.
"""

import logging
import os
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING, Any, Literal

from mint_lib.server.http_errors import Refusal

if TYPE_CHECKING:
    import uvicorn

logger = logging.getLogger(__name__)
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Readiness:
    """Whether requests should be sent here. May be used from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._state: Literal["loading", "ready", "draining"] = "loading"

    @property
    def state(self) -> Literal["loading", "ready", "draining"]:
        """`loading` until the first warm answers, then `ready`, and `draining` from the first signal on."""
        return self._state

    @property
    def is_ready(self) -> bool:
        """Whether load balancers should send requests."""
        return self._state == "ready"

    @property
    def is_draining(self) -> bool:
        """Whether the server is about to end."""
        return self._state == "draining"

    def mark_ready(self) -> None:
        """Every student has given a warm answer. Does not undo draining."""
        with self._lock:
            if self._state == "loading":
                self._state = "ready"

    def begin_drain(self) -> None:
        """Ask load balancers to look elsewhere."""
        with self._lock:
            self._state = "draining"

    def check(self) -> None:
        """Raise a Refusal (503) unless ready."""
        if self._state == "loading":
            raise Refusal(503, "not_ready", "The models are being loaded. Try again later.", 5.0)
        if self._state == "draining":
            raise Refusal(503, "draining", "The server is shutting down. Ask another one.", 5.0)


def install_early_exit() -> None:
    """End the process at once, with code 0, on SIGTERM or SIGINT: for the time before a server handles them.

    As first process of a container, a process without handlers ignores SIGTERM, and Kubernetes would wait out the whole
    grace period. Only the main thread can install handlers; elsewhere nothing is done.
    """
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            signal.signal(number, lambda *_: exit_now())


def exit_now() -> None:
    """End the process without waiting for threads, which may be in the middle of a download."""
    logging.shutdown()
    sys.stdout.flush()
    os._exit(0)


def make_draining_server(
    base: "type[uvicorn.Server]", config: "uvicorn.Config", *, readiness: Readiness, drain_seconds: float
) -> "uvicorn.Server":
    """A server of class `base` that drains.

    The first signal starts the drain, a second one ends it at once, a third gives up on accepted requests too.
    """

    class DrainingServer(base):  # type: ignore[misc, valid-type]
        """Handles signals by draining, and does not raise them again at the end as uvicorn does: exit code 0."""

        should_exit: bool
        stops_listening_at: float | None = None

        def handle_exit(self, sig: int, frame: Any) -> None:
            if self.should_exit:
                self.force_exit = True
            elif self.stops_listening_at is not None or readiness.state == "loading":
                self.should_exit = True
            else:
                self.stops_listening_at = time.monotonic() + drain_seconds
            readiness.begin_drain()

        async def on_tick(self, counter: int) -> bool:
            if self.stops_listening_at is not None and time.monotonic() >= self.stops_listening_at:
                self.should_exit = True
            return bool(await super().on_tick(counter))

    return DrainingServer(config)
