"""Everything that the chart and our own code render, checked by tests/manifests: no finding may be left."""

import copy
import functools
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import helm_tools
import pytest
import yaml
from manifests import access, everything, flows, joins, pods, safeguards
from manifests.breaks import CANARY, GONE, apply, list_policy_breaks
from manifests.objects import Finding, Manifest, select, walk
from manifests.pod_rules import DIGEST, find_pod_faults
from manifests.pod_security import find_restricted_violations
from manifests.steps import find_step_faults

from mint_lib.cluster import ClusterConfig, GpuConfig, RayOnCluster, ServingOnCluster, Toleration
from mint_lib.inference_service import render_inference_service, render_vllm
from mint_lib.placement import RayWorkers, StepOnCluster
from mint_lib.ray_job import render_ray_job
from mint_lib.recipe import load_recipe
from mint_lib.records import Reference
from mint_lib.student import StudentConfig
from mint_lib.training.settings import AlignmentConfig
from pipelines.mint import build_pipeline

ROOT = Path(__file__).parents[2]
REFERENCE = Reference(kind="model", name="quickstart", version="v000003", digest="sha256:" + "ab" * 32)
IMAGES = {"serve": helm_tools.DIGESTS["images.serve"], "train": helm_tools.DIGESTS["images.train"]}
STUDENT = StudentConfig(model="hub:some-lab/Base-1B-Instruct", revision="0123456789" * 4, window_tokens=768)
OPTIONS: dict[str, dict[str, str]] = {
    "as-is": {},
    "all": {
        "hub.isAllowed": "true",
        "hub.credentials": "secret",
        "deidentification.credentials": "secret",
        "chat.isAllowed": "true",
        "chat.credentials": "secret",
        "network.chat.cidrs": "{203.0.113.40/32}",
        "network.chat.ports": "{8443}",
        "s3.caConfigMap": "mint-s3-ca",
        "network.podIdentity": "true",
        "network.clients[0].namespace": "clinic",
        "network.clients[0].podLabels.app": "portal",
        "pipelines.namespaces": "{kubeflow}",
        "kueue.create": "true",
        "kueue.queue": "mint",
        "monitoring.enabled": "true",
    },
    "least": {
        "hub.isAllowed": "false",
        "endpointTest.enabled": "false",
        "pipelines.executorRole": "false",
        "quota.enabled": "false",
    },
    "store-inside": {"network.s3.namespace": "seaweedfs", "network.s3.podLabels.app": "seaweedfs"},
    "chat-inside": {
        "chat.isAllowed": "true",
        "network.chat.namespace": "vllm",
        "network.chat.podLabels.app": "vllm",
        "network.chat.ports": "{8000}",
    },
}


@functools.cache
def load_values(file: Path, option: str) -> dict[str, Any]:
    """Values as helm merges them: the defaults, the file, then single ones."""
    values = yaml.safe_load((helm_tools.CHART / "values.yaml").read_text())
    if file.name == "values.yaml":
        values = merge(values, unfold(helm_tools.CLUSTER_FACTS))
    else:
        values = merge(values, yaml.safe_load(file.read_text()))
    return merge(values, unfold(OPTIONS[option]))


