"""All checks on one installation, in one call.

Goes in: objects, and what is known of where they go. Comes out: all findings. It holds no rule of its own.
"""

from collections.abc import Sequence
from typing import Any

from manifests import access, flows, joins, leaks, pod_rules, pod_security, pods, safeguards, schemas
from manifests.objects import Finding, Manifest, name_object


def find_object_faults(
    objects: Sequence[Manifest],
    *,
    minors: Sequence[str] = schemas.MINORS,
    platform_gives_users: bool = False,
    canaries: Sequence[str] = (),
) -> list[Finding]:
    """What is wrong with objects and their pods, each for itself."""
    found = schemas.find_schema_faults(objects, minors=minors) + pods.find_unread_pods(objects)
    found += safeguards.find_safeguard_faults(objects)
    for pod in pods.list_pods(objects):
        found += pod_security.find_restricted_violations(pod)
        found += pod_rules.find_pod_faults(pod, platform_gives_users=platform_gives_users)
    for manifest in objects:
        subject = name_object(manifest)
        found += leaks.find_leaks(manifest, subject=subject, canaries=canaries)
        found += leaks.find_secret_objects(manifest, subject=subject)
    return found


def find_installation_faults(
    objects: Sequence[Manifest], values: dict[str, Any], *, allowed: set[access.Permission]
) -> list[Finding]:
    """What is wrong between objects: rights, flows, names.

    Args:
        objects: All objects of one installation.
        values: What they were rendered from, as `flows.list_endpoints` reads it.
        allowed: The rights that there should be.
    """
    own = pods.list_pods(objects)
    later = flows.list_later_pods(values["namespace"]["name"])
    return [
        *access.find_access_faults(objects, allowed),
        *access.find_account_faults(objects, own),
        *flows.find_flow_faults(objects, values),
        *joins.find_join_faults(objects, pods=[*own, *later]),
    ]
