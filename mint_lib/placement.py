"""What the steps of a recipe need on a cluster: the recipe's section `cluster`.

Goes in: values. Comes out: `StepsOnCluster`, one `StepOnCluster` a stage. A run on this machine does not look at it,
and it is no part of what an output is made from.
"""

from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from mint_lib.cluster import Toleration


class RayWorkers(BaseModel):
    """How a step runs as a Ray job of its own instead of in its pod."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    workers_per_pod: int = Field(default=1, ge=1)
    """Training workers (`alignment.num_workers`) that share a pod: as many as a node has GPUs."""
    shared_memory_gib: int = Field(default=2, ge=1)
    """Size of /dev/shm of each pod; Ray's object store and NCCL live there. Counts as the pod's memory."""
    head_num_cpus: int = Field(default=2, ge=1)
    head_memory_gib: int = Field(default=8, ge=2)
    """Of the head, which computes nothing where there are workers."""
    deadline_hours: float = Field(default=24.0, gt=0.0)
    """The job is ended after so long, with all of its pods."""
    max_restarts: int = Field(default=1, ge=0)
    """How often a job that failed is begun anew on a new Ray cluster; training goes on from its last checkpoint."""


class StepOnCluster(BaseModel):
    """What a step's pod gets: as requests and as limits."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    num_cpus: int = Field(default=2, ge=1)
    """CPU cores; of each worker pod where the step is a Ray job."""
    memory_gib: int = Field(default=8, ge=1)
    """Memory; of each worker pod where the step is a Ray job."""
    scratch_gib: int = Field(default=20, ge=1)
    """Disk below /tmp and the cache for models; of each pod."""
    num_gpus: int = Field(default=0, ge=0)
    """Accelerators; of each worker pod where the step is a Ray job."""
    gpu_resource: str = Field(default="nvidia.com/gpu", pattern=r"^[a-z0-9.-]+/[A-Za-z0-9._-]+$")
    """Extended resource of the device plugin."""
    node_selector: dict[str, str] = {}
    tolerations: tuple[Toleration, ...] = ()
    max_retries: int = Field(default=2, ge=0)
    """How often Kubeflow tries the step again; only for stages that may be tried again."""
    timeout_hours: float = Field(default=24.0, gt=0.0)
    """The step's pod is ended after so long."""
    ray: RayWorkers | None = None
    """None: computed in the step's pod."""

    @model_validator(mode="after")
    def _waits_as_long_as_its_job(self) -> Self:
        if self.ray is not None and self.timeout_hours < self.ray.deadline_hours:
            raise ValueError(
                f"timeout_hours {self.timeout_hours:g} is below ray.deadline_hours {self.ray.deadline_hours:g}: the "
                "step would be ended while its job may still run"
            )
        return self


class StepsOnCluster(BaseModel):
    """What the steps of each stage need."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    data: StepOnCluster = StepOnCluster()
    teacher: StepOnCluster = StepOnCluster()
    preferences: StepOnCluster = StepOnCluster()
    alignment: StepOnCluster = StepOnCluster(num_cpus=2, memory_gib=12)
    evaluation: StepOnCluster = StepOnCluster(memory_gib=12)
    registry: StepOnCluster = StepOnCluster()

    @model_validator(mode="after")
    def _runs_on_ray_what_computes_there(self) -> Self:
        for stage in ("data", "preferences", "evaluation", "registry"):
            if getattr(self, stage).ray is not None:
                raise ValueError(f"{stage} cannot be a Ray job; only teacher and alignment may have `ray`")
        return self
