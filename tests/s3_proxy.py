"""A proxy between the store and a real S3 server, which misbehaves as told: requests, signatures and replies are real.

Goes in: the server's address and a list of `Fault`, or a `Storm` of them. Comes out: a proxy on loopback, which notes
what it has seen. It knows S3's paths, not its XML.
"""

import collections
import contextlib
import http.client
import http.server
import random
import ssl
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
    """`lose-reply`, `cut-reply` (in the middle, or `cut-reply 17`: after so many bytes), `flip-bit` (of the reply's
    first byte, or `flip-bit 17`: of that one), `flip-request`, `slow` (the reply comes in small pieces within a
    second), `trickle` (one byte each 50 ms), `stall`, `halt` (half of the reply, then nothing), `drop`, `hold` (until
    `Proxy.released`), or `503 SlowDown`: a status and an S3 error code."""
    times: int = 1


class Storm(NamedTuple):
    """Faults at random, the same for the same seed: what befalls a request depends on its method, its path and how
    many like it came before, not on the order in which threads run."""

    seed: int
    rate: float
    """Share of the requests that a fault befalls."""
    actions: tuple[str, ...]

    def draw(self, method: str, path: str, number: int) -> str:
        """The action for the `number`th request of this kind."""
        chance = random.Random(f"{self.seed} {method} {path} {number}")
        return chance.choice(self.actions) if chance.random() < self.rate else ""


class Seen(NamedTuple):
    """A request that reached the proxy."""

    at: float
    """On the monotonic clock."""
    method: str
    path: str
    host: str
    action: str


class Proxy(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, upstream: str, tls: ssl.SSLContext | None = None):
        super().__init__(("127.0.0.1", 0), ProxyHandler)
        self.upstream = upstream
        self.tls = tls
        self.faults: list[Fault] = []
        self.storm: Storm | None = None
        self.seen: list[Seen] = []
        self.lock = threading.Lock()
        self.counts: collections.Counter[tuple[str, str]] = collections.Counter()
        self.held = threading.Event()
        """A request is being held."""
        self.released = threading.Event()

    @property
    def endpoint_url(self) -> str:
        return f"{'https' if self.tls else 'http'}://127.0.0.1:{self.server_address[1]}"

    def get_request(self) -> tuple[Any, Any]:
        connection, address = super().get_request()
        if self.tls is not None:
            # The handshake belongs to the handler's thread: a client that stays silent must not block the others.
            connection = self.tls.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
        return connection, address

    def take_fault(self, method: str, path: str, host: str) -> str:
        with self.lock:
            action = self._find_fault(method, path)
            self.seen.append(Seen(time.monotonic(), method, path, host, action))
            return action

    def _find_fault(self, method: str, path: str) -> str:
        for index, fault in enumerate(self.faults):
            if fault.method == method and fault.part in path and fault.times > 0:
                self.faults[index] = fault._replace(times=fault.times - 1)
                return fault.action
        if self.storm is None:
            return ""
        self.counts[method, path] += 1
        return self.storm.draw(method, path, self.counts[method, path])

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hung up is part of these tests."""


class ProxyHandler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        action, _, where = self.server.take_fault(self.command, self.path, self.headers["Host"]).partition(" ")
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
            reply = f"<?xml version='1.0'?><Error><Code>{where}</Code><Message>m</Message></Error>".encode()
            self.answer(int(action), [("Content-Type", "application/xml")], [reply], len(reply))
            return
        if action == "flip-request" and body:
            body = flip_bit(body, 0)
        upstream = http.client.HTTPConnection(self.server.upstream, timeout=30)
        headers = {name: value for name, value in self.headers.items() if name.lower() != "expect"}
        upstream.request(self.command, self.path, body=body, headers=headers)
        response = upstream.getresponse()
        data = response.read()
        length = int(response.getheader("Content-Length") or 0) if self.command == "HEAD" else len(data)
        upstream.close()
        if action == "lose-reply":
            self.close_connection = True
            return
        pieces = [data]
        if action == "flip-bit" and data:
            pieces = [flip_bit(data, int(where or 0) % len(data))]
        elif action == "cut-reply":
            pieces = [data[: int(where or len(data) // 2)]]
        elif action == "slow":
            pieces = [data[begin : begin + len(data) // 10 + 1] for begin in range(0, len(data), len(data) // 10 + 1)]
        elif action == "trickle":
            pieces = [data[index : index + 1] for index in range(len(data))]
        elif action == "halt":
            pieces = [data[: len(data) // 2], b""]
        skipped = ("transfer-encoding", "connection", "content-length")
        kept = [(name, value) for name, value in response.getheaders() if name.lower() not in skipped]
        self.answer(response.status, kept, pieces, length)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = forward  # noqa: N815 (http.server finds them by these names)

    def answer(self, status: int, headers: list[tuple[str, str]], pieces: list[bytes], length: int) -> None:
        """Send the pieces, 50 ms apart, and hang up if they are fewer bytes than the length says."""
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        if self.command != "HEAD":
            for index, piece in enumerate(pieces):
                time.sleep(0 if not index else 0.05 if piece else 3)
                self.wfile.write(piece)
            self.close_connection = self.close_connection or sum(map(len, pieces)) < length

    def log_message(self, *arguments: Any) -> None:
        """Stay silent."""


def flip_bit(data: bytes, index: int) -> bytes:
    """`data` with the lowest bit of one byte changed."""
    return data[:index] + bytes([data[index] ^ 1]) + data[index + 1 :]


@contextlib.contextmanager
def running_proxy(upstream: str, tls: ssl.SSLContext | None = None) -> Iterator[Proxy]:
    """A proxy before the server at `upstream`, a host and a port; what it holds is released at the end."""
    with Proxy(upstream, tls) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.released.set()
            server.shutdown()
            thread.join()
