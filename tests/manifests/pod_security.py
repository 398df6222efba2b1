"""Kubernetes' Pod Security Standards, levels `baseline` and `restricted`, field by field.

Goes in: a `Pod`. Comes out: findings, one for each field that an API server with `restricted` enforced would refuse, or
that `baseline` names. Source: kubernetes.io/docs/concepts/security/pod-security-standards. It does not know what we ask
beyond them: that is pod_rules.py.
"""

from collections.abc import Iterator
from typing import Any

from manifests.objects import Finding
from manifests.pods import Pod

_VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
_SYSCTLS = {
    *("kernel.shm_rmid_forced", "net.ipv4.ip_local_port_range", "net.ipv4.ip_unprivileged_port_start"),
    *("net.ipv4.tcp_syncookies", "net.ipv4.ping_group_range", "net.ipv4.ip_local_reserved_ports"),
    *("net.ipv4.tcp_keepalive_time", "net.ipv4.tcp_fin_timeout", "net.ipv4.tcp_keepalive_intvl"),
    *("net.ipv4.tcp_keepalive_probes", "net.ipv4.tcp_rmem", "net.ipv4.tcp_wmem"),
}
_SELINUX_TYPES = {"", "container_t", "container_init_t", "container_kvm_t", "container_engine_t"}
_APPARMOR_NOTE = "container.apparmor.security.beta.kubernetes.io/"
_PROBES = ("livenessProbe", "readinessProbe", "startupProbe")


def find_restricted_violations(pod: Pod) -> list[Finding]:
    """What the standard `restricted`, and `baseline` below it, forbids in a pod."""
    parts = [*_check_pod(pod)]
    outer = pod.spec.get("securityContext", {})
    for path, container in pod.containers():
        parts += _check_container(path, container, outer, has_pod=not pod.is_runtime)
    return [Finding(rule, pod.subject, path, words) for rule, path, words in parts]


def _check_pod(pod: Pod) -> Iterator[tuple[str, str, str]]:
    for key in ("hostNetwork", "hostPID", "hostIPC"):
        if pod.spec.get(key):
            yield "host-namespaces", f"{pod.path}/{key}", "the node's own namespace"
    for index, volume in enumerate(pod.spec.get("volumes", [])):
        for sort in volume.keys() - {"name"} - _VOLUMES:
            rule = "host-path" if sort == "hostPath" else "volume-type"
            yield rule, f"{pod.path}/volumes/{index}", f"{sort} is not one of {', '.join(sorted(_VOLUMES))}"
    outer = pod.spec.get("securityContext", {})
    for sysctl in outer.get("sysctls", []):
        if sysctl["name"] not in _SYSCTLS:
            yield "sysctls", f"{pod.path}/securityContext/sysctls", f"{sysctl['name']} is not a safe one"
    for key, value in pod.annotations.items():
        if key.startswith(_APPARMOR_NOTE) and value != "runtime/default" and not value.startswith("localhost/"):
            yield "apparmor", f"annotations/{key}", f"{value!r} takes AppArmor off"
    yield from _check_context(f"{pod.path}/securityContext", outer)


def _check_context(path: str, context: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """What stands in the security context of a pod and of a container alike."""
    if context.get("windowsOptions", {}).get("hostProcess"):
        yield "host-process", f"{path}/windowsOptions/hostProcess", "a process of the node"
    if context.get("runAsUser") == 0:
        yield "run-as-user", f"{path}/runAsUser", "0 is root"
    if context.get("runAsNonRoot") is False:
        yield "run-as-non-root", f"{path}/runAsNonRoot", "false lets root in"
    linux = context.get("seLinuxOptions", {})
    if linux.get("type", "") not in _SELINUX_TYPES or linux.get("user") or linux.get("role"):
        yield "selinux", f"{path}/seLinuxOptions", f"{linux} is more than a container's type"
    if context.get("appArmorProfile", {}).get("type", "RuntimeDefault") not in ("RuntimeDefault", "Localhost"):
        yield "apparmor", f"{path}/appArmorProfile/type", f"{context['appArmorProfile']['type']!r} takes AppArmor off"
    if context.get("seccompProfile", {}).get("type", "RuntimeDefault") not in ("RuntimeDefault", "Localhost"):
        yield "seccomp", f"{path}/seccompProfile/type", f"{context['seccompProfile']['type']!r} filters nothing"


def _check_container(
    path: str, container: dict[str, Any], outer: dict[str, Any], *, has_pod: bool
) -> Iterator[tuple[str, str, str]]:
    inner = container.get("securityContext", {})
    where = f"{path}/securityContext"
    yield from _check_context(where, inner)
    if inner.get("privileged"):
        yield "privileged", f"{where}/privileged", "all of the node's rights"
    if inner.get("allowPrivilegeEscalation") is not False:
        yield "privilege-escalation", f"{where}/allowPrivilegeEscalation", "must be false"
    capabilities = inner.get("capabilities", {})
    if "ALL" not in capabilities.get("drop", []):
        yield "drop-all", f"{where}/capabilities/drop", "must hold ALL"
    more = set(capabilities.get("add", [])) - {"NET_BIND_SERVICE"}
    if more:
        yield "add-capabilities", f"{where}/capabilities/add", f"{sorted(more)} may not be added"
    if inner.get("procMount", "Default") != "Default":
        yield "proc-mount", f"{where}/procMount", f"{inner['procMount']!r} shows more than Default"
    if has_pod:  # a runtime has no pod; its containers are seen again in the InferenceService that takes it
        if inner.get("runAsNonRoot", outer.get("runAsNonRoot")) is None:
            yield "run-as-non-root", f"{where}/runAsNonRoot", "must be true here or for the pod"
        if not (inner.get("seccompProfile") or outer.get("seccompProfile")):
            yield "seccomp", f"{where}/seccompProfile", "must be set here or for the pod"
    for index, port in enumerate(container.get("ports", [])):
        if port.get("hostPort"):
            yield "host-port", f"{path}/ports/{index}/hostPort", f"{port['hostPort']} is a port of the node"
    handlers = {probe: container.get(probe, {}) for probe in _PROBES}
    handlers |= {f"lifecycle/{hook}": action for hook, action in container.get("lifecycle", {}).items()}
    for name, handler in handlers.items():
        for how in ("httpGet", "tcpSocket"):
            if isinstance(handler, dict) and handler.get(how, {}).get("host"):
                yield "probe-host", f"{path}/{name}/{how}/host", "the kubelet would ask another machine"
