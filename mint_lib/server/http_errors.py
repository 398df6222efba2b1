"""Errors as HTTP answers: the one table from error to status, and the two shapes that clients expect.

Goes in: an exception. Comes out: status, code, words and headers, as an ASGI answer in KServe's shape or in OpenAI's.
Only errors of `mint_lib.errors` are put into words, since those hold no content; anything else is "internal error".
"""

import dataclasses
import json
import math
from typing import TYPE_CHECKING, Any

from mint_lib.errors import (
    ComputationFailed,
    DeadlineExceeded,
    Draining,
    InvalidInput,
    NotFound,
    Overloaded,
    PromptTooLong,
    ServingError,
)
from mint_lib.server.calls import current_call

if TYPE_CHECKING:
    from starlette.types import Send


class Refusal(ServingError):
    """A request that is refused before a model sees it, by a rule of HTTP or of access."""

    def __init__(
        self, status: int, code: str, message: str, retry_after_seconds: float | None = None, param: str | None = None
    ):
        super().__init__(status, code, message, retry_after_seconds, param)
        self.status = status
        self.code = code
        self.retry_after_seconds = retry_after_seconds
        self.param = param

    def __str__(self) -> str:
        return str(self.args[2])


class BadField(InvalidInput):
    """A field of a request's body that is missing, unknown or wrong; `field` names it."""

    def __init__(self, message: str, field: str):
        super().__init__(message, field)
        self.field = field

    def __str__(self) -> str:
        return str(self.args[0])


@dataclasses.dataclass(frozen=True)
class Problem:
    """An error as clients see it."""

    status: int
    code: str
    """One of a closed set; also the `reason` of `mint_serving_rejected_total`."""
    message: str
    retry_after_seconds: float | None = None
    param: str | None = None


# The first that fits counts, so a class stands before its base.
_TABLE: tuple[tuple[type[Exception], int, str], ...] = (
    (Overloaded, 429, "overloaded"),
    (DeadlineExceeded, 504, "deadline_exceeded"),
    (Draining, 503, "draining"),
    (ComputationFailed, 500, "computation_failed"),
    (PromptTooLong, 400, "prompt_too_long"),
    (NotFound, 404, "not_found"),
    (InvalidInput, 400, "invalid_input"),
)
_RETRY_WHILE_DRAINING_SECONDS = 5.0  # by then a load balancer has taken this server out of its list
_OPENAI_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
    504: "server_error",
}


def describe_error(error: BaseException) -> Problem:
    """What a client is told of `error`."""
    if isinstance(error, Refusal):
        return Problem(error.status, error.code, str(error), error.retry_after_seconds, error.param)
    for kind, status, code in _TABLE:
        if isinstance(error, kind):
            retry = getattr(error, "retry_after_seconds", None)
            if status == 503:
                retry = _RETRY_WHILE_DRAINING_SECONDS
            return Problem(status, code, str(error), retry, getattr(error, "field", None))
    return Problem(
        500, "internal_error", "The server made a mistake on this request. Report its id to whoever runs the server."
    )


def render_problem(problem: Problem, *, path: str, request_id: str) -> tuple[list[tuple[bytes, bytes]], bytes]:
    """Headers and body of the answer to a request for `path`."""
    content: dict[str, Any]
    if path.startswith("/openai/"):
        content = {"error": {**describe_for_openai(problem), "request_id": request_id}}
    else:
        content = {"error": problem.message, "code": problem.code, "request_id": request_id}
    body = json.dumps(content).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if problem.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if problem.retry_after_seconds is not None:
        headers.append((b"retry-after", str(max(1, math.ceil(problem.retry_after_seconds))).encode()))
    return headers, body


def describe_for_openai(problem: Problem) -> dict[str, str | None]:
    """The inner part of an error in OpenAI's shape."""
    return {
        "message": problem.message,
        "type": _OPENAI_TYPES.get(problem.status, "invalid_request_error"),
        "code": problem.code,
        "param": problem.param,
    }


async def send_problem(send: "Send", problem: Problem, *, path: str) -> None:
    """Answer the current call with `problem`."""
    call = current_call()
    call.problem = problem.code
    headers, body = render_problem(problem, path=path, request_id=call.request_id)
    await send({"type": "http.response.start", "status": problem.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def describe_validation(errors: list[Any]) -> BadField:
    """Pydantic's first finding on a body. Its messages name what is allowed, not what was given.

    Args:
        errors: `ValidationError.errors()`, each with `loc`, `type` and `msg`.
    """
    found = errors[0]
    place = ".".join(_printable(str(part)) for part in found["loc"] if part not in ("body", "request_body")) or "body"
    if found["type"] == "extra_forbidden":
        return BadField(
            f"The field {place} is not known here. Leave it out; /openapi.json lists the known ones.", place
        )
    if found["type"] == "missing":
        return BadField(f"The field {place} is missing. Give it; /openapi.json says how.", place)
    words = found["msg"].removeprefix("Value error, ")
    return BadField(f"The field {place} is not acceptable: {words}. /openapi.json says what is.", place)


def _printable(text: str) -> str:
    """The first characters of a key that a client chose, fit for a message."""
    return "".join(letter if letter.isprintable() else "?" for letter in text[:64])
