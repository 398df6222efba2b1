"""A connection to Kubeflow Pipelines that says in words why it does not come about.

Goes in: an address, and a token file if there is one. Comes out: `kfp.Client`, proven to reach an API of the version
that it speaks. The token stays in its file and in requests: it is neither logged nor part of a message.
"""

import contextlib
import http
import io
import json
import logging
import os
import pathlib
import stat
import urllib.parse
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

from mint_lib.cluster import ClusterConfig
from mint_lib.errors import InvalidInput, MintError

logger = logging.getLogger(__name__)

IN_CLUSTER_HOST = "http://ml-pipeline.kubeflow.svc.cluster.local:8888"
IN_CLUSTER_TOKEN = pathlib.Path("/var/run/secrets/kubeflow/pipelines/token")
"""Where Kubeflow's documentation has a pod's token for the audience `pipelines.kubeflow.org` mounted."""
REQUEST_SECONDS = 30
_MAX_MESSAGE_LENGTH = 300


class KubeflowRefused(MintError):
    """Kubeflow Pipelines cannot be reached, or did not do what was asked."""


class Address(NamedTuple):
    """Where Kubeflow Pipelines is, and how to enter."""

    host: str
    namespace: str | None
    """The profile's namespace; None where Kubeflow has one user."""
    token_file: pathlib.Path | None
    ca_file: pathlib.Path | None


def find_address(
    cluster: ClusterConfig,
    *,
    host: str | None,
    namespace: str | None,
    token_file: pathlib.Path | None,
    ca_file: pathlib.Path | None,
) -> Address:
    """The address from the command line, else from the cluster file, else that of the cluster that this pod is in.

    Raises:
        InvalidInput: there is none, or a file cannot be read.
    """
    is_in_cluster = "KUBERNETES_SERVICE_HOST" in os.environ
    found = host or cluster.kubeflow.host or (IN_CLUSTER_HOST if is_in_cluster else None)
    if found is None:
        raise InvalidInput(
            "No address of Kubeflow Pipelines. Give --host or kubeflow.host in the cluster file; without an ingress: "
            "`kubectl -n kubeflow port-forward svc/ml-pipeline 8888`, then --host http://127.0.0.1:8888."
        )
    url = urllib.parse.urlsplit(found)
    if url.scheme not in ("http", "https") or not url.hostname or url.username:
        raise InvalidInput(f"--host {url.hostname or found!r} is not an address. Write http(s)://host, without a user.")
    if token_file is None and is_in_cluster and IN_CLUSTER_TOKEN.exists():
        token_file = IN_CLUSTER_TOKEN
    elif token_file is not None:
        _check_token_file(token_file)
    if token_file is not None and url.scheme == "http" and not _is_private(url.hostname):
        logger.warning("The token goes to %s without encryption. Use https where others can listen.", url.hostname)
    if ca_file is not None and not ca_file.is_file():
        raise InvalidInput(f"--ca-file {ca_file} is no file. Give the PEM file of the authority of {url.hostname}.")
    return Address(found.rstrip("/"), namespace or cluster.kubeflow.namespace, token_file, ca_file)


def connect(address: Address) -> Any:
    """A `kfp.Client` on `address`, after its API answered.

    Raises:
        KubeflowRefused: nobody answers, TLS fails, or what answers is no API of the version that we speak.
        InvalidInput: this Kubeflow wants a namespace and none is given, or the other way round.
    """
    with quiet_kubeflow():
        import kfp
        import kfp_server_api

        credentials: Any = None
        if address.token_file is not None:
            from kfp.client.set_volume_credentials import ServiceAccountTokenVolumeCredentials

            # Reads the file for every request, so a token that is renewed there is used.
            credentials = ServiceAccountTokenVolumeCredentials(str(address.token_file))
        configuration = kfp_server_api.Configuration(host=address.host)
        if address.ca_file is not None:
            configuration.ssl_ca_cert = str(address.ca_file)
        if credentials is not None:
            configuration.api_key["authorization"] = "read at each request"
            configuration.api_key_prefix["authorization"] = "Bearer"
            configuration.refresh_api_key_hook = credentials.refresh_api_key_hook
        # Before the client is made: it asks for the same five times, five seconds apart, and logs tracebacks.
        has_many_users = _ask_health(kfp_server_api.HealthzServiceApi(kfp_server_api.ApiClient(configuration)), address)
        if has_many_users != (address.namespace is not None):
            raise InvalidInput(
                f"Kubeflow at {address.host} has several users. Give the namespace of your profile: --namespace or "
                "kubeflow.namespace in the cluster file."
                if has_many_users
                else f"Kubeflow at {address.host} has one user. Leave out --namespace and kubeflow.namespace."
            )
        return kfp.Client(
            host=address.host,
            namespace=address.namespace or "kubeflow",
            credentials=credentials,
            ssl_ca_cert=str(address.ca_file) if address.ca_file else None,
        )


