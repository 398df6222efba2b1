"""KServe's server with our routes and our end: the part that must subclass it.

Goes in: the application and the data plane. Comes out: `StudentServer`. Importing this module imports KServe, which
reads the process's arguments: `app.import_kserve` must be around it. Nothing of KServe's module is changed, so that
several servers fit into one process.
"""

import asyncio
import logging
import signal
import socket
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kserve import ModelServer
from kserve.protocol.dataplane import DataPlane
from kserve.protocol.rest.server import RESTServer

from mint_lib.errors import InvalidInput
from mint_lib.server.kserve_dataplane import StudentRepository
from mint_lib.server.lifecycle import SIGNALS, Readiness, exit_now, install_early_exit, make_draining_server

if TYPE_CHECKING:
    import uvicorn
    from fastapi import FastAPI
    from starlette.types import ASGIApp

logger = logging.getLogger(__name__)
_KEEP_ALIVE_SECONDS = 75  # longer than the 60 s of common load balancers, so that those close idle connections, not we


class StudentRESTServer(RESTServer):
    """KServe's HTTP server with an application of its own, on a chosen address, draining at its end."""

    _server: "uvicorn.Server"

    def __init__(
        self,
        application: "ASGIApp",
        dataplane: DataPlane,
        *,
        readiness: Readiness,
        host: str,
        port: int,
        drain_seconds: float,
        grace_seconds: float,
    ):
        super().__init__(
            application,
            dataplane,
            model_repository_extension=None,
            http_port=port,
            grace_period=grace_seconds,
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        )
        self.config.host = host
        # It would log paths, which clients write; uvicorn looks only at whether this logger reaches a handler.
        access_logger = logging.getLogger("uvicorn.access")
        access_logger.handlers, access_logger.propagate = [], False
        self.config.server_header = False
        self.config.ws = "none"
        self._server = make_draining_server(
            type(self._server), self.config, readiness=readiness, drain_seconds=drain_seconds
        )

    def create_application(self) -> None:
        """Nothing: the application is complete, and KServe's global one stays as it is."""

    async def serve(self, listener: socket.socket) -> None:
        """Answer on `listener` until a signal or `stop`."""
        await self._server.serve(sockets=[listener])

    def stop(self) -> None:
        """Stop listening at once; accepted requests finish."""
        self._server.should_exit = True


class StudentServer(ModelServer):
    """The model server of students."""

    http_port: int

    def __init__(
        self,
        application: "ASGIApp",
        dataplane: DataPlane,
        *,
        routes: "FastAPI",
        readiness: Readiness,
        host: str,
        port: int,
        drain_seconds: float,
        grace_seconds: float,
    ):
        # With a handler of its own, KServe leaves logging to the entry point.
        logging.getLogger("kserve").addHandler(logging.NullHandler())
        repository: StudentRepository = dataplane.model_registry
        super().__init__(
            http_port=port, registered_models=repository, enable_grpc=False, workers=1, enable_latency_logging=False
        )
        self.dataplane = dataplane
        self.application = application
        self.routes = routes
        self.readiness = readiness
        self._host = host
        self._listener: socket.socket | None = None
        self._rest_server = StudentRESTServer(
            application,
            dataplane,
            readiness=readiness,
            host=host,
            port=port,
            drain_seconds=drain_seconds,
            grace_seconds=grace_seconds,
        )
        self._load_error: BaseException | None = None

    def bind(self) -> str:
        """Take the address; returns the URL that will answer. `start` does so itself if this was not called.

        Raises:
            InvalidInput: the address is taken or not of this machine.
        """
        if self._listener is None:
            family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
            try:
                self._listener = socket.create_server((self._host, self.http_port), family=family, backlog=1024)
            except OSError as error:
                raise InvalidInput(
                    f"The server cannot listen on {self._host}, port {self.http_port} ({error.strerror}). Stop what "
                    "listens there, or choose another port."
                ) from None
            self.http_port = self._listener.getsockname()[1]
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"http://{host}:{self.http_port}"

    def start(self, load: Callable[[], None]) -> None:
        """Listen, run `load` beside it, be ready once it returns, and serve until a signal. Returns after the drain.

        `load` puts students into the lineup. A signal while it runs ends the process at once, with code 0.

        Raises:
            InvalidInput: the address cannot be listened on.
            BaseException: whatever `load` raised; the server has stopped by then.
        """
        install_early_exit()
        self.bind()
        loader = threading.Thread(target=self._load, args=(load,), name="load-students", daemon=True)
        asyncio.run(self._serve_with(loader))
        if self._load_error is not None:
            raise self._load_error
        if loader.is_alive():
            exit_now()

    async def _serve_with(self, loader: threading.Thread) -> None:
        assert self._listener is not None
        asyncio.get_running_loop().set_exception_handler(_log_loop_error)
        loader.start()
        await self._rest_server.serve(self._listener)

    def _load(self, load: Callable[[], None]) -> None:
        try:
            load()
        except BaseException as error:
            self._load_error = error
            self._rest_server.stop()
        else:
            self.readiness.mark_ready()

    def register_signal_handler(self) -> None:
        """Nothing: the draining server handles signals itself."""

    def stop(self, sig: int = signal.SIGTERM) -> None:
        """Drain as on a signal; may be called from any thread."""
        assert sig in SIGNALS
        self._rest_server._server.handle_exit(sig, None)


def _log_loop_error(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """An error that nobody awaited: its type only, since its words may quote a request."""
    logger.error("the event loop met %s", type(context.get("exception")).__name__)
