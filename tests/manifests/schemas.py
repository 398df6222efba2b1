"""Objects checked as an API server checks them: core schemas, true CRD schemas, and the CRDs' CEL rules.

Goes in: objects, and the Kubernetes minors to check against. Comes out: findings. Fields that no schema knows are
findings too. A kind without a schema must be on the list of those that were checked by hand. Webhooks are not run.
"""

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import crd_schema

from manifests.objects import Finding, Manifest, group_of, name_object

MINORS = ("1.32", "1.33", "1.34", "1.35", "1.36")
"""What the chart claims to run on."""
CHECKED_BY_HAND = {
    "external-secrets.io/v1 ExternalSecret": "no schema at hand; fields compared with the project's API reference",
    "route.openshift.io/v1 Route": "OpenShift's own API; fields compared with its API reference",
    "security.openshift.io/v1 SecurityContextConstraints": "OpenShift's own API",
}
_CORE_GROUPS = {
    *("", "apps", "batch", "policy", "autoscaling", "rbac.authorization.k8s.io", "networking.k8s.io"),
    *("scheduling.k8s.io", "coordination.k8s.io", "admissionregistration.k8s.io", "apiextensions.k8s.io"),
    *("storage.k8s.io", "node.k8s.io", "certificates.k8s.io", "apiregistration.k8s.io"),
}


def find_schema_faults(
    objects: Sequence[Manifest], *, minors: Sequence[str] = MINORS, folder: Path = crd_schema.CRD_FOLDER
) -> list[Finding]:
    """What the schemas refuse; custom resources are left out where `folder` does not exist."""
    found = []
    for manifest in objects:
        if group_of(manifest) in _CORE_GROUPS:
            found += _check_core(_pack(manifest), tuple(minors))
        elif folder.is_dir():
            found += _check_custom(_pack(manifest), folder)
    return found


def _schema_file(folder: Path, manifest: Manifest) -> Path:
    return folder / f"{manifest['apiVersion'].replace('/', '_')}_{manifest['kind']}.json"


def _pack(manifest: Manifest) -> str:
    """The object as a key: many are checked again and again."""
    return json.dumps(manifest, sort_keys=True)


@functools.cache
def _check_core(packed: str, minors: tuple[str, ...]) -> list[Finding]:
    import kubernetes_validate

    manifest, found = json.loads(packed), []
    for minor in minors:
        try:
            kubernetes_validate.validate(manifest, minor, strict=True)
        except kubernetes_validate.ValidationError as error:
            path = "/".join(map(str, error.absolute_path))
            found.append(Finding("schema", name_object(manifest), path, f"Kubernetes {minor}: {error.message[:200]}"))
        except kubernetes_validate.SchemaNotFoundError:
            kind = f"{manifest.get('apiVersion')} {manifest.get('kind')}"
            found.append(Finding("schema-unknown", name_object(manifest), "", f"Kubernetes {minor} knows no {kind}"))
    return found


@functools.cache
def _check_custom(packed: str, folder: Path) -> list[Finding]:
    manifest = json.loads(packed)
    kind = f"{manifest['apiVersion']} {manifest['kind']}"
    if not _schema_file(folder, manifest).is_file():
        words = f"no schema of {kind}, and not checked by hand"
        return [] if kind in CHECKED_BY_HAND else [Finding("schema-unknown", name_object(manifest), "", words)]
    found = []
    for error in crd_schema.find_schema_errors(manifest, folder=folder):
        path, _, words = error.partition(": ")
        found.append(Finding("schema", name_object(manifest), path, words))
    return [*found, *find_rule_faults(manifest, folder=folder)]


def find_rule_faults(manifest: Manifest, *, folder: Path = crd_schema.CRD_FOLDER) -> Iterator[Finding]:
    """CEL rules (`x-kubernetes-validations`) of the CRD that a new object breaks; none where no evaluator is installed.

    Rules on `oldSelf` speak of changes, and are left out.
    """
    try:
        import cel
    except ImportError:
        return
    schema = _load_schema(_schema_file(folder, manifest))
    for path, value, rule, message in _list_rules(schema, _fill_defaults(schema, manifest), ""):
        try:
            holds = _compile(rule, cel.compile).execute({"self": value})
        except Exception as error:
            # The library raises plain errors of Python's for what a server calls a rule that could not be evaluated.
            yield Finding("schema-rule", name_object(manifest), path, f"{rule} could not be evaluated: {error}")
            continue
        if holds is not True:
            yield Finding("schema-rule", name_object(manifest), path, message or rule)


@functools.cache
def _load_schema(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


@functools.cache
def _compile(rule: str, compile_rule: Callable[[str], Any]) -> Any:
    return compile_rule(rule)


def _fill_defaults(schema: Any, value: Any) -> Any:
    """The object as the server sees it when it evaluates rules: defaults filled in, those of defaults too."""
    if not isinstance(schema, dict):
        return value
    if isinstance(value, list):
        return [_fill_defaults(schema.get("items"), part) for part in value]
    if not isinstance(value, dict):
        return value
    properties, others = schema.get("properties", {}), schema.get("additionalProperties")
    defaults = {key: part["default"] for key, part in properties.items() if "default" in part}
    return {key: _fill_defaults(properties.get(key, others), part) for key, part in {**defaults, **value}.items()}


def _list_rules(schema: Any, value: Any, path: str) -> Iterator[tuple[str, Any, str, str]]:
    """Rules that stand over parts which are there, with the part's path and value."""
    if not isinstance(schema, dict) or value is None:
        return
    for rule in schema.get("x-kubernetes-validations") or []:
        if "oldSelf" not in rule["rule"]:
            yield path, value, rule["rule"], rule.get("message", "")
    if isinstance(value, dict):
        properties, others = schema.get("properties", {}), schema.get("additionalProperties")
        for key, part in value.items():
            yield from _list_rules(properties.get(key, others), part, f"{path}/{key}" if path else key)
    elif isinstance(value, list):
        for index, part in enumerate(value):
            yield from _list_rules(schema.get("items"), part, f"{path}/{index}")
