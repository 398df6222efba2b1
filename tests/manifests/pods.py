"""Every pod that objects lead to, also those that KServe and KubeRay will make from them.

Goes in: Kubernetes objects. Comes out: `Pod`, one for each template, with the labels that the pod will carry. An
InferenceService is merged with its ServingRuntime as KServe's controller does it (pkg/controller/v1beta1/
inferenceservice: MergePodSpec, MergeRuntimeContainers, buildObjectMeta). It judges nothing but what it cannot read.
"""

import copy
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from manifests.objects import Finding, Manifest, name_object, name_of, namespace_of, select, walk

_TEMPLATES = ("Deployment", "StatefulSet", "DaemonSet", "ReplicaSet", "Job")
_RAY = ("RayJob", "RayCluster", "RayService", "RayCronJob")
_SORTS = ("initContainers", "containers", "ephemeralContainers")
_RUNTIMES = ("ServingRuntime", "ClusterServingRuntime")
_FROM_RUNTIME = ("nodeSelector", "affinity", "tolerations", "volumes", "imagePullSecrets", "schedulerName")
"""What KServe takes of a runtime for the pod; all else of the pod is the InferenceService's."""
_OF_THE_COMPONENT = {
    *("minReplicas", "maxReplicas", "scaleTarget", "scaleMetric", "scaleMetricType", "autoScaling", "model"),
    *("containerConcurrency", "timeout", "canaryTrafficPercent", "logger", "batcher", "labels", "annotations"),
    *("deploymentStrategy", "workerSpec", "storageUris", "storageContainerName"),
}
_MERGED_BY = {"env": "name", "volumeMounts": "mountPath", "ports": "containerPort", "volumes": "name"}
_MERGED_BY |= {"imagePullSecrets": "name"}


class Pod(NamedTuple):
    """A pod to be, and where it comes from."""

    subject: str
    path: str
    namespace: str
    name: str
    labels: dict[str, str]
    annotations: dict[str, str]
    spec: dict[str, Any]
    is_whole: bool = True
    """False where others fill in the rest: a runtime's containers, or an LLMInferenceService over KServe's template."""

    @property
    def component(self) -> str:
        """Which of the platform's pods it is."""
        return self.labels.get("app.kubernetes.io/component", "")

    @property
    def is_runtime(self) -> bool:
        """Whether it is the containers and volumes of a runtime alone; its InferenceServices have the rest."""
        return self.subject.startswith(_RUNTIMES)

    def containers(self) -> list[tuple[str, dict[str, Any]]]:
        """Containers of every sort, each with its path."""
        return [
            (f"{self.path}/{sort}/{index}", container)
            for sort in _SORTS
            for index, container in enumerate(self.spec.get(sort, []))
        ]


def list_pods(objects: Sequence[Manifest]) -> list[Pod]:
    """All pods that the objects lead to."""
    return [pod for manifest in objects for pod in _list_pods_of(manifest, objects)]


def find_unread_pods(objects: Sequence[Manifest]) -> list[Finding]:
    """Containers in places where `list_pods` does not look, and RayJobs whose submitter nobody wrote down."""
    found = []
    for manifest in objects:
        read = {f"{pod.path}/{sort}" for pod in _list_pods_of(manifest, ()) for sort in _SORTS}
        for path, value in walk(manifest):
            if path.rpartition("/")[2] in _SORTS and isinstance(value, list) and value and path not in read:
                found.append(Finding("pod-unread", name_object(manifest), path, "containers that no check knows of"))
        spec = manifest.get("spec", {})
        by_pod = manifest.get("kind") == "RayJob" and spec.get("submissionMode", "K8sJobMode") == "K8sJobMode"
        if by_pod and "submitterPodTemplate" not in spec:
            words = "KubeRay's own submitter pod is not restricted; write the template down"
            found.append(Finding("ray-submitter", name_object(manifest), "spec/submitterPodTemplate", words))
    return found


def merge_runtime(runtime: Manifest, service: Manifest) -> dict[str, Any]:
    """The pod's spec that KServe makes of a runtime and an InferenceService that names it."""
    base, predictor = runtime["spec"], service["spec"]["predictor"]
    own = {key: value for key, value in predictor.items() if key not in _OF_THE_COMPONENT}
    spec = _merge({key: base[key] for key in _FROM_RUNTIME if key in base}, own)
    given = {key: value for key, value in predictor["model"].items() if key in _CONTAINER_FIELDS}
    merged = []
    for container in base["containers"]:
        if container["name"] == "kserve-container":
            one = _merge(container, given | {"name": "kserve-container"})
            one["args"] = [*container.get("args", []), *given.get("args", [])]
            merged.insert(0, _fill_placeholders(one, service["metadata"]))
        else:
            merged.append(copy.deepcopy(container))
    spec["containers"] = merged + list(own.get("containers", []))
    return spec


_CONTAINER_FIELDS = {
    *("args", "command", "env", "envFrom", "image", "imagePullPolicy", "lifecycle", "livenessProbe", "ports"),
    *("readinessProbe", "resources", "securityContext", "startupProbe", "volumeMounts", "workingDir"),
    *("terminationMessagePath", "terminationMessagePolicy", "volumeDevices", "restartPolicy", "resizePolicy"),
}


