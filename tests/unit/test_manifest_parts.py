"""The parts that checks on rendered objects are made of: quantities, selectors, pods, schemas, secrets."""

import copy
from fractions import Fraction
from typing import Any

import crd_schema
import helm_tools
import pytest
import yaml
from manifests import access, everything, leaks, pods, safeguards, sample, schemas
from manifests.breaks import Break, apply
from manifests.objects import matches_selector
from manifests.pod_security import find_restricted_violations
from manifests.quantities import parse_quantity


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        ({}, True),
        ({"matchLabels": {"a": "1"}}, True),
        ({"matchLabels": {"a": "1", "b": "2"}}, False),
        ({"matchExpressions": [{"key": "a", "operator": "In", "values": ["1", "2"]}]}, True),
        ({"matchExpressions": [{"key": "a", "operator": "NotIn", "values": ["1"]}]}, False),
        ({"matchExpressions": [{"key": "b", "operator": "NotIn", "values": ["1"]}]}, True),
        ({"matchExpressions": [{"key": "a", "operator": "Exists"}]}, True),
        ({"matchExpressions": [{"key": "a", "operator": "DoesNotExist"}]}, False),
        ({"matchLabels": {"a": "1"}, "matchExpressions": [{"key": "b", "operator": "Exists"}]}, False),
    ],
)
def test_selector_takes_the_labels_that_kubernetes_would(selector: dict[str, Any], expected: bool) -> None:
    assert matches_selector(selector, {"a": "1"}) is expected


@pytest.mark.parametrize(
    ("text", "number"),
    [
        *(
            ("500m", Fraction(1, 2)),
            ("2", 2),
            (2, 2),
            ("1.5Gi", 1610612736),
            ("1k", 1000),
            ("1Ki", 1024),
            ("1e3", 1000),
        ),
        *(("1E", 10**18), ("1Ei", 2**60), ("2E2", 200), ("100n", Fraction(1, 10**7)), (".5", Fraction(1, 2))),
    ],
)
def test_quantity_is_the_number_that_kubernetes_reads(text: str | int, number: Fraction | int) -> None:
    assert parse_quantity(text) == number


@pytest.mark.parametrize("text", ["", "1 Gi", "1gb", "Gi", "1KiB", "0x1"])
def test_quantity_that_kubernetes_refuses_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="quantity"):
        parse_quantity(text)


def test_pod_of_a_service_is_its_runtime_with_the_service_over_it() -> None:
    installation = sample.list_sample()
    broken = copy.deepcopy(installation)
    service = next(one for one in broken if one["kind"] == "InferenceService")
    runtime = next(one for one in broken if one["kind"] == "ServingRuntime")
    runtime["spec"]["containers"][0]["args"] = ["serve", "--name={{.Name}}"]
    runtime["spec"]["tolerations"] = [{"key": "gpu", "operator": "Exists"}]
    model = service["spec"]["predictor"]["model"]
    model |= {"env": [{"name": "HOME", "value": "/var/cache/mint"}], "resources": {"limits": {"cpu": "9"}}}
    service["spec"]["predictor"]["volumes"] = [{"name": "cache", "emptyDir": {"sizeLimit": "9Gi"}}]
    (pod,) = [pod for pod in pods.list_pods(broken) if pod.subject.startswith("InferenceService")]
    (container,) = pod.spec["containers"]
    assert container["args"] == ["serve", "--name=syndromes", "model/syndromes@champion"]
    assert {entry["name"]: entry.get("value") for entry in container["env"]}["HOME"] == "/var/cache/mint"
    assert container["resources"]["limits"] == {"cpu": "9", "memory": "2Gi", "ephemeral-storage": "4Gi"}
    assert [volume["emptyDir"]["sizeLimit"] for volume in pod.spec["volumes"]] == ["1Gi", "9Gi"]
    assert pod.spec["tolerations"] == [{"key": "gpu", "operator": "Exists"}]
    assert pod.component == "server"
    assert pod.labels["serving.kserve.io/inferenceservice"] == "syndromes"


@pytest.mark.parametrize("kind", ["Deployment", "StatefulSet", "DaemonSet", "ReplicaSet", "Job", "CronJob"])
def test_pod_of_every_core_kind_is_looked_into(kind: str) -> None:
    template: dict[str, Any] = {"spec": {"template": {"spec": {"containers": [{"name": "x"}], "hostPID": True}}}}
    spec = template["spec"] if kind != "CronJob" else {"jobTemplate": template}
    manifest = {"apiVersion": "v1", "kind": kind, "metadata": {"name": "x", "namespace": "mint"}, "spec": spec}
    (pod,) = pods.list_pods([manifest])
    assert "host-namespaces" in {finding.rule for finding in find_restricted_violations(pod)}
    assert pods.find_unread_pods([manifest]) == []


