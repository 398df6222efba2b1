"""`mint doctor --cluster` against a double of an API server over HTTP: every check when good, missing and forbidden."""

import asyncio
import logging
import re
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mint_lib.cluster import ClusterConfig
from mint_lib.store import Store
from pipelines import cluster_doctor
from pipelines.cluster_doctor import run_cluster_checks
from pipelines.doctor import Check

kmock = pytest.importorskip("kmock", reason="kmock is not installed")
kubernetes = pytest.importorskip("kubernetes.client", reason="kubernetes is not installed")

ROOT = Path(__file__).parents[2]
STEPS = "system:serviceaccount:kubeflow:mint-pipeline"
HEALTH = "/api/v1/namespaces/kubeflow/services/http:ml-pipeline:8888/proxy/apis/v2beta1/healthz"
CANARY = "canary-of-a-secret-value"
KINDS = (
    "serving.kserve.io/v1beta1/inferenceservices",
    "serving.kserve.io/v1alpha1/servingruntimes",
    "ray.io/v1/rayjobs",
    "cert-manager.io/v1/certificates",
    "kueue.x-k8s.io/v1beta2/localqueues",
    "keda.sh/v1alpha1/scaledobjects",
    "monitoring.coreos.com/v1/podmonitors",
    "monitoring.coreos.com/v1/prometheusrules",
    "metrics.k8s.io/v1beta1/pods",
)
CONTROLLERS = {
    "kserve-controller-manager": "kserve",
    "kuberay-operator": "kuberay-system",
    "kueue-controller-manager": "kueue-system",
    "keda-operator": "keda",
    "cert-manager": "cert-manager",
}
CLUSTER = ClusterConfig.model_validate(
    {
        "namespace": "mint",
        "images": {name: f"registry.example/mint-{name}@sha256:{'a' * 64}" for name in ("serve", "train")},
        "s3": {"endpoint_url": "http://store.invalid:8333"},
        "s3_ca_config_map": "mint-s3-ca",
        "hub_secret": "mint-hub",
        "deidentification_secret": "mint-deidentification",
        "chat_secret": "mint-chat",
        "image_pull_secrets": ["registry"],
        "serving": {"autoscaler": "external"},
        "ray": {"queue": "mint", "is_encrypted": True, "pod_priority": "high", "workload_priority": "research"},
    }
)


class Emulator(kmock.KubernetesEmulator):
    """An API server's memory. Reviews are questions: no server stores one."""

    async def _handle(self, request: Any) -> Any:
        if (request.resource.plural or "" if request.resource else "").endswith("reviews"):
            return await kmock.KubernetesScaffold._handle(self, request)
        return await super()._handle(request)


