import re
from pathlib import Path
from typing import Any

import crd_schema
import pytest
import typer
import yaml
from pydantic import ValidationError

from mint_lib.cluster import ClusterConfig, GpuConfig, Images, Toleration, load_cluster
from mint_lib.errors import InvalidInput
from mint_lib.inference_service import MAX_NAME_LENGTH, render_inference_service, render_vllm
from mint_lib.records import Reference
from mint_lib.serving import name_models
from mint_lib.storage.settings import S3Settings
from mint_lib.student import StudentConfig
from pipelines.cli import app

REFERENCE = Reference(kind="model", name="quickstart", version="v000003", digest="sha256:" + "ab" * 32)
IMAGE = "registry.example.org:5000/mint/serve@sha256:" + "cd" * 32
TRAIN_IMAGE = "registry.example.org:5000/mint/train@sha256:" + "ef" * 32
STORE = S3Settings(endpoint_url="https://s3.example.org", bucket="models", prefix="team/a")
CLUSTER = ClusterConfig(namespace="clinic", images=Images(serve=IMAGE, train=TRAIN_IMAGE), s3=STORE)
HUB_STUDENT = StudentConfig(model="hub:some-lab/Base-1B-Instruct", revision="0123456789" * 4, window_tokens=768)


def cluster_with(changes: dict[str, Any]) -> ClusterConfig:
    """The cluster with other values: of its own, and of its section `serving`."""
    own = {key: value for key, value in changes.items() if key in ClusterConfig.model_fields}
    serving = {key: value for key, value in changes.items() if key not in own}
    return CLUSTER.model_copy(update={"serving": CLUSTER.serving.model_copy(update=serving), **own})


def service(**changes: Any) -> dict[str, Any]:
    return render_inference_service(REFERENCE, cluster=cluster_with(changes))


def vllm(**changes: Any) -> dict[str, Any]:
    return render_vllm(REFERENCE, cluster=cluster_with(changes), student=HUB_STUDENT, lora_rank=16)


def pod_of(manifest: dict[str, Any]) -> dict[str, Any]:
    spec = manifest["spec"]
    return spec["predictor"] if manifest["kind"] == "InferenceService" else spec["template"]


def container_of(manifest: dict[str, Any]) -> dict[str, Any]:
    (container,) = pod_of(manifest)["containers"]
    return container


def environment_of(manifest: dict[str, Any]) -> dict[str, Any]:
    return {entry["name"]: entry.get("value", entry.get("valueFrom")) for entry in container_of(manifest)["env"]}


@pytest.mark.parametrize(
    "manifest",
    [
        service(),
        service(s3_secret=None, s3_ca_config_map="store-ca", hub_secret="hub"),
        vllm(),
        vllm(gpu=GpuConfig(image=IMAGE, num_gpus=2, node_selector={"gpu": "a100"}, tolerations=())),
        vllm(gpu=GpuConfig(tolerations=(Toleration(key="team", operator="Equal", value="a", effect="NoExecute"),))),
    ],
    ids=["plain", "web-identity", "vllm", "vllm-nodes", "vllm-tolerations"],
)
def test_rendered_object_is_accepted_by_its_crd(manifest: dict[str, Any]) -> None:
    if not crd_schema.CRD_FOLDER.is_dir():
        pytest.skip(f"no CRD schemas in {crd_schema.CRD_FOLDER}")
    assert crd_schema.find_schema_errors(manifest) == []


@pytest.mark.parametrize("kind", ["InferenceService", "LLMInferenceService"])
def test_crd_check_with_a_misspelt_or_mistyped_field_names_it(kind: str) -> None:
    if not crd_schema.CRD_FOLDER.is_dir():
        pytest.skip(f"no CRD schemas in {crd_schema.CRD_FOLDER}")
    manifest = service() if kind == "InferenceService" else vllm()
    container_of(manifest)["resourcez"] = {}
    pod_of(manifest)["terminationGracePeriodSeconds"] = "a minute"
    errors = "\n".join(crd_schema.find_schema_errors(manifest))
    assert "resourcez" in errors
    assert "terminationGracePeriodSeconds" in errors


