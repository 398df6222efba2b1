"""Every way in which the sample installation and pipeline are broken, with the rules that must say so.

Goes in: nothing. Comes out: `Break` objects, and what applies one. Where others make the pod, a part of the breaks is
repeated there: it is enough to see that the place is looked at.
"""

import copy
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from manifests import sample
from manifests.objects import Manifest

GONE = object()
CANARY = "canary-5f1d0c"
HEAD = ("spec", "rayClusterSpec", "headGroupSpec", "template", "spec")
WORKER = ("spec", "rayClusterSpec", "workerGroupSpecs", 0, "template", "spec")
SUBMITTER = ("spec", "submitterPodTemplate", "spec")
PREDICTOR = ("spec", "predictor")
Path = tuple[Any, ...]


class Break(NamedTuple):
    """One field set or taken away, and the rules that must say so: these and no others."""

    target: str
    """Kind and name of the object; empty: the first key of the path says where."""
    path: Path
    value: Any
    """The new value; `GONE` takes the field away, a path that ends in + appends."""
    rules: str

    @property
    def name(self) -> str:
        """A short name for the test's id."""
        return f"{self.target}:{'.'.join(map(str, self.path[-4:]))}:{'gone' if self.value is GONE else 'set'}"


def apply(change: Break, objects: list[Manifest]) -> list[Manifest]:
    """The objects with one field broken; the given ones stay as they are."""
    broken = copy.deepcopy(objects)
    kind, _, name = change.target.partition("/")
    node: Any = broken
    if kind:
        node = next(one for one in broken if (one["kind"], one["metadata"]["name"]) == (kind, name))
    for key in change.path[:-1]:
        node = node.setdefault(key, {}) if isinstance(node, dict) else node[key]
    if change.value is GONE:
        del node[change.path[-1]]
    elif change.path[-1] == "+":
        node.append(change.value)
    else:
        node[change.path[-1]] = change.value
    return broken


def list_breaks() -> list[Break]:
    """Breaks of objects, their rights and their names."""
    return [
        *list_container_breaks(),
        *list_pod_breaks(),
        *list_access_breaks(),
        *list_join_breaks(),
        *list_safeguard_breaks(),
    ]


