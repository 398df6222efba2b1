"""A proxy between the store and a real S3 server, which misbehaves as told: requests, signatures and replies are real.

Goes in: the server's address and a list of `Fault`. Comes out: a proxy on loopback. It knows S3's paths, not its XML.
"""

import contextlib
import http.client
import http.server
import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

ALWAYS = 10**9


class Fault(NamedTuple):
    """What the proxy does to the next `times` requests with this method whose path contains `part`."""

    method: str
    part: str
    action: str
    """`lose-reply`, `cut-reply`, `flip-bit`, `stall`, `drop`, `hold` (until `Proxy.released`), or `503 SlowDown`: a
    status and an S3 error code."""
    times: int = 1


class Proxy(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, upstream: str):
        super().__init__(("127.0.0.1", 0), ProxyHandler)
        self.upstream = upstream
        self.faults: list[Fault] = []
        self.lock = threading.Lock()
        self.held = threading.Event()
        """A request is being held."""
        self.released = threading.Event()

    @property
    def endpoint_url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def take_fault(self, method: str, path: str) -> str:
        with self.lock:
            for index, fault in enumerate(self.faults):
                if fault.method == method and fault.part in path and fault.times > 0:
                    self.faults[index] = fault._replace(times=fault.times - 1)
                    return fault.action
        return ""

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hung up is part of these tests."""


class ProxyHandler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        action = self.server.take_fault(self.command, self.path)
        if action == "drop":
            self.close_connection = True
            return
        if action == "stall":
            time.sleep(3)
            self.close_connection = True
            return
        if action == "hold":
            self.server.held.set()
            self.server.released.wait()
        if action[:1].isdigit():
            status, code = action.split()
            reply = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>m</Message></Error>".encode()
            self.answer(int(status), [("Content-Type", "application/xml")], reply)
            return
        upstream = http.client.HTTPConnection(self.server.upstream, timeout=30)
        headers = {name: value for name, value in self.headers.items() if name.lower() != "expect"}
        upstream.request(self.command, self.path, body=body, headers=headers)
        response = upstream.getresponse()
        data = response.read()
        upstream.close()
        if action == "lose-reply":
            self.close_connection = True
            return
        if action == "flip-bit":
            data = bytes([data[0] ^ 1]) + data[1:]
        skipped = ("transfer-encoding", "connection", "content-length")
        kept = [(name, value) for name, value in response.getheaders() if name.lower() not in skipped]
        self.answer(response.status, kept, data, cut=action == "cut-reply")

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = forward  # noqa: N815 (http.server finds them by these names)

    def answer(self, status: int, headers: list[tuple[str, str]], data: bytes, *, cut: bool = False) -> None:
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if cut else data)
        self.close_connection = self.close_connection or cut

    def log_message(self, *arguments: Any) -> None:
        """Stay silent."""


@contextlib.contextmanager
def running_proxy(upstream: str) -> Iterator[Proxy]:
    """A proxy before the server at `upstream`, a host and a port; what it holds is released at the end."""
    with Proxy(upstream) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.released.set()
            server.shutdown()
            thread.join()