def merge(base: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in more.items():
        if value is None and key in base and isinstance(base.get(key), str):
            del merged[key]  # helm takes a key away that is null
        elif isinstance(value, dict) and isinstance(base.get(key), dict):
            merged[key] = merge(base[key], value)
        else:
            merged[key] = value
    return merged


def unfold(sets: dict[str, str]) -> dict[str, Any]:
    """What `--set` makes of dotted paths, as far as these tests use it."""
    values: dict[str, Any] = {}
    for path, text in sets.items():
        node: Any = values
        *keys, last = path.replace("[0]", ".0").split(".")
        for key, following in zip(keys, [*keys[1:], last], strict=True):
            if isinstance(node, list):
                node.extend([{}] if not node else [])
                node = node[0]
            else:
                node = node.setdefault(key, [] if following == "0" else {})
        node[last] = yaml.safe_load(text.replace("{", "[").replace("}", "]"))
    return values


@functools.cache
def render(file: Path, option: str) -> tuple[Manifest, ...]:
    sets = (helm_tools.CLUSTER_FACTS if file.name == "values.yaml" else {}) | OPTIONS[option]
    return tuple(helm_tools.render_chart((file,), sets))


def find_faults(objects: tuple[Manifest, ...], values: dict[str, Any]) -> list[Finding]:
    users = not values["userId"]
    allowed = access.load_allowed(
        values["namespace"]["name"],
        pipeline_namespaces=values["pipelines"]["namespaces"],
        has_executor=values["pipelines"]["executorRole"],
    )
    return [
        *everything.find_object_faults(objects, platform_gives_users=users, canaries=[CANARY]),
        *everything.find_installation_faults(objects, values, allowed=allowed),
    ]


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("file", helm_tools.VALUES_FILES, ids=lambda file: file.stem)
def test_chart_breaks_no_rule(file: Path, option: str) -> None:
    assert find_faults(render(file, option), load_values(file, option)) == []


@pytest.mark.parametrize("file", helm_tools.VALUES_FILES, ids=lambda file: file.stem)
def test_quota_of_the_chart_holds_its_servers_and_queues(file: Path) -> None:
    assert safeguards.find_quota_faults(render(file, "as-is")) == []


@pytest.mark.parametrize("file", helm_tools.VALUES_FILES, ids=lambda file: file.stem)
def test_objects_of_our_code_fit_into_the_installed_chart(file: Path) -> None:
    """What a user does next with the cluster file that the chart wrote: a service and a Ray job, among the chart's."""
    objects, values = render(file, "all"), load_values(file, "all")
    (config,) = [one for one in select(objects, "ConfigMap") if one["metadata"]["name"] == "mint-cluster"]
    cluster = ClusterConfig.model_validate(yaml.safe_load(config["data"]["cluster.yaml"]))
    service = render_inference_service(REFERENCE, cluster=cluster, name="by-hand")
    assert find_faults((*objects, service, render_job(cluster)), values) == []


CLUSTER = ClusterConfig.model_validate(
    {"namespace": "mint", "images": IMAGES, "s3": {"endpoint_url": "https://s3.example.org", "bucket": "models"}}
)
CLUSTERS = {
    "plain": CLUSTER,
    "workload-identity": CLUSTER.model_copy(update={"s3_secret": None}),
    "everything": CLUSTER.model_copy(
        update={
            "hub_secret": "mint-hub",
            "deidentification_secret": "mint-deidentification",
            "chat_secret": "mint-chat",
            "s3_ca_config_map": "mint-s3-ca",
            "image_pull_secrets": ("mirror-login",),
            "ray": RayOnCluster(queue="mint", workload_priority="mint-study", pod_priority="high", is_encrypted=True),
            "serving": ServingOnCluster(autoscaler="external", base="base/smollm2", load_seconds=900),
        }
    ),
    "platform-gives-users": CLUSTER.model_copy(update={"user_id": None}),
}
ALIGNMENT = AlignmentConfig(name="quickstart", seed=1, student=StudentConfig())
STEPS = {
    "one-pod": (ALIGNMENT, StepOnCluster(ray=RayWorkers())),
    "gpus": (
        ALIGNMENT.model_copy(update={"num_workers": 8, "use_gpu": True}),
        StepOnCluster(
            num_cpus=16,
            memory_gib=200,
            num_gpus=4,
            node_selector={"gpu": "a100"},
            tolerations=(Toleration(key="nvidia.com/gpu"),),
            ray=RayWorkers(workers_per_pod=4, shared_memory_gib=32),
        ),
    ),
}


def render_job(cluster: ClusterConfig, step: str = "gpus") -> Manifest:
    config, placement = STEPS[step]
    inputs = {"pairs": f"pairs/quickstart@v000001#sha256:{'1' * 64}"}
    return render_ray_job(
        "alignment",
        config,
        inputs,
        cluster=cluster,
        step=placement,
        name="mint-alignment-0123456789abcdef",
        run_id="run-1",
    )


def find_code_faults(manifest: Manifest, cluster: ClusterConfig) -> list[Finding]:
    found = everything.find_object_faults([manifest], platform_gives_users=cluster.user_id is None, canaries=[CANARY])
    # What a queue or a scaler is called is the chart's; here the object stands alone.
    alone = {"reference-unknown", "scaled-by-nobody"} if cluster is CLUSTERS["everything"] else set()
    return found + [finding for finding in joins.find_join_faults([manifest]) if finding.rule not in alone]


@pytest.fixture
def _secrets_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN", "MINT_TOKEN"):
        monkeypatch.setenv(name, CANARY)


@pytest.mark.usefixtures("_secrets_in_the_environment")
@pytest.mark.parametrize("cluster", CLUSTERS.values(), ids=CLUSTERS)
def test_service_of_our_code_breaks_no_rule(cluster: ClusterConfig) -> None:
    assert find_code_faults(render_inference_service(REFERENCE, cluster=cluster), cluster) == []


@pytest.mark.usefixtures("_secrets_in_the_environment")
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("cluster", CLUSTERS.values(), ids=CLUSTERS)
def test_ray_job_of_our_code_breaks_no_rule(cluster: ClusterConfig, step: str) -> None:
    assert find_code_faults(render_job(cluster, step), cluster) == []


@pytest.mark.usefixtures("_secrets_in_the_environment")
@pytest.mark.parametrize("gpu", [GpuConfig(), GpuConfig(image=IMAGES["serve"], num_gpus=2)], ids=["", "image"])
@pytest.mark.parametrize("cluster", CLUSTERS.values(), ids=CLUSTERS)
def test_vllm_service_of_our_code_breaks_no_rule(cluster: ClusterConfig, gpu: GpuConfig) -> None:
    cluster = cluster.model_copy(update={"serving": cluster.serving.model_copy(update={"gpu": gpu})})
    manifest = render_vllm(REFERENCE, cluster=cluster, student=STUDENT, lora_rank=16)
    assert find_code_faults(manifest, cluster) == []


RECIPES = sorted((ROOT / "pipelines" / "recipes").glob("*.yaml")) + sorted((ROOT / "tests").rglob("recipes/*.yaml"))


@pytest.mark.usefixtures("_secrets_in_the_environment")
@pytest.mark.parametrize("cluster", CLUSTERS.values(), ids=CLUSTERS)
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda file: file.stem)
def test_compiled_pipeline_breaks_no_rule(recipe: Path, cluster: ClusterConfig, tmp_path: Path) -> None:
    from kfp import compiler

    target = tmp_path / "pipeline.yaml"
    compiler.Compiler().compile(build_pipeline(load_recipe(recipe), cluster), str(target))
    documents = list(yaml.safe_load_all(target.read_text()))
    found = find_step_faults(documents, canaries=[CANARY], platform_gives_users=cluster.user_id is None)
    assert found == []