def list_container_breaks() -> Iterator[Break]:
    """Breaks of containers: all of them in two places, some wherever else there are containers."""
    security = [
        ("allowPrivilegeEscalation", True, "privilege-escalation"),
        ("allowPrivilegeEscalation", GONE, "privilege-escalation"),
        ("readOnlyRootFilesystem", False, "read-only-root"),
        ("readOnlyRootFilesystem", GONE, "read-only-root"),
        ("privileged", True, "privileged"),
        ("capabilities", GONE, "drop-all"),
        ("capabilities", {"drop": ["NET_RAW"]}, "drop-all"),
        ("capabilities", {"drop": ["ALL"], "add": ["SYS_ADMIN"]}, "add-capabilities"),
        ("runAsNonRoot", False, "run-as-non-root"),
        ("runAsUser", 0, "run-as-user user-number"),
        ("runAsGroup", 0, "user-number"),
        ("seccompProfile", {"type": "Unconfined"}, "seccomp"),
        ("procMount", "Unmasked", "proc-mount"),
        ("seLinuxOptions", {"type": "spc_t"}, "selinux"),
        ("seLinuxOptions", {"user": "system_u"}, "selinux"),
        ("appArmorProfile", {"type": "Unconfined"}, "apparmor"),
        ("windowsOptions", {"hostProcess": True}, "host-process"),
    ]
    whole = [
        (("image",), "registry.example/mint:latest", "image-digest"),
        (("image",), "registry.example/mint:1.0@sha256:short", "image-digest"),
        (("image",), GONE, "image-digest"),
        (("imagePullPolicy",), "Never", "image-pull"),
        (("tty",), True, "terminal"),
        (("workingDir",), "/srv", "not-writable"),
        (("env", 0, "value"), "/home/mint", "not-writable"),
        (("env", 1, "value"), "/opt/hub", "not-writable"),
        (("volumeMounts", 0, "readOnly"), True, "not-writable"),
        (("volumeMounts", 0, "subPath"), "part", "mount-subpath"),
        (("volumeMounts", 1), GONE, "not-writable volume-unused"),
        (("volumeMounts", "+"), {"name": "none", "mountPath": "/x"}, "mount-unknown"),
        (("volumeMounts", "+"), {"name": "cache", "mountPath": "/tmp/"}, "mount-twice"),
        (("env", "+"), {"name": "API_TOKEN", "value": "s3cr3t-words"}, "secret-by-value"),
        (("env", "+"), {"name": "X", "value": "AKIA" + "A1B2C3D4" * 2}, "secret-by-value"),
        (("env", "+"), {"name": "X", "value": f"before {CANARY} after"}, "secret-canary"),
        (("args",), ["--url", "https://me:pass@host.example"], "secret-by-value"),
        (("envFrom",), [{"secretRef": {"name": "mint-s3"}}], "secret-whole"),
        (("env", 2, "valueFrom", "secretKeyRef", "name"), "others", "reference-unknown"),
        (("lifecycle",), {"preStop": {"httpGet": {"host": "10.0.0.1", "port": 1}}}, "probe-host"),
        (("readinessProbe",), {"tcpSocket": {"host": "10.0.0.1", "port": 1}}, "probe-host"),
        (("ports",), [{"containerPort": 7000, "hostPort": 7000, "protocol": "TCP"}], "host-port"),
        (("resources", "requests", "cpu"), "2", "resources-order"),
        (("resources", "requests", "memory"), "0", "resources-quantity"),
        (("resources", "limits", "nvidia.com/gpu"), "1", ""),
        (("resources", "requests", "nvidia.com/gpu"), "1", "resources-order"),
        (("resources", "limits", "ephemeral-storage"), "1Gi", "resources-order volume-size"),
        *(
            (("resources", part, name), GONE, f"resources-{part}")
            for part in ("requests", "limits")
            for name in ("cpu", "memory", "ephemeral-storage")
        ),
    ]
    for target, place in [("Pod/endpoint-test", ("spec",)), ("RayJob/alignment-1", WORKER)]:
        start = (*place, "containers", 0)
        yield from (Break(target, (*start, "securityContext", key), value, rules) for key, value, rules in security)
        yield from (Break(target, (*start, *path), value, rules) for path, value, rules in whole)
    # The same fields in the other places where pods are made: one of them each is enough to see that it is looked at.
    for target, place in [
        ("ServingRuntime/mint-text", ("spec",)),
        ("RayJob/alignment-1", HEAD),
        ("RayJob/alignment-1", SUBMITTER),
        ("Pod/a-step", ("spec",)),
    ]:
        start = (*place, "containers", 0)
        yield from (
            Break(target, (*start, "securityContext", key), value, rules) for key, value, rules in security[::3]
        )
        yield Break(target, (*start, "image"), "mint:latest", "image-digest")
        yield Break(target, (*start, "resources", "limits", "memory"), GONE, "resources-limits")
    yield Break(
        "Pod/endpoint-test", ("spec", "containers", 0, "resources", "limits", "cpu"), "2 cores", "resources-quantity"
    )
    hidden = {"name": "more", "image": sample.IMAGE}
    missing = "privilege-escalation drop-all read-only-root not-writable resources-limits resources-requests"
    for sort in ("initContainers", "ephemeralContainers"):
        yield Break("Pod/endpoint-test", ("spec", sort), [hidden], missing)


