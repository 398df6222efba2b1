"""One question over HTTP: tried again where that can help, within a deadline and a budget.

Goes in: an `Endpoint` and the body of a request. Comes out: a reply with what it took, or an error of
`mint_lib/errors.py`. Redirects are not followed and proxies of the environment are not used, so that a case goes to the
host that the recipe names and nowhere else. Errors hold status and host, never what was sent or answered. Waiting times
are drawn evenly up to a bound that doubles ("full jitter", Brooker 2015), or are what the endpoint asks for.
"""

import dataclasses
import datetime
import email.utils
import json
import logging
import random
import threading
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from mint_lib.chat.budget import Budget
from mint_lib.chat.endpoint import Endpoint
from mint_lib.chat.questions import Reply
from mint_lib.chat.replies import find_error_code, read_reply
from mint_lib.errors import DeadlineExceeded, GateFailed, InvalidInput, MintError, Overloaded, ServingError

if TYPE_CHECKING:
    import httpx

_FIRST_PAUSE_SECONDS = 0.5
_LONGEST_PAUSE_SECONDS = 30.0
_MAX_ANSWER_BYTES = 8 * 1024**2
_PASSING_STATUSES = frozenset({408, 425, 429})
_LASTING_STATUSES = frozenset({501, 505})
_LASTING_CODES = frozenset({"insufficient_quota"})
_CASE_CODES = frozenset(
    {"content_filter", "content_policy_violation", "context_length_exceeded", "prompt_too_long", "invalid_image"}
)
"""Codes of OpenAI's, vLLM's and our own server that say something of this one request, not of the recipe."""
_HINTS = {
    401: "Check the key that api_key_variable names.",
    403: "Check that the key may use this model.",
    404: "Check base_url and model.",
    413: "Send smaller images or shorter texts.",
}


class Sent(NamedTuple):
    """What came of a call and what it took."""

    outcome: Reply | MintError
    num_attempts: int
    seconds: float
    cost: float


@dataclasses.dataclass
class _Failure:
    """Why an attempt brought no reply."""

    reason: str
    is_passing: bool = True
    retry_after_seconds: float | None = None
    may_be_billed: bool = False
    """The endpoint may have answered, and only we do not know what."""