def _list_pods_of(manifest: Manifest, objects: Iterable[Manifest]) -> Iterator[Pod]:
    kind, spec = manifest.get("kind"), manifest.get("spec", {})
    if kind == "Pod":
        yield _pod(manifest, "spec", manifest.get("metadata", {}), spec)
    elif kind in _TEMPLATES:
        pod = _template(manifest, "spec/template", spec["template"])
        claims = [{"name": name_of(one), "persistentVolumeClaim": {}} for one in spec.get("volumeClaimTemplates", [])]
        yield pod._replace(spec={**pod.spec, "volumes": [*pod.spec.get("volumes", []), *claims]}) if claims else pod
    elif kind == "CronJob":
        template = spec["jobTemplate"]["spec"]["template"]
        yield _template(manifest, "spec/jobTemplate/spec/template", template)
    elif kind in _RUNTIMES:
        yield _pod(manifest, "spec", spec, spec, is_whole=False)
    elif kind == "InferenceService":
        yield from _list_pods_of_service(manifest, objects)
    elif kind == "LLMInferenceService":
        for part in ("template", "worker"):
            if part in spec:
                yield _pod(manifest, f"spec/{part}", manifest["metadata"], spec[part], is_whole=False)
        if "template" in spec.get("prefill", {}):
            template = spec["prefill"]["template"]
            yield _pod(manifest, "spec/prefill/template", manifest["metadata"], template, is_whole=False)
    elif kind in _RAY:
        yield from _list_pods_of_ray(manifest)


def _list_pods_of_service(manifest: Manifest, objects: Iterable[Manifest]) -> Iterator[Pod]:
    metadata, spec = manifest["metadata"], manifest["spec"]
    for part in ("predictor", "transformer", "explainer"):
        if part not in spec:
            continue
        component, runtime = spec[part], None
        if part == "predictor" and "model" in component:
            wanted = component["model"].get("runtime")
            same = (one for one in select(objects, *_RUNTIMES) if name_of(one) == wanted)
            runtime = next((one for one in same if namespace_of(one) in ("", namespace_of(manifest))), None)
            if runtime is None:  # a cross-object check says so
                continue
        own = {key: value for key, value in component.items() if key not in _OF_THE_COMPONENT}
        pod_spec = own if runtime is None else merge_runtime(runtime, manifest)
        base = {} if runtime is None else runtime["spec"]
        name = f"{metadata['name']}-{part}"
        labels = {**base.get("labels", {}), **metadata.get("labels", {}), **component.get("labels", {})}
        labels |= {"serving.kserve.io/inferenceservice": metadata["name"], "component": part, "app": f"isvc.{name}"}
        notes = {
            **base.get("annotations", {}),
            **metadata.get("annotations", {}),
            **component.get("annotations", {}),
        }
        yield Pod(name_object(manifest), f"spec/{part}", namespace_of(manifest), name, labels, notes, pod_spec)


def _list_pods_of_ray(manifest: Manifest) -> Iterator[Pod]:
    spec, path = manifest["spec"], "spec"
    if manifest["kind"] == "RayCronJob":
        spec, path = spec["jobTemplate"], "spec/jobTemplate"
    cluster, below = (spec, path) if manifest["kind"] == "RayCluster" else (spec.get("rayClusterSpec"), "")
    below = below or f"{path}/{'rayClusterConfig' if manifest['kind'] == 'RayService' else 'rayClusterSpec'}"
    cluster = cluster or spec.get("rayClusterConfig", {})
    if "headGroupSpec" in cluster:
        yield _template(manifest, f"{below}/headGroupSpec/template", cluster["headGroupSpec"]["template"])
    for index, group in enumerate(cluster.get("workerGroupSpecs", [])):
        yield _template(manifest, f"{below}/workerGroupSpecs/{index}/template", group["template"])
    if "submitterPodTemplate" in spec:
        yield _template(manifest, f"{path}/submitterPodTemplate", spec["submitterPodTemplate"])


def _template(manifest: Manifest, path: str, template: Manifest) -> Pod:
    return _pod(manifest, f"{path}/spec", template.get("metadata", {}), template.get("spec", {}))


def _pod(manifest: Manifest, path: str, metadata: Manifest, spec: Manifest, *, is_whole: bool = True) -> Pod:
    labels, annotations = metadata.get("labels", {}), metadata.get("annotations", {})
    subject, namespace = name_object(manifest), namespace_of(manifest)
    return Pod(subject, path, namespace, name_of(manifest), labels, annotations, spec, is_whole)


def _merge(base: Any, patch: Any, key: str = "") -> Any:
    """A strategic merge patch, as far as pods need it: lists of named things are joined by their key."""
    if isinstance(base, dict) and isinstance(patch, dict):
        merged = copy.deepcopy(base)
        for name, value in patch.items():
            merged[name] = _merge(base[name], value, name) if name in base else copy.deepcopy(value)
        return merged
    if isinstance(base, list) and isinstance(patch, list) and key in _MERGED_BY:
        by = _MERGED_BY[key]
        given = {item[by]: item for item in patch}
        kept = [_merge(item, given.pop(item[by])) if item[by] in given else item for item in base]
        return copy.deepcopy(kept + list(given.values()))
    return copy.deepcopy(patch)


def _fill_placeholders(container: dict[str, Any], metadata: Manifest) -> dict[str, Any]:
    def fill(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: fill(part) for key, part in value.items()}
        if isinstance(value, list):
            return [fill(part) for part in value]
        if not isinstance(value, str) or "{{" not in value:
            return value
        for place in ("Name", "Namespace"):
            value = value.replace("{{." + place + "}}", metadata[place.lower()])
        for label, text in metadata.get("labels", {}).items():
            value = value.replace("{{.Labels." + label + "}}", text)
        return value

    return fill(container)