def find_local_folders() -> list[Path]:
    """Folders of k8s/ that hold all that they build."""
    return [
        file.parent
        for file in sorted((ROOT / "k8s").glob("*/kustomization.yaml"))
        if "https://" not in "".join(yaml.safe_load(file.read_text()).get("resources", []))
    ]


OWN_FILES = sorted(path for path in (ROOT / "k8s").rglob("*.yaml") if "vendor" not in path.parts)


def build(folder: Path) -> list[Manifest]:
    kubectl = helm_tools.require_tool("kubectl")
    done = subprocess.run([kubectl, "kustomize", str(folder)], capture_output=True, text=True, check=True, timeout=60)
    return [one for one in yaml.safe_load_all(done.stdout) if one]


@pytest.mark.parametrize("folder", find_local_folders(), ids=lambda folder: folder.name)
def test_own_objects_beside_third_parties_break_no_rule(folder: Path) -> None:
    assert everything.find_object_faults(build(folder)) == []


def test_flows_pass_the_policies_beside_third_parties_too() -> None:
    """A connection has two ends: the store's and Prometheus' namespaces have policies of their own."""
    beside = [one for folder in find_local_folders() for one in build(folder)]
    (store,) = [pod for pod in pods.list_pods(beside) if pod.namespace == "seaweedfs"]
    file = helm_tools.CHART / "values-dev.yaml"
    gateway = {"network.gateway.namespace": "gateway", "network.gateway.podLabels.app": "envoy"}
    sets = {"monitoring.enabled": "true", **gateway}
    objects = helm_tools.render_chart((file,), sets)
    values = merge(load_values(file, "as-is"), unfold(sets))
    values["network"]["s3"]["podLabels"] = store.labels
    assert flows.find_flow_faults(objects, values) == []
    assert flows.find_flow_faults([*objects, *beside], values) == []
    closed = [one for one in select(beside, "NetworkPolicy") if one["metadata"]["namespace"] == "seaweedfs"]
    closed[0]["spec"]["ingress"] = []
    assert {finding.rule for finding in flows.find_flow_faults([*objects, *closed], values)} == {"flow-less"}


