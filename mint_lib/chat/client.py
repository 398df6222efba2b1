"""A chat model as a function from a question to an answer: kept answers first, then the endpoint; every call traced.

Goes in: an `Endpoint`, a folder, and questions with what they are about. Comes out: replies, a trace and sums. It does
not know what questions mean: whatever asks a chat model (a teacher, a judge) asks through it. The folder holds answers
by the digest of address, request and sample number, and the traces of all runs.
"""

import datetime
import os
import pathlib
import threading
from types import TracebackType
from typing import Any, Self

from mint_lib.chat.budget import Budget
from mint_lib.chat.cache import ReplyCache
from mint_lib.chat.endpoint import Endpoint
from mint_lib.chat.questions import ChatRequest, Reply, digest_json
from mint_lib.chat.trace import Call, Trace
from mint_lib.chat.transport import Sent, Transport
from mint_lib.errors import MintError, ServingError


class ChatClient:
    """Asks one endpoint, from several threads, within a `with` block; its end also ends calls that wait.

    A connection is made when the first answer is not at hand. Budget, trace and sums go on over several blocks.
    """

    def __init__(self, endpoint: Endpoint, *, folder: pathlib.Path, keeps_content: bool):
        """`keeps_content`: messages and answers stand in the trace too."""
        self._endpoint = endpoint
        self._budget = Budget(endpoint.max_cost)
        self._cache = ReplyCache(folder / "replies")
        started = datetime.datetime.now(datetime.UTC)
        name = f"{started:%Y%m%dT%H%M%S.%f}-{os.getpid()}.jsonl"
        self.trace = Trace(folder / "traces" / name, keeps_content=keeps_content)
        self._lock = threading.Lock()
        self._is_open = False
        self._transport: Transport | None = None

    def __enter__(self) -> Self:
        with self._lock:
            self._is_open = True
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        with self._lock:
            transport, self._transport = self._transport, None
        if transport is not None:
            transport.close()

    def stop(self) -> None:
        """Ask nothing more in this block and end calls that wait; one that is being answered goes on."""
        with self._lock:
            self._is_open = False
            if self._transport is not None:
                self._transport.stop()

    def ask(self, request: ChatRequest, *, subject: str, step: str, sample: int = 0) -> Reply:
        """The answer to `request`; another `sample` is another answer to the same question.

        `subject` and `step` say in the trace what it is about.

        Raises:
            MintError: one of the errors of `Transport.send`.
        """
        body = request.body(self._endpoint)
        key = digest_json({"url": self._endpoint.url, "body": body, "sample": sample})
        kept = self._cache.get(key)
        sent = Sent(kept, 0, 0.0, 0.0) if kept is not None else self._send(request, body)
        if kept is None and isinstance(sent.outcome, Reply) and not sent.outcome.is_refused:
            self._cache.put(key, sent.outcome)  # an endpoint may take a refusal back
        call = Call.of(
            sent.outcome,
            subject=subject,
            step=step,
            sample=sample,
            request=key,
            cached=kept is not None,
            attempts=sent.num_attempts,
            seconds=round(sent.seconds, 3),
            cost=sent.cost,
        )
        self.trace.add(call, messages=request.messages, outcome=sent.outcome)
        if isinstance(sent.outcome, MintError):
            raise sent.outcome
        return sent.outcome

    def summary(self) -> dict[str, Any]:
        """Counts, tokens and cost of the calls so far, failed ones included in the cost."""
        return self.trace.sum() | {"cost": round(self._budget.spent, 9)}

    def _send(self, request: ChatRequest, body: dict[str, Any]) -> Sent:
        """What came of `request` at the endpoint."""
        with self._lock:
            if not self._is_open:
                raise ServingError("No more questions are asked because the run stops.")
            if self._transport is None:
                self._transport = Transport(self._endpoint, budget=self._budget)
            transport = self._transport
        num_input_tokens = request.bound_input_tokens(self._endpoint)
        return transport.send(body, num_input_tokens=num_input_tokens, num_output_tokens=request.max_tokens)
