"""Names, selectors and references that must meet, over all objects together.

Goes in: all objects of one installation. Comes out: findings. What people make themselves (secrets above all) stands in
`MADE_BY_PEOPLE`, with the document that tells them to. It knows no pod's inside: that is pod_rules.py.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from manifests.objects import Finding, Manifest, matches_selector, name_object, name_of, namespace_of, select, walk
from manifests.pods import Pod, list_pods

MADE_BY_PEOPLE = {
    ("Secret", "mint-s3"),
    ("Secret", "mint-hub"),
    ("Secret", "mint-deidentification"),
    ("Secret", "mint-chat"),
    ("Secret", "mint-serving-tokens"),
    ("Secret", "mint-metrics-token"),
    ("Secret", "mint-test-token"),
    ("ConfigMap", "mint-s3-ca"),
}
"""Kinds and names that helm/README.md tells to make."""
CLUSTER_WIDE = {
    *("Namespace", "ClusterRole", "ClusterRoleBinding", "CustomResourceDefinition", "PriorityClass"),
    *("ClusterServingRuntime", "ResourceFlavor", "ClusterQueue", "WorkloadPriorityClass", "StorageClass"),
    *("ClusterTriggerAuthentication", "ValidatingWebhookConfiguration", "MutatingWebhookConfiguration"),
}
_LABELS = ("app.kubernetes.io/name", "app.kubernetes.io/part-of")
_LABEL_VALUE = re.compile(r"([A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?)?")
_LABEL_KEY = re.compile(r"([a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?")
_DNS_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
_DNS_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")
_LONGEST = {"InferenceService": 52, "RayJob": 47, "LLMInferenceService": 52}
"""KServe appends `-predictor`, KubeRay a random suffix and `-head-svc`; what comes out has 63 characters at most."""
_LOOSE_NAMES = {"Role", "ClusterRole", "RoleBinding", "ClusterRoleBinding"}
"""Their names may be any part of a path."""


def find_join_faults(objects: Sequence[Manifest], *, pods: Sequence[Pod] | None = None) -> list[Finding]:
    """What does not meet.

    Args:
        objects: All objects of one installation.
        pods: The pods that selectors may aim at; those that the objects lead to if None. Give more where steps and
            Ray jobs come later.
    """
    own = list_pods(objects)
    targets = own if pods is None else list(pods)
    found = [finding for manifest in objects for finding in _check_identity(manifest)]
    twice = Counter((one.get("kind"), namespace_of(one), name_of(one)) for one in objects)
    found += [
        Finding("duplicate", f"{kind} {namespace or '-'}/{name}", "", f"{count} objects of this name")
        for (kind, namespace, name), count in twice.items()
        if count > 1
    ]
    for check in (_check_selectors, _check_scalers, _check_monitors):
        found += check(objects, targets)
    found += [*_check_queues(objects), *_check_runtimes(objects)]
    for pod in own:
        found += _check_references(pod, objects)
    return found


def _check_identity(manifest: Manifest) -> Iterator[Finding]:
    kind, name, subject = str(manifest.get("kind")), name_of(manifest), name_object(manifest)
    if kind in CLUSTER_WIDE and namespace_of(manifest):
        yield Finding("namespace", subject, "metadata/namespace", "the kind has no namespace")
    if kind not in CLUSTER_WIDE and not namespace_of(manifest):
        yield Finding("namespace", subject, "metadata/namespace", "is missing, so it lands wherever it is installed")
    longest = _LONGEST.get(kind, 63)
    is_named = kind in _LOOSE_NAMES or (_DNS_NAME if "." in name else _DNS_LABEL).fullmatch(name)
    if len(name) > longest or not is_named:
        yield Finding("name", subject, "metadata/name", f"{name!r} ({len(name)}) is no name of up to {longest}")
    labels = manifest.get("metadata", {}).get("labels", {})
    for key in _LABELS:
        if key not in labels:
            yield Finding("label-missing", subject, f"metadata/labels/{key}", "is missing")
    if labels.get("app.kubernetes.io/part-of", "mint") != "mint":
        yield Finding("label-missing", subject, "metadata/labels/app.kubernetes.io/part-of", "is not mint")
    for path, part in walk(manifest):
        if path.rpartition("/")[2] in ("labels", "matchLabels") and isinstance(part, dict) and _is_kubernetes(path):
            for key, value in part.items():
                good = isinstance(value, str) and _LABEL_VALUE.fullmatch(value) and _LABEL_KEY.fullmatch(key)
                if not good:
                    yield Finding("label-value", subject, path, f"{key}: {value!r} is no label")


def _is_kubernetes(path: str) -> bool:
    """Prometheus' labels of rules and KServe's model labels are of another sort."""
    return "/rules/" not in path and "groups" not in path


def _check_selectors(objects: Sequence[Manifest], pods: Sequence[Pod]) -> Iterator[Finding]:
    for manifest in select(objects, "PodDisruptionBudget", "Service", "NetworkPolicy"):
        spec = manifest["spec"]
        key = "podSelector" if manifest["kind"] == "NetworkPolicy" else "selector"
        selector = spec.get(key) or {}
        if manifest["kind"] == "Service":
            selector = {"matchLabels": selector}
        is_all = manifest["kind"] == "NetworkPolicy" and not selector
        chosen = [pod for pod in pods if pod.namespace == namespace_of(manifest) and _takes(selector, pod)]
        if not chosen and not is_all:
            yield Finding("selects-nothing", name_object(manifest), f"spec/{key}", f"{selector} selects no pod of ours")
        if manifest["kind"] == "PodDisruptionBudget":
            names = {pod.name for pod in chosen}
            if len(names) > 1:
                words = f"{sorted(names)} share one budget, so one may take all of the other's"
                yield Finding("budget-shared", name_object(manifest), f"spec/{key}", words)
            if ("minAvailable" in spec) == ("maxUnavailable" in spec):
                yield Finding("budget-amount", name_object(manifest), "spec", "give minAvailable or maxUnavailable")
            if str(spec.get("maxUnavailable")) in ("0", "0%") or str(spec.get("minAvailable")) == "100%":
                yield Finding("budget-amount", name_object(manifest), "spec", "no node can be drained any more")
    for pod in pods:
        for index, spread in enumerate(pod.spec.get("topologySpreadConstraints", [])):
            if not _takes(spread.get("labelSelector") or {}, pod):
                path = f"{pod.path}/topologySpreadConstraints/{index}"
                yield Finding("spreads-others", pod.subject, path, "does not select the pod itself")


def _takes(selector: Manifest, pod: Pod) -> bool:
    return bool(selector) and matches_selector(selector, pod.labels)


def _check_scalers(objects: Sequence[Manifest], pods: Sequence[Pod]) -> Iterator[Finding]:
    services = {(namespace_of(one), f"{name_of(one)}-predictor"): one for one in select(objects, "InferenceService")}
    scaled: Counter[tuple[str, str]] = Counter()
    for manifest in select(objects, "ScaledObject", "HorizontalPodAutoscaler"):
        subject, target = name_object(manifest), manifest["spec"]["scaleTargetRef"]
        place = (namespace_of(manifest), target["name"])
        scaled[place] += 1
        if target.get("kind", "Deployment") != "Deployment" or place not in services:
            words = f"{target} is not the Deployment <name>-predictor of an InferenceService"
            yield Finding("scales-nothing", subject, "spec/scaleTargetRef", words)
            continue
        notes = services[place]["metadata"].get("annotations", {})
        if notes.get("serving.kserve.io/autoscalerClass") != "external":
            words = "KServe scales it too: set serving.kserve.io/autoscalerClass external there"
            yield Finding("scaled-twice", subject, "spec/scaleTargetRef", words)
        for trigger in manifest["spec"].get("triggers", []):
            name = trigger.get("authenticationRef", {}).get("name")
            known = {name_of(one) for one in select(objects, "TriggerAuthentication", "ClusterTriggerAuthentication")}
            if name and name not in known:
                yield Finding("reference-unknown", subject, "spec/triggers", f"no TriggerAuthentication {name}")
    for (namespace, name), count in scaled.items():
        if count > 1:
            yield Finding("scaled-twice", f"Deployment {namespace}/{name}", "", f"{count} objects scale it")
    for place, service in services.items():
        notes = service["metadata"].get("annotations", {})
        if notes.get("serving.kserve.io/autoscalerClass") == "external" and place not in scaled:
            words = "its scaling is left to an object that is not there"
            yield Finding("scaled-by-nobody", name_object(service), "metadata/annotations", words)


def _check_monitors(objects: Sequence[Manifest], pods: Sequence[Pod]) -> Iterator[Finding]:
    for manifest in select(objects, "PodMonitor"):
        spec, subject = manifest["spec"], name_object(manifest)
        places = (spec.get("namespaceSelector") or {}).get("matchNames") or [namespace_of(manifest)]
        chosen = [pod for pod in pods if pod.namespace in places and matches_selector(spec["selector"], pod.labels)]
        if not chosen:
            yield Finding("selects-nothing", subject, "spec/selector", f"{spec['selector']} selects no pod of ours")
        for pod in chosen:
            if pod.component != "server":
                yield Finding("monitors-others", subject, "spec/selector", f"takes in {pod.subject}")
            if not pod.spec:  # known by its labels only
                continue
            ports = [port for _, container in pod.containers() for port in container.get("ports", [])]
            for index, endpoint in enumerate(spec["podMetricsEndpoints"]):
                token = endpoint.get("authorization", {}).get("credentials", {}).get("name")
                if ("Secret", token) not in MADE_BY_PEOPLE:
                    path = f"spec/podMetricsEndpoints/{index}/authorization"
                    yield Finding(
                        "reference-unknown", subject, path, f"{token!r}: figures want a token of scope metrics"
                    )
                wanted = endpoint.get("port", endpoint.get("portNumber", endpoint.get("targetPort")))
                if not any(wanted in (port.get("name"), port["containerPort"]) for port in ports):
                    path = f"spec/podMetricsEndpoints/{index}/port"
                    yield Finding("port-unknown", subject, path, f"{wanted!r} is no port of {pod.subject}")


def _check_queues(objects: Sequence[Manifest]) -> Iterator[Finding]:
    names = {kind: {name_of(one) for one in select(objects, kind)} for kind in ("ResourceFlavor", "ClusterQueue")}
    for queue in select(objects, "LocalQueue"):
        if queue["spec"]["clusterQueue"] not in names["ClusterQueue"]:
            words = f"no ClusterQueue {queue['spec']['clusterQueue']}"
            yield Finding("reference-unknown", name_object(queue), "spec/clusterQueue", words)
    for queue in select(objects, "ClusterQueue"):
        for index, group in enumerate(queue["spec"]["resourceGroups"]):
            for flavor in group["flavors"]:
                if flavor["name"] not in names["ResourceFlavor"]:
                    words = f"no ResourceFlavor {flavor['name']}"
                    yield Finding("reference-unknown", name_object(queue), f"spec/resourceGroups/{index}", words)
    locals_ = {(namespace_of(one), name_of(one)) for one in select(objects, "LocalQueue")}
    ranks = {name_of(one) for one in select(objects, "WorkloadPriorityClass")}
    for job in select(objects, "RayJob"):
        labels = job["metadata"].get("labels", {})
        queue = labels.get("kueue.x-k8s.io/queue-name")
        if queue is not None and (namespace_of(job), queue) not in locals_:
            yield Finding("reference-unknown", name_object(job), "metadata/labels", f"no LocalQueue {queue}")
        rank = labels.get("kueue.x-k8s.io/priority-class")
        if rank is not None and rank not in ranks:
            yield Finding("reference-unknown", name_object(job), "metadata/labels", f"no WorkloadPriorityClass {rank}")


def _check_runtimes(objects: Sequence[Manifest]) -> Iterator[Finding]:
    runtimes = list(select(objects, "ServingRuntime", "ClusterServingRuntime"))
    for service in select(objects, "InferenceService"):
        model = service["spec"]["predictor"].get("model")
        if model is None:
            continue
        same = [one for one in runtimes if name_of(one) == model.get("runtime")]
        same = [one for one in same if namespace_of(one) in ("", namespace_of(service))]
        path = "spec/predictor/model/runtime"
        if not same:
            yield Finding("reference-unknown", name_object(service), path, f"no runtime {model.get('runtime')}")
        elif model["modelFormat"]["name"] not in {one["name"] for one in same[0]["spec"]["supportedModelFormats"]}:
            yield Finding("reference-unknown", name_object(service), path, "the runtime does not know the format")


def _check_references(pod: Pod, objects: Sequence[Manifest]) -> Iterator[Finding]:
    made = {
        (kind, namespace_of(one), name_of(one)) for kind in ("Secret", "ConfigMap") for one in select(objects, kind)
    }
    made |= {
        ("Secret", namespace_of(one), one["spec"].get("target", {}).get("name", name_of(one)))
        for one in select(objects, "ExternalSecret")
    }
    for path, kind, name, is_optional in _list_references(pod.spec):
        if (kind, pod.namespace, name) not in made and (kind, name) not in MADE_BY_PEOPLE and not is_optional:
            words = f"{kind} {name} is neither rendered nor on the list of those that people make"
            yield Finding("reference-unknown", pod.subject, f"{pod.path}/{path}", words)


def _list_references(spec: dict[str, Any]) -> Iterator[tuple[str, str, str, bool]]:
    for path, part in walk(spec):
        if not isinstance(part, dict):
            continue
        last = path.rpartition("/")[2]
        if last in ("secretKeyRef", "secretRef"):
            yield path, "Secret", part["name"], part.get("optional", False)
        elif last in ("configMapKeyRef", "configMapRef"):
            yield path, "ConfigMap", part["name"], part.get("optional", False)
        elif last == "secret" and "secretName" in part:
            yield path, "Secret", part["secretName"], part.get("optional", False)
        elif last == "configMap" and "name" in part:
            yield path, "ConfigMap", part["name"], part.get("optional", False)
