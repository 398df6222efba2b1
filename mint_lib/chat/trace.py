"""What was asked and answered, call by call, without what it said.

Goes in: calls as they end. Comes out: a line of JSON for each, written at once so that a run that fails leaves it too,
and the sums. A line holds digests and figures; messages and answers only where `keeps_content` says so, and then only
its owner may read the file.
"""

import hashlib
import os
import pathlib
import threading
from collections import Counter
from typing import Any, Self

from pydantic import BaseModel, ConfigDict

from mint_lib.chat.questions import Message, Reply
from mint_lib.errors import MintError


class Call(BaseModel):
    """One call, as a line of the trace holds it."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    subject: str
    """What the question is about, for instance a case id."""
    step: str
    """Which question it was."""
    sample: int
    """Number of the sample, from 0."""
    request: str
    """Digest of the request, images included."""
    response: str | None = None
    """Digest of the answer's text; none where the call failed."""
    error: str | None = None
    """Why it failed."""
    finish_reason: str = ""
    model: str = ""
    """Who answered, as the endpoint says."""
    num_input_tokens: int | None = None
    num_output_tokens: int | None = None
    cached: bool
    """The answer was kept from an earlier call, and cost nothing this time."""
    attempts: int
    """0 where the answer was kept."""
    seconds: float
    """Of all attempts and the pauses between them."""
    cost: float
    """Where the endpoint did not count, the most it can be."""
    messages: list[dict[str, Any]] | None = None
    """Images by digest. None unless content is kept."""
    answer: str | None = None

    @classmethod
    def of(cls, outcome: Reply | MintError, **values: Any) -> Self:
        """The line of a call that brought `outcome`; `values` are its other fields."""
        if isinstance(outcome, MintError):
            return cls(error=str(outcome), **values)
        told = outcome.model_dump(include={"finish_reason", "model", "num_input_tokens", "num_output_tokens"})
        return cls(response=_digest(outcome.text.encode()), **told, **values)


class Trace:
    """Calls in a file and their sums, for several threads."""

    def __init__(self, path: pathlib.Path, *, keeps_content: bool):
        self.path = path
        self._keeps_content = keeps_content
        self._lock = threading.Lock()
        self._calls: list[Call] = []

    def add(self, call: Call, *, messages: tuple[Message, ...], outcome: Reply | MintError) -> None:
        """Write one line."""
        if self._keeps_content:
            answer = outcome.text if isinstance(outcome, Reply) else None
            call = call.model_copy(update={"messages": [_describe_turn(turn) for turn in messages], "answer": answer})
        with self._lock:
            self._calls.append(call)
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            with os.fdopen(handle, "wb") as file:
                file.write(_write_line(call))

    def dump(self) -> bytes:
        """All lines, ordered by subject, sample and then time, so that threads do not decide the order."""
        with self._lock:
            calls = sorted(self._calls, key=lambda call: (call.subject, call.sample))
        return b"".join(_write_line(call) for call in calls)

    def sum(self) -> dict[str, Any]:
        """Counts and tokens of the calls so far."""
        with self._lock:
            calls = tuple(self._calls)
        asked = [call for call in calls if not call.cached]
        return {
            "num_calls": len(asked),
            "num_cached": len(calls) - len(asked),
            "num_failed": sum(call.error is not None for call in asked),
            "num_retries": sum(max(0, call.attempts - 1) for call in asked),
            "num_input_tokens": sum(call.num_input_tokens or 0 for call in asked),
            "num_output_tokens": sum(call.num_output_tokens or 0 for call in asked),
            "num_calls_without_usage": sum(call.num_output_tokens is None and call.error is None for call in asked),
            "answered_by": sorted({call.model for call in calls if call.model}),
            "finish_reasons": dict(
                sorted(Counter(call.finish_reason or "unknown" for call in calls if call.error is None).items())
            ),
        }


def _describe_turn(message: Message) -> dict[str, Any]:
    images = [_digest(image) for image in message.images]
    return {"role": message.role, "text": message.text} | ({"images": images} if images else {})


def _digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def _write_line(call: Call) -> bytes:
    left_out = {"messages", "answer"} if call.messages is None else set()
    return (call.model_dump_json(exclude=left_out) + "\n").encode()
