"""What we ask of every pod beyond Kubernetes' standard `restricted`.

Goes in: a `Pod`. Comes out: findings. A read-only root, writable places on bounded volumes only, a user by number, no
token of the API server unless listed, no address book of services, requests and limits for cpu, memory and ephemeral
storage, images by digest, probes, and time enough to stop. It knows no other object: that is joins.py.
"""

import re
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

from manifests.objects import Finding
from manifests.pods import Pod
from manifests.quantities import parse_quantity

TOKEN_HOLDERS = {("mint-pipeline", "step")}
"""Service account and component of the pods that speak with the API server."""
BOUNDED = ("cpu", "memory", "ephemeral-storage")
WRITTEN_TO = {
    *("HOME", "TMPDIR", "XDG_CACHE_HOME", "HF_HOME", "MINT_CACHE_DIR", "RAY_TMPDIR", "MPLCONFIGDIR"),
    *("TORCHINDUCTOR_CACHE_DIR", "TORCH_EXTENSIONS_DIR", "TRITON_CACHE_DIR", "TRITON_HOME", "PYTHONPYCACHEPREFIX"),
}
"""Variables that name a folder which a library writes to."""
DIGEST = re.compile(r"[a-z0-9][a-z0-9._:/-]*@sha256:[0-9a-f]{64}")
_SOURCES_THAT_ARE_READ_ONLY = {"secret", "configMap", "projected", "downwardAPI"}

Part = tuple[str, str, str]


def find_pod_faults(pod: Pod, *, platform_gives_users: bool = False) -> list[Finding]:
    """What a pod lacks of our own rules.

    Args:
        pod: The pod.
        platform_gives_users: True where the platform gives every namespace its own user numbers (OpenShift): then a
            number in the pod is the fault.
    """
    parts = list(_check_containers(pod))
    if not pod.is_runtime:
        parts += [*_check_pod(pod), *_check_user(pod, platform_gives_users)]
    if not _is_kserves_own(pod):
        parts += _check_volumes(pod)
        if pod.component == "server" or pod.is_runtime:
            parts += _check_server(pod)
    return [Finding(rule, pod.subject, path, words) for rule, path, words in parts]


def _check_pod(pod: Pod) -> Iterator[Part]:
    account = pod.spec.get("serviceAccountName", "default")
    if account == "default":
        yield "service-account", f"{pod.path}/serviceAccountName", "the account `default` is everybody's"
    if "serviceAccount" in pod.spec:
        yield "service-account", f"{pod.path}/serviceAccount", "the old spelling of serviceAccountName"
    if pod.spec.get("automountServiceAccountToken") is not False and (account, pod.component) not in TOKEN_HOLDERS:
        yield "token-mount", f"{pod.path}/automountServiceAccountToken", f"{account} is not on the list: must be false"
    for index, volume in enumerate(pod.spec.get("volumes", [])):
        sources = volume.get("projected", {}).get("sources", [])
        tokens = [source["serviceAccountToken"] for source in sources if "serviceAccountToken" in source]
        if any(not token.get("audience") for token in tokens) and (account, pod.component) not in TOKEN_HOLDERS:
            yield "token-mount", f"{pod.path}/volumes/{index}/projected", "a token of the API server by another way"
    if pod.spec.get("enableServiceLinks") is not False:
        yield "service-links", f"{pod.path}/enableServiceLinks", "must be false: every service becomes a variable"
    if pod.spec.get("shareProcessNamespace"):
        yield "share-processes", f"{pod.path}/shareProcessNamespace", "containers see each other's processes"
    for key in ("hostAliases", "nodeName"):
        if pod.spec.get(key):
            yield "pinned", f"{pod.path}/{key}", "names a machine"
    seccomp = pod.spec.get("securityContext", {}).get("seccompProfile", {}).get("type")
    if seccomp != "RuntimeDefault":
        yield "seccomp-runtime-default", f"{pod.path}/securityContext/seccompProfile", f"{seccomp!r}"


