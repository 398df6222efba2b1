"""What a Kubernetes cluster lacks for this platform, and how to mend it: the checks behind `mint doctor --cluster`.

Goes in: the cluster file's config, or none for what needs no file, and a client of the API server. Comes out: findings.
Nothing in the cluster is changed. Of a secret only the status of the answer is taken, its content is never read. The
store is tried from where this runs, which pods may see otherwise. It does not know what the chart or `k8s/` would
install, only what our objects need.
"""

import functools
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from mint_lib.cluster import ClusterConfig
from mint_lib.errors import MintError
from pipelines.cluster_api import ApiReader, Right, Unreachable, load_client
from pipelines.doctor import Check

if TYPE_CHECKING:
    from kubernetes.client import ApiClient

MIN_KUBERNETES = (1, 32)
"""What KServe 0.21 asks for."""
STANDALONE_NAMESPACE = "kubeflow"
"""Where a standalone Kubeflow Pipelines lives and runs its steps."""
STORE_DEADLINE_SECONDS = 10.0
_ENFORCE = "pod-security.kubernetes.io/enforce"
_STEP_RIGHTS = (
    *(Right(verb, "ray.io", "rayjobs") for verb in ("create", "get", "list", "watch", "delete")),
    *(Right(verb, "", "pods") for verb in ("get", "list")),
    Right("get", "", "pods/log"),
)
_APPLY_RIGHTS = tuple(Right(verb, "serving.kserve.io", "inferenceservices") for verb in ("get", "create", "patch"))


class _Kind(NamedTuple):
    """A kind that our objects are of."""

    group: str
    version: str
    plural: str
    folder: str
    """Of `k8s/`, which installs it; empty for what clusters bring."""
    is_needed: bool


class _Controller(NamedTuple):
    """A Deployment without which our objects stay as they are."""

    deployment: str
    folder: str
    is_needed: bool


def run_cluster_checks(cluster: ClusterConfig | None, *, api_client: "ApiClient | None" = None) -> Iterator[Check]:
    """Every check in turn, the store's last; an API server that cannot be reached is one finding and the end.

    Args:
        cluster: The cluster file; without one only the API server, kinds, controllers and nodes are looked at.
        api_client: A client of the `kubernetes` package; None takes the pod's account or the current kubeconfig.
    """
    checks: list[Callable[[ApiReader], Iterator[Check]]] = [
        _check_server,
        *(functools.partial(check, cluster=cluster) for check in (_check_kinds, _check_controllers, _check_nodes)),
    ]
    if cluster is not None:
        for part in (_check_namespaces, _check_names, _check_queue, _check_rights, _check_kubeflow):
            checks.append(functools.partial(part, cluster=cluster))
    try:
        api = ApiReader(api_client or load_client())
        for check in checks:
            yield from check(api)
    except Unreachable as error:
        mend = "kubectl config get-contexts; kubectl version"
        yield Check("api server", "missing", f"{error}; nothing more can be checked", mend)
        return
    if cluster is None:
        yield Check(
            "cluster file", "note", "none given: names, queue, permissions and store unchecked", "add --cluster FILE"
        )
    else:
        yield _check_store(cluster)


def _check_server(api: ApiReader) -> Iterator[Check]:
    version = api.get("/version").body
    name = str(version.get("gitVersion", "unknown"))
    numbers = tuple(int("".join(filter(str.isdigit, str(version.get(part, "0")))) or 0) for part in ("major", "minor"))
    wanted = ".".join(map(str, MIN_KUBERNETES))
    if numbers >= MIN_KUBERNETES:
        yield Check("api server", "ok", f"Kubernetes {name}, asked as {api.user or 'an unknown account'}")
    else:
        yield Check(
            "api server", "missing", f"Kubernetes {name}; KServe needs {wanted}", f"upgrade to {wanted} or later"
        )


