"""`k8s/`: the pinned third parties. What is remote is played by stand-ins that hold the objects our patches aim at.

The stand-ins are served on loopback and fetched by `k8s/mirror.py`, so that the air-gapped way is run by every test.
"""

import functools
import gzip
import http.server
import importlib.util
import io
import json
import re
import shutil
import socket
import subprocess
import sys
import tarfile
import threading
import time
import types
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from crd_schema import CRD_FOLDER, find_schema_errors
from helm_tools import VALUES_FILES, find_tool, render_chart, require_tool

from mint_lib.errors import StoreError
from mint_lib.storage.seaweedfs import GRPC_OFFSET, find_program
from mint_lib.storage.settings import S3Settings
from mint_lib.store import Store

K8S = Path(__file__).parents[2] / "k8s"
README = (K8S / "README.md").read_text()
ENFORCE = "pod-security.kubernetes.io/enforce"
LEVELS = {
    "cert-manager": "restricted",
    "kuberay-system": "restricted",
    "kueue-system": "restricted",
    "keda": "restricted",
    "kserve": "restricted",
    "monitoring": "restricted",
    "kubeflow": "baseline",
    "seaweedfs": "restricted",
}
"""Pod Security level that each namespace of a third party enforces."""
Document = dict[str, Any]


def _load_mirror() -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("mirror", K8S / "mirror.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


mirror = _load_mirror()
FOLDERS = [folder.name for folder in mirror.list_folders(K8S)]


def _object(kind: str, name: str, namespace: str | None = None, version: str = "v1", **rest: Any) -> Document:
    metadata = {"name": name} | ({"namespace": namespace} if namespace else {})
    return {"apiVersion": version, "kind": kind, "metadata": metadata, **rest}


def _workload(
    name: str, namespace: str, container: str, image: str, *, kind: str = "Deployment", **extra: Any
) -> Document:
    pod = {"containers": [{"name": container, "image": image, **extra}], "serviceAccountName": name}
    labels = {"app": name}
    spec = {"selector": {"matchLabels": labels}, "template": {"metadata": {"labels": labels}, "spec": pod}}
    return _object(kind, name, namespace, "apps/v1", spec=spec)


def _binding(name: str, namespace: str) -> list[Document]:
    subjects = [{"kind": "ServiceAccount", "name": name, "namespace": namespace}]
    role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": name}
    rbac = "rbac.authorization.k8s.io/v1"
    return [
        _object("ServiceAccount", name, namespace),
        _object("ClusterRoleBinding", name, None, rbac, roleRef=role, subjects=subjects),
    ]


def _crd(plural: str, group: str) -> Document:
    return _object(
        "CustomResourceDefinition", f"{plural}.{group}", None, "apiextensions.k8s.io/v1", spec={"group": group}
    )


ADMISSION = "admissionregistration.k8s.io/v1"
KSERVE_CRDS = [_crd("inferenceservices", "serving.kserve.io"), _crd("servingruntimes", "serving.kserve.io")]
STAND_INS: dict[str, list[Document]] = {
    "cert-manager.yaml": [
        _object("Namespace", "cert-manager"),
        _workload("cert-manager", "cert-manager", "main", "quay.io/jetstack/cert-manager-controller:v1.21.2"),
        _workload("cert-manager-webhook", "cert-manager", "main", "quay.io/jetstack/cert-manager-webhook:v1.21.2"),
        _workload(
            "cert-manager-cainjector", "cert-manager", "main", "quay.io/jetstack/cert-manager-cainjector:v1.21.2"
        ),
    ],
    "manifests.yaml": [
        _object("Namespace", "kueue-system"),
        _object(
            "ConfigMap", "kueue-manager-config", "kueue-system", data={"controller_manager_config.yaml": "of upstream"}
        ),
        _workload("kueue-controller-manager", "kueue-system", "manager", "registry.k8s.io/kueue/kueue:v0.19.7"),
    ],
    "keda-2.20.2.yaml": [
        _object("Namespace", "keda"),
        _workload("keda-operator", "keda", "keda-operator", "ghcr.io/kedacore/keda:2.20.2"),
        _workload("keda-metrics-apiserver", "keda", "keda", "ghcr.io/kedacore/keda-metrics-apiserver:2.20.2"),
    ],
    "kserve-crds.yaml": KSERVE_CRDS,
    "kserve.yaml": [
        *KSERVE_CRDS,
        _object(
            "ConfigMap",
            "inferenceservice-config",
            "kserve",
            data={
                "agent": '{"image" : "kserve/agent:v0.21.0", "cpuLimit": "1"}',
                "explainers": '{"art": {"image" : "kserve/art-explainer", "defaultImageVersion": "latest"}}',
                "opentelemetryCollector": '{"metricReceiverEndpoint": "keda-otel-scaler.keda.svc:4317"}',
                "deploy": '{"defaultDeploymentMode": "Serverless"}',
                "ingress": '{"disableIngressCreation": false}',
            },
        ),
        _workload("kserve-controller-manager", "kserve", "manager", "kserve/kserve-controller:v0.21.0"),
        _workload("kserve-localmodel-controller-manager", "kserve", "manager", "kserve/localmodel:v0.21.0"),
        _workload("llmisvc-controller-manager", "kserve", "manager", "kserve/llmisvc-controller:v0.21.0"),
        _workload("kserve-kernelcachenode-agent", "kserve", "manager", "kserve/kernelcache:v0.21.0", kind="DaemonSet"),
        _workload(
            "kserve-localmodelnode-agent", "kserve", "manager", "kserve/localmodelnode:v0.21.0", kind="DaemonSet"
        ),
        _object("MutatingWebhookConfiguration", "inferenceservice.serving.kserve.io", None, ADMISSION),
        _object("MutatingWebhookConfiguration", "llminferenceservice.serving.kserve.io", None, ADMISSION),
        _object("ValidatingWebhookConfiguration", "inferenceservice.serving.kserve.io", None, ADMISSION),
        _object("ValidatingWebhookConfiguration", "llminferenceservice.serving.kserve.io", None, ADMISSION),
        _object("ValidatingWebhookConfiguration", "llminferenceserviceconfig.serving.kserve.io", None, ADMISSION),
        _object("ValidatingWebhookConfiguration", "localmodelcache.serving.kserve.io", None, ADMISSION),
    ],
    "bundle.yaml": [
        _crd("podmonitors", "monitoring.coreos.com"),
        *_binding("prometheus-operator", "default"),
        _workload(
            "prometheus-operator",
            "default",
            "prometheus-operator",
            "quay.io/prometheus-operator/prometheus-operator:v0.94.1",
            args=[
                "--kubelet-service=kube-system/kubelet",
                "--prometheus-config-reloader=quay.io/prometheus-operator/prometheus-config-reloader:v0.94.1",
            ],
        ),
    ],
    "ray-operator/config/default": [
        _crd("rayjobs", "ray.io"),
        *_binding("kuberay-operator", "default"),
        _workload("kuberay-operator", "default", "kuberay-operator", "quay.io/kuberay/operator:v1.7.1"),
    ],
    "manifests/kustomize/cluster-scoped-resources": [
        _object("Namespace", "kubeflow"),
        _crd("workflows", "argoproj.io"),
    ],
    "manifests/kustomize/env/platform-agnostic": [
        _workload(
            "ml-pipeline",
            "kubeflow",
            "ml-pipeline-api-server",
            "ghcr.io/kubeflow/kfp-api-server:2.17.2",
            env=[{"name": "V2_DRIVER_IMAGE", "value": "ghcr.io/kubeflow/kfp-driver:2.17.2"}],
        ),
        _workload("mysql", "kubeflow", "mysql", "mysql:8.4"),
    ],
}
"""By the file's name, or by the folder's path in its repository."""


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """A server that plays github.com, and the folder that it serves."""
    root = tmp_path_factory.mktemp("web")
    for address in (address for name in FOLDERS for address in mirror.list_addresses(K8S / name)):
        base = mirror._BASE.fullmatch(address)
        if base is None:
            path = root / address.removeprefix("https://github.com/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(yaml.safe_dump_all(STAND_INS[path.name]))
        else:
            owner_and_name = base["repository"].removeprefix("https://github.com/")
            archive = root / owner_and_name / "archive" / "refs" / "tags" / f"{base['version']}.tar.gz"
            archive.parent.mkdir(parents=True, exist_ok=True)
            top = f"{owner_and_name.rpartition('/')[2]}-{base['version']}"
            _write_archive(
                archive, top, [path for path in STAND_INS if "/" in path and path.startswith(base["path"][:9])]
            )
    handler = functools.partial(_QuietHandler, directory=str(root))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", root
        server.shutdown()


class _QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments: Any) -> None:
        pass


def _write_archive(path: Path, top: str, folders: list[str]) -> None:
    """A release's archive as GitHub makes it, with files besides those that we want."""
    with tarfile.open(path, "w:gz") as archive:
        texts = {f"{top}/README.md": "", f"{top}/docs/big.yaml": "kind: NotForUs"}
        for folder in folders:
            texts[f"{top}/{folder}/kustomization.yaml"] = "kind: Kustomization\nresources: [all.yaml]\n"
            texts[f"{top}/{folder}/all.yaml"] = yaml.safe_dump_all(STAND_INS[folder])
        for name, text in texts.items():
            member = tarfile.TarInfo(name)
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))