def _check_user(pod: Pod, platform_gives_users: bool) -> Iterator[Part]:
    outer = pod.spec.get("securityContext", {})
    numbers = ("runAsUser", "runAsGroup", "fsGroup")
    for path, context in [
        (f"{pod.path}/securityContext", outer),
        *((f"{path}/securityContext", container.get("securityContext", {})) for path, container in pod.containers()),
    ]:
        for key in numbers:
            if platform_gives_users and key in context:
                yield "user-number", f"{path}/{key}", "the platform gives the number and refuses this one"
            elif context.get(key) == 0:
                yield "user-number", f"{path}/{key}", "0 is root's"
    if platform_gives_users:
        return
    for path, container in pod.containers():
        inner = container.get("securityContext", {})
        for key in ("runAsUser", "runAsGroup"):
            if inner.get(key, outer.get(key)) is None:
                words = "an image may name its user by name, which runAsNonRoot refuses"
                yield "user-number", f"{path}/securityContext/{key}", words


def _check_containers(pod: Pod) -> Iterator[Part]:
    for path, container in pod.containers():
        if container.get("securityContext", {}).get("readOnlyRootFilesystem") is not True and not _is_kserves_own(pod):
            yield "read-only-root", f"{path}/securityContext/readOnlyRootFilesystem", "must be true"
        image = container.get("image")
        if image is None and pod.is_whole:
            yield "image-digest", f"{path}/image", "no image"
        if image is not None and not DIGEST.fullmatch(image):
            yield "image-digest", f"{path}/image", f"{image!r} can move; name it by its digest"
        if container.get("imagePullPolicy", "IfNotPresent") not in ("IfNotPresent", "Always"):
            yield "image-pull", f"{path}/imagePullPolicy", f"{container['imagePullPolicy']!r} trusts what is there"
        for key in ("stdin", "tty"):
            if container.get(key):
                yield "terminal", f"{path}/{key}", "nobody types here"
        if pod.is_whole or "resources" in container:
            yield from _check_resources(f"{path}/resources", container.get("resources", {}), pod)


def _is_kserves_own(pod: Pod) -> bool:
    """KServe's vLLM template writes below its root; only KServe can change that."""
    return pod.subject.startswith("LLMInferenceService ")


def _check_resources(path: str, resources: dict[str, Any], pod: Pod) -> Iterator[Part]:
    needed = ("cpu", "memory") if _is_kserves_own(pod) else BOUNDED
    requests, limits = resources.get("requests", {}), resources.get("limits", {})
    for part, amounts in (("requests", requests), ("limits", limits)):
        for name in needed:
            if name not in amounts:
                yield f"resources-{part}", f"{path}/{part}/{name}", "is missing"
        for name, amount in amounts.items():
            try:
                if parse_quantity(amount) <= 0:
                    yield "resources-quantity", f"{path}/{part}/{name}", f"{amount!r} is nothing"
            except ValueError as error:
                yield "resources-quantity", f"{path}/{part}/{name}", str(error)
                return
    for name, amount in requests.items():
        if name in limits and parse_quantity(amount) > parse_quantity(limits[name]):
            yield "resources-order", f"{path}/requests/{name}", f"{amount} is more than the limit {limits[name]}"
        if "/" in name and parse_quantity(amount) != parse_quantity(limits.get(name, 0)):
            yield "resources-order", f"{path}/requests/{name}", "devices are given whole: request and limit are equal"