def _check_kinds(api: ApiReader, cluster: ClusterConfig | None) -> Iterator[Check]:
    has_queue, is_encrypted, has_scaler = _describe_needs(cluster)
    has_hpa = cluster is not None and not has_scaler
    for kind in (
        _Kind("serving.kserve.io", "v1beta1", "inferenceservices", "50-kserve-crds", True),
        _Kind("serving.kserve.io", "v1alpha1", "servingruntimes", "50-kserve-crds", True),
        _Kind("ray.io", "v1", "rayjobs", "20-kuberay", True),
        _Kind("cert-manager.io", "v1", "certificates", "10-cert-manager", is_encrypted),
        _Kind("kueue.x-k8s.io", "v1beta2", "localqueues", "30-kueue", has_queue),
        _Kind("keda.sh", "v1alpha1", "scaledobjects", "40-keda", has_scaler),
        _Kind("metrics.k8s.io", "v1beta1", "pods", "", has_hpa),
        _Kind("monitoring.coreos.com", "v1", "podmonitors", "60-prometheus-operator", False),
        _Kind("monitoring.coreos.com", "v1", "prometheusrules", "60-prometheus-operator", False),
    ):
        name = f"kind {kind.plural}.{kind.group}"
        answer = api.get(f"/apis/{kind.group}/{kind.version}")
        if kind.plural in {resource.get("name") for resource in answer.list("resources")}:
            yield Check(name, "ok", f"{kind.version} is served")
        elif answer.status == 403:
            yield _say_forbidden(name, f"read /apis/{kind.group}", f"kubectl api-resources --api-group={kind.group}")
        else:
            served = [version["version"] for version in api.get(f"/apis/{kind.group}").list("versions")]
            found = f"{kind.version} is not served" + (f", only {', '.join(served)}" if served else "")
            without = "" if kind.is_needed else "; needed only where the cluster file or the chart uses it"
            mend = f"kubectl apply --server-side -k k8s/{kind.folder}" if kind.folder else "install metrics-server"
            yield Check(name, "missing" if kind.is_needed else "note", found + without, mend)


def _check_controllers(api: ApiReader, cluster: ClusterConfig | None) -> Iterator[Check]:
    has_queue, is_encrypted, has_scaler = _describe_needs(cluster)
    for controller in (
        _Controller("kserve-controller-manager", "51-kserve", True),
        _Controller("kuberay-operator", "20-kuberay", True),
        _Controller("kueue-controller-manager", "30-kueue", has_queue),
        _Controller("keda-operator", "40-keda", has_scaler),
        _Controller("cert-manager", "10-cert-manager", is_encrypted),
    ):
        if not controller.is_needed:
            continue
        name = f"controller {controller.deployment}"
        # Whoever installed it chose the namespace, so it is looked for by its name in all of them.
        answer = api.get("/apis/apps/v1/deployments", {"fieldSelector": f"metadata.name={controller.deployment}"})
        if answer.status != 200:
            listing = "kubectl get deployments --all-namespaces"
            yield _say_forbidden(
                name, "list deployments in all namespaces", f"{listing} | grep {controller.deployment}"
            )
            continue
        found = [item for item in answer.list("items") if item["metadata"]["name"] == controller.deployment]
        ready = [item for item in found if item.get("status", {}).get("readyReplicas", 0) > 0]
        if ready:
            yield Check(name, "ok", f"ready in {ready[0]['metadata']['namespace']}")
        elif found:
            where = found[0]["metadata"]["namespace"]
            mend = f"kubectl -n {where} describe deployment {controller.deployment}; kubectl -n {where} get events"
            yield Check(name, "missing", f"no pod of it is ready in {where}", mend)
        else:
            mend = f"kubectl apply --server-side -k k8s/{controller.folder}"
            yield Check(name, "missing", "no Deployment of this name in any namespace", mend)


def _check_nodes(api: ApiReader, cluster: ClusterConfig | None) -> Iterator[Check]:
    resource = cluster.serving.gpu.resource if cluster else "nvidia.com/gpu"
    answer = api.get("/api/v1/nodes")
    if answer.status != 200:
        yield _say_forbidden("gpu nodes", "list nodes", "kubectl describe nodes | grep -A6 Allocatable")
        return
    nodes = [node for node in answer.list("items") if not node.get("spec", {}).get("unschedulable")]
    counts = [int(node.get("status", {}).get("allocatable", {}).get(resource, 0)) for node in nodes]
    if any(counts):
        yield Check("gpu nodes", "ok", f"{sum(counts)} {resource} on {sum(map(bool, counts))} of {len(nodes)} nodes")
    else:
        found = f"none of {len(nodes)} nodes offers {resource}; the recipes with 3B and 11B students need them"
        yield Check("gpu nodes", "note", found, "k8s/README.md, GPU operator")


def _check_namespaces(api: ApiReader, cluster: ClusterConfig) -> Iterator[Check]:
    for namespace in _list_namespaces(cluster):
        name = f"namespace {namespace}"
        answer = api.get(f"/api/v1/namespaces/{namespace}")
        if answer.status == 403:
            yield _say_forbidden(
                name, f"get namespaces/{namespace}", f"kubectl get namespace {namespace} --show-labels"
            )
            continue
        if answer.status != 200:
            yield Check(name, "missing", "there is no such namespace", f"kubectl create namespace {namespace}")
            continue
        level = (answer.body.get("metadata", {}).get("labels") or {}).get(_ENFORCE, "none")
        if level == "restricted":
            yield Check(name, "ok", "Pod Security restricted is enforced")
        elif namespace == cluster.namespace:
            mend = f"kubectl label namespace {namespace} {_ENFORCE}=restricted --overwrite"
            yield Check(name, "missing", f"Pod Security level enforced: {level}, not restricted", mend)
        else:
            yield Check(name, "note", f"Pod Security level enforced: {level}; Kubeflow's own pods need no less")


