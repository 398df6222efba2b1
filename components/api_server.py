"""Requests to a Kubernetes API server, tried again while it is away, with what went wrong in words.

Goes in: a method and a path. Comes out: JSON or bytes. What a caller must decide itself (no such object, an object of
that name exists) is an exception of its own; everything else that cannot be mended by waiting is a `ClusterError`.
"""

import json
import random
import time
from typing import TYPE_CHECKING, Any

from mint_lib.errors import ClusterError

if TYPE_CHECKING:
    from kubernetes.client import ApiClient

_CONNECT_SECONDS = 5.0
_READ_SECONDS = 30.0
_FIRST_PAUSE_SECONDS = 0.5
_LONGEST_PAUSE_SECONDS = 15.0
_MAX_MESSAGE_LENGTH = 500
_MEND = {
    400: "The message above says what the API server refuses; its version may be older than this code expects.",
    401: "The token was not accepted. Log in again, or give the pod a service account whose token is mounted.",
    403: (
        "Where a permission is missing, use the chart's service account and role for pipelines; where a quota or a "
        "webhook refuses, the message above says which. `mint doctor --cluster` lists every permission."
    ),
    422: "The message above says which field is refused; the CRDs may be older than this code expects.",
}


class NoSuchObject(ClusterError):
    """The server knows no such object, or no such kind."""


class ObjectExists(ClusterError):
    """An object of that name exists."""


class NotNow(ClusterError):
    """The server cannot answer this while the object is as it is, for instance for the log of a pod that waits."""


class ApiServer:
    """One API server. Answers that say `later` and lost connections are tried again for `patience_seconds`."""

    def __init__(self, client: "ApiClient", *, patience_seconds: float = 300.0):
        self.client = client
        self.patience_seconds = patience_seconds

    def get(self, path: str, **query: str) -> Any:
        """The object or list at `path`."""
        return json.loads(self.request("GET", path, query=query))

    def request(self, method: str, path: str, *, query: dict[str, str] | None = None, body: Any = None) -> bytes:
        """The body of the answer.

        Raises:
            NoSuchObject: the server answered 404.
            ObjectExists: it answered 409 to what was to be created.
            NotNow: it answered 400 to a question.
            ClusterError: it refuses, or gave no usable answer for `patience_seconds`.
        """
        from kubernetes.client.exceptions import ApiException
        from urllib3.exceptions import HTTPError

        give_up = time.monotonic() + self.patience_seconds
        pause_seconds = _FIRST_PAUSE_SECONDS
        while True:
            wait_seconds = pause_seconds
            try:
                return self._send(method, path, query or {}, body)
            except ApiException as error:
                if error.status != 429 and error.status < 500:
                    raise _refusal(method, path, error.status, _read_message(error.body)) from None
                reason = f"{error.status} {_read_message(error.body)}".strip()
                wait_seconds = max(pause_seconds, _read_retry_after(error.headers))
            except HTTPError as error:
                reason = type(error).__name__
            if time.monotonic() + wait_seconds > give_up:
                raise ClusterError(
                    f"Kubernetes gave no usable answer to {method} {path} for {self.patience_seconds:.0f} s "
                    f"({reason}). Look at the API server and at the network to it, then start the step again."
                )
            time.sleep(wait_seconds * random.uniform(0.8, 1.2))  # noqa: S311 - spreads clients, guards nothing
            pause_seconds = min(2 * pause_seconds, _LONGEST_PAUSE_SECONDS)

    def _send(self, method: str, path: str, query: dict[str, str], body: Any) -> bytes:
        response = self.client.call_api(
            path,
            method,
            query_params=list(query.items()),
            header_params={"Accept": "application/json, */*", "Content-Type": "application/json"},
            body=body,
            auth_settings=["BearerToken"],
            _return_http_data_only=True,
            _preload_content=False,
            _request_timeout=(_CONNECT_SECONDS, _READ_SECONDS),
        )
        return bytes(response.data)


def connect(*, patience_seconds: float = 300.0) -> ApiServer:
    """The API server of the cluster that this process runs in; otherwise that of the kubeconfig.

    Raises:
        ClusterError: there is neither.
    """
    from kubernetes import client, config

    configuration = client.Configuration()
    try:
        config.load_incluster_config(client_configuration=configuration)
    except config.ConfigException:
        try:
            config.load_kube_config(client_configuration=configuration)
        except (config.ConfigException, OSError) as error:
            raise ClusterError(
                f"No cluster is known: this process runs in no pod with a token, and there is no usable kubeconfig "
                f"({type(error).__name__}). Set KUBECONFIG, or run in a pod whose service account's token is mounted."
            ) from None
    configuration.retries = False  # ours are the only ones
    return ApiServer(client.ApiClient(configuration), patience_seconds=patience_seconds)


def _refusal(method: str, path: str, status: int, message: str) -> ClusterError:
    what = f"Kubernetes refused {method} {path} with {status}: {message}"
    if status == 404:
        return NoSuchObject(what)
    if status == 409 and method == "POST":
        return ObjectExists(what)
    if status == 400 and method == "GET":
        return NotNow(what)
    return ClusterError(f"{what}. {_MEND.get(status, '')}".strip())


def _read_message(body: Any) -> str:
    """The server's own words, without what surrounds them."""
    text = body.decode(errors="replace") if isinstance(body, bytes) else str(body or "")
    try:
        answer = json.loads(text)
    except ValueError:
        answer = None
    message = answer.get("message") if isinstance(answer, dict) else text
    return " ".join(str(message or "no message").split())[:_MAX_MESSAGE_LENGTH].rstrip(".")


def _read_retry_after(headers: Any) -> float:
    try:
        return float((headers or {}).get("Retry-After", 0))
    except ValueError:
        return 0.0