@pytest.mark.parametrize("manifest", [service(), vllm()], ids=["service", "vllm"])
def test_rendered_object_survives_yaml(manifest: dict[str, Any]) -> None:
    assert yaml.safe_load(yaml.safe_dump(manifest)) == manifest


def test_pod_writes_only_to_bounded_volumes_and_holds_no_cluster_token() -> None:
    manifest = service(s3_ca_config_map="ca")
    pod, container = pod_of(manifest), container_of(manifest)
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert pod["automountServiceAccountToken"] is False
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes.keys() == {mount["name"] for mount in container["volumeMounts"]}
    writable = [mount for mount in container["volumeMounts"] if not mount.get("readOnly")]
    assert {mount["mountPath"] for mount in writable} == {"/tmp", "/var/cache/mint"}
    assert all("sizeLimit" in volumes[mount["name"]]["emptyDir"] for mount in writable)
    environment = environment_of(manifest)
    used = {environment["HOME"], environment["MINT_CACHE_DIR"], container["workingDir"]}
    assert used <= {mount["mountPath"] for mount in writable}
    assert environment["HF_HOME"].startswith(environment["MINT_CACHE_DIR"] + "/")


def test_pod_serves_the_pinned_version_behind_tokens_and_without_the_page() -> None:
    manifest = service()
    container = container_of(manifest)
    arguments = container["args"]
    assert arguments[:2] == ["serve", str(REFERENCE)]
    assert manifest["metadata"]["annotations"]["mint.platform/reference"] == str(REFERENCE)
    assert container["image"] == IMAGE
    assert "--no-page" in arguments
    tokens = Path(arguments[arguments.index("--tokens") + 1])
    mount = next(mount for mount in container["volumeMounts"] if mount["mountPath"] == str(tokens.parent))
    assert "subPath" not in mount
    volume = next(volume for volume in pod_of(manifest)["volumes"] if volume["name"] == mount["name"])
    assert volume["secret"]["secretName"] == "mint-serving-tokens"
    assert volume["secret"]["items"] == [{"key": tokens.name, "path": tokens.name}]


def test_pod_of_a_renamed_service_answers_to_the_services_name() -> None:
    manifest = render_inference_service(REFERENCE, cluster=CLUSTER, name="syndromes")
    assert manifest["metadata"]["name"] == "syndromes"
    assert name_models([container_of(manifest)["args"][1]]) == {"syndromes": str(REFERENCE)}


def test_pod_starts_the_command_with_options_that_it_has() -> None:
    manifest = service(drain_seconds=12, grace_seconds=34)
    subcommand, *arguments = container_of(manifest)["args"]
    assert container_of(manifest)["command"] == ["mint"]
    command = typer.main.get_command(app)
    parsed = command.commands[subcommand].make_context(subcommand, arguments).params
    assert parsed["references"] == [str(REFERENCE)]
    assert (parsed["host"], parsed["port"]) == ("0.0.0.0", container_of(manifest)["ports"][0]["containerPort"])
    assert (parsed["drain_seconds"], parsed["grace_seconds"], parsed["page"]) == (12, 34, False)


def test_pod_finds_the_store_by_the_variables_that_the_library_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = environment_of(service())
    for name in list(environment):
        if isinstance(environment[name], str) and name.startswith("MINT_S3_"):
            monkeypatch.setenv(name, environment[name])
    assert S3Settings.from_environment() == STORE


def test_pod_takes_keys_from_secrets_and_never_by_value() -> None:
    environment = environment_of(service(hub_secret="hub"))
    for key, secret in {"AWS_ACCESS_KEY_ID": "mint-s3", "AWS_SECRET_ACCESS_KEY": "mint-s3", "HF_TOKEN": "hub"}.items():
        assert environment[key] == {"secretKeyRef": {"name": secret, "key": key}}
    assert not {"AWS_ACCESS_KEY_ID", "HF_TOKEN"} & environment_of(service(s3_secret=None)).keys()