class Api:
    """The double: a cluster on which nothing is missing, for a test to break."""

    def __init__(self, emulator: Any, url: str) -> None:
        self.emulator, self.url = emulator, url
        self.user = "maria"
        self.refused: set[tuple[str, str, str]] = set()
        """(who, verb, resource) that the reviews answer with no."""
        self.may_ask_for_others = True
        self.version = {"major": "1", "minor": "33+", "gitVersion": "v1.33.2"}
        for kind in KINDS:
            emulator.resources[kind] = {}
        objects = emulator.objects
        for name, namespace in CONTROLLERS.items():
            metadata = {"name": name, "namespace": namespace}
            objects["apps/v1/deployments", namespace, name] = {"metadata": metadata, "status": {"readyReplicas": 1}}
        for name, num_gpus in (("node-1", "4"), ("node-2", "4"), ("node-3", "0")):
            objects["v1/nodes", None, name] = {"spec": {}, "status": {"allocatable": {"nvidia.com/gpu": num_gpus}}}
        self.levels = {"mint": "restricted", "kubeflow": "baseline"}
        """Pod Security level by namespace."""
        for namespace in self.levels:
            emulator[f"get /api/v1/namespaces/{namespace}"] << self._tell_namespace
            for secret in ("mint-s3", "mint-hub", "registry"):
                objects["v1/secrets", namespace, secret] = {"data": {"key": CANARY}}
            objects["v1/configmaps", namespace, "mint-s3-ca"] = {"data": {"ca.crt": CANARY}}
        for secret in ("mint-deidentification", "mint-chat"):
            objects["v1/secrets", "kubeflow", secret] = {"data": {"key": CANARY}}
        objects["v1/secrets", "mint", "mint-serving-tokens"] = {"data": {"tokens.json": CANARY}}
        for namespace, account in (("mint", "mint-serving"), ("mint", "mint-ray"), ("kubeflow", "mint-pipeline")):
            objects["v1/serviceaccounts", namespace, account] = {}
        objects["scheduling.k8s.io/v1/priorityclasses", None, "high"] = {}
        objects["kueue.x-k8s.io/v1beta2/workloadpriorityclasses", None, "research"] = {}
        self.queue_conditions: list[dict[str, str]] = [{"type": "Active", "status": "True"}]
        self.health: Any = {"multi_user": False}
        queue = "get /apis/kueue.x-k8s.io/v1beta2/namespaces/mint/localqueues/mint"
        emulator[queue] << (lambda _: {"status": {"conditions": self.queue_conditions}})
        emulator["get /version"] << (lambda _: self.version)
        emulator[f"get {HEALTH}"] << self._tell_health
        emulator["get /apis/v2beta1/healthz"] << self._tell_health
        emulator["post /apis/authentication.k8s.io/v1/selfsubjectreviews"] << (
            lambda _: {"status": {"userInfo": {"username": self.user}}}
        )
        reviews = "post /apis/authorization.k8s.io/v1"
        emulator[f"{reviews}/selfsubjectaccessreviews"] << (lambda request: self._review(request, self.user))
        emulator[f"{reviews}/subjectaccessreviews"] << self._review_another

    def _tell_namespace(self, request: Any) -> Any:
        name = request.url.path.rpartition("/")[2]
        if name not in self.levels:
            raise kmock.KubernetesError(status=404)
        return {"metadata": {"name": name, "labels": {"pod-security.kubernetes.io/enforce": self.levels[name]}}}

    def _tell_health(self, request: Any) -> Any:
        if isinstance(self.health, int):
            raise kmock.KubernetesError(status=self.health)
        return self.health

    def _review_another(self, request: Any) -> Any:
        if not self.may_ask_for_others:
            raise kmock.KubernetesError(status=403)
        return self._review(request, request.data["spec"]["user"])

    def _review(self, request: Any, user: str) -> dict[str, Any]:
        asked = request.data["spec"]["resourceAttributes"]
        resource = "/".join(filter(None, (asked["resource"], asked.get("subresource"))))
        return {"status": {"allowed": (user, asked["verb"], resource) not in self.refused}}

    def forbid(self, pattern: str) -> None:
        """Answer every GET of a path with 403."""
        self.emulator["get", re.compile(pattern)] ** 100 << 403

    def remove(self, resource: str, namespace: str | None, name: str) -> None:
        del self.emulator.objects[resource, namespace, name]

    def replace(self, resource: str, namespace: str | None, name: str, document: dict[str, Any]) -> None:
        self.remove(resource, namespace, name)
        self.emulator.objects[resource, namespace, name] = document

    def client(self) -> Any:
        configuration = kubernetes.Configuration()
        configuration.host, configuration.retries = self.url, False
        return kubernetes.ApiClient(configuration)

    def check(self, cluster: ClusterConfig | None = CLUSTER) -> dict[str, Check]:
        """Findings by name."""
        return {check.name: check for check in run_cluster_checks(cluster, api_client=self.client())}

    def find(self, name: str, cluster: ClusterConfig | None = CLUSTER) -> Check:
        """One finding; the checks after it are not run."""
        return next(check for check in run_cluster_checks(cluster, api_client=self.client()) if check.name == name)


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Iterator[Api]:
    """A running double, in a thread with a loop of its own; the store counts as good."""
    monkeypatch.setattr(Store, "check_access", lambda self: None)
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    loop, is_ready, stop, made = asyncio.new_event_loop(), threading.Event(), asyncio.Event(), []

    async def serve() -> None:
        async with Emulator() as emulator, kmock.Server(emulator) as server:
            made.append(Api(emulator, str(server.url).rstrip("/")))
            is_ready.set()
            await stop.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),), daemon=True)
    thread.start()
    assert is_ready.wait(10)
    yield made[0]
    loop.call_soon_threadsafe(stop.set)
    thread.join(10)
    loop.close()