def _check_names(api: ApiReader, cluster: ClusterConfig) -> Iterator[Check]:
    """Everything that the cluster file names: whether it is there."""
    steps_namespace = _list_namespaces(cluster)[-1]
    for namespace in _list_namespaces(cluster):
        for plural, name, arguments in _list_shared_names(cluster):
            yield _check_name(api, namespace, plural, name, arguments)
    for secret in (cluster.deidentification_secret, cluster.chat_secret):
        if secret is not None:
            yield _check_name(api, steps_namespace, "secrets", secret, "secret generic {name} --from-env-file=FILE")
    tokens = cluster.serving.tokens_secret
    yield _check_name(api, cluster.namespace, "secrets", tokens, "secret generic {name} --from-file=tokens.json")
    for namespace, account in (
        (cluster.namespace, cluster.serving.service_account),
        (cluster.namespace, cluster.ray.service_account),
        (steps_namespace, cluster.kubeflow.service_account),
    ):
        yield _check_name(api, namespace, "serviceaccounts", account, "serviceaccount {name}")
    for path, priority in (
        ("/apis/scheduling.k8s.io/v1/priorityclasses", cluster.ray.pod_priority),
        ("/apis/kueue.x-k8s.io/v1beta2/workloadpriorityclasses", cluster.ray.workload_priority),
    ):
        if priority is not None:
            plural = path.rpartition("/")[2]
            get = f"kubectl get {plural} {priority}"
            yield _judge_name(f"{plural} {priority}", api.status(f"{path}/{priority}"), get, "helm/README.md, Kueue")


def _list_shared_names(cluster: ClusterConfig) -> Iterator[tuple[str, str, str]]:
    """What steps and servers both need, as (plural, name, arguments of `kubectl create` that make it)."""
    for secret in (cluster.s3_secret, cluster.hub_secret):
        if secret is not None:
            yield "secrets", secret, "secret generic {name} --from-env-file=FILE"
    for secret in cluster.image_pull_secrets:
        file = "--from-file=.dockerconfigjson=config.json --type=kubernetes.io/dockerconfigjson"
        yield "secrets", secret, "secret generic {name} " + file
    if cluster.s3_ca_config_map is not None:
        yield "configmaps", cluster.s3_ca_config_map, "configmap {name} --from-file=ca.crt"


def _check_name(api: ApiReader, namespace: str, plural: str, name: str, arguments: str) -> Check:
    title = f"{plural.removesuffix('s')} {name} in {namespace}"
    get = f"kubectl -n {namespace} get {plural} {name} -o name"
    # Asked first: a refused look at a secret is an alarm in some clusters' audit.
    if api.may(Right("get", "", plural), namespace=namespace, name=name) is False:
        return _say_forbidden(title, f"get {plural}/{name}", get)
    status = api.status(f"/api/v1/namespaces/{namespace}/{plural}/{name}")
    return _judge_name(title, status, get, f"kubectl -n {namespace} create {arguments.format(name=name)}")


def _judge_name(title: str, status: int, get: str, mend: str) -> Check:
    if status == 200:
        return Check(title, "ok", "is there")
    if status == 403:
        return _say_forbidden(title, "read it", get)
    return Check(title, "missing", "is not there", mend)


def _check_queue(api: ApiReader, cluster: ClusterConfig) -> Iterator[Check]:
    queue = cluster.ray.queue
    if queue is None:
        yield Check("queue", "note", "the cluster file names none: Ray jobs start at once, whatever is free")
        return
    name, get = f"queue {queue} in {cluster.namespace}", f"kubectl -n {cluster.namespace} get localqueue {queue}"
    answer = api.get(f"/apis/kueue.x-k8s.io/v1beta2/namespaces/{cluster.namespace}/localqueues/{queue}")
    if answer.status == 403:
        yield _say_forbidden(name, f"get localqueues/{queue}", get)
    elif answer.status != 200:
        yield Check(name, "missing", "is not there: Ray jobs would wait for ever", "helm/README.md, Kueue")
    else:
        conditions = {item.get("type"): item for item in answer.body.get("status", {}).get("conditions") or ()}
        active = conditions.get("Active", {})
        if active.get("status") == "True":
            yield Check(name, "ok", "active")
        else:
            reason = active.get("message") or active.get("reason") or "Kueue has not looked at it yet"
            yield Check(name, "missing", f"is not active: {reason}", f"{get} -o yaml; kubectl get clusterqueues")