def test_pod_with_its_own_authority_points_the_store_at_the_mounted_file() -> None:
    manifest = service(s3_ca_config_map="store-ca")
    folder = Path(environment_of(manifest)["MINT_S3_CA_BUNDLE"]).parent
    mount = next(mount for mount in container_of(manifest)["volumeMounts"] if mount["mountPath"] == str(folder))
    volume = next(volume for volume in pod_of(manifest)["volumes"] if volume["name"] == mount["name"])
    assert volume["configMap"]["name"] == "store-ca"


@pytest.mark.parametrize(("drain_seconds", "grace_seconds"), [(6, 1), (10, 60), (45, 300)])
def test_pod_is_given_longer_than_the_server_takes_to_stop(drain_seconds: int, grace_seconds: int) -> None:
    manifest = service(drain_seconds=drain_seconds, grace_seconds=grace_seconds)
    arguments = container_of(manifest)["args"]
    assert arguments[arguments.index("--drain-seconds") + 1] == str(drain_seconds)
    assert arguments[arguments.index("--grace-seconds") + 1] == str(grace_seconds)
    assert pod_of(manifest)["terminationGracePeriodSeconds"] > drain_seconds + grace_seconds
    # The server keeps accepting for longer than Kubernetes needs to see that it is not ready.
    probe = container_of(manifest)["readinessProbe"]
    assert drain_seconds > probe["periodSeconds"] * probe["failureThreshold"]


def test_pod_may_load_for_the_configured_time_before_it_is_restarted() -> None:
    container = container_of(service(load_seconds=901))
    probe = container["startupProbe"]
    assert probe["httpGet"]["path"] == "/readyz"
    assert probe["periodSeconds"] * probe["failureThreshold"] >= 901
    assert container["livenessProbe"]["httpGet"]["path"] == "/healthz"
    assert container["readinessProbe"]["httpGet"]["path"] == "/readyz"
    assert {probe["httpGet"]["port"] for probe in (probe, container["livenessProbe"])} == {
        container["ports"][0]["containerPort"]
    }


def test_service_scales_by_what_kserve_accepts_and_replaces_pods_one_up_none_down() -> None:
    manifest = service(min_replicas=3, max_replicas=9, target_cpu_percent=55)
    predictor, annotations = pod_of(manifest), manifest["metadata"]["annotations"]
    assert (predictor["minReplicas"], predictor["maxReplicas"]) == (3, 9)
    # KServe's webhook lets the HPA have cpu and memory only, and only under these two annotations.
    assert (predictor["scaleMetric"], predictor["scaleTarget"]) == ("cpu", 55)
    assert annotations["serving.kserve.io/deploymentMode"] == "Standard"
    assert annotations["serving.kserve.io/autoscalerClass"] == "hpa"
    assert predictor["deploymentStrategy"]["rollingUpdate"]["maxUnavailable"] == 0
    spread = predictor["topologySpreadConstraints"][0]
    assert spread["labelSelector"]["matchLabels"] == {
        "serving.kserve.io/inferenceservice": manifest["metadata"]["name"]
    }


def test_pod_asks_for_what_it_is_limited_to_and_computes_with_that_many_threads() -> None:
    manifest = service(num_cpus=6, memory_gib=12)
    resources = container_of(manifest)["resources"]
    assert resources["requests"] == resources["limits"]
    assert (resources["limits"]["cpu"], resources["limits"]["memory"]) == ("6", "12Gi")
    assert environment_of(manifest)["OMP_NUM_THREADS"] == "6"


def test_pod_carries_the_labels_that_network_policies_select() -> None:
    labels = pod_of(service())["labels"]
    assert labels["app.kubernetes.io/part-of"] == "mint"
    assert labels["app.kubernetes.io/component"] == "server"


def test_service_with_an_external_autoscaler_leaves_scaling_alone() -> None:
    manifest = service(autoscaler="external")
    assert manifest["metadata"]["annotations"]["serving.kserve.io/autoscalerClass"] == "external"
    assert not {"scaleMetric", "scaleTarget"} & pod_of(manifest).keys()