def test_pod_with_a_number_where_the_platform_gives_one_is_a_fault() -> None:
    installation = sample.list_sample()
    rules = {
        finding.rule for finding in everything.find_object_faults(installation, minors=(), platform_gives_users=True)
    }
    assert rules == {"user-number"}


def test_rule_of_a_crd_in_cel_refuses_what_its_schema_takes() -> None:
    installation = sample.list_sample()
    pytest.importorskip("cel")
    if not crd_schema.CRD_FOLDER.is_dir():
        pytest.skip(f"no CRD schemas in {crd_schema.CRD_FOLDER}")
    resources = [{"name": "cpu", "nominalQuota": "8", "borrowingLimit": "1"}]
    path = ("spec", "resourceGroups", 0, "flavors", 0, "resources")
    queue = next(
        one
        for one in apply(Break("ClusterQueue/mint", path, resources, ""), installation)
        if one["kind"] == "ClusterQueue"
    )
    assert crd_schema.find_schema_errors(queue) == []
    assert [finding.rule for finding in schemas.find_schema_faults([queue])] == ["schema-rule"]


@pytest.mark.parametrize("minor", schemas.MINORS)
def test_core_schema_of_every_minor_refuses_a_field_that_it_does_not_know(minor: str) -> None:
    manifest = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "x"}, "dara": {}}
    assert [finding.rule for finding in schemas.find_schema_faults([manifest], minors=[minor])] == ["schema"]


def test_minors_checked_begin_where_the_chart_begins() -> None:
    chart = yaml.safe_load((helm_tools.CHART / "Chart.yaml").read_text())
    assert chart["kubeVersion"] == f">={schemas.MINORS[0]}.0-0"


def test_right_of_a_binding_holds_where_the_binding_is() -> None:
    allowed = access.load_allowed("mint", pipeline_namespaces=["kubeflow"])
    where = {(one.subject, one.namespace) for one in allowed if one.resource == "rayjobs"}
    assert where == {("ServiceAccount mint/mint-pipeline", "mint"), ("ServiceAccount kubeflow/mint-pipeline", "mint")}
    reports = {(one.subject, one.namespace) for one in allowed if one.resource == "workflowtaskresults"}
    assert reports == {(f"ServiceAccount {place}/mint-pipeline", place) for place in ("mint", "kubeflow")}


@pytest.mark.parametrize(
    "text",
    [
        *("AKIA" + "ABCDEFGH" * 2, "hf_" + "a" * 30, "ghp_" + "b" * 36, "eyJ" + "a" * 20 + "." + "b" * 20 + ".c"),
        *("Authorization: Bearer " + "a1b2" * 8, "postgres://mint:pw@db", "x\n-----BEGIN PRIVATE " + "KEY-----"),
    ],
)
def test_text_that_looks_like_a_secret_is_found_wherever_it_stands(text: str) -> None:
    for value in ({"data": {"key": text}}, {"args": ["a", f"--x={text}"]}, {"annotations": {"note": text}}):
        assert {finding.rule for finding in leaks.find_leaks(value, subject="x")} == {"secret-by-value"}


def test_names_of_files_and_references_are_no_secrets() -> None:
    entries = [
        {"name": "TOKENS_PASSWORD_FILE", "value": "/var/run/secrets/mint/tokens.json"},
        {"name": "USE_CREDENTIALS", "value": "true"},
        {"name": "AWS_SECRET_ACCESS_KEY", "valueFrom": {"secretKeyRef": {"name": "mint-s3", "key": "k"}}},
        {"name": "MINT_S3_ENDPOINT_URL", "value": "https://s3.example.org:8333/x@y"},
    ]
    assert leaks.find_leaks({"env": entries}, subject="x") == []


@pytest.mark.parametrize(
    ("hard", "is_small"),
    [
        ({"requests.cpu": "13"}, False),
        ({"requests.cpu": "12"}, True),
        ({"limits.memory": "10Gi", "pods": "0"}, False),
        ({"limits.memory": "9Gi"}, True),
        ({"limits.ephemeral-storage": "1Gi"}, True),
    ],
)
def test_quota_below_the_largest_number_of_servers_and_the_queues_is_small(
    hard: dict[str, str], is_small: bool
) -> None:
    quota = {"kind": "ResourceQuota", "metadata": {"name": "q", "namespace": "mint"}, "spec": {"hard": hard}}
    rules = [finding.rule for finding in safeguards.find_quota_faults([*sample.list_sample(), quota])]
    assert rules == ["quota-small"] * is_small