def _check_volumes(pod: Pod) -> Iterator[Part]:
    volumes = {volume["name"]: volume for volume in pod.spec.get("volumes", [])}
    for name, volume in volumes.items():
        if "emptyDir" in volume and "sizeLimit" not in (volume["emptyDir"] or {}):
            yield "volume-size", f"{pod.path}/volumes/{name}/emptyDir", "without sizeLimit it fills the node"
    mounted = set()
    for path, container in pod.containers():
        mounts = container.get("volumeMounts", [])
        mounted |= {mount["name"] for mount in mounts}
        for mount in mounts:
            if mount["name"] not in volumes:
                yield "mount-unknown", f"{path}/volumeMounts/{mount['name']}", "no such volume"
            if "subPath" in mount or "subPathExpr" in mount:
                yield "mount-subpath", f"{path}/volumeMounts/{mount['name']}", "a change never reaches the pod"
        if len({mount["mountPath"].rstrip("/") for mount in mounts}) < len(mounts):
            yield "mount-twice", f"{path}/volumeMounts", "two volumes at one path"
        yield from _check_writable(path, container, mounts, volumes)
        yield from _check_sizes(path, container, mounts, volumes)
    for name in volumes.keys() - mounted:
        yield "volume-unused", f"{pod.path}/volumes/{name}", "nothing mounts it"


def _check_writable(
    path: str, container: dict[str, Any], mounts: list[dict[str, Any]], volumes: dict[str, Any]
) -> Iterator[Part]:
    writable = [
        mount["mountPath"].rstrip("/")
        for mount in mounts
        if not mount.get("readOnly") and not volumes.get(mount["name"], {}).keys() & _SOURCES_THAT_ARE_READ_ONLY
    ]
    values = {entry["name"]: entry.get("value") for entry in container.get("env", [])}
    used = {f"env/{name}": value for name, value in values.items() if name in WRITTEN_TO and value}
    used["/tmp"] = "/tmp"
    if "workingDir" in container:
        used["workingDir"] = container["workingDir"]
    for what, folder in used.items():
        place = folder.rstrip("/")
        if not any(place == root or place.startswith(f"{root}/") for root in writable):
            yield "not-writable", f"{path}/{what}", f"{folder} is on no writable volume, and the root is read-only"


def _check_sizes(
    path: str, container: dict[str, Any], mounts: list[dict[str, Any]], volumes: dict[str, Any]
) -> Iterator[Part]:
    limits = container.get("resources", {}).get("limits", {})
    folders = [(volumes.get(name, {}).get("emptyDir") or {}) for name in {mount["name"] for mount in mounts}]
    sizes: dict[str, list[Fraction]] = {"": [], "Memory": []}
    for folder in folders:
        if "sizeLimit" in folder:
            sizes[folder.get("medium", "")].append(parse_quantity(folder["sizeLimit"]))
    # Folders on disk may share the pod's limit, one alone must not be beyond it; memory is taken by all of them.
    for resource, amount in (("ephemeral-storage", max(sizes[""], default=0)), ("memory", sum(sizes["Memory"]))):
        if resource in limits and amount > parse_quantity(limits[resource]):
            yield (
                "volume-size",
                f"{path}/resources/limits/{resource}",
                f"{limits[resource]} is less than its folders hold",
            )


def _check_server(pod: Pod) -> Iterator[Part]:
    for path, container in pod.containers()[:1]:
        for probe, asked in (("startupProbe", "/readyz"), ("readinessProbe", "/readyz"), ("livenessProbe", "/healthz")):
            if container.get(probe, {}).get("httpGet", {}).get("path") != asked:
                yield "probe", f"{path}/{probe}", f"must ask {asked}"
        arguments = " ".join([*container.get("command", []), *container.get("args", [])])
        if not re.search(r"--tokens[ =]/", arguments):
            yield "server-auth", f"{path}/args", "--tokens must name the file of the tokens"
        needed = 0
        for option in ("--drain-seconds", "--grace-seconds"):
            given_option = re.search(rf"{option}[ =](\d+)", arguments)
            if given_option is None:
                yield "stop-time", f"{path}/args", f"{option} is not given, so the time to stop is not known"
                return
            needed += int(given_option.group(1))
        given = pod.spec.get("terminationGracePeriodSeconds", 30)
        if pod.is_whole and given <= needed:
            words = f"{given} s is not more than the {needed} s that the server takes to drain and to finish"
            yield "stop-time", f"{pod.path}/terminationGracePeriodSeconds", words