def test_service_with_a_base_in_the_store_loads_it_from_there() -> None:
    arguments = container_of(service(base="base/smollm2"))["args"]
    assert arguments[arguments.index("--base") + 1] == "base/smollm2"


def test_pod_without_a_user_of_ours_leaves_it_to_the_platform() -> None:
    security = pod_of(service(user_id=None))["securityContext"]
    assert not {"runAsUser", "runAsGroup", "fsGroup"} & security.keys()
    assert security["runAsNonRoot"] is True


@pytest.mark.parametrize(
    "image",
    [
        "registry.example.org/mint:latest",
        "registry.example.org/mint:1.4.2",
        "registry.example.org/mint",
        "registry.example.org/mint@sha256:abc",
        "registry.example.org/mint@sha256:" + "CD" * 32,
        IMAGE + "\n",
    ],
)
def test_cluster_with_an_image_that_can_move_is_refused(image: str) -> None:
    with pytest.raises(ValidationError, match="image"):
        ClusterConfig(namespace="clinic", images={"serve": image, "train": TRAIN_IMAGE}, s3=STORE)
    with pytest.raises(ValidationError, match="image"):
        GpuConfig(image=image)


@pytest.mark.parametrize(
    "values",
    [
        {"serving": {"min_replicas": 5, "max_replicas": 4}},
        {"serving": {"drain_seconds": 1}},
        {"namespace": "Clinic"},
        {"serving": {"tokens_secret": "../tokens"}},
        {"serving": {"replicas": 3}},
        {"serving": {"gpu": {"tolerations": [{"key": "a", "operator": "Equal"}]}}},
        {"serving": {"gpu": {"tolerations": [{"key": "a", "value": "b"}]}}},
        {"kubeflow": {"host": "https://name:secret@kubeflow.example.org"}},
        {"ray": {"version": "latest"}},
        {"user_id": 0},
    ],
)
def test_cluster_with_a_value_that_cannot_work_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ClusterConfig.model_validate(CLUSTER.model_dump() | values)


@pytest.mark.parametrize("name", ["1st", "a" * (MAX_NAME_LENGTH + 1), "Quick", "a-", "a.b", "a_b"])
def test_service_with_a_name_that_kserve_refuses_is_refused_in_words(name: str) -> None:
    with pytest.raises(InvalidInput, match="beginning with a letter"):
        render_inference_service(REFERENCE, cluster=CLUSTER, name=name)
    with pytest.raises(InvalidInput, match="beginning with a letter"):
        render_vllm(REFERENCE, cluster=CLUSTER, student=HUB_STUDENT, lora_rank=8, name=name)


@pytest.mark.parametrize("endpoint_url", ["http://127.0.0.1:8333", "http://localhost:9000", "http://[::1]:9000"])
def test_cluster_with_a_store_on_loopback_is_refused(endpoint_url: str) -> None:
    with pytest.raises(ValidationError, match="loopback"):
        ClusterConfig.model_validate(CLUSTER.model_dump() | {"s3": {"endpoint_url": endpoint_url}})


def test_cluster_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump(CLUSTER.model_dump(mode="json")))
    assert load_cluster(path) == CLUSTER


@pytest.mark.parametrize(
    ("text", "expected"),
    [(None, "FileNotFoundError"), ("[1", "cannot be read"), ("- 1", "keys and values"), ("name: x", "name")],
)
def test_cluster_file_that_cannot_be_used_is_refused_in_words(tmp_path: Path, text: str | None, expected: str) -> None:
    path = tmp_path / "cluster.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InvalidInput, match=expected):
        load_cluster(path)


def test_ray_version_of_a_cluster_is_the_one_that_is_pinned() -> None:
    constraints = (Path(__file__).parents[2] / ".ci" / "constraints.txt").read_text()
    assert f"\nray=={CLUSTER.ray.version}\n" in constraints