def _copy_with_addresses(url: str, to: Path) -> Path:
    """A copy of k8s/ that fetches from `url`."""
    shutil.copytree(K8S, to, ignore=shutil.ignore_patterns("vendor", "checksums.txt", "__pycache__"))
    for path in to.glob("*/kustomization.yaml"):
        path.write_text(path.read_text().replace("https://github.com", url))
    return to


def _run_mirror(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": f"{Path(require_tool('kubectl')).parent}:/usr/bin:/bin"}
    command = [sys.executable, str(root / "mirror.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)


@pytest.fixture(scope="module")
def vendored(web: tuple[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """k8s/vendor as `mirror.py fetch` writes it."""
    root = _copy_with_addresses(web[0], tmp_path_factory.mktemp("copy") / "k8s")
    done = _run_mirror(root, "fetch")
    assert done.returncode == 0, done.stderr
    return root / "vendor"


@pytest.fixture
def kubectl(monkeypatch: pytest.MonkeyPatch) -> None:
    """`kubectl` is found by `mirror.build`."""
    folder = Path(require_tool("kubectl")).parent
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


@functools.cache
def _build(folder: Path) -> list[Document]:
    """The objects of a folder, which tests only read."""
    return list(yaml.load_all(mirror.build(folder), Loader=mirror._Loader))


def _find(documents: list[Document], kind: str, name: str) -> Document:
    (found,) = [item for item in documents if (item["kind"], item["metadata"]["name"]) == (kind, name)]
    return found


def _list_own() -> list[Document]:
    """Objects that k8s/ itself defines: those of its files, patches left out."""
    own = []
    for name in FOLDERS:
        for resource in yaml.safe_load((K8S / name / "kustomization.yaml").read_text())["resources"]:
            if "://" not in resource:
                own += list(yaml.safe_load_all((K8S / name / resource).read_text()))
    return own


@pytest.mark.parametrize("name", FOLDERS)
def test_folder_builds_from_files_alone_and_its_namespaces_enforce_a_level(vendored, kubectl, name):
    assert mirror.list_addresses(vendored / name) == []
    documents = _build(vendored / name)
    assert documents
    for document in documents:
        if document["kind"] == "Namespace":
            namespace = document["metadata"]["name"]
            assert document["metadata"]["labels"][ENFORCE] == LEVELS[namespace]
        elif "namespace" in document["metadata"]:
            assert document["metadata"]["namespace"] in LEVELS


def test_every_namespace_of_a_third_party_is_made_by_a_folder(vendored, kubectl):
    made = [
        item["metadata"]["name"] for name in FOLDERS for item in _build(vendored / name) if item["kind"] == "Namespace"
    ]
    assert sorted(made) == sorted(LEVELS)


@pytest.mark.parametrize("name", FOLDERS)
def test_address_names_a_version_and_no_branch(name):
    for address in mirror.list_addresses(K8S / name):
        version = re.fullmatch(
            r"https://github\.com/[\w-]+/[\w-]+(?:/releases/download/(v\d+\.\d+\.\d+)/[\w.-]+\.yaml|//[\w/-]+\?ref=(v?\d+\.\d+\.\d+))",
            address,
        )
        assert version, address
        assert f"| {(version[1] or version[2]).removeprefix('v')} |" in README, address


def _list_patched() -> list[tuple[str, str, str]]:
    """(folder, kind, name) of every patch that names its object."""
    found = []
    for name in FOLDERS:
        for patch in yaml.safe_load((K8S / name / "kustomization.yaml").read_text()).get("patches", []):
            if "target" not in patch:
                text = patch.get("patch") or (K8S / name / patch["path"]).read_text()
                document = yaml.safe_load(text)
                found.append((name, document["kind"], document["metadata"]["name"]))
    return found


@pytest.mark.parametrize(("folder", "kind", "name"), _list_patched())
def test_patch_whose_object_is_gone_fails(vendored, kubectl, tmp_path, folder, kind, name):
    copy = tmp_path / folder
    shutil.copytree(vendored / folder, copy)
    for path in copy.rglob("*.yaml"):
        if path.name not in ("kustomization.yaml", "manager-config.yaml", "inferenceservice-config.yaml"):
            documents = list(yaml.safe_load_all(path.read_text()))
            for document in documents:
                if document and (document.get("kind"), document["metadata"]["name"]) == (kind, name):
                    document["metadata"]["name"] = "renamed-by-upstream"
            path.write_text(yaml.safe_dump_all(documents))
    with pytest.raises(mirror.MirrorError, match=re.escape(name)):
        mirror.build(copy)


def test_kserve_serves_in_standard_mode_without_an_ingress_and_keeps_its_other_keys(vendored, kubectl):
    documents = _build(vendored / "51-kserve")
    data = _find(documents, "ConfigMap", "inferenceservice-config")["data"]
    assert json.loads(data["deploy"]) == {"defaultDeploymentMode": "Standard"}
    ingress = json.loads(data["ingress"])
    assert (ingress["disableIngressCreation"], ingress["disableIstioVirtualHost"]) == (True, True)
    assert "kserve/agent:v0.21.0" in data["agent"]


def test_kserve_keeps_the_controller_of_inference_services_and_no_other(vendored, kubectl):
    documents = _build(vendored / "51-kserve")
    left = {(item["kind"], item["metadata"]["name"]) for item in documents}
    workloads = {name for kind, name in left if kind in ("Deployment", "DaemonSet")}
    webhooks = {name for kind, name in left if kind.endswith("WebhookConfiguration")}
    assert workloads == {"kserve-controller-manager"}
    assert webhooks == {"inferenceservice.serving.kserve.io"}


def test_kueue_queues_ray_jobs_and_nothing_else(vendored, kubectl):
    documents = _build(vendored / "30-kueue")
    text = _find(documents, "ConfigMap", "kueue-manager-config")["data"]["controller_manager_config.yaml"]
    config = yaml.safe_load(text)
    assert config["integrations"]["frameworks"] == ["ray.io/rayjob"]
    assert config["manageJobsWithoutQueueName"] is False


@pytest.mark.parametrize(
    ("folder", "name"), [("20-kuberay", "kuberay-operator"), ("30-kueue", "kueue-controller-manager")]
)
def test_operator_meets_the_level_that_its_namespace_enforces(vendored, kubectl, folder, name):
    pod = _find(_build(vendored / folder), "Deployment", name)["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["securityContext"] == {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    assert container["image"]


@pytest.mark.parametrize(
    ("folder", "name", "namespace"),
    [
        ("20-kuberay", "kuberay-operator", "kuberay-system"),
        ("60-prometheus-operator", "prometheus-operator", "monitoring"),
    ],
)
def test_operator_moves_with_its_account_and_its_rights(vendored, kubectl, folder, name, namespace):
    documents = _build(vendored / folder)
    assert _find(documents, "Deployment", name)["metadata"]["namespace"] == namespace
    assert _find(documents, "ServiceAccount", name)["metadata"]["namespace"] == namespace
    (subject,) = _find(documents, "ClusterRoleBinding", name)["subjects"]
    assert subject["namespace"] == namespace


def test_prometheus_binds_the_account_that_it_runs_as(vendored, kubectl):
    documents = _build(vendored / "61-prometheus")
    (subject,) = _find(documents, "ClusterRoleBinding", "prometheus-find-pods")["subjects"]
    account = _find(documents, "Prometheus", "prometheus")["spec"]["serviceAccountName"]
    assert (subject["name"], subject["namespace"]) == (account, "monitoring")


@pytest.mark.skipif(not CRD_FOLDER.exists(), reason="the CRD schemas are not here")
def test_own_custom_resources_meet_their_crds():
    own = [item for item in _list_own() if item["apiVersion"].startswith("monitoring.coreos.com/")]
    assert {item["kind"] for item in own} == {"Prometheus", "Alertmanager"}
    assert [find_schema_errors(item) for item in own] == [[], []]


def test_own_core_objects_are_valid(vendored, kubectl):
    validator = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    for folder in ("61-prometheus", "90-seaweedfs"):
        for document in _build(vendored / folder):
            if not document["apiVersion"].startswith("monitoring.coreos.com/"):
                validator.validate(document, "1.33", strict=True)


def test_own_images_are_pinned_by_digest():
    images = mirror.list_images(yaml.safe_dump_all(_list_own()))
    assert len(images) == 3
    assert all(re.search(r":[\w.-]+@sha256:[0-9a-f]{64}$", image) for image in images)


@pytest.mark.skipif(find_tool("helm") is None, reason="helm is not installed")
@pytest.mark.parametrize("values", VALUES_FILES, ids=lambda path: path.stem)
def test_no_object_is_defined_here_and_in_the_chart(vendored, kubectl, values):
    ours = {(item["kind"], item["metadata"]["name"]) for name in FOLDERS for item in _build(vendored / name)}
    chart = {(item["kind"], item["metadata"]["name"]) for item in render_chart((values,))}
    assert chart
    assert ours & chart == set()


@pytest.mark.skipif(find_tool("helm") is None, reason="helm is not installed")
def test_chart_lets_traffic_through_to_namespaces_that_exist():
    values = yaml.safe_load((K8S.parent / "helm" / "values.yaml").read_text())
    network, monitoring = values["network"], values["monitoring"]
    named = {network["kuberay"]["namespace"], network["kubeflow"]["namespace"], monitoring["prometheusNamespace"]}
    assert named <= set(LEVELS)
    assert ".monitoring." in monitoring["prometheusAddress"]


@pytest.mark.skipif(find_tool("helm") is None, reason="helm is not installed")
def test_readme_values_for_the_trial_store_open_the_way_to_it(tmp_path):
    block = re.findall(r"^    ((?:s3|network): \{.*\})$", README, re.MULTILINE)
    values = tmp_path / "trial.yaml"
    values.write_text("\n".join(block))
    chart = render_chart((values,), {"network.apiServer.cidrs[0]": "10.0.0.1/32"})
    (service,) = [item for item in _list_own() if item["kind"] == "Service"]
    port = service["spec"]["ports"][0]["port"]
    ways = [
        {entry["port"] for entry in rule["ports"]}
        for policy in chart
        if policy["kind"] == "NetworkPolicy"
        for rule in policy["spec"].get("egress", [])
        for peer in rule.get("to", [])
        if peer.get("namespaceSelector", {}).get("matchLabels") == {"kubernetes.io/metadata.name": "seaweedfs"}
    ]
    assert ways
    assert all(ports == {port} for ports in ways)


def test_readme_applies_every_folder_in_order_and_waits_for_what_is_there(vendored, kubectl):
    steps = re.findall(r"kubectl apply --server-side -k k8s/([\w-]+)", README)
    assert steps == FOLDERS
    waited = re.findall(r"kubectl -n ([\w-]+) (?:wait --for=condition=Available|rollout status) (\w+)/([\w-]+)", README)
    documents = [item for name in FOLDERS for item in _build(vendored / name)]
    there = {(item["metadata"].get("namespace"), item["kind"].lower(), item["metadata"]["name"]) for item in documents}
    assert len(waited) >= 8
    assert set(waited) <= there


def test_image_list_finds_those_in_json_arguments_and_variables(vendored, kubectl):
    text = _run_mirror(vendored.parent, "images").stdout.splitlines()
    for image in (
        "kserve/agent:v0.21.0",
        "quay.io/prometheus-operator/prometheus-config-reloader:v0.94.1",
        "ghcr.io/kubeflow/kfp-driver:2.17.2",
        "mysql:8.4",
    ):
        assert image in text
    assert not [line for line in text if "keda-otel-scaler" in line or "art-explainer" in line or "kubelet" in line]
    assert not [line for line in text if "llmisvc" in line]


def test_rendered_folder_takes_every_image_from_the_mirror(vendored, kubectl):
    text = _run_mirror(vendored.parent, "render", "51-kserve", "71-kubeflow", "--registry", "registry.example/m").stdout
    images = mirror.list_images(text)
    assert len(images) >= 4
    assert {image.split("/")[0] + "/" + image.split("/")[1] for image in images} == {"registry.example/m"}
    assert "registry.example/m/kserve/agent:v0.21.0" in images
    assert "registry.example/m/kubeflow/kfp-driver:2.17.2" in images
    assert "registry.example/m/mysql:8.4" in images


def test_copies_are_commands_with_a_tag_or_a_digest(vendored, kubectl):
    lines = _run_mirror(vendored.parent, "copies", "61-prometheus", "--registry", "r.example/m").stdout.splitlines()
    digest = re.search(r"prometheus:v3\.14\.0(@sha256:\w+)", (K8S / "61-prometheus" / "prometheus.yaml").read_text())[1]
    source = f"docker://quay.io/prometheus/prometheus{digest}"
    target = "docker://r.example/m/prometheus/prometheus:v3.14.0"
    assert f"skopeo copy --all --preserve-digests {source} {target}" in lines


def test_second_fetch_that_gives_other_content_is_refused(web, vendored, tmp_path):
    root = _copy_with_addresses(web[0], tmp_path / "k8s")
    shutil.copy(vendored.parent / "checksums.txt", root)
    assert _run_mirror(root, "fetch").returncode == 0
    address = next(line.split()[1] for line in (root / "checksums.txt").read_text().splitlines() if "bundle" in line)
    served = web[1] / address.removeprefix(web[0] + "/")
    before = served.read_text()
    try:
        served.write_text(before + "---\nkind: Stranger\n")
        done = _run_mirror(root, "fetch")
    finally:
        served.write_text(before)
    assert done.returncode != 0
    assert f"{address} has changed" in done.stderr
    assert not (root / "vendor").exists()


def test_archive_is_compared_by_its_files_not_by_its_compression(web, vendored, tmp_path):
    root = _copy_with_addresses(web[0], tmp_path / "k8s")
    shutil.copy(vendored.parent / "checksums.txt", root)
    (served,) = web[1].rglob("v1.7.1.tar.gz")
    before = served.read_bytes()
    try:
        served.write_bytes(gzip.compress(gzip.decompress(before), compresslevel=1))
        assert served.read_bytes() != before
        assert _run_mirror(root, "fetch").returncode == 0
        renamed = {"kind": "Secret", "metadata": {"name": "stranger"}}
        original, STAND_INS["ray-operator/config/default"] = STAND_INS["ray-operator/config/default"], [renamed]
        _write_archive(served, "kuberay-v1.7.1", ["ray-operator/config/default"])
        STAND_INS["ray-operator/config/default"] = original
        assert "has changed" in _run_mirror(root, "fetch").stderr
    finally:
        served.write_bytes(before)


def test_fetch_without_the_internet_says_where_to_run_it(tmp_path):
    root = _copy_with_addresses("http://127.0.0.1:9", tmp_path / "k8s")
    done = _run_mirror(root, "fetch")
    assert done.returncode != 0
    assert "Run fetch on a machine that reaches it" in done.stderr
    assert "Traceback" not in done.stderr


def test_images_before_a_fetch_say_to_fetch(tmp_path):
    root = _copy_with_addresses("http://127.0.0.1:9", tmp_path / "k8s")
    assert "Run fetch first" in _run_mirror(root, "images").stderr


def test_trial_store_starts_with_the_arguments_of_its_manifest(tmp_path, monkeypatch):
    (workload,) = [item for item in _list_own() if item["kind"] == "StatefulSet"]
    (container,) = workload["spec"]["template"]["spec"]["containers"]
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "trial-key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "trial-secret-of-some-length")
    names = ("s3.port", "master.port", "volume.port", "filer.port", "admin.port")
    ports = _find_free_ports(len(names), beside=GRPC_OFFSET)
    own = [f"-{name}={port}" for name, port in zip(names, ports, strict=True)]
    # The last of two equal options counts: this machine's folder, loopback and ports.
    command = [find_program(), *container["args"], f"-dir={tmp_path}", "-ip.bind=127.0.0.1", *own]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        endpoint = f"http://127.0.0.1:{ports[0]}"
        _wait_for(f"{endpoint}{container['readinessProbe']['httpGet']['path']}", server)
        _wait_for_bucket(Store(S3Settings(endpoint_url=endpoint, bucket="mint")))
    finally:
        server.kill()
        server.wait()


def _find_free_ports(num_ports: int, *, beside: int) -> list[int]:
    found: list[int] = []
    while len(found) < num_ports:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port = first.getsockname()[1]
            try:
                second.bind(("127.0.0.1", port + beside))
            except (OSError, OverflowError):
                continue
            found.append(port)
    return found


def _wait_for(url: str, server: "subprocess.Popen[bytes]") -> None:
    give_up = time.monotonic() + 60
    while time.monotonic() < give_up:
        assert server.poll() is None, "the store ended while it started"
        try:
            with urllib.request.urlopen(url, timeout=2) as answer:
                if answer.status == 200:
                    return
        except OSError:
            time.sleep(0.2)
    raise AssertionError(f"{url} did not answer")


def _wait_for_bucket(store: Store) -> None:
    """The bucket is made a moment after the server is ready."""
    give_up = time.monotonic() + 30
    while True:
        try:
            store.check_access()
            return
        except StoreError:
            if time.monotonic() > give_up:
                raise
            time.sleep(0.2)