def test_cluster_that_has_everything_is_found_good(api):
    found = api.check()
    assert {name: check.detail for name, check in found.items() if check.status != "ok"} == {
        "namespace kubeflow": "Pod Security level enforced: baseline; Kubeflow's own pods need no less"
    }
    assert found["api server"].detail == "Kubernetes v1.33.2, asked as maria"
    assert found["gpu nodes"].detail == "8 nvidia.com/gpu on 2 of 3 nodes"
    assert found["controller kuberay-operator"].detail == "ready in kuberay-system"
    rights = "create, get, list, watch, delete rayjobs.ray.io; get, list pods; get pods/log"
    assert found["rights of the steps"].detail == rights
    expected = {f"kind {kind.split('/')[2]}.{kind.split('/')[0]}" for kind in KINDS}
    expected |= {f"controller {name}" for name in CONTROLLERS} | {"namespace mint", "queue mint in mint"}
    expected |= {f"secret {name} in {where}" for name in ("mint-s3", "mint-hub") for where in ("mint", "kubeflow")}
    expected |= {"secret mint-deidentification in kubeflow", "secret mint-chat in kubeflow"}
    expected |= {"secret mint-serving-tokens in mint", "configmap mint-s3-ca in kubeflow", "priorityclasses high"}
    expected |= {"serviceaccount mint-ray in mint", "serviceaccount mint-pipeline in kubeflow", "rights of the steps"}
    assert expected <= set(found)
    assert not {"secret mint-deidentification in mint", "secret mint-chat in mint"} & set(found)


def _remove(*key: Any) -> Callable[[Api], None]:
    return lambda api: api.remove(*key)


def _set(**values: Any) -> Callable[[Api], None]:
    return lambda api: [setattr(api, key, value) for key, value in values.items()] and None


def _drop_kind(kind: str) -> Callable[[Api], None]:
    def drop(api: Api) -> None:
        del api.emulator.resources[kind]
        for key in [key for key in api.emulator.objects if kind.startswith(f"{key[0].group}/{key[0].version}")]:
            del api.emulator.objects[key]

    return drop


def _stop_controller(name: str) -> Callable[[Api], None]:
    def stop(api: Api) -> None:
        status = {"readyReplicas": 0}
        metadata = {"name": name, "namespace": CONTROLLERS[name]}
        document = {"metadata": metadata, "status": status}
        api.replace("apps/v1/deployments", CONTROLLERS[name], name, document)

    return stop


INACTIVE = [{"type": "Active", "status": "False", "message": "ClusterQueue is stopped"}]
BROKEN = {
    "old server": (_set(version={"major": "1", "minor": "30"}), "api server", "KServe needs 1.32"),
    "no InferenceService": (_drop_kind(KINDS[0]), "kind inferenceservices.serving.kserve.io", "v1beta1 is not served"),
    "no RayJob": (_drop_kind(KINDS[2]), "kind rayjobs.ray.io", "v1 is not served"),
    "no certificates": (_drop_kind(KINDS[3]), "kind certificates.cert-manager.io", "v1 is not served"),
    "no Kueue": (_drop_kind(KINDS[4]), "kind localqueues.kueue.x-k8s.io", "v1beta2 is not served"),
    "no KEDA": (_drop_kind(KINDS[5]), "kind scaledobjects.keda.sh", "v1alpha1 is not served"),
    **{f"{name} down": (_stop_controller(name), f"controller {name}", "no pod of it is ready") for name in CONTROLLERS},
    **{
        f"no {name}": (_remove("apps/v1/deployments", where, name), f"controller {name}", "no Deployment of this name")
        for name, where in CONTROLLERS.items()
    },
    "no namespace": (_set(levels={}), "namespace mint", "there is no such namespace"),
    "no label": (_set(levels={"mint": "privileged"}), "namespace mint", "enforced: privileged, not restricted"),
    "no S3 secret": (_remove("v1/secrets", "mint", "mint-s3"), "secret mint-s3 in mint", "is not there"),
    "none for steps": (_remove("v1/secrets", "kubeflow", "mint-s3"), "secret mint-s3 in kubeflow", "is not there"),
    "no hub secret": (_remove("v1/secrets", "mint", "mint-hub"), "secret mint-hub in mint", "is not there"),
    **{
        f"no {name}": (_remove("v1/secrets", "kubeflow", name), f"secret {name} in kubeflow", "is not there")
        for name in ("mint-deidentification", "mint-chat")
    },
    "no pull secret": (_remove("v1/secrets", "mint", "registry"), "secret registry in mint", "is not there"),
    "no tokens": (
        _remove("v1/secrets", "mint", "mint-serving-tokens"),
        "secret mint-serving-tokens in mint",
        "is not there",
    ),
    "no authority": (_remove("v1/configmaps", "mint", "mint-s3-ca"), "configmap mint-s3-ca in mint", "is not there"),
    "no account": (_remove("v1/serviceaccounts", "mint", "mint-ray"), "serviceaccount mint-ray in mint", "not there"),
    "no steps' account": (
        _remove("v1/serviceaccounts", "kubeflow", "mint-pipeline"),
        "serviceaccount mint-pipeline in kubeflow",
        "is not there",
    ),
    "no priority": (
        _remove("scheduling.k8s.io/v1/priorityclasses", None, "high"),
        "priorityclasses high",
        "is not there",
    ),
    "queue stopped": (_set(queue_conditions=INACTIVE), "queue mint in mint", "ClusterQueue is stopped"),
    "queue new": (_set(queue_conditions=[]), "queue mint in mint", "Kueue has not looked at it yet"),
    "steps refused": (
        _set(refused={(STEPS, "delete", "rayjobs"), (STEPS, "get", "pods/log")}),
        "rights of the steps",
        "not allowed: delete rayjobs.ray.io; get pods/log",
    ),
    "KFP with users": (_set(health={"multi_user": True}), "kubeflow pipelines", "names no kubeflow.namespace"),
    "KFP down": (_set(health=503), "kubeflow pipelines", "answers 503"),
    "KFP is none": (_set(health={"other": 1}), "kubeflow pipelines", "answers 200"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_cluster_that_lacks_one_thing_names_it_with_a_mend(api, case):
    damage, name, words = BROKEN[case]
    damage(api)
    check = api.find(name)
    assert check.status == "missing"
    assert words in check.detail
    assert check.mend
    for path in re.findall(r"\b(?:k8s|helm)/[\w./-]*\w", check.mend):
        assert (ROOT / path).exists()


@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        (r"/apis/ray\.io.*", "kind rayjobs.ray.io"),
        (r"/apis/apps/v1/deployments", "controller kserve-controller-manager"),
        (r"/api/v1/nodes", "gpu nodes"),
        (r"/api/v1/namespaces/mint", "namespace mint"),
        (r"/api/v1/namespaces/mint/secrets/mint-s3", "secret mint-s3 in mint"),
        (r"/api/v1/namespaces/mint/configmaps/.*", "configmap mint-s3-ca in mint"),
        (r"/apis/scheduling.*", "priorityclasses high"),
    ],
)
def test_look_that_is_forbidden_is_said_with_who_could(api, pattern, name):
    api.forbid(pattern)
    check = api.find(name)
    assert check.status == "note"
    assert "this account may not" in check.detail
    assert check.mend.startswith("somebody who may: kubectl")


