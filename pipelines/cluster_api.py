"""Reads a Kubernetes API server for `mint doctor --cluster`: statuses and small documents, never a traceback.

Goes in: a client of the `kubernetes` package, paths and questions about rights. Comes out: what the server said. It
changes nothing, and it cannot hand out a secret: `status` drops the body unread.
"""

import json
import os
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from kubernetes.client import ApiClient

TIMEOUT_SECONDS = (5, 20)
"""To connect, and to read."""
_METADATA_ONLY = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1"
_REVIEWS = "/apis/authorization.k8s.io/v1"


class Unreachable(Exception):
    """No API server, or one that does not know who asks."""


class Answer(NamedTuple):
    """What came back."""

    status: int
    """HTTP status; 0 where nobody answered."""
    body: dict[str, Any]

    def list(self, key: str) -> list[dict[str, Any]]:
        """The list under `key`; empty where there is none."""
        return self.body.get(key) or []


class Right(NamedTuple):
    """A verb on a resource."""

    verb: str
    group: str
    resource: str
    """Plural, with its subresource after a slash."""

    @property
    def target(self) -> str:
        """The resource with its group, as kubectl writes it."""
        return f"{self.resource}.{self.group}" if self.group else self.resource


def load_client() -> "ApiClient":
    """A client as the pod's account, or as the current context of the kubeconfig says.

    Raises:
        Unreachable: neither is there.
    """
    from kubernetes import client, config

    try:
        if os.environ.get("KUBERNETES_SERVICE_HOST") and not os.environ.get("KUBECONFIG"):
            config.load_incluster_config()
        else:
            config.load_kube_config()
    except (config.ConfigException, OSError, ValueError) as error:
        raise Unreachable(f"there is no usable kubeconfig and no pod's account ({type(error).__name__})") from None
    configuration = client.Configuration.get_default_copy()
    # A second try would only say the same later, and log that it was made.
    configuration.retries = False
    return client.ApiClient(configuration)


class ApiReader:
    """One API server, as one account sees it."""

    def __init__(self, api_client: "ApiClient") -> None:
        self._client = api_client
        review = {"apiVersion": "authentication.k8s.io/v1", "kind": "SelfSubjectReview"}
        answer = self._send("POST", "/apis/authentication.k8s.io/v1/selfsubjectreviews", body=review)
        self.user = str(answer.body.get("status", {}).get("userInfo", {}).get("username", ""))
        """Who asks; empty where the server does not say."""

    def get(self, path: str, query: dict[str, str] | None = None) -> Answer:
        """The document at `path`. Not for secrets.

        Raises:
            Unreachable: the server does not answer, or answers 401.
        """
        return self._send("GET", path, query=query)

    def status(self, path: str) -> int:
        """The status of a GET at `path`; its body, metadata at most, is dropped unread.

        Raises:
            Unreachable: the server does not answer, or answers 401.
        """
        return self._send("GET", path, is_read=False).status

    def may(self, right: Right, *, namespace: str, name: str = "", user: str | None = None) -> bool | None:
        """Whether this account, or `user`, has a right; None if that may not be asked.

        Raises:
            Unreachable: the server does not answer, or answers 401.
        """
        resource, _, subresource = right.resource.partition("/")
        attributes = {"namespace": namespace, "verb": right.verb, "group": right.group, "resource": resource}
        attributes |= {key: value for key, value in {"subresource": subresource, "name": name}.items() if value}
        spec: dict[str, Any] = {"resourceAttributes": attributes}
        kind = "SelfSubjectAccessReview"
        if user is not None and user != self.user:
            # An authorizer that knows groups only would refuse an account without its own.
            own_namespace = user.split(":")[2]
            groups = ["system:serviceaccounts", f"system:serviceaccounts:{own_namespace}", "system:authenticated"]
            kind, spec = "SubjectAccessReview", spec | {"user": user, "groups": groups}
        review = {"apiVersion": "authorization.k8s.io/v1", "kind": kind, "spec": spec}
        answer = self._send("POST", f"{_REVIEWS}/{kind.lower()}s", body=review)
        allowed = answer.body.get("status", {}).get("allowed")
        return bool(allowed) if allowed is not None else None

    def get_from_host(self, url: str) -> Answer:
        """A document that is not the API server's; no credentials are sent, no redirect is followed."""
        import urllib3

        timeout = urllib3.Timeout(connect=TIMEOUT_SECONDS[0], read=TIMEOUT_SECONDS[1])
        try:
            response = urllib3.PoolManager(timeout=timeout, retries=False).request("GET", url, redirect=False)
        except urllib3.exceptions.HTTPError:
            return Answer(0, {})
        return Answer(response.status, _parse(response.data))

    def _send(
        self,
        method: str,
        path: str,
        *,
        query: dict[str, str] | None = None,
        body: dict[str, Any] | None = None,
        is_read: bool = True,
    ) -> Answer:
        import urllib3
        from kubernetes.client import ApiException

        try:
            # Unread until here: the client logs every body that it reads.
            response, status, _ = self._client.call_api(
                path,
                method,
                query_params=list((query or {}).items()),
                header_params={"Accept": "application/json" if is_read else _METADATA_ONLY},
                body=body,
                auth_settings=["BearerToken"],
                _preload_content=False,
                _request_timeout=TIMEOUT_SECONDS,
            )
        except ApiException as error:
            if error.status in (0, 401):
                why = "does not know this account (401)" if error.status else "does not present a trusted certificate"
                raise Unreachable(f"the API server at {self._client.configuration.host} {why}") from None
            return Answer(int(error.status), {})
        except urllib3.exceptions.HTTPError as error:
            reason = type(getattr(error, "reason", error)).__name__
            raise Unreachable(f"no API server answers at {self._client.configuration.host} ({reason})") from None
        try:
            return Answer(status, _parse(response.data) if is_read else {})
        finally:
            response.close()


def _parse(data: bytes) -> dict[str, Any]:
    """A JSON object; empty for anything else."""
    try:
        found = json.loads(data)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
