"""A small installation in which every check finds nothing: what the mutation tests break.

Goes in: nothing. Comes out: objects, and the values that the flows are derived from. It holds one object of each kind
that a check looks at, and is no example of how to install anything.
"""

from typing import Any

from manifests.objects import Manifest

IMAGE = "registry.example/mint-serve@sha256:" + "b" * 64
HOME = "mint"
_RAY_NODES = ["ray-head", "ray-worker"]
_STORE_USERS = ["server", "step", *_RAY_NODES]
VALUES: dict[str, Any] = {
    "namespace": {"name": HOME},
    "monitoring": {"enabled": True, "prometheusNamespace": "monitoring"},
    "endpointTest": {"enabled": True},
    "hub": {"isAllowed": False},
    "chat": {"isAllowed": False},
    "network": {
        "gateway": {"namespace": "gateway", "podLabels": {"app": "envoy"}},
        "clients": [],
        "prometheus": {"podLabels": {"app.kubernetes.io/name": "prometheus"}},
        "kuberay": {"namespace": "kuberay", "podLabels": {"app": "kuberay-operator"}},
        "kubeflow": {
            "namespace": "kubeflow",
            "services": [{"podLabels": {"app": "ml-pipeline"}, "ports": [8887, 8888]}],
        },
        "dns": {"namespace": "kube-system", "podLabels": {"k8s-app": "kube-dns"}, "port": 53, "cacheAddresses": []},
        "s3": {"namespace": "", "podLabels": {}, "cidrs": ["192.0.2.8/30"], "ports": [443]},
        "hub": {"cidrs": ["0.0.0.0/0"], "exceptCidrs": ["10.0.0.0/8"], "ports": [443]},
        "chat": {"namespace": "", "podLabels": {}, "cidrs": ["203.0.113.40/32"], "exceptCidrs": [], "ports": [8443]},
        "apiServer": {"cidrs": ["198.51.100.7/32"], "ports": [6443]},
        "podIdentity": False,
    },
}


def list_sample() -> list[Manifest]:
    """The objects, new ones at each call."""
    return [*_list_identities(), *_list_serving(), *_list_ray(), *_list_policies()]


def list_sample_pipeline() -> list[dict[str, Any]]:
    """The documents of a compiled pipeline of one step, new ones at each call."""
    resources = {"resourceCpuRequest": "2", "resourceCpuLimit": "2"}
    resources |= {"resourceMemoryRequest": "8Gi", "resourceMemoryLimit": "8Gi"}
    container = {"image": IMAGE, "command": ["python3"], "args": ["-m", "x"], "resources": resources}
    ours = {"app.kubernetes.io/part-of": "mint", "app.kubernetes.io/component": "step", "mint.platform/stage": "data"}
    setting = {
        "podMetadata": {"labels": ours},
        "secretAsEnv": [{"secretName": "mint-s3", "keyToEnv": [{"secretKey": "k", "envVar": "AWS_SECRET_ACCESS_KEY"}]}],
        "emptyDirMounts": [
            {"volumeName": "scratch", "mountPath": "/tmp", "sizeLimit": "4Gi"},
            {"volumeName": "cache", "mountPath": "/var/cache/mint", "sizeLimit": "4Gi"},
        ],
        "securityContext": {"runAsUser": "10001", "runAsNonRoot": True},
        "activeDeadlineSeconds": "86400",
    }
    spec = {"deploymentSpec": {"executors": {"exec-data": {"container": container}}}}
    return [spec, {"platforms": {"kubernetes": {"deploymentSpec": {"executors": {"exec-data": setting}}}}}]


def _object(version: str, kind: str, name: str, **parts: Any) -> Manifest:
    labels = {"app.kubernetes.io/name": name, "app.kubernetes.io/part-of": "mint"}
    return {
        "apiVersion": version,
        "kind": kind,
        "metadata": {"name": name, "namespace": HOME, "labels": labels},
    } | parts


