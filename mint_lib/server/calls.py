"""One HTTP request on its way through the server: who asks, by when, under which route.

Goes in: what the outer layers learn of a request. Comes out: `current_call()`, the same record for every layer, so that
KServe's handlers, which are given headers only, need no header of ours to be trusted. It holds no content of a request.
"""

import contextlib
import contextvars
import dataclasses
import re
from collections.abc import Iterator
from typing import Literal

Scope = Literal["infer", "metrics"]
Needs = Literal["nothing", "token", "infer", "metrics"]


@dataclasses.dataclass(frozen=True)
class Route:
    """A path that is answered, and what a token must allow for it."""

    method: Literal["GET", "POST"]
    path: str
    needs: Needs
    """`nothing`: open. `token`: any valid token. Otherwise: a token with this scope."""


ROUTES = (
    Route("GET", "/", "nothing"),
    Route("GET", "/healthz", "nothing"),
    Route("GET", "/readyz", "nothing"),
    Route("GET", "/metrics", "metrics"),
    Route("GET", "/openapi.json", "token"),
    Route("GET", "/v1/models", "infer"),
    Route("GET", "/v1/models/{model_name}", "infer"),
    Route("POST", "/v1/models/{model_name}:predict", "infer"),
    Route("GET", "/v2", "token"),
    Route("GET", "/v2/health/live", "nothing"),
    Route("GET", "/v2/health/ready", "nothing"),
    Route("GET", "/v2/models", "infer"),
    Route("GET", "/v2/models/{model_name}", "infer"),
    Route("GET", "/v2/models/{model_name}/ready", "infer"),
    Route("POST", "/v2/models/{model_name}/infer", "infer"),
    Route("GET", "/openai/v1/models", "infer"),
    Route("POST", "/openai/v1/completions", "infer"),
    Route("POST", "/openai/v1/chat/completions", "infer"),
)


def _pattern(path: str) -> re.Pattern[str]:
    # No colon: it sets off a verb, so that "/v1/models/x:explain" is no model called "x:explain".
    return re.compile(r"[^/:\x00-\x1f]+".join(re.escape(part) for part in path.split("{model_name}")))


_PATTERNS = tuple((route, _pattern(route.path)) for route in ROUTES)


def find_route(method: str, path: str) -> Route | None:
    """The route that `path` (percent-decoded) belongs to; where only another method is answered, that one."""
    found = [route for route, pattern in _PATTERNS if pattern.fullmatch(path)]
    return next((route for route in found if route.method == method), found[0] if found else None)


@dataclasses.dataclass(frozen=True)
class Grant:
    """What the bearer of a token may do."""

    tenant: str
    models: tuple[str, ...]
    """Names of models, or `*` for all."""
    scopes: tuple[Scope, ...]

    def allows(self, model: str) -> bool:
        """Whether the bearer may ask the model called `model`."""
        return "*" in self.models or model in self.models


@dataclasses.dataclass(kw_only=True)
class Call:
    """One request. The layers fill it from the outside in."""

    request_id: str
    route: Route | None
    """None: no such path."""
    started: float
    """`time.monotonic()` when its head had arrived."""
    deadline: float
    """`time.monotonic()` after which nobody wants the answer."""
    grant: Grant | None = None
    model: str = ""
    """Name of the served student it was about; a name that nobody serves never gets here."""
    problem: str = ""
    """Code of the error it was answered with, or ended with in the middle of a stream."""
    is_abandoned: bool = False
    """Its client went away before the answer was complete."""
    resources: contextlib.AsyncExitStack = dataclasses.field(default_factory=contextlib.AsyncExitStack)
    """Leases and tickets; closed when the request ends, in whatever way."""

    @property
    def tenant(self) -> str:
        """Whose request it is."""
        return self.grant.tenant if self.grant else ""


_current: contextvars.ContextVar[Call] = contextvars.ContextVar("mint_call")


def current_call() -> Call:
    """The request that the running task answers."""
    return _current.get()


@contextlib.contextmanager
def entered(call: Call) -> Iterator[None]:
    """Make `call` the current one for this task and the tasks it starts."""
    token = _current.set(call)
    try:
        yield
    finally:
        _current.reset(token)
