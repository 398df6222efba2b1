"""What a Kubernetes cluster offers us, as one frozen config: the cluster file.

Goes in: values, of a YAML file or of the chart's ConfigMap `mint-cluster`. Comes out: `ClusterConfig`. It says what is
installed and under which names; how much a recipe's steps need stands in the recipe (`mint_lib.placement`). Secrets are
named, never held; nothing here asks a cluster.
"""

import pathlib
from typing import Annotated, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from mint_lib.errors import InvalidInput
from mint_lib.plugins import describe_validation_error
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


class Images(BaseModel):
    """Our images with their digests: a tag can be moved to other code."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    serve: Image
    """The model server."""
    train: Image
    """Everything else: the steps of a pipeline and Ray's pods."""


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


class ServingOnCluster(BaseModel):
    """How a model is served."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    service_account: ObjectName = "mint-serving"
    """For vLLM it must list a secret with KServe's `serving.kserve.io/s3-*` annotations."""
    tokens_secret: ObjectName = "mint-serving-tokens"  # noqa: S105 - the name of one
    """Its key `tokens.json` holds the tokens file."""
    base: str | None = None
    """The base's weights in the store (`base/smollm2`, see `mint base`); None takes them from where training did."""
    min_replicas: int = Field(default=2, ge=1)
    max_replicas: int = Field(default=4, ge=1)
    autoscaler: Literal["hpa", "external"] = "hpa"
    """`hpa`: KServe's own, by CPU. `external`: KServe makes none, as where the chart's ScaledObject is there."""
    target_cpu_percent: int = Field(default=70, ge=1, le=100)
    """CPU use of a replica above which `hpa` adds another. KServe's HPA knows cpu and memory, not concurrency."""
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


class KubeflowOnCluster(BaseModel):
    """Where Kubeflow Pipelines answers, and as whom steps run."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    host: str | None = Field(default=None, pattern=r"^https?://[^/@\s]+(/[^@\s]*)?$")
    """Address of the API or of the UI, which `mint submit --host` overrides; None: given there, or inside the cluster
    the service `ml-pipeline` of the namespace `kubeflow`."""
    namespace: ObjectName | None = None
    """Namespace (profile) that runs belong to, where Kubeflow has several users; None for a standalone one."""
    service_account: ObjectName = "mint-pipeline"
    """Of the steps' pods; may create Ray jobs in `namespace`."""
    image_pull_policy: Literal["IfNotPresent", "Always", "Never"] = "IfNotPresent"


class RayOnCluster(BaseModel):
    """How KubeRay and Kueue run our Ray jobs."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    service_account: ObjectName = "mint-ray"
    version: str = Field(default="2.60.0", pattern=r"^\d+\.\d+\.\d+$")
    """Ray in the train image; KubeRay refuses token authentication without knowing it."""
    queue: ObjectName | None = None
    """Kueue's LocalQueue; None starts jobs without a queue."""
    workload_priority: ObjectName | None = None
    """Kueue's WorkloadPriorityClass: who goes first in the queue."""
    pod_priority: ObjectName | None = None
    """PriorityClass of the pods: who may push others off a node."""
    is_encrypted: bool = False
    """Mutual TLS between Ray's pods; KubeRay makes the certificates by cert-manager."""


class ClusterConfig(BaseModel):
    """What is installed, and under which names. Secrets are named, never held."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    namespace: ObjectName
    """Where Ray jobs and servers run."""
    images: Images
    s3: S3Settings
    """The store as pods reach it."""
    s3_secret: ObjectName | None = "mint-s3"  # noqa: S105 - the name of one
    """Its keys are AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; None leaves credentials to the service account."""
    s3_ca_config_map: ObjectName | None = None
    """Its key `ca.crt` holds the authority behind the store's certificate; None trusts the usual ones."""
    hub_secret: ObjectName | None = None
    """Its key HF_TOKEN opens gated base models of the hub; None asks for open ones only."""
    deidentification_secret: ObjectName | None = None
    """Its key MINT_DEIDENTIFICATION_KEY goes to the data step of a recipe with `data.deidentify`, and to no other pod;
    None refuses such recipes."""
    chat_secret: ObjectName | None = None
    """Its keys are the environment variables that recipes name as `endpoint.api_key_variable`. A chat teacher's step
    gets the one that its recipe names, no other pod gets any; None refuses recipes that name one."""
    image_pull_secrets: tuple[ObjectName, ...] = ()
    user_id: int | None = Field(default=10001, ge=1)
    """User and group of every pod; None leaves them to the platform, as OpenShift wants."""
    serving: ServingOnCluster = ServingOnCluster()
    kubeflow: KubeflowOnCluster = KubeflowOnCluster()
    ray: RayOnCluster = RayOnCluster()

    @model_validator(mode="after")
    def _is_reached_by_pods(self) -> Self:
        if self.s3.is_loopback:
            raise ValueError(
                f"the store at {self.s3.endpoint_url} is on this machine's loopback, which no pod reaches; give the "
                "address that the cluster uses"
            )
        return self


def load_cluster(path: pathlib.Path) -> ClusterConfig:
    """The cluster file at `path`.

    Raises:
        InvalidInput: it cannot be read, holds no mapping, or a value of it is not allowed.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InvalidInput(
            f"{path} cannot be read ({type(error).__name__}). Give a YAML file of cluster values."
        ) from None
    if not isinstance(values, dict):
        raise InvalidInput(f"{path} must hold keys and values, for instance `namespace: mint`.")
    try:
        return ClusterConfig.model_validate(values)
    except ValidationError as error:
        raise InvalidInput(describe_validation_error(error, ClusterConfig, where=str(path))) from None
