"""Who may ask what: bearer tokens from a mounted file, read again when it changes.

Goes in: a tokens file and the Authorization header of a request. Comes out: a `Grant` with tenant, models and scopes,
or a refusal. Plain tokens are not stored, logged or compared: the file holds their sha256, and a token is looked up by
its digest. That lookup needs no constant-time comparison, because its timing could only tell about digests, and nobody
can choose a token whose digest begins in a wanted way without having searched for it.
"""

import datetime
import hashlib
import ipaddress
import logging
import os
import pathlib
import secrets
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from mint_lib.errors import InvalidInput
from mint_lib.server.calls import Grant, Scope, current_call
from mint_lib.server.http_errors import Refusal

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Send
    from starlette.types import Scope as AsgiScope

logger = logging.getLogger(__name__)
_CHECK_SECONDS = 1.0  # how long a revoked token may go on working
_MAX_FILE_BYTES = 4 * 1024**2
_MAX_TOKEN_LENGTH = 512
_ALL_SCOPES: tuple[Scope, ...] = ("infer", "metrics")


class AccessConfig(BaseModel):
    """How requests are authorised."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    mode: Literal["tokens", "off"] = "tokens"
    """`off` lets everybody on this machine ask everything, and is allowed on a loopback address only."""
    tokens_file: pathlib.Path | None = None
    """JSON file of tokens' digests, tenants, models, scopes and expiry."""

    @model_validator(mode="after")
    def _names_a_file(self) -> Self:
        if (self.mode == "tokens") != (self.tokens_file is not None):
            raise ValueError(
                "tokens_file belongs to mode `tokens`, and only to it: give the file, or set mode to `off`"
            )
        return self


class TokenEntry(BaseModel):
    """One token of the file."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    """Hex digest of the token."""
    tenant: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    """Whose it is. Several tokens may be of one tenant."""
    models: Annotated[tuple[str, ...], Field(min_length=1)]
    """Names of models, or `*`."""
    scopes: Annotated[tuple[Scope, ...], Field(min_length=1)]
    """`infer` to ask, `metrics` to read metrics."""
    expires: AwareDatetime | None
    """Null: never."""


class TokensFile(BaseModel):
    """What a tokens file holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tokens: tuple[TokenEntry, ...]

    @model_validator(mode="after")
    def _has_each_token_once(self) -> Self:
        if len({entry.sha256 for entry in self.tokens}) < len(self.tokens):
            raise ValueError("a sha256 stands twice")
        return self


def issue_token(
    tenant: str,
    *,
    models: tuple[str, ...] = ("*",),
    scopes: tuple[Scope, ...] = _ALL_SCOPES,
    expires: datetime.datetime | None = None,
) -> tuple[str, TokenEntry]:
    """A fresh token, and the entry that makes a tokens file accept it."""
    token = secrets.token_urlsafe(32)
    digest = hashlib.sha256(token.encode()).hexdigest()
    return token, TokenEntry(sha256=digest, tenant=tenant, models=models, scopes=scopes, expires=expires)


class TokenBook:
    """The tokens of a file, as they are now. A broken new file keeps the old tokens."""

    def __init__(self, path: pathlib.Path, *, tell_failure: Callable[[], None]):
        self._path = path
        self._tell_failure = tell_failure
        self._stamp = _stamp(path)
        self._entries = _read_tokens(path)
        self._next_check = time.monotonic() + _CHECK_SECONDS

    def find(self, token: str) -> Grant | None:
        """What the bearer of `token` may do; None for an unknown or expired one."""
        if time.monotonic() >= self._next_check:
            self.refresh()
        entry = self._entries.get(hashlib.sha256(token.encode()).hexdigest())
        if entry is None or (entry.expires and entry.expires <= datetime.datetime.now(datetime.UTC)):
            return None
        return Grant(entry.tenant, entry.models, entry.scopes)

    def refresh(self) -> None:
        """Read the file again if it is another one than last time."""
        self._next_check = time.monotonic() + _CHECK_SECONDS
        stamp = _stamp(self._path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._entries = _read_tokens(self._path)
        except InvalidInput as error:
            logger.error("the tokens read before stay in force: %s", error)
            self._tell_failure()
        else:
            logger.info("read %d tokens", len(self._entries))


def _stamp(path: pathlib.Path) -> tuple[int, int, int] | None:
    """What changes when a file is replaced, a mounted Secret's link included."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


def _read_tokens(path: pathlib.Path) -> dict[str, TokenEntry]:
    """Entries by digest.

    Raises:
        InvalidInput: the file is missing, too large or not a tokens file.
    """
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise InvalidInput(f"The tokens file {path} cannot be read ({error.strerror}). Mount it.") from None
    if len(data) > _MAX_FILE_BYTES:
        raise InvalidInput(f"The tokens file {path} is larger than {_MAX_FILE_BYTES} bytes.")
    try:
        tokens = TokensFile.model_validate_json(data).tokens
    except ValidationError as error:
        first = error.errors(include_input=False, include_context=False, include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise InvalidInput(
            f"The tokens file {path} is wrong at {place} ({first['type']}). Each token needs sha256, tenant, models, "
            "scopes and expires; see the README."
        ) from None
    return {entry.sha256: entry for entry in tokens}


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server on `host`."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


class AccessGate:
    """ASGI layer: 401 without a valid token, 403 where it does not allow the route, 404 and 405 for any other route."""

    def __init__(self, inner: "ASGIApp", config: AccessConfig, *, tell_failure: Callable[[], None]):
        self._inner = inner
        self._book = TokenBook(config.tokens_file, tell_failure=tell_failure) if config.tokens_file else None

    async def __call__(self, scope: "AsgiScope", receive: "Receive", send: "Send") -> None:
        """Let a request pass with its grant noted, or raise a Refusal."""
        if scope["type"] == "http":
            call = current_call()
            # An unknown route needs a token too: what exists is nobody else's business.
            needs = call.route.needs if call.route else "token"
            headers = scope["headers"]
            if needs != "nothing":
                call.grant = self._authenticate(headers)
                if needs in _ALL_SCOPES and needs not in call.grant.scopes:
                    raise Refusal(403, "forbidden", f"This token lacks the scope `{needs}`. Ask for one that has it.")
            if call.route is None:
                raise Refusal(404, "not_found", "There is no such route. See /openapi.json.")
            if call.route.method != scope["method"]:
                raise Refusal(405, "method_not_allowed", f"This route is asked with {call.route.method} only.")
        await self._inner(scope, receive, send)

    def _authenticate(self, headers: list[tuple[bytes, bytes]]) -> Grant:
        if self._book is None:
            # A web page may reach a loopback server under a name of its own (DNS rebinding); such a name is not ours.
            hosts = [value.decode("latin-1").rpartition(":") for name, value in headers if name == b"host"]
            if len(hosts) != 1 or not any(is_loopback(part) for part in (hosts[0][0], "".join(hosts[0]))):
                raise Refusal(403, "forbidden", "Without tokens this server answers to loopback names only.")
            return Grant("anonymous", ("*",), _ALL_SCOPES)
        values = [value for name, value in headers if name == b"authorization"]
        if len(values) == 1 and len(values[0]) <= _MAX_TOKEN_LENGTH:
            kind, _, token = values[0].decode("latin-1").partition(" ")
            grant = self._book.find(token.strip()) if kind.lower() == "bearer" else None
            if grant is not None:
                return grant
        # One answer for none, unknown and expired: which of them it was is nobody's business.
        raise Refusal(401, "unauthenticated", "A valid token is needed. Send it as `Authorization: Bearer <token>`.")