def list_pod_breaks() -> Iterator[Break]:
    """Breaks of pods: who they are, what they mount, how servers stop."""
    changes = [
        (("hostNetwork",), True, "host-namespaces"),
        (("hostPID",), True, "host-namespaces"),
        (("hostIPC",), True, "host-namespaces"),
        (("automountServiceAccountToken",), True, "token-mount"),
        (("automountServiceAccountToken",), GONE, "token-mount"),
        (("enableServiceLinks",), True, "service-links"),
        (("enableServiceLinks",), GONE, "service-links"),
        (("shareProcessNamespace",), True, "share-processes"),
        (("nodeName",), "node-1", "pinned"),
        (("hostAliases",), [{"ip": "10.0.0.1", "hostnames": ["s3"]}], "pinned"),
        (("serviceAccountName",), "nobody", "account-unknown"),
        (("serviceAccountName",), GONE, "service-account account-unknown"),
        (("securityContext", "runAsUser"), 0, "run-as-user user-number"),
        (("securityContext", "runAsUser"), GONE, "user-number"),
        (("securityContext", "runAsGroup"), GONE, "user-number"),
        (("securityContext", "fsGroup"), 0, "user-number"),
        (("securityContext", "runAsNonRoot"), False, "run-as-non-root"),
        (("securityContext", "seccompProfile"), GONE, "seccomp-runtime-default"),
        (("securityContext", "seccompProfile"), {"type": "Unconfined"}, "seccomp seccomp-runtime-default"),
        (("securityContext", "sysctls"), [{"name": "kernel.msgmax", "value": "1"}], "sysctls"),
        (("securityContext", "windowsOptions"), {"hostProcess": True}, "host-process"),
        (("securityContext", "seLinuxOptions"), {"role": "system_r"}, "selinux"),
        (("securityContext", "appArmorProfile"), {"type": "Unconfined"}, "apparmor"),
    ]
    for target, place in [("Pod/endpoint-test", ("spec",)), ("InferenceService/syndromes", PREDICTOR)]:
        yield from (Break(target, (*place, *path), value, rules) for path, value, rules in changes)
    for place in (HEAD, WORKER, SUBMITTER):
        yield from (Break("RayJob/alignment-1", (*place, *path), value, rules) for path, value, rules in changes[:7])
    token = {"name": "t", "projected": {"sources": [{"serviceAccountToken": {"path": "t"}}]}}
    volumes = [
        (("+",), {"name": "node", "hostPath": {"path": "/"}}, "host-path volume-unused"),
        (("+",), {"name": "share", "nfs": {"server": "a", "path": "/"}}, "volume-type volume-unused"),
        ((0, "emptyDir"), {}, "volume-size"),
        ((0, "emptyDir", "sizeLimit"), "900Gi", "volume-size"),
        ((0, "emptyDir"), {"sizeLimit": "3Gi", "medium": "Memory"}, "volume-size"),
        ((1,), {"name": "cache", "secret": {"secretName": "mint-s3"}}, "not-writable"),
        ((1,), {"name": "cache", "secret": {"secretName": "other"}}, "not-writable reference-unknown"),
        ((1,), {"name": "cache", "configMap": {"name": "other"}}, "not-writable reference-unknown"),
        (("+",), token, "token-mount volume-unused"),
    ]
    for target, place in [("Pod/endpoint-test", ("spec",)), ("RayJob/alignment-1", HEAD)]:
        yield from (Break(target, (*place, "volumes", *path), value, rules) for path, value, rules in volumes)
    note = ("metadata", "annotations", "container.apparmor.security.beta.kubernetes.io/main")
    yield Break("Pod/endpoint-test", note, "unconfined", "apparmor")
    yield Break("RayJob/alignment-1", ("spec", "submitterPodTemplate"), GONE, "ray-submitter")
    yield Break("Pod/a-step", ("spec", "serviceAccountName"), "mint-ray", "token-mount account-shared")
    server = ("spec", "containers", 0)
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        yield Break("ServingRuntime/mint-text", (*server, probe), GONE, "probe")
        yield Break("ServingRuntime/mint-text", (*server, probe, "httpGet", "path"), "/", "probe")
    yield Break(
        "ServingRuntime/mint-text", (*server, "args"), ["serve", "--tokens=/x", "--drain-seconds=10"], "stop-time"
    )
    yield Break("ServingRuntime/mint-text", (*server, "args", 3), "--no-tokens", "server-auth")
    yield Break("ServingRuntime/mint-text", (*server, "args", 2), "--grace-seconds=600", "stop-time")
    yield Break("InferenceService/syndromes", (*PREDICTOR, "terminationGracePeriodSeconds"), 70, "stop-time")
    yield Break("InferenceService/syndromes", (*PREDICTOR, "terminationGracePeriodSeconds"), GONE, "stop-time")
    hidden = {"template": {"spec": {"containers": [{"name": "x", "image": "y"}]}}}
    yield Break("ConfigMap/notes", ("spec",), hidden, "pod-unread schema")


