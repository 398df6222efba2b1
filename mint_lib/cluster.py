"""Where and how a model is served on a Kubernetes cluster, as one frozen config.

Goes in: values. Comes out: `ClusterConfig`. Secrets are named, never held; nothing here asks a cluster.
"""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from mint_lib.storage.settings import S3Settings

READY_PERIOD_SECONDS = 2
"""How often a pod is asked whether it is ready."""

Image = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._:/-]*@sha256:[0-9a-f]{64}$")]
ObjectName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$")]


class Toleration(BaseModel):
    """A taint of the nodes that pods may run on in spite of it."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    key: str = Field(min_length=1)
    operator: Literal["Exists", "Equal"] = "Exists"
    value: str | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] = "NoSchedule"

    @model_validator(mode="after")
    def _has_a_value_where_one_is_compared(self) -> Self:
        if (self.value is None) == (self.operator == "Equal"):
            raise ValueError("operator Equal needs a value, Exists must not have one")
        return self


class GpuConfig(BaseModel):
    """What a vLLM pod gets."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    image: Image | None = None
    """vLLM image with its digest; None takes the one that the cluster's KServe installation names."""
    resource: str = Field(default="nvidia.com/gpu", pattern=r"^[a-z0-9.-]+/[A-Za-z0-9._-]+$")
    """Extended resource of the device plugin."""
    num_gpus: int = Field(default=1, ge=1, le=8)
    """GPUs of one pod; the model is split over them."""
    num_cpus: int = Field(default=4, ge=1)
    memory_gib: int = Field(default=32, ge=1)
    tolerations: tuple[Toleration, ...] = (Toleration(key="nvidia.com/gpu"),)
    node_selector: dict[str, str] = {}


class ClusterConfig(BaseModel):
    """Where and how a model is served on a cluster. Secrets are named, never held."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    namespace: ObjectName
    image: Image
    """Our image with its digest: a tag can be moved to other code."""
    s3: S3Settings
    """The store as pods reach it."""
    service_account: ObjectName = "mint-serving"
    """For vLLM it must list a secret with KServe's `serving.kserve.io/s3-*` annotations."""
    tokens_secret: ObjectName = "mint-serving-tokens"  # noqa: S105 - the name of one
    """Its key `tokens.json` holds the tokens file."""
    s3_secret: ObjectName | None = "mint-s3"  # noqa: S105 - the name of one
    """Its keys are AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; None leaves credentials to the service account."""
    s3_ca_config_map: ObjectName | None = None
    """Its key `ca.crt` holds the authority behind the store's certificate; None trusts the usual ones."""
    hub_secret: ObjectName | None = None
    """Its key HF_TOKEN opens gated base models of the hub; None asks for open ones only."""
    min_replicas: int = Field(default=2, ge=1)
    max_replicas: int = Field(default=4, ge=1)
    target_cpu_percent: int = Field(default=70, ge=1, le=100)
    """CPU use of a replica above which another is added. KServe's HPA knows cpu and memory, not concurrency."""
    num_cpus: int = Field(default=4, ge=1)
    memory_gib: int = Field(default=8, ge=1)
    scratch_gib: int = Field(default=2, ge=1)
    """Size of /tmp, which holds adapters while they load."""
    cache_gib: int = Field(default=8, ge=1)
    """Size of the folder for base weights."""
    load_seconds: int = Field(default=600, ge=30)
    """How long a pod may load before it is started anew."""
    drain_seconds: int = Field(default=10, ge=3 * READY_PERIOD_SECONDS)
    """From the signal to stop until no new connection is taken: load balancers need to see that it is not ready."""
    grace_seconds: int = Field(default=60, ge=1)
    """What accepted requests get to finish after that."""
    gpu: GpuConfig = GpuConfig()

    @model_validator(mode="after")
    def _can_be_scheduled(self) -> Self:
        if self.max_replicas < self.min_replicas:
            raise ValueError(f"max_replicas {self.max_replicas} is below min_replicas {self.min_replicas}")
        return self