def _cluster_wide(version: str, kind: str, name: str, **parts: Any) -> Manifest:
    made = _object(version, kind, name, **parts)
    del made["metadata"]["namespace"]
    return made


def _labels(component: str, stage: str) -> dict[str, str]:
    ours = {"app.kubernetes.io/part-of": "mint", "app.kubernetes.io/component": component}
    return ours | {"mint.platform/stage": stage}


def _container(name: str, **more: Any) -> dict[str, Any]:
    amounts = {"cpu": "1", "memory": "2Gi", "ephemeral-storage": "4Gi"}
    return {
        "name": name,
        "image": IMAGE,
        "command": ["mint"],
        "workingDir": "/tmp",
        "env": [
            {"name": "HOME", "value": "/tmp"},
            {"name": "HF_HOME", "value": "/var/cache/mint/hub"},
            {"name": "AWS_SECRET_ACCESS_KEY", "valueFrom": {"secretKeyRef": {"name": "mint-s3", "key": "k"}}},
        ],
        "resources": {"requests": dict(amounts), "limits": dict(amounts)},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "runAsNonRoot": True,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "volumeMounts": [
            {"name": "scratch", "mountPath": "/tmp"},
            {"name": "cache", "mountPath": "/var/cache/mint"},
        ],
    } | more


def _volumes() -> list[dict[str, Any]]:
    return [
        {"name": "scratch", "emptyDir": {"sizeLimit": "1Gi"}},
        {"name": "cache", "emptyDir": {"sizeLimit": "2Gi"}},
    ]


def _pod_spec(account: str, **more: Any) -> dict[str, Any]:
    return {
        "serviceAccountName": account,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": 10001,
            "runAsGroup": 10001,
            "fsGroup": 10001,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
    } | more