@contextlib.contextmanager
def explain_failures(address: Address, doing: str) -> Iterator[None]:
    """Turn what the client raises while `doing` something into words.

    Raises:
        KubeflowRefused: instead of the client's own errors.
    """
    with quiet_kubeflow():
        import kfp_server_api
        import urllib3

        try:
            yield
        except kfp_server_api.ApiException as error:
            raise KubeflowRefused(_explain_status(error, address, doing)) from None
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise KubeflowRefused(_explain_connection(error, address)) from None


@contextlib.contextmanager
def quiet_kubeflow() -> Iterator[None]:
    """Keep to itself what the client prints and warns of."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def _ask_health(api: Any, address: Address) -> bool:
    """Whether this Kubeflow has several users, read from its health."""
    with explain_failures(address, "say how it is"):
        reply = api.healthz_service_get_healthz(_preload_content=False, _request_timeout=REQUEST_SECONDS)
    try:
        health = json.loads(reply.data)
        return bool(health.get("multi_user", False))
    except (ValueError, AttributeError):
        raise KubeflowRefused(
            f"{address.host} answers with a page, not with the API: a login stands before it, or it is another server. "
            "Give the address of the API (the service ml-pipeline, port 8888), or --token-file."
        ) from None


def _explain_status(error: Any, address: Address, doing: str) -> str:
    if error.status == 0:
        return _explain_connection(error, address)
    if error.status == http.HTTPStatus.UNAUTHORIZED:
        what = "refuses the token" if address.token_file else "wants a token"
        return (
            f"Kubeflow at {address.host} {what} (401). Give --token-file with a fresh one: `kubectl create token "
            "SERVICE_ACCOUNT --audience pipelines.kubeflow.org > FILE`."
        )
    if error.status == http.HTTPStatus.FORBIDDEN:
        where = f"the namespace {address.namespace}" if address.namespace else "this Kubeflow"
        return (
            f"Whom the token stands for may not {doing} in {where} (403). Ask for the role kubeflow-edit there, or "
            "give another --namespace or --token-file."
        )
    if error.status == http.HTTPStatus.NOT_FOUND and doing == "say how it is":
        return (
            f"{address.host} has no API of version v2beta1 (404). Kubeflow Pipelines 2.x has; check the path of "
            "--host, which often ends with /pipeline behind an ingress."
        )
    return f"Kubeflow at {address.host} could not {doing} ({error.status}). {_read_message(error)}"


def _explain_connection(error: Any, address: Address) -> str:
    text = str(error)
    if "CERTIFICATE_VERIFY_FAILED" in text or "SSL" in text:
        return (
            f"No trusted TLS connection to {address.host}. If its certificate is of your own authority, give --ca-file "
            "with that authority's PEM file; if it speaks plain HTTP, write http://."
        )
    return (
        f"Nobody answers at {address.host} ({type(error).__name__}). Check --host and the network; without an ingress: "
        "`kubectl -n kubeflow port-forward svc/ml-pipeline 8888`."
    )


def _read_message(error: Any) -> str:
    """The reason in an error's answer, as short as a line: the rest of it repeats the pipeline."""
    try:
        body = json.loads(error.body)
        words = str(body.get("message") or body.get("error") or error.reason)
    except (ValueError, TypeError, AttributeError):
        words = str(error.reason)
    return words.splitlines()[0][:_MAX_MESSAGE_LENGTH] if words else ""


def _check_token_file(path: pathlib.Path) -> None:
    try:
        mode, words = path.stat().st_mode, path.read_text(encoding="ascii").split()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"--token-file {path} cannot be read ({type(error).__name__}).") from None
    if len(words) != 1:
        raise InvalidInput(f"--token-file {path} must hold one token and nothing else; it holds {len(words)} words.")
    if stat.S_IMODE(mode) & (stat.S_IRWXG | stat.S_IRWXO):
        logger.warning("Others on this machine can read %s. Make it yours alone: chmod 600 %s", path, path)


def _is_private(host: str) -> bool:
    """Requests to `host` stay on this machine or inside the cluster."""
    return host in ("localhost", "127.0.0.1", "::1") or host.endswith((".svc", ".svc.cluster.local"))
