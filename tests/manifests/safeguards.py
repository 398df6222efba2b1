"""What single objects must say so that the platform is closed, cleans up after itself, and fits its quota.

Goes in: objects. Comes out: findings on namespaces' Pod Security labels, Ray jobs, services open to the outside,
scalers and quotas. It knows no pod's inside: that is pod_rules.py.
"""

from collections.abc import Iterator, Sequence
from fractions import Fraction

from manifests.objects import Finding, Manifest, name_object, name_of, namespace_of, select
from manifests.pods import Pod, list_pods
from manifests.quantities import parse_quantity

_MODES = ("enforce", "audit", "warn")
_GUARDED = ("cpu", "memory", "ephemeral-storage")


def find_safeguard_faults(objects: Sequence[Manifest]) -> list[Finding]:
    """What an object lacks, each for itself."""
    found = [*_check_namespaces(objects), *_check_ray_jobs(objects), *_check_services(objects)]
    return [*found, *_check_ranges(objects)]


def _check_namespaces(objects: Sequence[Manifest]) -> Iterator[Finding]:
    for namespace in select(objects, "Namespace"):
        labels = namespace["metadata"].get("labels", {})
        for mode in _MODES:
            key = f"pod-security.kubernetes.io/{mode}"
            if labels.get(key) != "restricted":
                words = f"is {labels.get(key)!r} and not restricted"
                yield Finding("pod-security-label", name_object(namespace), f"metadata/labels/{key}", words)


def _check_ray_jobs(objects: Sequence[Manifest]) -> Iterator[Finding]:
    for job in select(objects, "RayJob"):
        subject, spec = name_object(job), job["spec"]
        if spec.get("rayClusterSpec", {}).get("authOptions", {}).get("mode") != "token":
            words = "must be token: without it whoever reaches the head runs code there"
            yield Finding("ray-auth", subject, "spec/rayClusterSpec/authOptions/mode", words)
        if spec.get("shutdownAfterJobFinishes") is not True:
            yield Finding("ray-ends", subject, "spec/shutdownAfterJobFinishes", "must be true: its GPUs stay taken")
        if not spec.get("activeDeadlineSeconds"):
            yield Finding("ray-ends", subject, "spec/activeDeadlineSeconds", "is missing: a job that hangs never ends")
        if spec.get("suspend"):
            yield Finding(
                "ray-ends", subject, "spec/suspend", "Kueue sets it; a job made so without a queue never starts"
            )


def _check_services(objects: Sequence[Manifest]) -> Iterator[Finding]:
    for service in select(objects, "Service"):
        spec = service["spec"]
        if spec.get("type", "ClusterIP") != "ClusterIP" or spec.get("externalIPs"):
            words = f"{spec.get('type')} opens it to the outside past the gateway"
            yield Finding("service-exposed", name_object(service), "spec/type", words)
    for route in select(objects, "Route", "Ingress"):
        if not route["spec"].get("tls"):
            yield Finding("service-exposed", name_object(route), "spec/tls", "tokens would pass in the clear")


def _check_ranges(objects: Sequence[Manifest]) -> Iterator[Finding]:
    """Numbers of replicas that a scaler and its service disagree about."""
    services = {(namespace_of(one), f"{name_of(one)}-predictor"): one for one in select(objects, "InferenceService")}
    for service in services.values():
        predictor = service["spec"]["predictor"]
        if predictor.get("minReplicas", 1) > predictor.get("maxReplicas", 1):
            yield Finding("scale-range", name_object(service), "spec/predictor/minReplicas", "is more than maxReplicas")
    for scaler in select(objects, "ScaledObject"):
        spec = scaler["spec"]
        service = services.get((namespace_of(scaler), spec["scaleTargetRef"]["name"]))
        for key, other in (("minReplicaCount", "minReplicas"), ("maxReplicaCount", "maxReplicas")):
            wanted = None if service is None else service["spec"]["predictor"].get(other)
            if wanted is not None and spec.get(key) != wanted:
                words = f"{spec.get(key)} is not the {wanted} of the service"
                yield Finding("scale-range", name_object(scaler), f"spec/{key}", words)


def find_quota_faults(objects: Sequence[Manifest]) -> list[Finding]:
    """Resources that servers at their largest and all queues together may ask for, and a quota would refuse."""
    pods, queues = list_pods(objects), list(select(objects, "ClusterQueue"))
    found = []
    for quota in select(objects, "ResourceQuota"):
        for key, amount in quota["spec"]["hard"].items():
            part, _, resource = key.partition(".")
            if part not in ("requests", "limits") or (resource not in _GUARDED and "/" not in resource):
                continue
            needed = sum(_count_servers(pod, objects) * _add_up(pod, part, resource) for pod in pods)
            needed += sum(
                parse_quantity(one["nominalQuota"])
                for queue in queues
                for group in queue["spec"]["resourceGroups"]
                for flavor in group["flavors"]
                for one in flavor["resources"]
                if one["name"] == resource
            )
            if needed > parse_quantity(amount):
                words = f"{amount} is less than the {float(needed):g} that servers and queues may take"
                found.append(Finding("quota-small", name_object(quota), f"spec/hard/{key}", words))
    return found


def _count_servers(pod: Pod, objects: Sequence[Manifest]) -> int:
    """Pods of a service at its largest, with the one more of a rolling update."""
    for service in select(objects, "InferenceService"):
        if name_object(service) == pod.subject:
            return int(service["spec"]["predictor"].get("maxReplicas", 1)) + 1
    return 0


def _add_up(pod: Pod, part: str, resource: str) -> Fraction:
    amounts = [container.get("resources", {}).get(part, {}).get(resource, 0) for _, container in pod.containers()]
    return sum(map(parse_quantity, amounts), Fraction(0))
