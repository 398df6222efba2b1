"""What all pods of ours have in common, as plain dictionaries: security, environment, volumes, labels.

Goes in: a `ClusterConfig`. Comes out: pieces of Kubernetes pod specs that meet Pod Security's level `restricted` with a
read-only root. Nothing here knows what a pod is for, and no secret is read: secrets are named only.
"""

from collections.abc import Mapping
from typing import Any

from mint_lib.cluster import ClusterConfig

CA_FOLDER = "/etc/mint/ca"
CACHE_FOLDER = "/var/cache/mint"
SCRATCH_FOLDER = "/tmp"  # noqa: S108 - a volume of the pod alone
PART_OF = "mint"
STAGE_LABEL = "mint.platform/stage"
RUN_LABEL = "mint.platform/run"


def label_pod(component: str, stage: str) -> dict[str, str]:
    """Labels by which network policies and people know a pod of ours."""
    return {
        "app.kubernetes.io/part-of": PART_OF,
        "app.kubernetes.io/component": component,
        STAGE_LABEL: stage,
    }


def list_environment(cluster: ClusterConfig, *, num_cpus: int) -> list[dict[str, Any]]:
    """Environment of a pod of ours: the store's address, its secrets by name, and where files may be written."""
    values = describe_environment(cluster) | {
        # Without it every library takes the node's cores for its own, not the pod's.
        "OMP_NUM_THREADS": str(num_cpus)
    }
    secrets = name_secrets(cluster)
    return [{"name": key, "value": value} for key, value in values.items()] + [
        {"name": key, "valueFrom": {"secretKeyRef": {"name": secret, "key": key}}} for key, secret in secrets.items()
    ]


def describe_environment(cluster: ClusterConfig) -> dict[str, str]:
    """The variables that hold no secret."""
    values = {
        f"MINT_S3_{field.upper()}": str(value).lower() if isinstance(value, bool) else str(value)
        for field, value in cluster.s3.model_dump(exclude_none=True, exclude={"ca_bundle"}).items()
        if value != ""
    }
    if cluster.s3_ca_config_map is not None:
        values["MINT_S3_CA_BUNDLE"] = f"{CA_FOLDER}/ca.crt"
    return values | {"MINT_CACHE_DIR": CACHE_FOLDER, "HF_HOME": f"{CACHE_FOLDER}/hub", "HOME": SCRATCH_FOLDER}


def name_secrets(cluster: ClusterConfig) -> dict[str, str]:
    """Environment variable, which is also the key, to the name of the secret that holds it."""
    secrets = {
        "AWS_ACCESS_KEY_ID": cluster.s3_secret,
        "AWS_SECRET_ACCESS_KEY": cluster.s3_secret,
        "HF_TOKEN": cluster.hub_secret,
    }
    return {key: secret for key, secret in secrets.items() if secret is not None}


def list_volumes(
    cluster: ClusterConfig, *, scratch_gib: int, cache_gib: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Volumes of a pod and where its container mounts them: scratch, cache, and the store's authority if it has one."""
    volumes: list[dict[str, Any]] = [
        {"name": "scratch", "emptyDir": {"sizeLimit": f"{scratch_gib}Gi"}},
        {"name": "cache", "emptyDir": {"sizeLimit": f"{cache_gib}Gi"}},
    ]
    mounts: list[dict[str, Any]] = [
        {"name": "scratch", "mountPath": SCRATCH_FOLDER},
        {"name": "cache", "mountPath": CACHE_FOLDER},
    ]
    if cluster.s3_ca_config_map is not None:
        volumes.append({"name": "ca", "configMap": {"name": cluster.s3_ca_config_map}})
        mounts.append({"name": "ca", "mountPath": CA_FOLDER, "readOnly": True})
    return volumes, mounts


def secret_volume(name: str, secret: str, key: str) -> dict[str, Any]:
    """A volume with one key of a secret, as a folder: what changes reaches a running pod only this way."""
    return {
        "name": name,
        "secret": {"secretName": secret, "items": [{"key": key, "path": key}], "defaultMode": 0o440},
    }


def same_resources(amounts: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Requests equal to limits: nothing that a neighbour does can evict or slow a pod down."""
    return {"requests": dict(amounts), "limits": dict(amounts)}


def secure_pod(cluster: ClusterConfig) -> dict[str, Any]:
    """A pod's `securityContext`."""
    # The numbers are free of meaning, but runAsNonRoot wants a number where an image names its user by name.
    user = {key: cluster.user_id for key in ("runAsUser", "runAsGroup", "fsGroup") if cluster.user_id is not None}
    return {"runAsNonRoot": True, **user, "seccompProfile": {"type": "RuntimeDefault"}}


def secure_container() -> dict[str, Any]:
    """A container's `securityContext`."""
    return {
        "allowPrivilegeEscalation": False,
        "runAsNonRoot": True,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def describe_pod(cluster: ClusterConfig, *, service_account: str) -> dict[str, Any]:
    """The fields of a pod's spec that all pods of ours share; callers may not need a token for the API server."""
    spec: dict[str, Any] = {
        "serviceAccountName": service_account,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": secure_pod(cluster),
    }
    if cluster.image_pull_secrets:
        spec["imagePullSecrets"] = [{"name": name} for name in cluster.image_pull_secrets]
    return spec
