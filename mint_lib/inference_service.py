"""The Kubernetes objects that serve a model under KServe, as plain dictionaries.

Goes in: a reference and a `ClusterConfig`. Comes out: an InferenceService that runs our own server (`mint serve`), or
an LLMInferenceService that runs the same weights on KServe's vLLM runtime. Nothing is applied, no cluster is asked, no
secret is read: secrets are named only.

The vLLM object generates text and nothing else: no exact ranking, no calibration, no abstention, no tokens file, and
KServe's storage initializer checks no digest. It has not been run on a GPU.
"""

import re
from collections.abc import Mapping
from typing import Any

from mint_lib.cluster import READY_PERIOD_SECONDS, ClusterConfig
from mint_lib.errors import InvalidInput
from mint_lib.pods import (
    SCRATCH_FOLDER,
    describe_pod,
    label_pod,
    list_environment,
    list_volumes,
    same_resources,
    secret_volume,
    secure_container,
)
from mint_lib.records import Reference
from mint_lib.student import StudentConfig
from mint_lib.student_weights import TUNED_FOLDERS

MAX_NAME_LENGTH = 52
"""KServe appends `-predictor` and Kubernetes allows 63 characters."""
_SERVICE_NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")  # inference_service_validation.go of KServe
_COMMIT = re.compile(r"[0-9a-f]{40}")
_TOKENS_FOLDER = "/var/run/secrets/mint"
_PORT = 8080
_EXIT_SECONDS = 10
"""From the end of the last request to the process's own exit, with room to spare."""
_VLLM_RANKS = (8, 16, 32, 64, 128, 256)
"""Values of vLLM's `--max-lora-rank` that all of its versions with LoRA on GPUs accept."""