def test_vllm_serves_the_base_at_its_commit_and_the_adapter_of_the_version() -> None:
    manifest = vllm()
    model = manifest["spec"]["model"]
    assert model["uri"] == f"hf://some-lab/Base-1B-Instruct:{HUB_STUDENT.revision}"
    assert model["lora"]["adapters"] == [
        {"name": "quickstart", "uri": "s3://models/team/a/model/quickstart/v000003/adapter"}
    ]
    assert model["name"] != "quickstart", "KServe wants the adapter's name to differ from the base's"
    assert manifest["metadata"]["annotations"]["mint.platform/reference"] == str(REFERENCE)
    assert "--max-model-len 768" in environment_of(manifest)["VLLM_ADDITIONAL_ARGS"]


def test_vllm_without_a_store_prefix_names_the_adapter_at_the_bucket_root() -> None:
    manifest = vllm(s3=S3Settings(endpoint_url="https://s3.example.org", bucket="models"))
    (adapter,) = manifest["spec"]["model"]["lora"]["adapters"]
    assert adapter["uri"] == "s3://models/model/quickstart/v000003/adapter"


def test_vllm_says_that_it_was_not_tested_on_a_gpu_and_what_it_lacks() -> None:
    annotations = vllm()["metadata"]["annotations"]
    assert annotations["mint.platform/tested-on-gpu"] == "no"
    assert re.search("no exact ranking", annotations["mint.platform/limits"])


def test_vllm_asks_for_gpus_and_tolerates_their_taints() -> None:
    manifest = vllm(gpu=GpuConfig(num_gpus=2, node_selector={"gpu": "a100"}))
    assert container_of(manifest)["resources"]["limits"]["nvidia.com/gpu"] == "2"
    assert "--tensor-parallel-size 2" in environment_of(manifest)["VLLM_ADDITIONAL_ARGS"]
    assert pod_of(manifest)["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    assert pod_of(manifest)["nodeSelector"] == {"gpu": "a100"}
    assert "image" not in container_of(manifest), "None leaves the image to the KServe installation"
    assert container_of(vllm(gpu=GpuConfig(image=IMAGE)))["image"] == IMAGE


@pytest.mark.parametrize(("rank", "loaded"), [(1, 8), (8, 8), (16, 16), (17, 32), (256, 256)])
def test_vllm_is_told_a_rank_that_it_knows_and_that_holds_the_adapter(rank: int, loaded: int) -> None:
    manifest = render_vllm(REFERENCE, cluster=CLUSTER, student=HUB_STUDENT, lora_rank=rank)
    assert manifest["spec"]["model"]["lora"]["maxRank"] == loaded


@pytest.mark.parametrize(
    "student",
    [
        StudentConfig(),
        StudentConfig(model="tiny"),
        StudentConfig(model="folder:/models/base"),
        StudentConfig(model="hub:some-lab/Base"),
        StudentConfig(model="hub:some-lab/Base", revision="main"),
        HUB_STUDENT.model_copy(update={"num_layers": 4}),
    ],
    ids=["package", "tiny", "folder", "no-revision", "branch", "cut"],
)
def test_vllm_with_a_base_that_is_not_a_pinned_hub_model_is_refused(student: StudentConfig) -> None:
    with pytest.raises(InvalidInput, match="hub:<organisation>/<name>"):
        render_vllm(REFERENCE, cluster=CLUSTER, student=student, lora_rank=16)


def test_vllm_with_an_adapter_of_too_high_a_rank_is_refused() -> None:
    with pytest.raises(InvalidInput, match="257"):
        render_vllm(REFERENCE, cluster=CLUSTER, student=HUB_STUDENT, lora_rank=257)


def test_vllm_serves_a_student_of_which_all_weights_were_trained_by_its_own_uri() -> None:
    manifest = render_vllm(REFERENCE, cluster=CLUSTER, student=StudentConfig(model="tiny"), lora_rank=None)
    assert manifest["spec"]["model"] == {
        "uri": "s3://models/team/a/model/quickstart/v000003/weights",
        "name": "quickstart",
    }
