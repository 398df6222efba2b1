"""What a Kubeflow task gets on a cluster: image, resources, secrets by name, volumes, labels, deadline, retries.

Goes in: a task, what its step needs and the cluster's config. Comes out: the same task with its settings, which the
compiler writes into the pipeline's platform spec. Kubeflow's backend adds the rest by itself: no privilege escalation,
no capabilities, seccomp RuntimeDefault. It offers no way to ask for a read-only root, an fsGroup or ephemeral-storage
requests; our image works under a read-only root where a policy of the cluster sets it.
"""

from typing import Any

from kfp import kubernetes

from mint_lib.cluster import ClusterConfig
from mint_lib.deidentification.config import KEY_VARIABLE
from mint_lib.errors import InvalidInput
from mint_lib.flow import Step
from mint_lib.placement import StepOnCluster
from mint_lib.pods import (
    CA_FOLDER,
    CACHE_FOLDER,
    SCRATCH_FOLDER,
    describe_environment,
    label_pod,
    name_secrets,
)
from mint_lib.ray_job import name_ray_job, render_ray_job

RUN_ID_FIELD = "metadata.labels['pipeline/runid']"
"""Kubeflow labels every pod of a run with its id. As a parameter it would be part of the cache's key."""
FOLLOWER = StepOnCluster(num_cpus=1, memory_gib=2, scratch_gib=1)
"""Resources of a pod that computes nothing: it follows a Ray job, or ends one."""
MAY_BE_TRIED_AGAIN = {
    "data": "a version exists once its manifest does, so an attempt that died left nothing that anybody sees",
    "teacher": "as data; a finished one is found by its key and not made again",
    "preferences": "as teacher",
    "alignment": "as teacher; goes on from its last checkpoint, and a Ray job that still runs is followed, not doubled",
    "evaluation": "as teacher",
}
"""Stages that Kubeflow may start again, and why. The registry moves an alias: after a failure somebody looks first."""
_POD_FIELDS = {
    "MINT_POD_NAME": "metadata.name",
    "MINT_POD_UID": "metadata.uid",
    "MINT_POD_NAMESPACE": "metadata.namespace",
    "MINT_RUN_ID": RUN_ID_FIELD,
}
_FIRST_PAUSE_SECONDS = 60


def place_step(task: Any, step: Step, *, cluster: ClusterConfig, placement: StepOnCluster) -> None:
    """Give the task of `step` what its placement says, and the secret that only this step may know.

    The pod that follows a Ray job needs little itself.
    """
    own = placement
    if placement.ray is not None:
        own = FOLLOWER.model_copy(
            update={"timeout_hours": placement.timeout_hours, "max_retries": placement.max_retries}
        )
    place_task(task, step.stage, cluster=cluster, placement=own)
    for name, secret in _name_own_secret(step, cluster).items():
        kubernetes.use_secret_as_env(task, secret, {name: name})


def place_task(task: Any, stage: str, *, cluster: ClusterConfig, placement: StepOnCluster) -> None:
    """Give `task` the image, resources, environment, volumes, labels, deadline and retries of `placement`."""
    task.set_container_image(cluster.images.train)
    _set_resources(task, placement)
    _set_environment(task, cluster, num_cpus=placement.num_cpus)
    _mount_volumes(task, cluster, scratch_gib=placement.scratch_gib)
    kubernetes.set_image_pull_policy(task, cluster.kubeflow.image_pull_policy)
    if cluster.image_pull_secrets:
        kubernetes.set_image_pull_secrets(task, list(cluster.image_pull_secrets))
    kubernetes.set_security_context(
        task, run_as_user=cluster.user_id, run_as_group=cluster.user_id, run_as_non_root=True
    )
    for key, value in label_pod("step", stage).items():
        kubernetes.add_pod_label(task, key, value)
    timeout_seconds = round(placement.timeout_hours * 3600)
    kubernetes.set_timeout(task, timeout_seconds)
    if stage in MAY_BE_TRIED_AGAIN and placement.max_retries:
        pauses_seconds = _FIRST_PAUSE_SECONDS * 2**placement.max_retries
        task.set_retry(
            placement.max_retries,
            backoff_duration=f"{_FIRST_PAUSE_SECONDS}s",
            backoff_factor=2.0,
            # Counted from the first attempt's start: its default of an hour would end, and never repeat, a long step.
            backoff_max_duration=f"{(placement.max_retries + 1) * timeout_seconds + pauses_seconds}s",
        )