def test_queue_that_may_not_be_read_is_said(api):
    cluster = CLUSTER.model_copy(update={"ray": CLUSTER.ray.model_copy(update={"queue": "other"})})
    api.forbid(".*/localqueues/other")
    assert "may not get localqueues/other" in api.find("queue other in mint", cluster).detail


def test_secret_that_may_not_be_read_is_not_looked_at(api):
    api.refused = {("maria", "get", "secrets")}
    check = api.find("secret mint-s3 in mint")
    assert check.status == "note"
    assert not [request for request in list(api.emulator) if "/secrets/" in str(request.url)]


def test_rights_of_steps_that_may_not_be_asked_are_said(api):
    api.may_ask_for_others = False
    check = api.find("rights of the steps")
    assert (check.status, "another account" in check.detail) == ("note", True)
    assert f"--as={STEPS}" in check.mend


def test_rights_inside_a_step_are_its_own_and_no_server_is_applied(api):
    api.user, api.may_ask_for_others = STEPS, False
    found = api.check()
    assert found["rights of the steps"].status == "ok"
    assert "your rights to serve" not in found


def test_person_who_may_not_serve_is_told_but_nothing_is_missing(api):
    api.refused = {("maria", "create", "inferenceservices")}
    check = api.find("your rights to serve")
    assert (check.status, check.detail) == ("note", "not allowed: create inferenceservices.serving.kserve.io")


@pytest.mark.parametrize(
    ("health", "status", "words"),
    [
        ({"multi_user": False}, "ok", "answers"),
        (401, "note", "asks for a login"),
        (403, "note", "may not reach"),
        (404, "missing", "answers 404"),
    ],
)
def test_kubeflow_at_a_host_is_asked_there(api, health, status, words):
    api.health = health
    cluster = CLUSTER.model_copy(update={"kubeflow": CLUSTER.kubeflow.model_copy(update={"host": api.url})})
    check = api.find("kubeflow pipelines", cluster)
    assert (check.status, words in check.detail, api.url in check.detail) == (status, True, True)


def test_kubeflow_host_that_is_down_is_missing(api):
    host = f"http://127.0.0.1:{_find_closed_port()}"
    cluster = CLUSTER.model_copy(update={"kubeflow": CLUSTER.kubeflow.model_copy(update={"host": host})})
    assert "cannot be reached from here" in api.find("kubeflow pipelines", cluster).detail