def list_access_breaks() -> Iterator[Break]:
    """Breaks of roles, bindings and accounts."""
    role = "Role/mint-ray-jobs"
    for index, num_verbs in enumerate((5, 2, 1)):
        for verb in range(num_verbs - 1):
            yield Break(role, ("rules", index, "verbs", verb), GONE, "rbac-less")
        yield Break(role, ("rules", index, "verbs", "+"), "patch", "rbac-more" + " rbac-pods" * (index == 1))
        yield Break(
            role, ("rules", index, "verbs"), ["*"], "rbac-more rbac-less rbac-wildcard" + " rbac-pods" * (index == 1)
        )
        yield Break(role, ("rules", index, "apiGroups"), ["*"], "rbac-more rbac-less rbac-wildcard")
        yield Break(role, ("rules", index, "resources"), ["*"], "rbac-more rbac-less rbac-wildcard")
        for verb in ("escalate", "bind", "impersonate"):
            yield Break(role, ("rules", index, "verbs", "+"), verb, "rbac-more rbac-verb")
    for resource in ("secrets", "pods/exec", "pods/attach", "serviceaccounts/token", "rolebindings", "nodes/proxy"):
        rule = {"apiGroups": [""], "resources": [resource], "verbs": ["get"]}
        yield Break(role, ("rules", "+"), rule, "rbac-more rbac-resource")
    rule = {"apiGroups": ["batch"], "resources": ["jobs"], "verbs": ["create"]}
    yield Break(role, ("rules", "+"), rule, "rbac-more rbac-pods")
    yield Break(role, ("rules", 0, "resourceNames"), ["one"], "rbac-more rbac-less")
    binding = "RoleBinding/mint-ray-jobs"
    ray = {"kind": "ServiceAccount", "name": "mint-ray", "namespace": "mint"}
    yield Break(binding, ("subjects", "+"), ray, "rbac-more")
    yield Break(binding, ("subjects", 0, "namespace"), "elsewhere", "rbac-more rbac-less")
    everybody = {"kind": "Group", "name": "system:authenticated", "apiGroup": "rbac.authorization.k8s.io"}
    yield Break(binding, ("subjects", "+"), everybody, "rbac-more rbac-subject")
    yield Break(binding, ("subjects", "+"), ray | {"name": "default"}, "rbac-more rbac-subject")
    yield Break(binding, ("roleRef", "name"), "cluster-admin", "rbac-less rbac-role")
    yield Break(binding, ("kind",), "ClusterRoleBinding", "namespace rbac-less rbac-role")
    yield Break("ServiceAccount/mint-serving", ("automountServiceAccountToken",), True, "token-mount")
    yield Break("ServiceAccount/mint-serving", ("automountServiceAccountToken",), GONE, "token-mount")
    yield Break("ServiceAccount/mint-serving", ("secrets",), [{"name": "token"}], "token-secret")
    yield Break("ServiceAccount/mint-serving", ("metadata", "name"), "other", "account-unknown")