def check_placement(step: Step, *, cluster: ClusterConfig, placement: StepOnCluster) -> None:
    """Prove that a step can run with what recipe and cluster file give it.

    Raises:
        InvalidInput: the cluster file names no secret for the key that it needs, a pod of a Ray job would need that
            key, or its training workers want more than their pods have.
    """
    own_secret = _name_own_secret(step, cluster)
    if own_secret and placement.ray is not None:
        raise InvalidInput(
            f"{step.id} needs {', '.join(own_secret)}, which only a step's own pod gets, and cluster.{step.stage}.ray "
            f"makes it a Ray job. Leave cluster.{step.stage}.ray out."
        )
    if placement.ray is not None:
        example = f"cases/example@v000001#sha256:{'0' * 64}"
        inputs = {
            name: example if isinstance(source, str) else dict.fromkeys(source, example)
            for name, source in step.inputs.items()
        }
        name = name_ray_job(step.stage, "0" * 64)
        render_ray_job(step.stage, step.config, inputs, cluster=cluster, step=placement, name=name)
        return
    if step.stage != "alignment":
        return
    values = step.config.model_dump()
    num_workers, num_gpus = values["num_workers"], values["num_workers"] if values["use_gpu"] else 0
    if num_gpus > placement.num_gpus:
        raise InvalidInput(
            f"{step.id} trains with {num_gpus} GPUs and its pod gets {placement.num_gpus}. Set "
            f"cluster.alignment.num_gpus to {num_gpus}, or cluster.alignment.ray for pods of their own."
        )
    num_cpus = num_workers * values["cpus_per_worker"]
    if num_cpus > placement.num_cpus:
        raise InvalidInput(
            f"{step.id} trains with {num_workers} worker(s) of {values['cpus_per_worker']} cores and its pod gets "
            f"{placement.num_cpus}: they would wait for ever. Set cluster.alignment.num_cpus to at least {num_cpus}."
        )


def _name_own_secret(step: Step, cluster: ClusterConfig) -> dict[str, str]:
    """Environment variable, which is also the key, to the name of the secret that no other step's pod gets.

    Raises:
        InvalidInput: the cluster file names no such secret, or the variable holds something else in every pod.
    """
    values = step.config.model_dump()
    if step.stage == "data" and values["deidentify"] is not None:
        if cluster.deidentification_secret is None:
            raise InvalidInput(
                f"{step.id} de-identifies (data.deidentify), and the cluster file names no secret that holds "
                f"{KEY_VARIABLE}. Make one with that key where the steps run, and set deidentification_secret to its "
                "name (deidentification.credentials in the chart's values)."
            )
        return {KEY_VARIABLE: cluster.deidentification_secret}
    if step.stage == "teacher" and values["model"] == "chat":
        variable = values["config"]["endpoint"]["api_key_variable"]
        if variable is None:
            return {}
        if cluster.chat_secret is None:
            raise InvalidInput(
                f"{step.id} asks a chat model with the key of {variable} (endpoint.api_key_variable), and the cluster "
                f"file names no secret that holds it. Make one with the key {variable} where the steps run, and set "
                "chat_secret to its name (chat.credentials in the chart's values)."
            )
        if variable in {*describe_environment(cluster), *name_secrets(cluster), *_POD_FIELDS, KEY_VARIABLE}:
            raise InvalidInput(
                f"{step.id} takes the chat model's key from {variable} (endpoint.api_key_variable), which holds "
                "something else in pods of ours. Give it a variable of its own, for instance CHAT_API_KEY."
            )
        return {variable: cluster.chat_secret}
    return {}


def _set_resources(task: Any, placement: StepOnCluster) -> None:
    """Requests equal to limits: nothing that a neighbour does can evict or slow a pod down."""
    cpus, memory = str(placement.num_cpus), f"{placement.memory_gib}Gi"
    task.set_cpu_request(cpus).set_cpu_limit(cpus).set_memory_request(memory).set_memory_limit(memory)
    if placement.num_gpus:
        task.set_accelerator_type(placement.gpu_resource).set_accelerator_limit(placement.num_gpus)
    for key, value in placement.node_selector.items():
        kubernetes.add_node_selector(task, key, value)
    for toleration in placement.tolerations:
        kubernetes.add_toleration(task, **toleration.model_dump(exclude_none=True))


def _set_environment(task: Any, cluster: ClusterConfig, *, num_cpus: int) -> None:
    # Without the number of threads every library takes the node's cores for its own, not the pod's.
    for name, value in (describe_environment(cluster) | {"OMP_NUM_THREADS": str(num_cpus)}).items():
        task.set_env_variable(name, value)
    keys: dict[str, dict[str, str]] = {}
    for name, secret in name_secrets(cluster).items():
        keys.setdefault(secret, {})[name] = name
    for secret, key_to_variable in keys.items():
        kubernetes.use_secret_as_env(task, secret, key_to_variable)
    for name, field in _POD_FIELDS.items():
        kubernetes.use_field_path_as_env(task, name, field)


def _mount_volumes(task: Any, cluster: ClusterConfig, *, scratch_gib: int) -> None:
    for name, folder in {"scratch": SCRATCH_FOLDER, "cache": CACHE_FOLDER}.items():
        kubernetes.empty_dir_mount(task, name, folder, size_limit=f"{scratch_gib}Gi")
    if cluster.s3_ca_config_map is not None:
        kubernetes.use_config_map_as_volume(task, cluster.s3_ca_config_map, CA_FOLDER)
