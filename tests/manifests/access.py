"""Who may do what, from all roles and bindings that are rendered.

Goes in: objects. Comes out: the closure as a set of `Permission`, compared with a list, and findings on roles that are
too wide by themselves. Source of the dangerous verbs: kubernetes.io/docs/concepts/security/rbac-good-practices. It does
not know the roles that a cluster brings; a binding to one of them is a finding.
"""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from manifests.objects import Finding, Manifest, name_object, name_of, namespace_of, select
from manifests.pods import Pod

ALLOWED_FILE = Path(__file__).with_name("allowed_rbac.yaml")
_FORBIDDEN_VERBS = {"escalate", "bind", "impersonate"}
_FORBIDDEN_RESOURCES = {
    *("secrets", "pods/exec", "pods/attach", "pods/portforward", "pods/proxy", "pods/ephemeralcontainers"),
    *("services/proxy", "nodes/proxy", "nodes", "serviceaccounts/token", "certificatesigningrequests"),
    *("roles", "rolebindings", "clusterroles", "clusterrolebindings", "persistentvolumes"),
    *("mutatingwebhookconfigurations", "validatingwebhookconfigurations", "namespaces"),
}
_MAKES_PODS = {"pods", "deployments", "statefulsets", "daemonsets", "replicasets", "jobs", "cronjobs"}
_WRITES = {"create", "update", "patch", "*"}


class Permission(NamedTuple):
    """One verb of one subject on one resource."""

    subject: str
    """Kind, namespace and name."""
    namespace: str
    """Where it holds; `*` is everywhere."""
    group: str
    resource: str
    verb: str
    name: str = "*"
    """The one object that it holds for; `*` is all."""


def list_permissions(objects: Sequence[Manifest]) -> set[Permission]:
    """The closure of all bindings."""
    roles = {(role["kind"], namespace_of(role), name_of(role)): role for role in select(objects, "Role", "ClusterRole")}
    granted = set()
    for binding in select(objects, "RoleBinding", "ClusterRoleBinding"):
        scope = namespace_of(binding) if binding["kind"] == "RoleBinding" else "*"
        reference = binding["roleRef"]
        role = roles.get((reference["kind"], scope if reference["kind"] == "Role" else "", reference["name"]), {})
        for rule in role.get("rules") or []:
            for subject in binding.get("subjects") or []:
                who = f"{subject['kind']} {subject.get('namespace', '-')}/{subject['name']}"
                granted |= {
                    Permission(who, scope, group, resource, verb, name)
                    for group in rule.get("apiGroups", ["-"])
                    for resource in rule.get("resources", rule.get("nonResourceURLs", []))
                    for verb in rule["verbs"]
                    for name in rule.get("resourceNames") or ["*"]
                }
    return granted


def load_allowed(
    namespace: str, *, pipeline_namespaces: Sequence[str] = (), has_executor: bool = True
) -> set[Permission]:
    """The list of allowed_rbac.yaml for one installation.

    Args:
        namespace: Where the platform's pods run.
        pipeline_namespaces: Others where steps of pipelines run, under accounts of the same names.
        has_executor: Whether the chart gives the rights that every pod of a Kubeflow run needs.
    """
    allowed = set()
    for entry in yaml.safe_load(ALLOWED_FILE.read_text()):
        if entry.get("executor") and not has_executor:
            continue
        for home in (namespace, *pipeline_namespaces):
            scope = {"workload": namespace, "own": home}[entry["where"]]
            allowed |= {
                Permission(f"ServiceAccount {home}/{entry['serviceAccount']}", scope, entry["apiGroup"], *right)
                for right in itertools.product(entry["resources"], entry["verbs"], entry.get("names", ["*"]))
            }
    return allowed


