"""The documents that lead through a cluster, word by word: every command exists, and every object that one names is one
that the chart renders, that we define below k8s/, or that a third party is known to make.
"""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from doc_commands import check_command, list_commands
from helm_tools import DIGESTS, find_tool, render_chart, run_helm

from mint_lib.cluster import ClusterConfig

ROOT = Path(__file__).parents[2]
DOCUMENTS = {path: (ROOT / path).read_text() for path in ("README.md", "k8s/README.md", "helm/README.md")}
DEV = ROOT / "helm" / "values-dev.yaml"
MADE_BY_OTHERS = {
    # KServe makes a Deployment and a Service called NAME-predictor.
    "deployment/quickstart-predictor",
    # Releases that k8s/ pins.
    *("deployment/cert-manager-webhook", "deployment/kuberay-operator", "deployment/kueue-controller-manager"),
    *("deployment/keda-operator", "deployment/kserve-controller-manager", "deployment/prometheus-operator"),
    *("deployment/ml-pipeline", "service/ml-pipeline", "configmap/kfp-launcher"),
    *("crd/inferenceservices.serving.kserve.io", "crd/workflows.argoproj.io"),
}
KINDS = {"svc": "service", "cm": "configmap", "deploy": "deployment"}
NAMING = ("get", "wait", "logs", "port-forward", "patch", "rollout", "describe")
needs_tools = pytest.mark.skipif(
    find_tool("helm") is None or find_tool("kubectl") is None,
    reason="kubectl or helm is not installed: run tests/get_helm_kubectl.py .tools/bin",
)


def drop_options(words: list[str]) -> list[str]:
    """The words that are neither options nor their values."""
    flags_alone = {"--server-side", "--create-namespace", "--wait", "--all"}
    kept, skip = [], False
    for word in words:
        if skip:
            skip = False
        elif word.startswith("-"):
            skip = "=" not in word and word not in flags_alone
        else:
            kept.append(word)
    return kept


def list_named_objects(words: list[str]) -> list[str]:
    """`kind/name` of the objects that a kubectl command asks about."""
    verb, *rest = drop_options(words[1:])
    if verb not in NAMING:
        return []
    rest = rest[1:] if verb == "rollout" else rest
    if verb == "logs":
        return [f"pod/{name}" for name in rest[:1]]
    named = [word for word in rest if "/" in word]
    if not named and len(rest) >= 2 and not rest[1].isdigit():
        named = [f"{rest[0]}/{rest[1]}"]
    return [f"{KINDS.get(kind, kind)}/{name}" for kind, _, name in (word.lower().partition("/") for word in named)]


def list_rendered() -> set[str]:
    objects = render_chart((DEV,))
    for path in (ROOT / "k8s").rglob("*.yaml"):
        if path.name != "kustomization.yaml" and "vendor" not in path.parts:
            objects += [item for item in yaml.safe_load_all(path.read_text()) if item and "kind" in item]
    return {f"{item['kind'].lower()}/{item['metadata']['name']}" for item in objects}


@needs_tools
@pytest.mark.parametrize("document", DOCUMENTS)
def test_document_names_commands_that_exist(document: str) -> None:
    commands = list_commands(DOCUMENTS[document])
    assert len(commands) >= 5
    for words in commands:
        check_command(words)


@needs_tools
@pytest.mark.parametrize("document", DOCUMENTS)
def test_document_names_objects_that_exist(document: str) -> None:
    known = list_rendered() | MADE_BY_OTHERS
    named = [
        name
        for words in list_commands(DOCUMENTS[document])
        if words[0] == "kubectl"
        for name in list_named_objects(words)
    ]
    assert named
    assert set(named) - known == set()


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("kubectl --namespace mint get configmap mint-cluster --output x", ["configmap/mint-cluster"]),
        ("kubectl -n mint wait --for=condition=Ready inferenceservice/a --timeout=5m", ["inferenceservice/a"]),
        ("kubectl -n a wait --for=condition=Available prometheus/b alertmanager/c", ["prometheus/b", "alertmanager/c"]),
        ("kubectl -n kubeflow port-forward svc/ml-pipeline 8888", ["service/ml-pipeline"]),
        ("kubectl --namespace mint logs mint-endpoint-test", ["pod/mint-endpoint-test"]),
        ("kubectl -n seaweedfs rollout status statefulset/seaweedfs --timeout=5m", ["statefulset/seaweedfs"]),
        ("kubectl get endpointslices --namespace default --selector a=b", []),
        ("kubectl apply --server-side -k k8s/40-keda", []),
    ],
)
def test_named_objects_are_found_in_commands_as_they_are_written(command: str, expected: list[str]) -> None:
    assert list_named_objects(command.split()) == expected


@needs_tools
@pytest.mark.parametrize("document", ["README.md", "helm/README.md"])
def test_helm_commands_of_the_document_render(document: str, tmp_path: Path) -> None:
    own = tmp_path / "my-values.yaml"
    digests: dict[str, Any] = {}
    for key, value in DIGESTS.items():
        section, _, name = key.partition(".")
        digests.setdefault(section, {})[name] = value
    own.write_text(yaml.safe_dump(digests | {"network": {"apiServer": {"cidrs": ["192.0.2.10/32"]}}}))
    num_rendered = 0
    for words in list_commands(DOCUMENTS[document]):
        if words[:1] != ["helm"] or words[1] not in ("upgrade", "install", "template"):
            continue
        arguments = [word for word in words[2:] if word not in ("--install", "--create-namespace")]
        arguments = [str(own) if word == "my-values.yaml" else word for word in arguments]
        done = run_helm("template", *(str(ROOT / word) if (ROOT / word).exists() else word for word in arguments))
        assert done.returncode == 0, done.stderr
        num_rendered += 1
    assert num_rendered


@needs_tools
def test_chart_readme_makes_every_secret_that_pods_of_the_trial_name() -> None:
    text = yaml.safe_dump_all(render_chart((DEV,)))
    named = set(re.findall(r"secretKeyRef:\s+key: \S+\s+name: (\S+)", text)) | set(
        re.findall(r"secretName: (\S+)", text)
    )
    made = {
        words[words.index("generic") + 1]
        for words in list_commands(DOCUMENTS["helm/README.md"])
        if words[0] == "kubectl" and "generic" in words
    }
    assert named
    assert named <= made


def test_cluster_file_of_the_readme_is_one() -> None:
    example = re.search(r"holds at least:\n\n((?:    .*\n)+)", DOCUMENTS["README.md"])
    assert example is not None
    values = yaml.safe_load(re.sub(r"sha256:\.\.\.", "sha256:" + "ab" * 32, example[1]))
    assert ClusterConfig.model_validate(values).namespace == "mint"


@needs_tools
def test_store_of_the_third_parties_is_one_that_the_chart_takes(tmp_path: Path) -> None:
    lines = re.findall(r"^    ((?:s3|network): \{.*\})$", DOCUMENTS["k8s/README.md"], flags=re.MULTILINE)
    assert len(lines) == 2
    own = tmp_path / "values.yaml"
    own.write_text("\n".join(lines))
    assert render_chart((DEV, own))
