"""A stage as a Ray job of its own: KubeRay's RayJob as a plain dictionary.

Goes in: a stage, its config and inputs, the `ClusterConfig` and the step's placement. Comes out: a RayJob whose three
kinds of pods (head, workers, submitter) meet Pod Security's level `restricted` with a read-only root. What can be known
to fail is refused here, before anything is created. Nothing is applied, no cluster is asked.
"""

import base64
import copy
import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from mint_lib.cluster import ClusterConfig
from mint_lib.errors import InvalidInput
from mint_lib.placement import RayWorkers, StepOnCluster
from mint_lib.pods import (
    RUN_LABEL,
    SCRATCH_FOLDER,
    STAGE_LABEL,
    describe_pod,
    label_pod,
    list_environment,
    list_volumes,
    same_resources,
    secure_container,
)

JOB_LABEL = "mint.platform/job"
"""On the job and on all of its pods: the job's name."""
CONTENT_ANNOTATION = "mint.platform/content"
"""Digest of all that the job is made from, its run left out: two jobs with the same one do the same work."""
MAX_NAME_LENGTH = 47
"""KubeRay names the Ray cluster after the job and adds 6 characters; its services' names must stay below 63."""
_JOB_NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")  # KubeRay asks for a DNS-1035 label
_SAFE_WORD = re.compile(r"[A-Za-z0-9_./@#:=+-]+")
_HEAD_SHARED_MEMORY_GIB = 1
"""A head that computes nothing holds little in its object store."""
_OBJECT_STORE_SHARE = 0.5
"""Of /dev/shm; NCCL and data loaders get the rest."""
_SUBMITTER_RETRIES = 2
"""A submitter that lost its connection takes up the job that it submitted."""


def name_ray_job(stage: str, output_key: str) -> str:
    """Name of the job that makes the output with this key: the same in every attempt, so that one finds the other's."""
    return f"mint-{stage}-{output_key[:16]}"


