"""How large, how many and how long: the limits on requests, kept before anything is parsed or computed.

Goes in: `RequestLimits` and a request. Comes out: the request with its whole, strictly read body, run as a task that
ends when its deadline passes or its client goes away; or a refusal. It knows neither models nor routes' schemas.
"""

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

from mint_lib.errors import DeadlineExceeded, InvalidInput, Overloaded
from mint_lib.server.calls import Call, current_call
from mint_lib.server.http_errors import Refusal
from mint_lib.server.strict_json import parse_object

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

_DISCARDED_BYTES = 64 * 1024**2
_DISCARD_SECONDS = 5.0
_GRACE_SECONDS = 0.5  # the engine sees a deadline first and says more about it; this layer is for whatever does not


class RequestLimits(BaseModel):
    """What one request may cost."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    max_body_bytes: int = Field(default=1024**2, ge=1024)
    """Largest body where every student reads text only."""
    max_body_bytes_with_images: int = Field(default=16 * 1024**2, ge=1024)
    """Largest body where a student reads images, which travel as base64."""
    max_image_bytes: int = Field(default=8 * 1024**2, ge=1024)
    """Largest encoded image."""
    max_image_pixels: int = Field(default=16_000_000, ge=64)
    """Width times height; decoding takes three bytes for each."""
    max_prepared_image_bytes: int = Field(default=512 * 1024**2, ge=1024**2)
    """Memory of the images of all requests in the server at once, as students read them; one more is refused."""
    max_instances: int = Field(default=16, ge=1, le=256)
    """Cases of one V1 or V2 request."""
    max_json_depth: int = Field(default=32, ge=4, le=200)
    """Nesting of a body."""
    max_concurrent: int = Field(default=64, ge=1)
    """Requests to models that are in the server at once, whether they wait or run."""
    deadline_seconds: float = Field(default=60.0, gt=0, le=3600)
    """How long a request may take. A client may ask for less with the header x-request-timeout-seconds."""


class LimitsGate:
    """ASGI layer that reads the body, then runs the rest as a task that it can end."""

    def __init__(self, inner: "ASGIApp", limits: RequestLimits, *, reads_images: "Callable[[], bool]"):
        self._inner = inner
        self._limits = limits
        self._reads_images = reads_images
        self._num_running = 0

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        """Let a request pass within the limits, or raise a Refusal, InvalidInput, Overloaded or DeadlineExceeded."""
        if scope["type"] != "http":
            await self._inner(scope, receive, send)
            return
        call = current_call()
        call.deadline = min(call.deadline, call.started + self._read_timeout(scope))
        if scope["method"] != "POST":
            await self._run(call, scope, b"", receive, send)
            return
        if self._num_running >= self._limits.max_concurrent:
            raise Overloaded(f"The server already answers {self._limits.max_concurrent} requests. Try again later.")
        self._num_running += 1
        try:
            body = await self._read_body(call, scope, receive)
            parse_object(body, max_depth=self._limits.max_json_depth)
            # Handlers within see one spelling of the content type, and no headers of CloudEvents or of binary tensors.
            kept = [
                (name, value)
                for name, value in scope["headers"]
                if name not in (b"content-type", b"inference-header-content-length") and not name.startswith(b"ce-")
            ]
            scope["headers"] = [*kept, (b"content-type", b"application/json")]
            await self._run(call, scope, body, receive, send)
        finally:
            self._num_running -= 1

    def _read_timeout(self, scope: "Scope") -> float:
        """Seconds that this request may take."""
        given = [value for name, value in scope["headers"] if name == b"x-request-timeout-seconds"]
        if not given:
            return self._limits.deadline_seconds
        try:
            seconds = float(given[0])
        except ValueError:
            seconds = 0.0
        if len(given) > 1 or not 0 < seconds < float("inf"):
            raise InvalidInput(
                "The header x-request-timeout-seconds must be one number above 0. Mend it or leave it out."
            )
        return min(seconds, self._limits.deadline_seconds)

    async def _read_body(self, call: Call, scope: "Scope", receive: "Receive") -> bytes:
        """The whole body.

        Raises:
            Refusal: 413 or 415.
            DeadlineExceeded: it did not arrive in time.
        """
        headers = dict(scope["headers"])
        _check_content_type(headers)
        limit = self._limits.max_body_bytes_with_images if self._reads_images() else self._limits.max_body_bytes
        declared = headers.get(b"content-length", b"0")
        size = 0
        chunks: list[bytes] = []
        is_too_large = not declared.isdigit() or len(declared) > 18 or int(declared) > limit
        try:
            async with asyncio.timeout(max(0.0, call.deadline - time.monotonic())):
                while not is_too_large:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        call.is_abandoned = True
                        raise InvalidInput("The client went away before its request was complete.")
                    chunk = message.get("body", b"")
                    size += len(chunk)
                    is_too_large = size > limit
                    chunks.append(chunk)
                    if not message.get("more_body", False):
                        break
        except TimeoutError:
            raise DeadlineExceeded("The request did not arrive whole before its deadline. Send it faster.") from None
        if is_too_large:
            chunks.clear()
            if b"expect" not in headers:
                await discard_body(receive)
            raise Refusal(413, "body_too_large", f"The body is larger than {limit} bytes. Send less at once.")
        return b"".join(chunks)

    async def _run(self, call: Call, scope: "Scope", body: bytes, receive: "Receive", send: "Send") -> None:
        """Run the rest of the server as a task; end it at the deadline or when the client goes away."""
        outgoing = _Outgoing(send)
        incoming = _Incoming(body)
        task = asyncio.ensure_future(self._inner(scope, incoming.receive, outgoing.send))
        watch = asyncio.create_task(_wait_for_disconnect(receive))
        try:
            left = max(0.0, call.deadline - time.monotonic()) + _GRACE_SECONDS
            await asyncio.wait({task, watch}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if task.done() or outgoing.is_complete:
                await task
            elif watch.done():
                call.is_abandoned = True
            else:
                raise DeadlineExceeded("The answer was not ready before the request's deadline. Ask for less, or wait.")
        finally:
            task.cancel()
            watch.cancel()
            await asyncio.gather(task, watch, return_exceptions=True)
            await call.resources.aclose()


class _Incoming:
    """A body that was read, then silence: this layer alone listens for the client going away."""

    def __init__(self, body: bytes):
        self._body: bytes | None = body

    async def receive(self) -> "Message":
        if self._body is None:
            await asyncio.get_running_loop().create_future()
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}


class _Outgoing:
    """Passes an answer on and notes whether all of it was said."""

    def __init__(self, send: "Send"):
        self._send = send
        self.is_complete = False

    async def send(self, message: "Message") -> None:
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            # Servers report a disconnect after every complete answer: noted before, it is not taken for a real one.
            self.is_complete = True
        await self._send(message)


async def _wait_for_disconnect(receive: "Receive") -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def discard_body(receive: "Receive") -> None:
    """Read and forget what a client still sends, within bounds.

    A connection that is closed with unread bytes in it is reset, and the reset may overtake the refusal.
    """
    left = _DISCARDED_BYTES
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_DISCARD_SECONDS):
            while left > 0:
                message = await receive()
                left -= len(message.get("body", b""))
                if message["type"] == "http.disconnect" or not message.get("more_body", False):
                    return


def _check_content_type(headers: dict[bytes, bytes]) -> None:
    """Refuse what is not JSON in UTF-8 (415)."""
    kind, *parameters = (
        part.strip().lower() for part in headers.get(b"content-type", b"").decode("latin-1").split(";")
    )
    charsets = [part.removeprefix("charset=").strip('"') for part in parameters if part]
    encoding = headers.get(b"content-encoding", b"identity").strip().lower()
    if kind != "application/json" or any(charset != "utf-8" for charset in charsets) or encoding != b"identity":
        raise Refusal(
            415, "unsupported_media_type", "Bodies must be `content-type: application/json` in UTF-8, not compressed."
        )