def list_join_breaks() -> Iterator[Break]:
    """Breaks of names, labels, references and schemas."""
    service, job = "InferenceService/syndromes", "RayJob/alignment-1"
    away = {"matchLabels": {"serving.kserve.io/inferenceservice": "other"}}
    yield Break("PodDisruptionBudget/syndromes-servers", ("spec", "selector"), away, "selects-nothing")
    wide = {"matchLabels": {"app.kubernetes.io/part-of": "mint"}}
    yield Break("PodDisruptionBudget/syndromes-servers", ("spec", "selector"), wide, "budget-shared")
    yield Break("PodDisruptionBudget/syndromes-servers", ("spec", "maxUnavailable"), GONE, "budget-amount")
    yield Break("PodDisruptionBudget/syndromes-servers", ("spec", "maxUnavailable"), 0, "budget-amount")
    yield Break("PodDisruptionBudget/syndromes-servers", ("spec", "minAvailable"), 1, "budget-amount")
    spread = (*PREDICTOR, "topologySpreadConstraints", 0, "labelSelector")
    yield Break(service, spread, away, "spreads-others")
    yield Break(
        "ScaledObject/syndromes", ("spec", "scaleTargetRef", "name"), "syndromes", "scales-nothing scaled-by-nobody"
    )
    kind = ("spec", "scaleTargetRef", "kind")
    yield Break("ScaledObject/syndromes", kind, "StatefulSet", "scales-nothing")
    secret = ("spec", "triggers", 0, "authenticationRef")
    yield Break("ScaledObject/syndromes", secret, {"name": "none"}, "reference-unknown")
    note = ("metadata", "annotations", "serving.kserve.io/autoscalerClass")
    yield Break(service, note, "hpa", "scaled-twice")
    monitor = "PodMonitor/mint-servers"
    yield Break(monitor, ("spec", "selector"), away, "selects-nothing")
    yield Break(monitor, ("spec", "selector"), wide, "monitors-others port-unknown")
    yield Break(monitor, ("spec", "podMetricsEndpoints", 0, "port"), "metrics", "port-unknown")
    yield Break(monitor, ("spec", "namespaceSelector"), {"matchNames": ["other"]}, "selects-nothing")
    yield Break("LocalQueue/mint", ("spec", "clusterQueue"), "none", "reference-unknown")
    flavor = ("spec", "resourceGroups", 0, "flavors", 0, "name")
    yield Break("ClusterQueue/mint", flavor, "none", "reference-unknown")
    for label in ("queue-name", "priority-class"):
        yield Break(job, ("metadata", "labels", f"kueue.x-k8s.io/{label}"), "none", "reference-unknown")
    model = (*PREDICTOR, "model")
    lost = "reference-unknown selects-nothing monitors-nothing"
    yield Break(service, (*model, "modelFormat", "name"), "onnx", "reference-unknown")
    yield Break("ServingRuntime/mint-text", ("metadata", "namespace"), "other", lost.replace(" monitors-nothing", ""))
    for target in (service, "LocalQueue/mint", "NetworkPolicy/names", "Role/mint-ray-jobs"):
        for label in ("app.kubernetes.io/name", "app.kubernetes.io/part-of"):
            yield Break(target, ("metadata", "labels", label), GONE, "label-missing")
    yield Break("LocalQueue/mint", ("metadata", "labels", "team"), "a b", "label-value")
    yield Break("LocalQueue/mint", ("metadata", "labels", "team"), "x" * 64, "label-value")
    yield Break("LocalQueue/mint", ("metadata", "labels", "-team"), "a", "label-value")
    yield Break("PodMonitor/mint-servers", ("metadata", "name"), "Servers", "name")
    yield Break("PodMonitor/mint-servers", ("metadata", "name"), "a" * 64, "name")
    yield Break(job, ("metadata", "name"), "a" * 48, "name")
    yield Break("PodMonitor/mint-servers", ("metadata", "namespace"), GONE, "namespace selects-nothing")
    yield Break("ClusterQueue/mint", ("metadata", "namespace"), "mint", "namespace")
    yield Break("LocalQueue/mint", ("spec", "clusterQeue"), "mint", "schema")
    yield Break("PodDisruptionBudget/syndromes-servers", ("spec", "maxUnavailabel"), 1, "schema")
    yield Break("NetworkPolicy/names", ("spec", "podSelectors"), {}, "schema")
    yield Break("NetworkPolicy/default-deny", ("spec", "policyTypes"), ["Ingress"], "default-deny")
    yield Break("NetworkPolicy/default-deny", ("spec", "policyTypes"), ["Egress"], "default-deny flow-more")
    yield Break("NetworkPolicy/default-deny", ("spec", "podSelector"), wide, "default-deny flow-more")
    yield Break("NetworkPolicy/default-deny", ("spec", "egress"), [{}], "default-deny flow-more")
    yield Break("NetworkPolicy/default-deny", ("metadata", "namespace"), "other", "default-deny flow-more")
    yield Break("ServiceAccount/mint-ray", ("automountServiceAccountToken",), "no", "schema token-mount")
    yield Break("ConfigMap/notes", ("apiVersion",), "example.org/v1", "schema-unknown")
    yield Break("ConfigMap/notes", ("kind",), "Secret", "secret-object")
    yield Break("ConfigMap/notes", ("data", "key"), f"password: {CANARY}", "secret-canary")
    key = "-----BEGIN RSA PRIVATE " + "KEY-----"
    yield Break("ConfigMap/notes", ("data", "key"), key, "secret-by-value")


def list_safeguard_breaks() -> Iterator[Break]:
    """Breaks of what single objects must say."""
    for mode in ("enforce", "audit", "warn"):
        label = ("metadata", "labels", f"pod-security.kubernetes.io/{mode}")
        yield Break("Namespace/mint", label, GONE, "pod-security-label")
        yield Break("Namespace/mint", label, "baseline", "pod-security-label")
    job = "RayJob/alignment-1"
    yield Break(job, ("spec", "rayClusterSpec", "authOptions"), GONE, "ray-auth")
    yield Break(job, ("spec", "rayClusterSpec", "authOptions", "mode"), "disabled", "ray-auth")
    yield Break(job, ("spec", "shutdownAfterJobFinishes"), False, "ray-ends")
    yield Break(job, ("spec", "activeDeadlineSeconds"), GONE, "ray-ends")
    yield Break(job, ("spec", "suspend"), True, "ray-ends")
    yield Break("Service/tests", ("spec", "type"), "LoadBalancer", "service-exposed")
    yield Break("Service/tests", ("spec", "externalIPs"), ["192.0.2.1"], "service-exposed")
    yield Break("ScaledObject/syndromes", ("spec", "minReplicaCount"), 1, "scale-range")
    yield Break("ScaledObject/syndromes", ("spec", "maxReplicaCount"), GONE, "scale-range")
    yield Break("InferenceService/syndromes", (*PREDICTOR, "minReplicas"), 5, "scale-range")
    monitor = ("spec", "podMetricsEndpoints", 0, "authorization")
    yield Break("PodMonitor/mint-servers", monitor, GONE, "reference-unknown")
    yield Break("PodMonitor/mint-servers", (*monitor, "credentials", "name"), "other", "reference-unknown")


