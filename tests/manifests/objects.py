"""What a finding is, and how an object is named in one.

Goes in: Kubernetes objects as dictionaries. Comes out: names, and the objects of some kinds. It knows no rule.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

Manifest = dict[str, Any]


class Finding(NamedTuple):
    """One rule that one object breaks."""

    rule: str
    """A fixed word for the rule, so that a test can ask for exactly this one."""
    subject: str
    """Kind, namespace and name."""
    path: str
    """The field, from the object's root, with slashes."""
    words: str
    """What is wrong, with the value."""


def name_object(manifest: Manifest) -> str:
    """Kind, namespace and name in one string."""
    metadata = manifest.get("metadata", {})
    return f"{manifest.get('kind')} {metadata.get('namespace', '-')}/{metadata.get('name')}"


def name_of(manifest: Manifest) -> str:
    """The object's name, empty if it has none."""
    return str(manifest.get("metadata", {}).get("name", ""))


def namespace_of(manifest: Manifest) -> str:
    """The object's namespace, empty if it names none."""
    return str(manifest.get("metadata", {}).get("namespace", ""))


def group_of(manifest: Manifest) -> str:
    """The API group, empty for the core's own."""
    group, slash, _ = str(manifest.get("apiVersion", "")).partition("/")
    return group if slash else ""


def select(objects: Iterable[Manifest], *kinds: str) -> Iterator[Manifest]:
    """The objects of these kinds, in their order."""
    return (manifest for manifest in objects if manifest.get("kind") in kinds)


def matches_selector(selector: Manifest, labels: Mapping[str, str]) -> bool:
    """Whether a label selector takes these labels; an empty one takes all.

    Source: the API reference of `LabelSelector`: all requirements hold together, `NotIn` also takes an absent key.
    """
    for key, value in selector.get("matchLabels", {}).items():
        if labels.get(key) != value:
            return False
    for term in selector.get("matchExpressions", []):
        key, values = term["key"], term.get("values", [])
        holds = {
            "In": labels.get(key) in values,
            "NotIn": labels.get(key) not in values,
            "Exists": key in labels,
            "DoesNotExist": key not in labels,
        }
        if not holds[term["operator"]]:
            return False
    return True


def walk(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every part of a value with its path, the value itself first."""
    yield path, value
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        yield from walk(part, f"{path}/{key}" if path else str(key))