def _check_rights(api: ApiReader, cluster: ClusterConfig) -> Iterator[Check]:
    steps_namespace, namespace = _list_namespaces(cluster)[-1], cluster.namespace
    account = f"system:serviceaccount:{steps_namespace}:{cluster.kubeflow.service_account}"
    ask = f"kubectl auth can-i --list -n {namespace}"
    answers = {right: api.may(right, namespace=namespace, user=account) for right in _STEP_RIGHTS}
    yield _judge_rights("rights of the steps", answers, f"{ask} --as={account}", "helm/README.md, service accounts")
    if api.user != account:
        answers = {right: api.may(right, namespace=namespace) for right in _APPLY_RIGHTS}
        check = _judge_rights("your rights to serve", answers, ask, f"{ask}; ask who administers {namespace}")
        # Who only submits pipelines applies nothing.
        yield check._replace(status="note") if check.status == "missing" else check


def _judge_rights(name: str, answers: dict[Right, bool | None], ask: str, mend: str) -> Check:
    if None in answers.values():
        return _say_forbidden(name, "ask for another account's rights", ask)
    refused = [right for right, is_allowed in answers.items() if not is_allowed]
    if refused:
        return Check(name, "missing", f"not allowed: {_spell_rights(refused)}", mend)
    return Check(name, "ok", _spell_rights(list(answers)))


def _spell_rights(rights: list[Right]) -> str:
    """For instance `get, list pods; get pods/log`."""
    targets = dict.fromkeys(right.target for right in rights)
    verbs = {target: [right.verb for right in rights if right.target == target] for target in targets}
    return "; ".join(f"{', '.join(verbs[target])} {target}" for target in targets)


def _check_kubeflow(api: ApiReader, cluster: ClusterConfig) -> Iterator[Check]:
    path, host = "/apis/v2beta1/healthz", cluster.kubeflow.host
    if host is not None:
        where, answer = host, api.get_from_host(host.rstrip("/") + path)
    else:
        where = f"service ml-pipeline of {STANDALONE_NAMESPACE}"
        service = f"/api/v1/namespaces/{STANDALONE_NAMESPACE}/services/http:ml-pipeline:8888"
        answer = api.get(f"{service}/proxy{path}")
    look = f"kubectl -n {STANDALONE_NAMESPACE} get pods -l app=ml-pipeline"
    if answer.status == 200 and "multi_user" in answer.body:
        has_users = bool(answer.body["multi_user"])
        if has_users and cluster.kubeflow.namespace is None:
            found = f"{where} has several users, and the cluster file names no kubeflow.namespace"
            yield Check("kubeflow pipelines", "missing", found, "set kubeflow.namespace to your profile's namespace")
        else:
            yield Check("kubeflow pipelines", "ok", f"{where} answers" + (", several users" if has_users else ""))
    elif answer.status == 0:
        mend = "check kubeflow.host; from here a port-forward may be needed: mint submit --host"
        yield Check("kubeflow pipelines", "missing", f"{where} cannot be reached from here", mend)
    elif answer.status in (301, 302, 303, 307, 401):
        yield Check("kubeflow pipelines", "note", f"{where} answers and asks for a login", "mint submit with a token")
    elif answer.status == 403:
        yield _say_forbidden("kubeflow pipelines", f"reach {where}", look)
    else:
        mend = f"{look}; kubectl apply --server-side -k k8s/71-kubeflow"
        yield Check("kubeflow pipelines", "missing", f"{where} answers {answer.status}", mend)


def _check_store(cluster: ClusterConfig) -> Check:
    from mint_lib.store import Store

    settings = cluster.s3.model_copy(update={"deadline_seconds": STORE_DEADLINE_SECONDS})
    try:
        Store(settings).check_access()
    except (MintError, ImportError) as error:
        is_in_pod = bool(os.environ.get("KUBERNETES_SERVICE_HOST"))
        mend = "s3 and s3_secret of the cluster file; on this machine AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        found = f"from here: {error}" + ("" if is_in_pod else " Pods may still reach it: run mint doctor in one.")
        return Check("store", "missing" if is_in_pod else "note", found, mend)
    return Check("store", "ok", f"{settings.endpoint_url}: works from here; pods may see it otherwise")


def _describe_needs(cluster: ClusterConfig | None) -> tuple[bool, bool, bool]:
    """Whether the cluster file asks for a queue, for encryption between Ray's pods, and for KEDA."""
    if cluster is None:
        return False, False, False
    return cluster.ray.queue is not None, cluster.ray.is_encrypted, cluster.serving.autoscaler == "external"


def _list_namespaces(cluster: ClusterConfig) -> tuple[str, ...]:
    """Where servers and Ray jobs run, then where steps run, if that is another one."""
    steps_namespace = cluster.kubeflow.namespace or STANDALONE_NAMESPACE
    return tuple(dict.fromkeys((cluster.namespace, steps_namespace)))


def _say_forbidden(name: str, what: str, command: str) -> Check:
    return Check(name, "note", f"unknown: this account may not {what}", f"somebody who may: {command}")