def render_inference_service(
    reference: Reference, *, cluster: ClusterConfig, name: str | None = None
) -> dict[str, Any]:
    """A KServe InferenceService (serving.kserve.io/v1beta1) that runs `mint serve` on exactly this version.

    Pods meet Pod Security's level `restricted` and run in KServe's mode without Knative. Their metrics want a token
    with the scope `metrics`, which the chart's PodMonitor brings.

    Args:
        reference: What to serve; its digest is checked when it is loaded.
        cluster: Where.
        name: Name of the service, and of the model in requests; the reference's own if None.

    Raises:
        InvalidInput: the name is not one that KServe accepts.
    """
    service_name = _check_name(name or reference.name)
    # KServe's clients ask for the model by the service's name.
    served = str(reference) if service_name == reference.name else f"{service_name}={reference}"
    serving = cluster.serving
    volumes, mounts = list_volumes(cluster, scratch_gib=serving.scratch_gib, cache_gib=serving.cache_gib)
    volumes.append(secret_volume("tokens", serving.tokens_secret, "tokens.json"))
    mounts.append({"name": "tokens", "mountPath": _TOKENS_FOLDER, "readOnly": True})
    container = {
        "name": "kserve-container",
        "image": cluster.images.serve,
        "command": ["mint"],
        "args": [
            *("serve", served, "--host", "0.0.0.0", "--port", str(_PORT)),  # noqa: S104 - inside a pod
            *("--tokens", f"{_TOKENS_FOLDER}/tokens.json", "--no-page"),
            *("--drain-seconds", str(serving.drain_seconds), "--grace-seconds", str(serving.grace_seconds)),
            *(("--base", serving.base) if serving.base is not None else ()),
        ],
        # The command keeps a few files below the folder it is started in, and the image's own is read-only.
        "workingDir": SCRATCH_FOLDER,
        "env": list_environment(cluster, num_cpus=serving.num_cpus),
        "ports": [{"name": "http1", "containerPort": _PORT, "protocol": "TCP"}],
        # Ready means a warm answer was given, so a pod counts as started when it is ready for the first time.
        "startupProbe": _probe("/readyz", period_seconds=5, num_failures=-(-serving.load_seconds // 5)),
        "readinessProbe": _probe("/readyz", period_seconds=READY_PERIOD_SECONDS, num_failures=2),
        "livenessProbe": _probe("/healthz", period_seconds=10, num_failures=6),
        "resources": same_resources(
            {
                "cpu": str(serving.num_cpus),
                "memory": f"{serving.memory_gib}Gi",
                "ephemeral-storage": f"{serving.scratch_gib + serving.cache_gib + 1}Gi",
            }
        ),
        "securityContext": secure_container(),
        "volumeMounts": mounts,
    }
    predictor = {
        "labels": label_pod("server", "serving"),
        "minReplicas": serving.min_replicas,
        "maxReplicas": serving.max_replicas,
        **describe_pod(cluster, service_account=serving.service_account),
        "deploymentStrategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}},
        "terminationGracePeriodSeconds": serving.drain_seconds + serving.grace_seconds + _EXIT_SECONDS,
        "topologySpreadConstraints": [
            {
                "maxSkew": 1,
                "topologyKey": "kubernetes.io/hostname",
                "whenUnsatisfiable": "ScheduleAnyway",
                "labelSelector": {"matchLabels": {"serving.kserve.io/inferenceservice": service_name}},
            }
        ],
        "containers": [container],
        "volumes": volumes,
    }
    if serving.autoscaler == "hpa":
        predictor |= {"scaleMetric": "cpu", "scaleTarget": serving.target_cpu_percent}
    annotations = {
        "serving.kserve.io/deploymentMode": "Standard",
        "serving.kserve.io/autoscalerClass": serving.autoscaler,
    }
    return {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": _metadata(service_name, reference, cluster, annotations),
        "spec": {"predictor": predictor},
    }


def render_vllm(
    reference: Reference,
    *,
    cluster: ClusterConfig,
    student: StudentConfig,
    lora_rank: int | None,
    name: str | None = None,
) -> dict[str, Any]:
    """A KServe LLMInferenceService (serving.kserve.io/v1alpha2): the base on vLLM with the adapter, or a whole student.

    Requests name the student by the service's name and must bring its own template: vLLM applies the base's chat
    template only. KServe adds the LoRA arguments and the storage initializer that fetches all from their URIs.
    Untested on a GPU, which an annotation says too.

    Args:
        reference: The model or student whose folder `adapter/` or `weights/` is served.
        cluster: Where.
        student: The student's base, of the version's own `student.json`.
        lora_rank: Rank of the adapter; None if all weights were trained, and the version holds them.
        name: Name of the service and of the student in requests; the reference's own if None.

    Raises:
        InvalidInput: the base is not a hub model at a fixed commit, or the rank is more than vLLM loads.
    """
    service_name = _check_name(name or reference.name)
    prefix = f"{cluster.s3.prefix}/" if cluster.s3.prefix else ""
    version_uri = f"s3://{cluster.s3.bucket}/{prefix}{reference.kind}/{reference.name}/{reference.version}"
    if lora_rank is None:
        model: dict[str, Any] = {"uri": f"{version_uri}/{TUNED_FOLDERS['full']}", "name": service_name}
    else:
        repository = _check_hub_base(student)
        model = {
            "uri": f"hf://{repository}:{student.revision}",
            "name": repository,
            "lora": {
                "maxRank": _find_max_rank(lora_rank),
                "adapters": [{"name": service_name, "uri": f"{version_uri}/{TUNED_FOLDERS['adapter']}"}],
            },
        }
    gpu = cluster.serving.gpu
    arguments = f"--max-model-len {student.window_tokens} --tensor-parallel-size {gpu.num_gpus}"
    resources = {"cpu": str(gpu.num_cpus), "memory": f"{gpu.memory_gib}Gi", gpu.resource: str(gpu.num_gpus)}
    container = {
        "name": "main",
        "env": [{"name": "VLLM_ADDITIONAL_ARGS", "value": arguments}],
        "resources": same_resources(resources),
        "securityContext": secure_container() | {"readOnlyRootFilesystem": False},
    }
    if gpu.image is not None:
        container["image"] = gpu.image
    template: dict[str, Any] = {
        **describe_pod(cluster, service_account=cluster.serving.service_account),
        "tolerations": [toleration.model_dump(exclude_none=True) for toleration in gpu.tolerations],
        "containers": [container],
    }
    if gpu.node_selector:
        template["nodeSelector"] = gpu.node_selector
    annotations = {
        "mint.platform/tested-on-gpu": "no",
        "mint.platform/limits": "Generation only: no exact ranking, no calibration, no abstention; digests unchecked.",
    }
    return {
        "apiVersion": "serving.kserve.io/v1alpha2",
        "kind": "LLMInferenceService",
        "metadata": _metadata(service_name, reference, cluster, annotations),
        "spec": {
            "model": model,
            "replicas": cluster.serving.min_replicas,
            "router": {"gateway": {}, "route": {}},
            "template": template,
        },
    }


def _check_hub_base(student: StudentConfig) -> str:
    """The repository of an adapter's base, which vLLM is to fetch."""
    kind, _, repository = student.model.partition(":")
    if kind != "hub" or not _COMMIT.fullmatch(student.revision or "") or student.num_layers is not None:
        raise InvalidInput(
            f"The base {student.model} (revision {student.revision}, num_layers {student.num_layers}) cannot be served "
            "by vLLM on a cluster. Allowed is a whole hub model (hub:<organisation>/<name>) at a commit of 40 hex "
            "digits, so that the base is the one that the adapter was trained on. Train with student.model and "
            "student.revision set so, or render our own server."
        )
    return repository


def _find_max_rank(lora_rank: int) -> int:
    max_rank = next((rank for rank in _VLLM_RANKS if rank >= lora_rank), None)
    if max_rank is None:
        raise InvalidInput(f"The adapter has rank {lora_rank}; vLLM loads up to {_VLLM_RANKS[-1]}. Train with less.")
    return max_rank


def _check_name(name: str) -> str:
    if not _SERVICE_NAME.fullmatch(name) or len(name) > MAX_NAME_LENGTH:
        raise InvalidInput(
            f"{name!r} cannot name a service. KServe takes a-z, 0-9 and -, beginning with a letter, up to "
            f"{MAX_NAME_LENGTH} characters. Give another name."
        )
    return name


def _metadata(
    name: str, reference: Reference, cluster: ClusterConfig, annotations: Mapping[str, str]
) -> dict[str, Any]:
    return {
        "name": name,
        "namespace": cluster.namespace,
        "labels": {
            "app.kubernetes.io/name": name,
            **label_pod("server", "serving"),
        },
        "annotations": {"mint.platform/reference": str(reference), **annotations},
    }


def _probe(path: str, *, period_seconds: int, num_failures: int) -> dict[str, Any]:
    return {
        "httpGet": {"path": path, "port": _PORT, "scheme": "HTTP"},
        "periodSeconds": period_seconds,
        "timeoutSeconds": min(period_seconds, 5),
        "failureThreshold": num_failures,
    }