def _list_identities() -> list[Manifest]:
    restricted = {f"pod-security.kubernetes.io/{mode}": "restricted" for mode in ("enforce", "audit", "warn")}
    namespace = _cluster_wide("v1", "Namespace", HOME)
    namespace["metadata"]["labels"] |= restricted
    names = ("mint-pipeline", "mint-ray", "mint-serving", "mint-endpoint-test")
    accounts = [_object("v1", "ServiceAccount", name, automountServiceAccountToken=False) for name in names]
    rules = [
        {"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["create", "get", "list", "watch", "delete"]},
        {"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list"]},
        {"apiGroups": [""], "resources": ["pods/log"], "verbs": ["get"]},
    ]
    role = _object("rbac.authorization.k8s.io/v1", "Role", "mint-ray-jobs", rules=rules)
    binding = _object(
        "rbac.authorization.k8s.io/v1",
        "RoleBinding",
        "mint-ray-jobs",
        roleRef={"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "mint-ray-jobs"},
        subjects=[{"kind": "ServiceAccount", "name": "mint-pipeline", "namespace": HOME}],
    )
    step = _pod_spec("mint-pipeline", containers=[_container("main")], volumes=_volumes())
    step_pod = _object("v1", "Pod", "a-step", spec=step | {"automountServiceAccountToken": True})
    step_pod["metadata"]["labels"] |= _labels("step", "data") | {"pipelines.kubeflow.org/v2_component": "true"}
    tester = _object(
        "v1",
        "Pod",
        "endpoint-test",
        spec=_pod_spec("mint-endpoint-test", containers=[_container("main")], volumes=_volumes()),
    )
    tester["metadata"]["labels"] |= _labels("endpoint-test", "serving")
    service = _object("v1", "Service", "tests", spec={"selector": _labels("endpoint-test", "serving")})
    notes = _object("v1", "ConfigMap", "notes", data={"key": "value"})
    return [namespace, *accounts, notes, service, role, binding, step_pod, tester]


def _list_serving() -> list[Manifest]:
    server = _container("kserve-container", args=["serve", "--drain-seconds=10", "--grace-seconds=60", "--tokens=/x"])
    server["ports"] = [{"name": "http1", "containerPort": 8080, "protocol": "TCP"}]
    for probe, path in (("startupProbe", "/readyz"), ("readinessProbe", "/readyz"), ("livenessProbe", "/healthz")):
        server[probe] = {"httpGet": {"path": path, "port": 8080}, "periodSeconds": 5}
    runtime = _object(
        "serving.kserve.io/v1alpha1",
        "ServingRuntime",
        "mint-text",
        spec={
            "supportedModelFormats": [{"name": "mint-text", "autoSelect": False}],
            "containers": [server],
            "volumes": _volumes(),
        },
    )
    chosen = {"serving.kserve.io/inferenceservice": "syndromes"}
    spread = {"maxSkew": 1, "topologyKey": "kubernetes.io/hostname", "whenUnsatisfiable": "ScheduleAnyway"}
    predictor = _pod_spec(
        "mint-serving",
        labels=_labels("server", "serving"),
        minReplicas=2,
        maxReplicas=4,
        terminationGracePeriodSeconds=80,
        topologySpreadConstraints=[spread | {"labelSelector": {"matchLabels": dict(chosen)}}],
        model={"modelFormat": {"name": "mint-text"}, "runtime": "mint-text", "args": ["model/syndromes@champion"]},
    )
    service = _object("serving.kserve.io/v1beta1", "InferenceService", "syndromes", spec={"predictor": predictor})
    service["metadata"]["annotations"] = {"serving.kserve.io/autoscalerClass": "external"}
    trigger = {
        "type": "prometheus",
        "metadata": {"query": "mint:wanted", "threshold": "1", "serverAddress": "http://p"},
    }
    scaler = _object(
        "keda.sh/v1alpha1",
        "ScaledObject",
        "syndromes",
        spec={
            "scaleTargetRef": {"name": "syndromes-predictor"},
            "minReplicaCount": 2,
            "maxReplicaCount": 4,
            "triggers": [trigger],
        },
    )
    budget = _object(
        "policy/v1",
        "PodDisruptionBudget",
        "syndromes-servers",
        spec={"maxUnavailable": 1, "selector": {"matchLabels": dict(chosen)}},
    )
    token = {"name": "mint-metrics-token", "key": "token"}
    monitor = _object(
        "monitoring.coreos.com/v1",
        "PodMonitor",
        "mint-servers",
        spec={
            "selector": {"matchLabels": {"app.kubernetes.io/component": "server"}},
            "podMetricsEndpoints": [{"port": "http1", "authorization": {"credentials": token}}],
        },
    )
    return [runtime, service, scaler, budget, monitor]


def _list_ray() -> list[Manifest]:
    def template(component: str) -> Manifest:
        spec = _pod_spec("mint-ray", containers=[_container(component)], volumes=_volumes())
        return {"metadata": {"labels": _labels(component, "alignment")}, "spec": spec}

    head, submitter = template("ray-head"), template("ray-submitter")
    submitter["spec"]["restartPolicy"] = "Never"
    group = {"groupName": "workers", "replicas": 1, "minReplicas": 1, "maxReplicas": 1, "rayStartParams": {}}
    job = _object(
        "ray.io/v1",
        "RayJob",
        "alignment-1",
        spec={
            "entrypoint": "python -m mint_lib alignment",
            "shutdownAfterJobFinishes": True,
            "activeDeadlineSeconds": 3600,
            "submitterPodTemplate": submitter,
            "rayClusterSpec": {
                "rayVersion": "2.60.0",
                "authOptions": {"mode": "token"},
                "headGroupSpec": {"rayStartParams": {}, "template": head},
                "workerGroupSpecs": [group | {"template": template("ray-worker")}],
            },
        },
    )
    job["metadata"]["labels"] |= {"kueue.x-k8s.io/queue-name": "mint", "kueue.x-k8s.io/priority-class": "mint-usual"}
    kueue = "kueue.x-k8s.io/v1beta2"
    resource = {"name": "cpu", "nominalQuota": "8"}
    group = {"coveredResources": ["cpu"], "flavors": [{"name": "mint-usual", "resources": [resource]}]}
    return [
        job,
        _cluster_wide(kueue, "ResourceFlavor", "mint-usual", spec={"nodeLabels": {"pool": "usual"}}),
        _cluster_wide(kueue, "ClusterQueue", "mint", spec={"namespaceSelector": {}, "resourceGroups": [group]}),
        _object(kueue, "LocalQueue", "mint", spec={"clusterQueue": "mint"}),
        _cluster_wide(kueue, "WorkloadPriorityClass", "mint-usual", value=100, description="The usual."),
    ]


def _list_policies() -> list[Manifest]:
    network = VALUES["network"]

    def of(components: list[str]) -> dict[str, Any]:
        term = {"key": "app.kubernetes.io/component", "operator": "In", "values": list(components)}
        return {"matchLabels": {"app.kubernetes.io/part-of": "mint"}, "matchExpressions": [term]}

    def elsewhere(namespace: str, labels: dict[str, str]) -> dict[str, Any]:
        place = {"matchLabels": {"kubernetes.io/metadata.name": namespace}}
        return {"namespaceSelector": place, "podSelector": {"matchLabels": dict(labels)}}

    def ports(*numbers: int, protocol: str = "TCP") -> list[dict[str, Any]]:
        return [{"protocol": protocol, "port": number} for number in numbers]

    def policy(name: str, chosen: dict[str, Any], **rules: Any) -> Manifest:
        types = [direction for direction in ("Ingress", "Egress") if direction.lower() in rules]
        spec = {"podSelector": chosen, "policyTypes": types or ["Ingress", "Egress"], **rules}
        return _object("networking.k8s.io/v1", "NetworkPolicy", name, spec=spec)

    def block(part: dict[str, Any]) -> list[dict[str, Any]]:
        return [{"ipBlock": {"cidr": cidr}} for cidr in part["cidrs"]]

    kubeflow, kuberay, dns = network["kubeflow"], network["kuberay"], network["dns"]
    callers = [
        elsewhere(network["gateway"]["namespace"], network["gateway"]["podLabels"]),
        elsewhere("monitoring", network["prometheus"]["podLabels"]),
        {"podSelector": of(["endpoint-test"])},
    ]
    to_api = {"to": block(network["apiServer"]), "ports": ports(*network["apiServer"]["ports"])}
    to_kubeflow = [
        {"to": [elsewhere(kubeflow["namespace"], one["podLabels"])], "ports": ports(*one["ports"])}
        for one in kubeflow["services"]
    ]
    driver = {"matchLabels": {"pipelines.kubeflow.org/v2_component": "true"}}
    to_head = {"to": [{"podSelector": of(["ray-head"])}], "ports": ports(8265)}
    submitters = [{"podSelector": of(["ray-submitter"])}, elsewhere(kuberay["namespace"], kuberay["podLabels"])]
    nodes = [{"podSelector": of(_RAY_NODES)}]
    to_names = {"to": [elsewhere(dns["namespace"], dns["podLabels"])]}
    return [
        policy("default-deny", {}),
        policy("names", {}, egress=[to_names | {"ports": ports(53) + ports(53, protocol="UDP")}]),
        policy("to-servers", of(["server"]), ingress=[{"from": callers, "ports": ports(8080)}]),
        policy("test", of(["endpoint-test"]), egress=[{"to": [{"podSelector": of(["server"])}], "ports": ports(8080)}]),
        policy("to-store", of(_STORE_USERS), egress=[{"to": block(network["s3"]), "ports": ports(443)}]),
        policy("from-steps", of(["step"]), egress=[to_api, *to_kubeflow]),
        policy("from-drivers", driver, egress=[to_api, *to_kubeflow]),
        policy("ray-nodes", of(_RAY_NODES), ingress=[{"from": nodes}], egress=[{"to": nodes}]),
        policy("to-head", of(["ray-head"]), ingress=[{"from": submitters, "ports": ports(8265)}]),
        policy("submit", of(["ray-submitter"]), egress=[to_head]),
    ]