def test_objects_that_people_make_are_named_where_they_are_told_to() -> None:
    text = (ROOT / "helm" / "README.md").read_text()
    assert [name for _, name in sorted(joins.MADE_BY_PEOPLE) if name not in text] == []


@pytest.mark.parametrize(
    "file", sorted(path for path in ROOT.glob("k8s/**/*.yaml") if "vendor" not in path.parts), ids=str
)
def test_image_written_in_a_file_is_named_by_its_digest(file: Path) -> None:
    images = [
        part
        for document in yaml.safe_load_all(file.read_text())
        for path, part in walk(document)
        if path.rpartition("/")[2] == "image" and isinstance(part, str)
    ]
    assert [image for image in images if not DIGEST.search(image)] == []


def test_policies_of_the_chart_with_any_selector_or_port_taken_away_are_noticed() -> None:
    file = helm_tools.CHART / "values-prod-gpu.yaml"
    objects, values = list(render(file, "as-is")), load_values(file, "as-is")
    policies = list(select(objects, "NetworkPolicy"))
    changes = [one for one in list_policy_breaks(policies) if one.value is GONE]
    assert len(changes) > 100
    assert [one.name for one in changes if not flows.find_flow_faults(apply(one, policies), values)] == []


def test_policy_for_the_chat_model_with_anything_taken_away_or_widened_is_noticed() -> None:
    file = helm_tools.CHART / "values-prod-gpu.yaml"
    values = load_values(file, "chat-inside")
    policies = list(select(render(file, "chat-inside"), "NetworkPolicy"))
    changes = list_policy_breaks([one for one in policies if one["metadata"]["name"] == "to-chat"])
    assert len(changes) > 10
    assert [one.name for one in changes if not flows.find_flow_faults(apply(one, policies), values)] == []


def test_pods_of_chart_and_code_with_any_safeguard_taken_away_are_noticed() -> None:
    objects = [*render(helm_tools.CHART / "values-prod-gpu.yaml", "as-is"), render_job(CLUSTER)]
    unnoticed = {
        f"{pod.subject} {path}"
        for pod in pods.list_pods(objects)
        for path, broken in list_weaker_pods(pod)
        if not find_restricted_violations(broken) + find_pod_faults(broken)
    }
    assert unnoticed == set()


def list_weaker_pods(pod: pods.Pod) -> Iterator[tuple[str, pods.Pod]]:
    """The pod without one of its safeguards, for each; where two say the same, without both."""
    for key in ("automountServiceAccountToken", "enableServiceLinks", "serviceAccountName"):
        if pod.is_whole:
            yield key, pod._replace(spec={name: value for name, value in pod.spec.items() if name != key})
    for key in ("runAsNonRoot", "seccompProfile", "runAsUser", "runAsGroup"):
        if pod.is_whole:
            spec = copy.deepcopy(pod.spec)
            for part in (spec, *spec["containers"]):
                part.get("securityContext", {}).pop(key, None)
            yield key, pod._replace(spec=spec)
    for key in ("allowPrivilegeEscalation", "readOnlyRootFilesystem", "capabilities"):
        spec = copy.deepcopy(pod.spec)
        del spec["containers"][0]["securityContext"][key]
        yield key, pod._replace(spec=spec)
    for part in ("requests", "limits"):
        for resource in ("cpu", "memory", "ephemeral-storage"):
            spec = copy.deepcopy(pod.spec)
            del spec["containers"][0]["resources"][part][resource]
            yield f"{part} {resource}", pod._replace(spec=spec)
    for index, _ in enumerate(pod.spec["containers"][0]["volumeMounts"]):
        spec = copy.deepcopy(pod.spec)
        del spec["containers"][0]["volumeMounts"][index]
        yield f"mount {index}", pod._replace(spec=spec)
