"""A chat endpoint on loopback that answers as told, and misbehaves as told: a real HTTP server, a model made of rules.

Goes in: a function from a request's body to what is sent back. Comes out: the server, with everything it received.
"""

import contextlib
import http.server
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple


class Say(NamedTuple):
    """What is sent back."""

    text: str | None = "RANKED_LIST:\n1. 'Kidney'\n2. 'Liver'"
    status: int = 200
    headers: dict[str, str] = {}  # noqa: RUF012
    usage: dict[str, int] | None = {"prompt_tokens": 100, "completion_tokens": 10}  # noqa: RUF012
    raw: bytes | None = None
    """The whole body, instead of a completion."""
    cut: bool = False
    """Promise the whole body and send half of it."""
    wait_seconds: float = 0.0
    drip_seconds: float = 0.0
    """Send the body byte by byte, with this pause between them."""

    def body(self) -> bytes:
        if self.raw is not None:
            return self.raw
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": self.text}}
        content: dict[str, Any] = {"object": "chat.completion", "model": "rules-1", "choices": [choice]}
        return json.dumps(content | ({} if self.usage is None else {"usage": self.usage})).encode()


Answer = Callable[[dict[str, Any]], Say]


def refuse(status: int, code: str = "", *, words: str = "", **headers: str) -> Say:
    """An error in OpenAI's shape."""
    body = json.dumps({"error": {"message": words, "type": "error", "code": code}}).encode()
    return Say(status=status, raw=body, headers={name.replace("_", "-"): value for name, value in headers.items()})


def script(*says: Say) -> Answer:
    """One after the other; the last one again and again."""
    waiting = list(says)
    lock = threading.Lock()

    def answer(body: dict[str, Any]) -> Say:
        with lock:
            return waiting.pop(0) if len(waiting) > 1 else waiting[0]

    return answer


class ChatServer(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, answer: Answer):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer = answer
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.num_at_once = 0
        self.most_at_once = 0
        self.lock = threading.Lock()

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    @property
    def texts(self) -> list[str]:
        """All text of each request received."""
        return [" ".join(read_texts(body)) for body in self.bodies]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hung up is part of these tests."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ChatServer

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with self.server.lock:
            self.server.bodies.append(body)
            self.server.headers.append({name.lower(): value for name, value in self.headers.items()})
            self.server.paths.append(self.path)
            self.server.num_at_once += 1
            self.server.most_at_once = max(self.server.most_at_once, self.server.num_at_once)
        try:
            self.send(self.server.answer(body))
        finally:
            with self.server.lock:
                self.server.num_at_once -= 1

    def send(self, say: Say) -> None:
        time.sleep(say.wait_seconds)
        data = say.body()
        self.send_response(say.status)
        self.send_header("content-length", str(len(data)))
        for name, value in say.headers.items():
            self.send_header(name, value)
        self.end_headers()
        if say.cut:
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
            return
        for piece in [data[place : place + 1] for place in range(len(data))] if say.drip_seconds else [data]:
            self.wfile.write(piece)
            time.sleep(say.drip_seconds)

    def log_message(self, *arguments: Any) -> None:
        """Not to the test's output."""


def read_texts(body: dict[str, Any]) -> list[str]:
    """The text parts of a request, turn by turn."""
    found = []
    for message in body["messages"]:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        found += [part["text"] for part in parts if part["type"] == "text"]
    return found


def read_image_urls(body: dict[str, Any]) -> list[str]:
    """The image parts of a request."""
    parts = [
        part for message in body["messages"] if isinstance(message["content"], list) for part in message["content"]
    ]
    return [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]


@contextlib.contextmanager
def running_endpoint(answer: Answer) -> Iterator[ChatServer]:
    """A server that runs until the block ends."""
    server = ChatServer(answer)
    thread = threading.Thread(target=lambda: server.serve_forever(poll_interval=0.02), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
