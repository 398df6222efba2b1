"""The steps of a compiled pipeline, as far as the pipeline itself decides what their pods are.

Goes in: the documents of a compiled pipeline (KFP's IR: the pipeline's spec, and the Kubernetes part that
kfp-kubernetes adds). Comes out: findings. What Kubeflow adds to a pod (its launcher, Argo's containers, the read-only
root) is not in these documents and is not judged.
"""

from collections.abc import Sequence
from typing import Any

from manifests.joins import MADE_BY_PEOPLE
from manifests.leaks import find_leaks
from manifests.objects import Finding
from manifests.pod_rules import DIGEST
from manifests.quantities import parse_quantity

_LABELS = {"app.kubernetes.io/part-of": "mint", "app.kubernetes.io/component": "step"}
_STAGES = {"data", "teacher", "preferences", "alignment", "evaluation", "registry", "serving"}
_WRITTEN_TO = ("/tmp", "/var/cache/mint")
_BOUNDS = (("resourceCpuRequest", "resourceCpuLimit"), ("resourceMemoryRequest", "resourceMemoryLimit"))


def find_step_faults(
    documents: Sequence[dict[str, Any]], *, canaries: Sequence[str] = (), platform_gives_users: bool = False
) -> list[Finding]:
    """What the steps of a compiled pipeline lack.

    Args:
        documents: What the compiler wrote, one dictionary a YAML document.
        canaries: Secrets that stood in the environment while it was compiled.
        platform_gives_users: As in `pod_rules.find_pod_faults`.
    """
    found = []
    for document in documents:
        found += find_leaks(document, subject="pipeline", canaries=canaries)
    executors = documents[0]["deploymentSpec"]["executors"]
    platform = next((one["platforms"]["kubernetes"] for one in documents if "platforms" in one), {})
    settings = platform.get("deploymentSpec", {}).get("executors", {})
    for name, executor in executors.items():
        if "container" not in executor:
            found.append(Finding("step-kind", name, "", f"{sorted(executor)} is no container"))
            continue
        setting = settings.get(name, {})
        parts = [*_check_container(executor["container"]), *_check_setting(setting, platform_gives_users)]
        found += [Finding(rule, f"step {name}", path, words) for rule, path, words in parts]
    return found


def _check_container(container: dict[str, Any]) -> list[tuple[str, str, str]]:
    found = []
    if not DIGEST.fullmatch(container.get("image", "")):
        found.append(("step-image", "container/image", f"{container.get('image')!r} can move; name it by its digest"))
    if "pip install" in " ".join([*container.get("command", []), *container.get("args", [])]):
        found.append(("step-installs", "container/command", "installs packages when it starts"))
    resources = container.get("resources", {})
    for request, limit in _BOUNDS:
        for key in (request, limit):
            if key not in resources:
                found.append(("step-resources", f"container/resources/{key}", "is missing"))
        amounts = [parse_quantity(resources[key]) for key in (request, limit) if key in resources]
        if len(amounts) > 1 and amounts[0] > amounts[1]:
            words = f"{resources[request]} is more than the limit {resources[limit]}"
            found.append(("step-resources", f"container/resources/{request}", words))
    return found


def _check_setting(setting: dict[str, Any], platform_gives_users: bool) -> list[tuple[str, str, str]]:
    found = []
    labels = setting.get("podMetadata", {}).get("labels", {})
    for key, value in _LABELS.items():
        if labels.get(key) != value:
            found.append(
                ("step-labels", f"podMetadata/labels/{key}", f"is not {value}: no network policy knows the pod")
            )
    if labels.get("mint.platform/stage") not in _STAGES:
        found.append(("step-labels", "podMetadata/labels/mint.platform/stage", "names no stage"))
    for index, secret in enumerate(setting.get("secretAsEnv", [])):
        name = _read_name(secret, "secretName")
        if ("Secret", name) not in MADE_BY_PEOPLE:
            found.append(
                ("step-secret", f"secretAsEnv/{index}", f"{name!r} is not on the list of those that people make")
            )
    folders = {folder["mountPath"]: folder for folder in setting.get("emptyDirMounts", [])}
    for place in _WRITTEN_TO:
        if place not in folders:
            found.append(("step-writable", f"emptyDirMounts{place}", "no volume; the image's root is read-only"))
    for path, folder in folders.items():
        if "sizeLimit" not in folder:
            found.append(("step-writable", f"emptyDirMounts{path}", "without sizeLimit it fills the node"))
    user = setting.get("securityContext", {})
    if user.get("runAsNonRoot") is not True:
        found.append(("step-user", "securityContext/runAsNonRoot", "must be true"))
    if platform_gives_users == ("runAsUser" in user) or str(user.get("runAsUser")) == "0":
        found.append(("step-user", "securityContext/runAsUser", f"{user.get('runAsUser')!r}"))
    if not setting.get("activeDeadlineSeconds"):
        found.append(("step-deadline", "activeDeadlineSeconds", "is missing: a step that hangs keeps its GPU"))
    if setting.get("imagePullPolicy", "IfNotPresent") not in ("IfNotPresent", "Always"):
        found.append(("step-image", "imagePullPolicy", f"{setting['imagePullPolicy']!r} trusts what is there"))
    return found


def _read_name(setting: dict[str, Any], key: str) -> str:
    parameter = setting.get(f"{key}Parameter", {})
    return str(setting.get(key) or parameter.get("runtimeValue", {}).get("constant", ""))