def find_access_faults(objects: Sequence[Manifest], allowed: set[Permission]) -> list[Finding]:
    """Rights that the list does not hold, those that it holds in vain, and roles that are too wide by themselves."""
    granted = list_permissions(objects)
    found = [
        Finding("rbac-more", right.subject, "", f"{tuple(right[1:])} is not allowed") for right in granted - allowed
    ]
    found += [Finding("rbac-less", right.subject, "", f"{tuple(right[1:])} is missing") for right in allowed - granted]
    for role in select(objects, "Role", "ClusterRole"):
        for index, rule in enumerate(role.get("rules") or []):
            found += [Finding(name, name_object(role), f"rules/{index}", words) for name, words in _check_rule(rule)]
    found += _check_bindings(objects)
    return found


def _check_rule(rule: dict[str, Any]) -> Iterator[tuple[str, str]]:
    resources, verbs = set(rule.get("resources", [])), set(rule["verbs"])
    stars = [part for part in ("apiGroups", "resources", "verbs") if any("*" in text for text in rule.get(part, []))]
    if stars:
        yield "rbac-wildcard", f"a star in {', '.join(stars)}"
    if verbs & _FORBIDDEN_VERBS:
        yield "rbac-verb", f"{sorted(verbs & _FORBIDDEN_VERBS)} lets it take any right"
    if resources & _FORBIDDEN_RESOURCES:
        yield "rbac-resource", f"{sorted(resources & _FORBIDDEN_RESOURCES)} is more than a workload needs"
    if resources & _MAKES_PODS and verbs & _WRITES:
        yield "rbac-pods", "who makes pods may be any service account of the namespace"
    if "nonResourceURLs" in rule:
        yield "rbac-resource", f"{rule['nonResourceURLs']} is the API server's own"


def _check_bindings(objects: Sequence[Manifest]) -> Iterator[Finding]:
    roles = {(role["kind"], namespace_of(role), name_of(role)) for role in select(objects, "Role", "ClusterRole")}
    bound = set()
    for binding in select(objects, "RoleBinding", "ClusterRoleBinding"):
        reference = binding["roleRef"]
        is_local = reference["kind"] == "Role" and binding["kind"] == "RoleBinding"
        role = (reference["kind"], namespace_of(binding) if is_local else "", reference["name"])
        bound.add(role)
        if role not in roles:
            yield Finding(
                "rbac-role", name_object(binding), "roleRef", f"{role} is not rendered; its rights are unknown"
            )
        for index, subject in enumerate(binding.get("subjects") or []):
            if subject["kind"] != "ServiceAccount" or subject["name"] == "default":
                words = f"{subject['kind']} {subject['name']}: only service accounts made for one use are bound"
                yield Finding("rbac-subject", name_object(binding), f"subjects/{index}", words)
    for kind, namespace, name in roles - bound:
        yield Finding("rbac-role", f"{kind} {namespace or '-'}/{name}", "", "is bound to nobody")


def find_account_faults(
    objects: Sequence[Manifest], pods: Sequence[Pod], *, token_accounts: Sequence[str] = ("mint-pipeline",)
) -> list[Finding]:
    """Pods whose service account is not rendered, accounts of several components, and accounts that mount a token."""
    accounts = {(namespace_of(account), name_of(account)): account for account in select(objects, "ServiceAccount")}
    users: dict[tuple[str, str], set[str]] = {}
    found = []
    for pod in pods:
        if not pod.is_whole:
            continue
        account = (pod.namespace, pod.spec.get("serviceAccountName", "default"))
        if account not in accounts:
            path = f"{pod.path}/serviceAccountName"
            found.append(Finding("account-unknown", pod.subject, path, f"{account} is not rendered"))
        users.setdefault(account, set()).add(pod.component.partition("-")[0])
    for (namespace, name), components in users.items():
        if len(components) > 1:
            words = f"is used by {sorted(components)}; each has its own"
            found.append(Finding("account-shared", f"ServiceAccount {namespace}/{name}", "", words))
    for account in accounts.values():
        if account.get("automountServiceAccountToken") is not False and name_of(account) not in token_accounts:
            words = "must be false: its pods ask the API server for nothing"
            found.append(Finding("token-mount", name_object(account), "automountServiceAccountToken", words))
        if account.get("secrets"):
            found.append(Finding("token-secret", name_object(account), "secrets", "a token that never expires"))
    return found