def test_optional_parts_are_not_missing_where_the_cluster_file_needs_none(api):
    for kind in KINDS[3:]:
        _drop_kind(kind)(api)
    for name in ("keda-operator", "kueue-controller-manager", "cert-manager"):
        api.remove("apps/v1/deployments", CONTROLLERS[name], name)
    api.emulator.resources[KINDS[-1]] = {}
    found = api.check(_without_options())
    assert "missing" not in {check.status for check in found.values()}
    assert found["kind localqueues.kueue.x-k8s.io"].status == "note"


def test_autoscaling_by_cpu_needs_the_metrics_server(api):
    _drop_kind(KINDS[-1])(api)
    check = api.find("kind pods.metrics.k8s.io", _without_options())
    assert (check.status, check.mend) == ("missing", "install metrics-server")


def _without_options() -> ClusterConfig:
    return ClusterConfig.model_validate(CLUSTER.model_dump(mode="json", exclude={"ray", "serving"}))


def test_kind_that_is_served_in_another_version_only_is_missing_with_that_version(api):
    _drop_kind(KINDS[4])(api)
    api.emulator.resources["kueue.x-k8s.io/v1beta1/localqueues"] = {}
    check = api.find("kind localqueues.kueue.x-k8s.io")
    assert (check.status, check.detail) == ("missing", "v1beta2 is not served, only v1beta1")


def test_nodes_without_gpus_or_closed_to_pods_are_a_note(api):
    for name in ("node-1", "node-2"):
        allocatable = {"nvidia.com/gpu": "4"}
        node = {"spec": {"unschedulable": True}, "status": {"allocatable": allocatable}}
        api.replace("v1/nodes", None, name, node)
    check = api.find("gpu nodes")
    assert (check.status, check.detail.split(";")[0]) == ("note", "none of 1 nodes offers nvidia.com/gpu")


def test_without_a_cluster_file_only_the_cluster_itself_is_checked(api):
    found = api.check(None)
    assert found["cluster file"].mend == "add --cluster FILE"
    assert {"api server", "gpu nodes", "kind rayjobs.ray.io"} <= set(found)
    assert not [name for name in found if name.startswith(("secret", "namespace", "queue", "store"))]


def test_doctor_changes_nothing_and_reads_no_secret(api, caplog):
    with caplog.at_level(logging.DEBUG):
        found = api.check()
    assert {request.method.value for request in list(api.emulator)} == {"GET", "POST"}
    posts = {str(request.url.path) for request in list(api.emulator) if request.method.value == "POST"}
    assert all(path.endswith("reviews") for path in posts)
    looks = [request for request in api.emulator if "/secrets/" in str(request.url.path)]
    assert looks
    assert all("as=PartialObjectMetadata" in request.headers["Accept"] for request in looks)
    assert CANARY not in caplog.text + str(found)


def test_server_that_is_down_is_one_finding():
    configuration = kubernetes.Configuration()
    configuration.host, configuration.retries = f"http://127.0.0.1:{_find_closed_port()}", False
    (check,) = run_cluster_checks(CLUSTER, api_client=kubernetes.ApiClient(configuration))
    assert (check.name, check.status) == ("api server", "missing")
    assert "no API server answers at http://127.0.0.1" in check.detail
    assert "kubectl" in check.mend


def test_account_that_the_server_does_not_know_is_one_finding(api):
    api.emulator["get", re.compile(".*")] << 401
    api.emulator["post", re.compile(".*")] ** 100 << 401
    (check,) = api.check().values()
    assert "does not know this account (401)" in check.detail


def test_machine_without_a_kubeconfig_is_one_finding(tmp_path, monkeypatch):
    from kubernetes.config import kube_config

    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setattr(kube_config, "KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "none"))
    (check,) = run_cluster_checks(CLUSTER)
    assert (check.status, "there is no usable kubeconfig" in check.detail) == ("missing", True)


def test_store_is_tried_for_real(store):
    check = cluster_doctor._check_store(CLUSTER.model_copy(update={"s3": store.settings}))
    assert check.status == "ok"


@pytest.mark.parametrize(("is_in_pod", "status"), [(True, "missing"), (False, "note")])
def test_store_out_of_reach_is_missing_only_inside_the_cluster(monkeypatch, is_in_pod, status):
    monkeypatch.setattr(cluster_doctor, "STORE_DEADLINE_SECONDS", 0.2)
    if is_in_pod:
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    else:
        monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    settings = CLUSTER.s3.model_copy(update={"endpoint_url": f"http://127.0.0.1:{_find_closed_port()}"})
    check = cluster_doctor._check_store(CLUSTER.model_copy(update={"s3": settings}))
    assert check.status == status
    assert check.detail.startswith("from here: ")


def _find_closed_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