def list_policy_breaks(policies: Sequence[Manifest]) -> list[Break]:
    """Each part of each policy taken away or made another, and each block made wider."""
    breaks = []
    selecting = {"podSelector", "namespaceSelector", "matchLabels", "matchExpressions", "ports", "to", "from"}
    for policy in policies:
        target = f"NetworkPolicy/{policy['metadata']['name']}"
        for path, part in list_paths(policy["spec"], ("spec",)):
            if path[-1] == "cidr":
                breaks.append(Break(target, path, "0.0.0.0/0", "flow-more"))
            elif path[-1] == "port":
                breaks.append(Break(target, path, 4, "flow"))
                breaks.append(Break(target, path, GONE, "flow"))
            elif path[-1] in selecting:
                if part and path != ("spec", "podSelector"):
                    breaks.append(Break(target, path, GONE, "flow"))
                if part and path[-1] == "podSelector":
                    breaks.append(Break(target, path, {}, "flow"))
            elif path[-2:-1] in (("matchLabels",), ("values",)):
                breaks.append(Break(target, path, GONE, "flow"))
                breaks.append(Break(target, path, "else", "flow"))
    return breaks


def list_paths(value: Any, path: Path) -> Iterator[tuple[Path, Any]]:
    """Every part of a value with its path as keys."""
    yield path, value
    for key, part in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from list_paths(part, (*path, key))


EXECUTOR = (0, "deploymentSpec", "executors", "exec-data")
SETTING = (1, "platforms", "kubernetes", *EXECUTOR[1:])


def list_step_breaks() -> list[Break]:
    """Breaks of the sample pipeline."""
    return [
        Break("", path, value, rule)
        for path, value, rule in [
            ((*EXECUTOR, "container", "image"), "mint-train:latest", "step-image"),
            ((*EXECUTOR, "container", "command"), ["sh", "-c", "python3 -m pip install kfp && x"], "step-installs"),
            *(
                ((*EXECUTOR, "container", "resources", f"resource{what}{part}"), GONE, "step-resources")
                for what in ("Cpu", "Memory")
                for part in ("Request", "Limit")
            ),
            ((*EXECUTOR, "container", "resources", "resourceMemoryRequest"), "9Gi", "step-resources"),
            ((*EXECUTOR, "container", "env"), [{"name": "HF_TOKEN", "value": "abcdefgh"}], "secret-by-value"),
            ((*EXECUTOR, "container", "args"), [f"--config={CANARY}"], "secret-canary"),
            ((*EXECUTOR,), {"importer": {}}, "step-kind"),
            *(
                ((*SETTING, "podMetadata", "labels", key), GONE, "step-labels")
                for key in ("app.kubernetes.io/part-of", "mint.platform/stage")
            ),
            ((*SETTING, "podMetadata", "labels", "app.kubernetes.io/component"), "server", "step-labels"),
            ((*SETTING, "secretAsEnv", 0, "secretName"), "somebodys", "step-secret"),
            ((*SETTING, "emptyDirMounts", 0), GONE, "step-writable"),
            ((*SETTING, "emptyDirMounts", 1, "sizeLimit"), GONE, "step-writable"),
            ((*SETTING, "securityContext", "runAsNonRoot"), GONE, "step-user"),
            ((*SETTING, "securityContext", "runAsUser"), GONE, "step-user"),
            ((*SETTING, "securityContext", "runAsUser"), "0", "step-user"),
            ((*SETTING, "activeDeadlineSeconds"), GONE, "step-deadline"),
            ((*SETTING, "imagePullPolicy"), "Never", "step-image"),
        ]
    ]