class Transport:
    """Connections to one endpoint, for several threads."""

    def __init__(self, endpoint: Endpoint, *, budget: Budget):
        import httpx

        for name in ("httpx", "httpcore"):  # they log the endpoint's own words, which may repeat a case
            logging.getLogger(name).setLevel(logging.WARNING)
        self._endpoint = endpoint
        self._budget = budget
        self._stopped = threading.Event()
        key = endpoint.read_key()
        self._http = httpx.Client(
            headers={"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {}),
            verify=httpx.create_ssl_context(),
            trust_env=False,
            follow_redirects=False,
            limits=httpx.Limits(max_connections=endpoint.num_concurrent),
        )

    def stop(self) -> None:
        """End calls that wait for their next attempt; one that is being answered goes on."""
        self._stopped.set()

    def close(self) -> None:
        """Let go of the connections."""
        self.stop()
        self._http.close()

    def send(self, body: dict[str, Any], *, num_input_tokens: int, num_output_tokens: int) -> Sent:
        """What came of `body`, which has at most `num_input_tokens` and is answered by at most `num_output_tokens`.

        The outcome is a reply, or one of these errors:
            InvalidInput: the endpoint refuses the request for good, for instance the key or the model's name.
            GateFailed: the budget does not allow it.
            Overloaded: still refused for a while after all attempts, or for longer than the deadline.
            DeadlineExceeded: no answer before the deadline.
            ServingError: no whole answer after all attempts.
        """
        content = json.dumps(body).encode()
        started = time.monotonic()
        bound = self._endpoint.price(num_input_tokens=num_input_tokens, num_output_tokens=num_output_tokens)
        cost, attempt = 0.0, 0
        outcome: Reply | MintError | None = None
        while outcome is None:
            attempt += 1
            seen, paid = self._pay(content, started, bound)
            cost += paid
            outcome = self._wait(seen, attempt, started) if isinstance(seen, _Failure) else seen
        return Sent(outcome, attempt, time.monotonic() - started, cost)

    def _wait(self, failure: _Failure, attempt: int, started: float) -> MintError | None:
        """Wait before the attempt after `attempt`; the error that ends the call where there is to be none."""
        if not failure.is_passing:
            return InvalidInput(failure.reason)
        if attempt == self._endpoint.max_attempts:
            return self._describe_end(failure, f"in {attempt} attempts", is_late=False)
        pause = self._choose_pause(attempt, failure)
        if self._remaining(started) <= pause:
            limit = f"within the deadline of {self._endpoint.deadline_seconds:g} seconds"
            return self._describe_end(failure, limit, is_late=True)
        return ServingError("The call was ended because the run stops.") if self._stopped.wait(pause) else None

    def _pay(self, content: bytes, started: float, bound: float) -> tuple[Reply | GateFailed | _Failure, float]:
        """One attempt within the budget, and what it cost."""
        try:
            self._budget.reserve(bound)
        except GateFailed as error:
            return error, 0.0
        paid = bound  # whatever breaks off an attempt may have been billed
        try:
            outcome = self._try(content, self._remaining(started))
            paid = self._price(outcome, bound)
        finally:
            self._budget.settle(bound, cost=paid)
        return outcome, paid

    def _remaining(self, started: float) -> float:
        return started + self._endpoint.deadline_seconds - time.monotonic()

    def _try(self, content: bytes, remaining_seconds: float) -> "Reply | _Failure":
        """One attempt."""
        import httpx

        seconds = min(self._endpoint.attempt_seconds, max(0.01, remaining_seconds))
        try:
            response, data = self._post(content, seconds)
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout):
            return _Failure("no connection")
        except httpx.TimeoutException:
            return _Failure("no answer in time", may_be_billed=True)
        except (httpx.HTTPError, RuntimeError):  # RuntimeError: the client was closed under a call
            return _Failure("the answer was cut off", may_be_billed=True)
        if data is None:
            return _Failure("the answer was too long or too slow", may_be_billed=True)
        if response.status_code == 200:
            return read_reply(data) or _Failure("the answer is not a chat completion", may_be_billed=True)
        return self._judge_refusal(response, data)

    def _post(self, content: bytes, seconds: float) -> "tuple[httpx.Response, bytes | None]":
        """Response and body; no body where it was too long or slow. The time is looked at between reads."""
        end = time.monotonic() + seconds
        with self._http.stream("POST", self._endpoint.url, content=content, timeout=seconds) as response:
            data = bytearray()
            for piece in response.iter_bytes():
                data += piece
                if len(data) > _MAX_ANSWER_BYTES or time.monotonic() > end:
                    return response, None
        return response, bytes(data)

    def _judge_refusal(self, response: "httpx.Response", data: bytes) -> "Reply | _Failure":
        """What a status other than 200 means."""
        status, code = response.status_code, find_error_code(data)
        if 400 <= status < 500 and code in _CASE_CODES:
            return Reply(
                text="", finish_reason=code, model="", num_input_tokens=0, num_output_tokens=0, is_refused=True
            )
        what = f"status {status}" + (f" ({code})" if code else "")
        passing = status in _PASSING_STATUSES or (status >= 500 and status not in _LASTING_STATUSES)
        if passing and code not in _LASTING_CODES:
            return _Failure(what, retry_after_seconds=read_retry_after(response.headers.get("retry-after", "")))
        if 300 <= status < 400:
            hint = "Redirects are not followed: give the final address as base_url."
        else:
            hint = _HINTS.get(
                status, "Check max_tokens_field, temperature and answer_format against what the endpoint understands."
            )
        return _Failure(f"{self._endpoint.host} refuses the request with {what}. {hint}", is_passing=False)

    def _price(self, outcome: "Reply | _Failure", bound: float) -> float:
        """What an attempt cost: as the endpoint counts, and at most where it may have counted and did not say."""
        if isinstance(outcome, _Failure):
            return bound if outcome.may_be_billed else 0.0
        if outcome.num_input_tokens is None or outcome.num_output_tokens is None:
            return bound
        return self._endpoint.price(
            num_input_tokens=outcome.num_input_tokens, num_output_tokens=outcome.num_output_tokens
        )

    def _choose_pause(self, attempt: int, failure: _Failure) -> float:
        """Seconds to wait before the next attempt."""
        drawn = random.uniform(0.0, min(_LONGEST_PAUSE_SECONDS, _FIRST_PAUSE_SECONDS * 2 ** (attempt - 1)))
        return drawn + (failure.retry_after_seconds or 0.0)

    def _describe_end(self, failure: _Failure, limit: str, *, is_late: bool) -> ServingError:
        """The error that ends a call."""
        message = (
            f"{self._endpoint.host} gave no usable answer {limit}; the last time: {failure.reason}. Answers so far are "
            "kept: run the same command again later, and only what is missing is asked."
        )
        if failure.reason.startswith("status 429"):
            return Overloaded(message, failure.retry_after_seconds or 1.0)
        return DeadlineExceeded(message) if is_late else ServingError(message)


def read_retry_after(value: str) -> float | None:
    """Seconds that a Retry-After header asks for, given as seconds or as a date (RFC 9110, 10.2.3); none if neither."""
    if value.strip().isdecimal() and value.isascii():
        return float(value)
    try:
        date = email.utils.parsedate_to_datetime(value)
    except ValueError:
        return None
    if date.tzinfo is None:
        date = date.replace(tzinfo=datetime.UTC)
    return max(0.0, (date - datetime.datetime.now(datetime.UTC)).total_seconds())