def render_ray_job(
    stage: str,
    config: BaseModel,
    inputs: Mapping[str, str | Mapping[str, str]],
    *,
    cluster: ClusterConfig,
    step: StepOnCluster,
    name: str,
    run_id: str | None = None,
) -> dict[str, Any]:
    """A RayJob (ray.io/v1, KubeRay 1.6 or later) that runs `stage` as `python -m mint_lib` does.

    With several workers (`num_workers` of the config) the head computes nothing and each worker pod holds
    `step.ray.workers_per_pod` of them; otherwise the head is the only pod and has all that the step asks for.

    Args:
        stage: One of `mint_lib.stages.STAGES`.
        config: The stage's config.
        inputs: Input name to a reference, or to named references.
        cluster: Where.
        step: What each pod gets.
        name: Of the job; see `name_ray_job`.
        run_id: Kubeflow's run, by which its jobs are found again.

    Raises:
        InvalidInput: the name is not allowed, or config and placement do not fit each other.
    """
    if not _JOB_NAME.fullmatch(name) or len(name) > MAX_NAME_LENGTH:
        raise InvalidInput(
            f"{name!r} cannot name a Ray job. KubeRay takes a-z, 0-9 and -, beginning with a letter, up to "
            f"{MAX_NAME_LENGTH} characters. Give another name."
        )
    ray = _check_placement(stage, config, step)
    num_workers = int(config.model_dump().get("num_workers", 1))
    pods = _PodRenderer(
        stage, name, cluster, step, num_threads=config.model_dump().get("cpus_per_worker", step.num_cpus)
    )
    ray_cluster: dict[str, Any] = {
        "rayVersion": cluster.ray.version,
        "enableInTreeAutoscaling": False,
        "authOptions": {"mode": "token"},
        "headGroupSpec": _render_head(pods, ray, has_workers=num_workers > 1),
    }
    if cluster.ray.is_encrypted:
        ray_cluster["tlsOptions"] = {"enabled": True}
    if num_workers > 1:
        ray_cluster["workerGroupSpecs"] = [_render_workers(pods, ray, num_pods=num_workers // ray.workers_per_pod)]
    spec: dict[str, Any] = {
        "entrypoint": _spell_entrypoint(stage, config, inputs),
        "submissionMode": "K8sJobMode",
        "submitterPodTemplate": pods.render_submitter(),
        "submitterConfig": {"backoffLimit": _SUBMITTER_RETRIES},
        "backoffLimit": ray.max_restarts,
        "activeDeadlineSeconds": round(ray.deadline_hours * 3600),
        "shutdownAfterJobFinishes": True,
        # Accelerators are free at once; the submitter, which has the log, stays until the job is deleted.
        "ttlSecondsAfterFinished": 0,
        "rayClusterSpec": ray_cluster,
    }
    queue_labels = {
        "kueue.x-k8s.io/queue-name": cluster.ray.queue,
        "kueue.x-k8s.io/priority-class": cluster.ray.workload_priority,
    }
    labels = {
        "app.kubernetes.io/name": name,
        "app.kubernetes.io/part-of": "mint",
        STAGE_LABEL: stage,
        JOB_LABEL: name,
        **{key: value for key, value in queue_labels.items() if value is not None},
    }
    digest = hashlib.sha256(json.dumps([spec, labels], sort_keys=True).encode()).hexdigest()
    if run_id is not None:
        labels[RUN_LABEL] = run_id
        spec = _label_run(spec, run_id)
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {
            "name": name,
            "namespace": cluster.namespace,
            "labels": labels,
            "annotations": {"mint.platform/config": config.model_dump_json(), CONTENT_ANNOTATION: f"sha256:{digest}"},
        },
        "spec": spec,
    }


def _check_placement(stage: str, config: BaseModel, step: StepOnCluster) -> RayWorkers:
    """The step's `ray` section, if config and placement fit each other."""
    ray, values = step.ray, config.model_dump()
    if ray is None:
        raise InvalidInput(f"cluster.{stage} has no section `ray`, so it is computed in the step's own pod. Add `ray`.")
    num_workers, per_pod = values.get("num_workers", 1), ray.workers_per_pod
    if num_workers % per_pod:
        raise InvalidInput(
            f"cluster.{stage}.ray.workers_per_pod is {per_pod}, and {stage} has {num_workers} worker(s). Pods are all "
            f"alike: give a number that divides {num_workers}."
        )
    if "use_gpu" in values and step.num_gpus != (per_pod if values["use_gpu"] else 0):
        advice = (
            f"Each worker takes one GPU: set num_gpus to workers_per_pod ({per_pod})."
            if values["use_gpu"]
            else f"Set {stage}.use_gpu to true, or num_gpus to 0."
        )
        raise InvalidInput(
            f"cluster.{stage}.num_gpus is {step.num_gpus} and {stage}.use_gpu is {str(values['use_gpu']).lower()}. "
            f"{advice}"
        )
    if values.get("deepspeed") is not None and not values.get("use_gpu"):
        raise InvalidInput(f"{stage}.deepspeed is set without {stage}.use_gpu. DeepSpeed is for GPUs: set use_gpu.")
    num_cpus = per_pod * values.get("cpus_per_worker", 1)
    if num_cpus > step.num_cpus:
        raise InvalidInput(
            f"The {per_pod} worker(s) of a pod take {num_cpus} CPU cores (cpus_per_worker), and "
            f"cluster.{stage}.num_cpus is {step.num_cpus}: they would wait for ever. Set it to at least {num_cpus}."
        )
    if ray.shared_memory_gib >= step.memory_gib:
        raise InvalidInput(
            f"cluster.{stage}.ray.shared_memory_gib is {ray.shared_memory_gib} and counts as the pod's memory, which "
            f"is {step.memory_gib} GiB. Set memory_gib higher."
        )
    return ray


def _spell_entrypoint(stage: str, config: BaseModel, inputs: Mapping[str, str | Mapping[str, str]]) -> str:
    """The command of the job. A shell, the `ray` command and another shell read it, so no word may need quotes."""
    words = [stage, "--config-base64", base64.urlsafe_b64encode(config.model_dump_json().encode()).decode()]
    for name, value in inputs.items():
        references = [value] if isinstance(value, str) else [f"{key}={text}" for key, text in value.items()]
        for reference in references:
            words += ["--input", f"{name}={reference}"]
    wrong = next((word for word in words if not _SAFE_WORD.fullmatch(word)), None)
    if wrong is not None:
        raise InvalidInput(
            f"{wrong[:200]!r} cannot stand in a Ray job's command. Allowed are letters, digits and _./@#:=+-, as in "
            "references and in the names of arms. Give the input another name."
        )
    return " ".join(["python", "-m", "mint_lib", *words])


def _render_head(pods: "_PodRenderer", ray: RayWorkers, *, has_workers: bool) -> dict[str, Any]:
    if not has_workers:
        return pods.render_computing_group("ray-head", shared_memory_gib=ray.shared_memory_gib)
    template = pods.render_ray_pod(
        "ray-head",
        resources={"cpu": str(ray.head_num_cpus), "memory": f"{ray.head_memory_gib}Gi"},
        shared_memory_gib=_HEAD_SHARED_MEMORY_GIB,
    )
    # Ray puts no work where there are no CPUs, so training never lands on the head.
    return {
        "rayStartParams": {"num-cpus": "0", **_size_object_store(_HEAD_SHARED_MEMORY_GIB)},
        "template": template,
    }


def _render_workers(pods: "_PodRenderer", ray: RayWorkers, *, num_pods: int) -> dict[str, Any]:
    return {
        "groupName": "workers",
        "replicas": num_pods,
        "minReplicas": num_pods,
        "maxReplicas": num_pods,
        **pods.render_computing_group("ray-worker", shared_memory_gib=ray.shared_memory_gib),
    }


def _size_object_store(shared_memory_gib: int) -> dict[str, str]:
    return {"object-store-memory": str(int(shared_memory_gib * _OBJECT_STORE_SHARE * 2**30))}


def _label_run(spec: dict[str, Any], run_id: str) -> dict[str, Any]:
    """`spec` with the run's label on every pod."""
    labelled = copy.deepcopy(spec)
    groups = [labelled["rayClusterSpec"]["headGroupSpec"], *labelled["rayClusterSpec"].get("workerGroupSpecs", [])]
    for template in [labelled["submitterPodTemplate"], *(group["template"] for group in groups)]:
        template["metadata"]["labels"][RUN_LABEL] = run_id
    return labelled


class _PodRenderer:
    """Pod templates of one job. KubeRay adds the token, certificates, probes over HTTP and the command."""

    def __init__(self, stage: str, name: str, cluster: ClusterConfig, step: StepOnCluster, *, num_threads: int):
        self._stage = stage
        self._name = name
        self._cluster = cluster
        self._step = step
        self._num_threads = num_threads

    def render_computing_group(self, component: str, *, shared_memory_gib: int) -> dict[str, Any]:
        """A group of pods that have what the step asks for, on the nodes that it asks for."""
        step = self._step
        resources = {"cpu": str(step.num_cpus), "memory": f"{step.memory_gib}Gi"}
        start = _size_object_store(shared_memory_gib)
        if step.num_gpus:
            resources[step.gpu_resource] = start["num-gpus"] = str(step.num_gpus)
        template = self.render_ray_pod(component, resources=resources, shared_memory_gib=shared_memory_gib)
        if step.node_selector:
            template["spec"]["nodeSelector"] = dict(step.node_selector)
        if step.tolerations:
            template["spec"]["tolerations"] = [item.model_dump(exclude_none=True) for item in step.tolerations]
        return {"rayStartParams": start, "template": template}

    def render_ray_pod(self, component: str, *, resources: dict[str, str], shared_memory_gib: int) -> dict[str, Any]:
        """A pod that is a node of the Ray cluster."""
        scratch_gib = self._step.scratch_gib
        volumes, mounts = list_volumes(self._cluster, scratch_gib=scratch_gib, cache_gib=scratch_gib)
        volumes.append({"name": "shared-mem", "emptyDir": {"medium": "Memory", "sizeLimit": f"{shared_memory_gib}Gi"}})
        mounts.append({"name": "shared-mem", "mountPath": "/dev/shm"})  # noqa: S108 - a volume of the pod alone
        container: dict[str, Any] = {
            "name": component,
            "image": self._cluster.images.train,
            "workingDir": SCRATCH_FOLDER,
            "env": [*list_environment(self._cluster, num_cpus=self._num_threads), *_list_ray_environment()],
            "resources": same_resources({**resources, "ephemeral-storage": f"{scratch_gib + 1}Gi"}),
            "securityContext": secure_container(),
            "volumeMounts": mounts,
        }
        if component == "ray-head":
            ports = {"gcs-server": 6379, "dashboard": 8265, "client": 10001}
            container["ports"] = [{"name": name, "containerPort": port} for name, port in ports.items()]
        return self._template(component, container, volumes)

    def render_submitter(self) -> dict[str, Any]:
        """The pod that hands the job to Ray and copies its log; it computes nothing and needs no secret of ours."""
        container = {
            "name": "ray-job-submitter",
            "image": self._cluster.images.train,
            "workingDir": SCRATCH_FOLDER,
            "env": [{"name": "HOME", "value": SCRATCH_FOLDER}, *_list_ray_environment()],
            "resources": same_resources({"cpu": "500m", "memory": "1Gi", "ephemeral-storage": "2Gi"}),
            "securityContext": secure_container(),
            "volumeMounts": [{"name": "scratch", "mountPath": SCRATCH_FOLDER}],
        }
        return self._template("ray-submitter", container, [{"name": "scratch", "emptyDir": {"sizeLimit": "1Gi"}}])

    def _template(self, component: str, container: dict[str, Any], volumes: list[dict[str, Any]]) -> dict[str, Any]:
        spec = {
            **describe_pod(self._cluster, service_account=self._cluster.ray.service_account),
            # A node of Ray that died comes back as a new pod: its old state is of no use.
            "restartPolicy": "Never",
            "containers": [container],
            "volumes": volumes,
        }
        if self._cluster.ray.pod_priority is not None:
            spec["priorityClassName"] = self._cluster.ray.pod_priority
        return {"metadata": {"labels": label_pod(component, self._stage) | {JOB_LABEL: self._name}}, "spec": spec}


def _list_ray_environment() -> list[dict[str, Any]]:
    values = {
        "RAY_TMPDIR": SCRATCH_FOLDER,
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONUNBUFFERED": "1",
        # Ray kills a stopped job after 3 s by default, before a training has written its checkpoint.
        "RAY_JOB_STOP_WAIT_TIME_S": "30",
    }
    return [{"name": name, "value": value} for name, value in values.items()]
