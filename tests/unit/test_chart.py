"""The chart, rendered by a real helm: that it installs, refuses what cannot work, and says what `mint_lib` says."""

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from doc_commands import check_command, list_commands
from helm_tools import (
    CHART,
    CLUSTER_FACTS,
    DIGESTS,
    RELEASE,
    VALUES_FILES,
    find_tool,
    render_chart,
    run_helm,
)

from mint_lib.cluster import ClusterConfig
from mint_lib.inference_service import render_inference_service
from mint_lib.pods import label_pod
from mint_lib.records import Reference
from pipelines.cli import app

DIGEST = "sha256:" + "cd" * 32
REFERENCE = Reference(kind="model", name="quickstart", version="v000003", digest=DIGEST)
MODEL = {
    "name": "quickstart",
    "modality": "text",
    "reference": str(REFERENCE),
    "autoscaling": {"mode": "hpa", "min": 2, "max": 4},
}
VALUES = pytest.mark.parametrize("values_file", VALUES_FILES, ids=lambda path: path.stem)


def render_with(values: dict[str, Any], tmp_path: Path) -> list[dict[str, Any]]:
    """The chart with facts of an example cluster, except those that `values` give."""
    path = tmp_path / "values.json"
    path.write_text(json.dumps(values))
    sets = {key: value for key, value in (DIGESTS | CLUSTER_FACTS).items() if not is_given(values, key)}
    return render_chart((path,), sets, images=False)


def is_given(values: dict[str, Any], key: str) -> bool:
    for part in key.split("."):
        if not isinstance(values, dict) or part not in values:
            return False
        values = values[part]
    return True


def find(objects: list[dict[str, Any]], kind: str, name: str | None = None) -> list[dict[str, Any]]:
    return [item for item in objects if item["kind"] == kind and name in (None, item["metadata"]["name"])]


def flatten(values: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Leaves of the values with their paths; a list or an empty mapping is one."""
    if isinstance(values, dict) and values:
        for key, part in values.items():
            yield from flatten(part, (*path, key))
    else:
        yield path, values


@VALUES
def test_chart_passes_strict_lint(values_file: Path) -> None:
    facts = DIGESTS | (CLUSTER_FACTS if values_file.name == "values.yaml" else {})
    sets = [part for key, value in facts.items() for part in ("--set", f"{key}={value}")]
    done = run_helm("lint", "--strict", str(CHART), "--values", str(values_file), *sets)
    assert done.returncode == 0, done.stdout + done.stderr


@VALUES
def test_chart_renders_with_every_object_in_a_namespace_that_it_names(values_file: Path) -> None:
    objects = render_chart((values_file,))
    of_the_cluster = {"Namespace", "ClusterQueue", "ResourceFlavor", "WorkloadPriorityClass"}
    for item in objects:
        has_namespace = "namespace" in item["metadata"]
        assert has_namespace != (item["kind"] in of_the_cluster), item["metadata"]["name"]
        assert item["metadata"].get("namespace") in (None, "mint", "kubeflow")
    (namespace,) = find(objects, "Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


@VALUES
def test_chart_makes_no_secret_and_no_role_of_the_whole_cluster(values_file: Path) -> None:
    kinds = {item["kind"] for item in render_chart((values_file,))}
    assert not kinds & {"Secret", "ClusterRole", "ClusterRoleBinding"}
    assert "Role" in kinds


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"imagse": {}}, "imagse"),
        ({"serving": {"tokensecret": "a"}}, "tokensecret"),
        ({"network": {"hub": {"port": 443}}}, "port"),
        ({"models": [MODEL | {"replicas": 2}]}, "replicas"),
        ({"images": {"serve": "registry.example/mint-serve:latest"}}, "/images/serve"),
        ({"images": {"train": "registry.example/mint-train@sha256:abc"}}, "/images/train"),
        ({"s3": {"credentials": "inline"}}, "workloadIdentity"),
        ({"models": [MODEL | {"modality": "sound"}]}, "vision"),
        ({"models": [MODEL | {"autoscaling": {"mode": "keda", "min": -1, "max": 2}}]}, "minimum"),
        ({"models": [MODEL | {"autoscaling": {"mode": "vpa", "min": 1, "max": 2}}]}, "knative"),
        ({"models": [MODEL | {"reference": "model/quickstart"}]}, "reference"),
        ({"models": [MODEL | {"name": "a" * 53}]}, "/models/0/name"),
        ({"models": [{key: value for key, value in MODEL.items() if key != "reference"}]}, "reference"),
        ({"serving": {"resources": {"memoryGib": "8"}}}, "memoryGib"),
        ({"serving": {"drainSeconds": 1}}, "drainSeconds"),
        ({"network": {"apiServer": {"cidrs": ["10.0.0.1"]}}}, "/network/apiServer/cidrs"),
        ({"userId": 0}, "userId"),
        ({"deidentification": {"credentials": "workloadIdentity"}}, "externalSecret"),
        ({"deidentification": {"externalSecret": {"properties": {"KEY": "a"}}}}, "KEY"),
        ({"chat": {"externalSecret": {"properties": {"api-key": "a"}}}}, "api-key"),
        ({"network": {"chat": {"cidrs": ["chat.example.org"]}}}, "/network/chat/cidrs"),
        ({"quota": {"hard": {"pods": "many"}}}, "pods"),
        ({"namespace": {"name": "Mint"}}, "/namespace/name"),
        ({"namespace": {"podSecurityVersion": "1.32"}}, "podSecurityVersion"),
    ],
    ids=lambda part: json.dumps(part)[:60] if isinstance(part, dict) else None,
)
def test_chart_refuses_values_that_its_schema_does_not_allow(
    values: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        render_with(values, tmp_path)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"s3": {"endpointUrl": "http://localhost:8333"}}, "loopback"),
        ({"s3": {"endpointUrl": ""}}, "s3.endpointUrl is empty"),
        ({"models": [MODEL | {"autoscaling": {"mode": "hpa", "min": 5, "max": 4}}]}, "min 5 above"),
        ({"models": [MODEL | {"autoscaling": {"mode": "keda", "min": 0, "max": 4}}]}, "Only mode knative"),
        ({"kueue": {"create": True}}, "kueue.queue is empty"),
        (
            {
                "kueue": {
                    "create": True,
                    "queue": "mint",
                    "flavors": [{"name": "a", "quotas": {"cpu": "1"}}, {"name": "b", "quotas": {"memory": "1Gi"}}],
                }
            },
            "same resources",
        ),
        ({"network": {"s3": {"cidrs": []}}}, "may not reach the store"),
        ({"network": {"apiServer": {"cidrs": []}}}, "network.apiServer.cidrs is empty"),
        ({"network": {"s3": {"cidrs": ["169.254.169.254/32"]}}}, "metadata"),
        ({"network": {"s3": {"cidrs": ["169.254.0.0/16"]}}}, "metadata"),
        ({"network": {"s3": {"cidrs": ["fd00:ec2::254/128"]}}}, "metadata"),
        ({"s3": {"credentials": "externalSecret"}}, "externalSecret.store"),
        ({"deidentification": {"credentials": "externalSecret"}}, "mint-deidentification is to come from"),
        ({"chat": {"isAllowed": True}}, "may not reach the chat model"),
        ({"chat": {"isAllowed": True}, "network": {"chat": {"cidrs": ["169.254.169.254/32"]}}}, "metadata"),
        (
            {
                "chat": {
                    "isAllowed": True,
                    "credentials": "externalSecret",
                    "externalSecret": {"store": "vault", "remoteKey": "mint/chat"},
                },
                "network": {"chat": {"cidrs": ["203.0.113.40/32"]}},
            },
            "mint-chat is to come from an external store, and has no keys",
        ),
    ],
    ids=lambda part: json.dumps(part)[:60] if isinstance(part, dict) else None,
)
def test_chart_refuses_in_words_what_could_not_work(values: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        render_with(values, tmp_path)


@pytest.mark.parametrize("image", ["serve", "train"])
def test_chart_without_an_image_says_which_value_to_set(image: str) -> None:
    given = {key: value for key, value in (DIGESTS | CLUSTER_FACTS).items() if key != f"images.{image}"}
    with pytest.raises(ValueError, match=f"--set images.{image}="):
        render_chart((), given, images=False)


@pytest.mark.parametrize(
    ("cidr", "expected"),
    [
        ("0.0.0.0/0", ["169.254.0.0/16"]),
        ("128.0.0.0/1", ["169.254.0.0/16"]),
        ("168.0.0.0/6", ["169.254.0.0/16"]),
        ("169.0.0.0/8", ["169.254.0.0/16"]),
        ("169.254.0.0/15", ["169.254.0.0/16"]),
        ("0.0.0.0/1", None),
        ("169.252.0.0/15", None),
        ("169.253.0.0/16", None),
        ("169.255.1.0/24", None),
        ("10.0.0.0/8", None),
        ("203.0.113.7/32", None),
        ("::/0", ["fd00:ec2::/32", "fe80::/10"]),
        ("2001:db8::/32", None),
    ],
)
def test_network_block_around_the_metadata_service_leaves_it_out(
    cidr: str, expected: list[str] | None, tmp_path: Path
) -> None:
    objects = render_with({"network": {"s3": {"cidrs": [cidr]}}}, tmp_path)
    (policy,) = find(objects, "NetworkPolicy", "to-store")
    (peer,) = policy["spec"]["egress"][0]["to"]
    assert peer["ipBlock"] == {"cidr": cidr} | ({"except": expected} if expected else {})


def test_hub_is_out_of_reach_unless_it_is_allowed(tmp_path: Path) -> None:
    assert not find(render_with({}, tmp_path), "NetworkPolicy", "to-hub")
    (policy,) = find(render_with({"hub": {"isAllowed": True}}, tmp_path), "NetworkPolicy", "to-hub")
    (peer,) = policy["spec"]["egress"][0]["to"]
    assert {"10.0.0.0/8", "169.254.0.0/16"} <= set(peer["ipBlock"]["except"])


def test_chat_model_is_out_of_reach_unless_it_is_allowed_and_then_of_teacher_steps_alone(tmp_path: Path) -> None:
    network = {"chat": {"cidrs": ["203.0.113.40/32"], "ports": [8443]}}
    assert not find(render_with({"network": network}, tmp_path), "NetworkPolicy", "to-chat")
    objects = render_with({"network": network, "chat": {"isAllowed": True}}, tmp_path)
    (policy,) = find(objects, "NetworkPolicy", "to-chat")
    assert policy["spec"]["podSelector"] == {"matchLabels": label_pod("step", "teacher")}
    (rule,) = policy["spec"]["egress"]
    assert rule == {
        "to": [{"ipBlock": {"cidr": "203.0.113.40/32"}}],
        "ports": [{"protocol": "TCP", "port": 8443}],
    }
    anywhere = {"chat": {"cidrs": ["0.0.0.0/0"], "exceptCidrs": ["10.0.0.0/8"]}}
    objects = render_with({"network": anywhere, "chat": {"isAllowed": True}}, tmp_path)
    (policy,) = find(objects, "NetworkPolicy", "to-chat")
    assert policy["spec"]["egress"][0]["to"][0]["ipBlock"]["except"] == ["10.0.0.0/8", "169.254.0.0/16"]


def test_secrets_of_steps_are_fetched_where_steps_run_and_are_no_part_of_a_server(tmp_path: Path) -> None:
    source = {"store": "vault", "remoteKey": "mint/keys"}
    values = {
        "models": [MODEL],
        "pipelines": {"namespaces": ["kubeflow"]},
        "deidentification": {"credentials": "externalSecret", "externalSecret": source},
        "chat": {
            "isAllowed": True,
            "credentials": "externalSecret",
            "externalSecret": source | {"properties": {"CHAT_API_KEY": "a", "OTHER_API_KEY": "b"}},
        },
        "network": {"chat": {"namespace": "vllm"}},
    }
    objects = render_with(values, tmp_path)
    keys = {"mint-deidentification": {"MINT_DEIDENTIFICATION_KEY"}, "mint-chat": {"CHAT_API_KEY", "OTHER_API_KEY"}}
    for name, expected in keys.items():
        made = find(objects, "ExternalSecret", name)
        assert {item["metadata"]["namespace"] for item in made} == {"mint", "kubeflow"}
        assert all({part["secretKey"] for part in item["spec"]["data"]} == expected for item in made)
    others = [item for item in objects if item["kind"] not in ("ExternalSecret", "ConfigMap")]
    assert not any(name in json.dumps(others) for name in keys)


def merge_named(base: list[dict[str, Any]], over: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Kubernetes' strategic merge of a list by `name`; an entry that is in both takes all keys of the latter."""
    merged = {item["name"]: item for item in base}
    for item in over:
        merged[item["name"]] = merged.get(item["name"], {}) | item
    return list(merged.values())


def merge_as_kserve_does(objects: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """The pod's spec that KServe makes of a service and its runtime (MergeRuntimeContainers, MergePodSpec)."""
    (service,) = find(objects, "InferenceService", name)
    predictor = dict(service["spec"]["predictor"])
    model = predictor.pop("model")
    (runtime,) = find(objects, "ServingRuntime", model["runtime"])
    assert model["modelFormat"]["name"] in [item["name"] for item in runtime["spec"]["supportedModelFormats"]]
    (container,) = runtime["spec"]["containers"]
    over = {key: model[key] for key in model.keys() - {"modelFormat", "runtime", "protocolVersion"}}
    merged = container | over
    merged["args"] = container["args"] + model["args"]
    merged["env"] = merge_named(container["env"], model["env"])
    merged["securityContext"] = container["securityContext"] | over.get("securityContext", {})
    predictor["containers"] = [merged]
    predictor["volumes"] = merge_named(runtime["spec"]["volumes"], predictor.get("volumes", []))
    if "imagePullSecrets" in runtime["spec"]:
        predictor["imagePullSecrets"] = runtime["spec"]["imagePullSecrets"]
    return predictor


def parse_serve_command(arguments: list[str]) -> dict[str, Any]:
    """Options of `mint serve`, by the command itself."""
    assert arguments[0] == "serve"
    command = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
    params = dict(command.make_context("serve", arguments[1:]).params)
    return {key: str(value) for key, value in params.items()}


def by_name(items: list[dict[str, Any]], key: str = "name") -> dict[str, dict[str, Any]]:
    return {item[key]: item for item in items}


@pytest.mark.parametrize(
    ("values", "change"),
    [
        ({"models": [MODEL]}, {}),
        ({"models": [MODEL | {"name": "syndromes"}]}, {"name": "syndromes"}),
        ({"models": [MODEL | {"base": "base/smollm2"}]}, {"serving": {"base": "base/smollm2"}}),
        (
            {
                "models": [MODEL],
                "s3": {"caConfigMap": "mint-s3-ca", "credentials": "workloadIdentity", "prefix": "a/b"},
                "hub": {"isAllowed": True, "credentials": "secret"},
                "images": {"pullSecrets": ["mirror"]},
                "userId": None,
            },
            {},
        ),
        (
            {
                "models": [
                    MODEL
                    | {
                        "autoscaling": {"mode": "keda", "min": 3, "max": 7},
                        "resources": {"numCpus": 6, "memoryGib": 12, "scratchGib": 3, "cacheGib": 9},
                    }
                ],
                "serving": {"loadSeconds": 901, "drainSeconds": 12, "graceSeconds": 34},
            },
            {
                "serving": {
                    **{"autoscaler": "external", "min_replicas": 3, "max_replicas": 7},
                    **{"num_cpus": 6, "memory_gib": 12, "scratch_gib": 3, "cache_gib": 9},
                }
            },
        ),
    ],
    ids=["plain", "renamed", "base", "settings", "own-resources"],
)
def test_service_of_the_chart_makes_the_pod_that_the_library_renders(
    values: dict[str, Any], change: dict[str, Any], tmp_path: Path
) -> None:
    objects = render_with(values, tmp_path)
    cluster = load_cluster_of(objects)
    cluster = cluster.model_copy(update={"serving": cluster.serving.model_copy(update=change.get("serving", {}))})
    expected_service = render_inference_service(REFERENCE, cluster=cluster, name=change.get("name"))
    expected = dict(expected_service["spec"]["predictor"])
    actual = merge_as_kserve_does(objects, expected_service["metadata"]["name"])
    (container,), (expected_container,) = actual.pop("containers"), expected.pop("containers")

    assert parse_serve_command(container.pop("args")) == parse_serve_command(expected_container.pop("args"))
    assert by_name(container.pop("env")) == by_name(expected_container.pop("env"))
    assert by_name(container.pop("volumeMounts")) == by_name(expected_container.pop("volumeMounts"))
    assert by_name(actual.pop("volumes")) == by_name(expected.pop("volumes"))
    assert container.pop("imagePullPolicy") == "IfNotPresent"
    expected_container.pop("imagePullPolicy", None)
    assert container == expected_container
    assert actual == expected

    (service,) = find(objects, "InferenceService")
    assert service["metadata"]["annotations"] == expected_service["metadata"]["annotations"]
    assert expected_service["metadata"]["labels"].items() <= service["metadata"]["labels"].items()


def test_model_of_a_vision_student_can_be_declared_with_options_and_nodes(tmp_path: Path) -> None:
    nodes = {
        "nodeSelector": {"disk": "ssd"},
        "tolerations": [{"key": "a", "operator": "Exists", "effect": "NoExecute"}],
    }
    model = MODEL | nodes | {"modality": "vision", "set": {"engine.max_batch": 16, "load.abstain_below": 0.3}}
    pod = merge_as_kserve_does(render_with({"models": [model]}, tmp_path), "quickstart")
    options = parse_serve_command(pod["containers"][0]["args"])
    assert "engine.max_batch=16" in str(options)
    assert "load.abstain_below=0.3" in str(options)
    assert (pod["nodeSelector"], pod["tolerations"]) == (nodes["nodeSelector"], nodes["tolerations"])


@pytest.mark.parametrize(
    ("mode", "autoscaler", "replicas"),
    [("keda", "external", (2, 4)), ("hpa", "hpa", (2, 4)), ("none", "none", (2, 2))],
)
def test_model_tells_kserve_who_scales_it(
    mode: str, autoscaler: str, replicas: tuple[int, int], tmp_path: Path
) -> None:
    objects = render_with({"models": [MODEL | {"autoscaling": {"mode": mode, "min": 2, "max": 4}}]}, tmp_path)
    (service,) = find(objects, "InferenceService")
    annotations, predictor = service["metadata"]["annotations"], service["spec"]["predictor"]
    assert annotations["serving.kserve.io/deploymentMode"] == "Standard"
    assert annotations["serving.kserve.io/autoscalerClass"] == autoscaler
    assert (predictor["minReplicas"], predictor["maxReplicas"]) == replicas
    assert ("scaleMetric" in predictor) == (mode == "hpa")


def test_model_on_knative_may_rest_at_zero_and_keeps_its_safeguards(tmp_path: Path) -> None:
    objects = render_with({"models": [MODEL | {"autoscaling": {"mode": "knative", "min": 0, "max": 3}}]}, tmp_path)
    (service,) = find(objects, "InferenceService")
    assert service["metadata"]["annotations"]["serving.kserve.io/deploymentMode"] == "Knative"
    assert "serving.kserve.io/autoscalerClass" not in service["metadata"]["annotations"]
    pod = merge_as_kserve_does(objects, "quickstart")
    assert pod["minReplicas"] == 0
    # Knative refuses these fields of a pod.
    assert not pod.keys() & {"securityContext", "terminationGracePeriodSeconds", "topologySpreadConstraints"}
    security = pod["containers"][0]["securityContext"]
    assert (security["runAsNonRoot"], security["runAsUser"], security["readOnlyRootFilesystem"]) == (True, 10001, True)
    assert by_name(pod["volumes"])["tokens"]["secret"]["defaultMode"] == 0o444
    (policy,) = find(objects, "NetworkPolicy", "to-servers")
    assert "knative-serving" in json.dumps(policy)
    assert not find(objects, "PodDisruptionBudget")


def test_disruption_budget_is_there_where_a_replica_can_be_spared(tmp_path: Path) -> None:
    (budget,) = find(render_with({"models": [MODEL]}, tmp_path), "PodDisruptionBudget")
    assert budget["spec"]["selector"]["matchLabels"] == {"serving.kserve.io/inferenceservice": "quickstart"}
    # KServe deletes a budget that bears the name of its own.
    assert budget["metadata"]["name"] != "quickstart-predictor"
    single = MODEL | {"autoscaling": {"mode": "none", "min": 1, "max": 1}}
    assert not find(render_with({"models": [single]}, tmp_path), "PodDisruptionBudget")


def load_cluster_of(objects: list[dict[str, Any]]) -> ClusterConfig:
    (file,) = find(objects, "ConfigMap", "mint-cluster")
    return ClusterConfig.model_validate(yaml.safe_load(file["data"]["cluster.yaml"]))


@VALUES
def test_cluster_file_of_the_chart_is_one_that_the_command_reads(values_file: Path) -> None:
    objects = render_chart((values_file,))
    cluster = load_cluster_of(objects)
    accounts = {item["metadata"]["name"] for item in find(objects, "ServiceAccount")}
    assert {cluster.kubeflow.service_account, cluster.ray.service_account, cluster.serving.service_account} <= accounts
    assert cluster.images.serve == DIGESTS["images.serve"]
    assert cluster.images.train == DIGESTS["images.train"]
    queues = {item["metadata"]["name"] for item in find(objects, "LocalQueue")}
    assert ({cluster.ray.queue} if cluster.ray.queue else set()) == queues
    priorities = {item["metadata"]["name"] for item in find(objects, "WorkloadPriorityClass")}
    assert cluster.ray.workload_priority is None or cluster.ray.workload_priority in priorities


def test_cluster_file_says_what_the_values_say(tmp_path: Path) -> None:
    values = {
        "namespace": {"name": "clinic"},
        "userId": None,
        "s3": {"credentials": "workloadIdentity", "prefix": "team/a", "pathStyle": False, "caConfigMap": "ca"},
        "hub": {"isAllowed": True, "credentials": "secret", "secretName": "gate"},
        "deidentification": {"credentials": "secret", "secretName": "pseudonyms"},
        "chat": {"isAllowed": True, "credentials": "secret", "secretName": "providers"},
        "network": {"chat": {"cidrs": ["203.0.113.40/32"]}},
        "kubeflow": {"host": "https://kfp.example.org/pipeline", "namespace": "clinic"},
        "ray": {"podPriority": "urgent", "isEncrypted": True},
        "kueue": {"queue": "shared", "priority": "first"},
    }
    cluster = load_cluster_of(render_with(values, tmp_path))
    assert (cluster.namespace, cluster.user_id) == ("clinic", None)
    assert (cluster.s3_secret, cluster.s3_ca_config_map, cluster.hub_secret) == (None, "ca", "gate")
    assert (cluster.deidentification_secret, cluster.chat_secret) == ("pseudonyms", "providers")
    assert (cluster.s3.prefix, cluster.s3.path_style) == ("team/a", False)
    assert (cluster.kubeflow.host, cluster.kubeflow.namespace) == ("https://kfp.example.org/pipeline", "clinic")
    assert (cluster.ray.queue, cluster.ray.workload_priority) == ("shared", "first")
    assert (cluster.ray.pod_priority, cluster.ray.is_encrypted) == ("urgent", True)


def test_key_of_a_chat_model_that_is_not_allowed_is_not_in_the_cluster_file(tmp_path: Path) -> None:
    assert load_cluster_of(render_with({"chat": {"credentials": "secret"}}, tmp_path)).chat_secret is None


def test_defaults_of_the_chart_are_those_of_the_library() -> None:
    cluster = load_cluster_of(render_chart())
    named = ClusterConfig(namespace="mint", images=cluster.images, s3=cluster.s3)
    assert cluster == named


EVERYTHING: dict[str, Any] = {
    "models": [MODEL | {"autoscaling": {"mode": "keda", "min": 2, "max": 4}}],
    "s3": {"credentials": "externalSecret", "externalSecret": {"store": "vault", "remoteKey": "mint/s3"}},
    "hub": {"isAllowed": True},
    "kueue": {"create": True, "queue": "mint"},
    "network": {"podIdentity": True},
    "openshift": {"routes": True},
}


@pytest.mark.parametrize(
    ("values", "absent"),
    [
        ({"namespace": {"create": False}}, {"Namespace"}),
        ({"quota": {"enabled": False}}, {"ResourceQuota", "LimitRange"}),
        ({"network": {"enabled": False}}, {"NetworkPolicy"}),
        ({"kueue": {"create": False}}, {"ClusterQueue", "LocalQueue", "ResourceFlavor", "WorkloadPriorityClass"}),
        ({"s3": {"credentials": "secret"}}, {"ExternalSecret"}),
        ({"serving": {"disruptionBudget": False}}, {"PodDisruptionBudget"}),
        ({"openshift": {"routes": False}}, {"Route"}),
        ({"endpointTest": {"enabled": False}}, {"Pod"}),
        ({"models": []}, {"InferenceService", "PodDisruptionBudget", "Route", "ScaledObject"}),
        # A model that scales by our figures needs the rules.
        ({"monitoring": {"enabled": False}, "models": [MODEL]}, {"PodMonitor", "PrometheusRule", "ScaledObject"}),
    ],
    ids=lambda part: json.dumps(part) if isinstance(part, dict) else None,
)
def test_part_that_is_turned_off_leaves_none_of_its_objects(
    values: dict[str, Any], absent: set[str], tmp_path: Path
) -> None:
    def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
        both = {key: merge(base[key], over[key]) for key in base.keys() & over.keys() if isinstance(over[key], dict)}
        return base | over | both

    kinds_with = {item["kind"] for item in render_with(EVERYTHING, tmp_path)}
    kinds_without = {item["kind"] for item in render_with(merge(EVERYTHING, values), tmp_path)}
    assert absent <= kinds_with
    assert not absent & kinds_without
    assert kinds_with - absent == kinds_without


def test_service_accounts_that_exist_are_not_made_again(tmp_path: Path) -> None:
    objects = render_with({"serviceAccounts": {"ray": {"create": False, "name": "their-ray"}}}, tmp_path)
    assert "their-ray" not in {item["metadata"]["name"] for item in find(objects, "ServiceAccount")}
    assert load_cluster_of(objects).ray.service_account == "their-ray"


def test_steps_in_kubeflows_own_namespace_may_make_ray_jobs_in_ours(tmp_path: Path) -> None:
    objects = render_with({"pipelines": {"namespaces": ["kubeflow"]}}, tmp_path)
    (binding,) = find(objects, "RoleBinding", "mint-ray-jobs")
    assert binding["metadata"]["namespace"] == "mint"
    assert {item["namespace"] for item in binding["subjects"]} == {"mint", "kubeflow"}
    accounts = find(objects, "ServiceAccount", "mint-pipeline")
    assert {item["metadata"]["namespace"] for item in accounts} == {"mint", "kubeflow"}


def test_only_the_account_of_steps_is_given_a_token() -> None:
    mounts = {
        item["metadata"]["name"]: item["automountServiceAccountToken"]
        for item in find(render_chart(), "ServiceAccount")
    }
    assert {name for name, has_token in mounts.items() if has_token} == {"mint-pipeline"}
    assert len(mounts) == 4


def test_every_value_is_documented_and_no_comment_stands_without_one() -> None:
    documented: list[tuple[str, ...]] = []
    parents: list[tuple[int, str]] = []
    has_words = False
    for line in (CHART / "values.yaml").read_text().splitlines():
        if re.match(r"\s*# -- \S", line):
            assert not has_words, f"two comments follow each other: {line}"
            has_words = True
            continue
        match = re.match(r"( *)([A-Za-z][A-Za-z0-9]*):", line)
        if match is None:
            continue
        indent = len(match[1])
        parents = [item for item in parents if item[0] < indent]
        path = (*(name for _, name in parents), match[2])
        parents.append((indent, match[2]))
        if has_words:
            documented.append(path)
            has_words = False
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    undocumented = [
        ".".join(path) for path, _ in flatten(values) if not any(path[: len(words)] == words for words in documented)
    ]
    assert undocumented == []


TAKEN_WHOLE = {"podLabels", "annotations", "properties", "hard", "containerRequests", "containerLimits"}
"""Maps that templates hand on as they are, or go through key by key."""
BY_NAME = {"images.serve", "images.train", *(f"serviceAccounts.{name}" for name in ("ray", "serving", "endpointTest"))}
"""Values that a helper gets by a name that it is given."""


def find_unused_values(values: dict[str, Any], templates: list[str]) -> list[str]:
    """Values that no template reads: by their path, or by a part of it and then the keys below."""

    def reads(text: str, path: tuple[str, ...]) -> bool:
        for num_taken in range(1, len(path) + 1):
            taken = re.escape(".".join(path[:num_taken]))
            if re.search(rf"\.Values\.{taken}(?![A-Za-z0-9])", text):
                return all(re.search(rf"\.{key}(?![A-Za-z0-9])", text) for key in path[num_taken:])
        return False

    unused = set()
    for path, _ in flatten(values):
        end = next((at for at, key in enumerate(path) if key in TAKEN_WHOLE), len(path))
        name = ".".join(path[: end + 1])
        if not any(name.startswith(known) for known in BY_NAME):
            unused |= set() if any(reads(text, path[: end + 1]) for text in templates) else {name}
    return sorted(unused)


def test_every_value_is_used_by_a_template() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    templates = [path.read_text() for path in (CHART / "templates").rglob("*.*")]
    assert find_unused_values(values, templates) == []
    assert find_unused_values({"network": {"nothing": 1}, "nobody": {"podLabels": {"a": "b"}}}, templates) == [
        "network.nothing",
        "nobody.podLabels",
    ]


def read_notes(values_file: Path, given: dict[str, str] | None = None) -> str:
    facts = DIGESTS | (CLUSTER_FACTS if values_file.name == "values.yaml" else {}) | (given or {})
    sets = [part for key, value in facts.items() for part in ("--set", f"{key}={value}")]
    arguments = ("--namespace", "mint-system", "--dry-run=client", "--values", str(values_file))
    done = run_helm("install", RELEASE, str(CHART), *arguments, *sets)
    assert done.returncode == 0, done.stderr
    return done.stdout.split("NOTES:\n", 1)[1]


@VALUES
def test_notes_name_commands_that_exist(values_file: Path) -> None:
    if find_tool("kubectl") is None:
        pytest.skip("kubectl is not installed: run tests/get_helm_kubectl.py .tools/bin")
    commands = list_commands(read_notes(values_file))
    assert {words[0] for words in commands} >= {"mint", "kubectl", "helm"}
    for words in commands:
        check_command(words)


def test_notes_tell_to_make_the_secrets_of_steps_in_every_namespace_of_steps() -> None:
    allowed = {"chat.isAllowed": "true", "chat.credentials": "secret", "network.chat.namespace": "vllm"}
    given = allowed | {"deidentification.credentials": "secret"}
    keys = {"mint-deidentification": "MINT_DEIDENTIFICATION_KEY", "mint-chat": "CHAT_API_KEY"}
    wanted = {
        ("kubectl", "--namespace", namespace, "create", "secret", "generic", name, f"--from-literal={key}=${key}")
        for namespace in ("mint", "kubeflow")
        for name, key in keys.items()
    }
    assert wanted <= {tuple(words) for words in list_commands(read_notes(CHART / "values-dev.yaml", given))}
    assert not wanted & {tuple(words) for words in list_commands(read_notes(CHART / "values-dev.yaml"))}


@pytest.mark.parametrize(
    "command",
    [
        ["kubectl", "--namespace", "mint", "create", "secret", "generic", "a", "--from-litteral=a=b"],
        ["helm", "tset", "mint"],
        ["mint", "submit", "recipe.yaml", "--clutser", "a"],
    ],
    ids=" ".join,
)
def test_command_check_finds_a_misspelt_command(command: list[str]) -> None:
    if find_tool("kubectl") is None:
        pytest.skip("kubectl is not installed: run tests/get_helm_kubectl.py .tools/bin")
    with pytest.raises((AssertionError, subprocess.CalledProcessError)):
        check_command(command)


class FakeServer(BaseHTTPRequestHandler):
    """Answers as a model server would, by the state of `server`."""

    def do_GET(self) -> None:
        self.send_response(200 if self.server.is_ready else 503)  # type: ignore[attr-defined]
        self.end_headers()

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        is_known = self.headers["Authorization"] == "Bearer right"
        is_asked_well = self.path == "/v1/models/quickstart:predict" and body["instances"][0]["text"]
        self.send_response(200 if is_known and is_asked_well else 401)
        self.end_headers()
        self.wfile.write(json.dumps({"predictions": [{"labels": self.server.labels}]}).encode())  # type: ignore[attr-defined]

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing to the terminal."""


@pytest.mark.parametrize(
    ("is_ready", "labels", "token", "expected"),
    [
        (True, [{"id": "OMIM:1"}], "right", 0),
        (True, [{"id": "OMIM:1"}], "", 0),
        (True, [{"id": "OMIM:1"}], "wrong", 1),
        (True, [], "right", 1),
        (False, [{"id": "OMIM:1"}], "right", 1),
    ],
    ids=["answers", "ready-without-token", "wrong-token", "no-labels", "not-ready"],
)
def test_endpoint_test_tells_a_model_that_answers_from_one_that_does_not(
    is_ready: bool, labels: list[Any], token: str, expected: int
) -> None:
    (pod,) = find(render_chart((CHART / "values-dev.yaml",)), "Pod")
    (container,) = pod["spec"]["containers"]
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeServer)
    server.is_ready, server.labels = is_ready, labels  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        environment = os.environ | {
            "MINT_TEST_MODELS": json.dumps({"quickstart": f"http://127.0.0.1:{server.server_port}"}),
            "MINT_TEST_SECONDS": "3" if is_ready else "0.5",
            "MINT_TEST_TOKEN": token,
            "NO_PROXY": "127.0.0.1",
        }
        command = [sys.executable, *container["command"][1:], *container["args"]]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    finally:
        server.shutdown()
        server.server_close()
    assert done.returncode == expected, done.stdout + done.stderr
    assert "quickstart" in done.stdout
    assert "right" not in done.stdout


def test_endpoint_test_asks_each_model_where_kserve_serves_it(tmp_path: Path) -> None:
    models = [MODEL, MODEL | {"name": "other"}]
    objects = render_with({"models": models, "endpointTest": {"port": 8080}}, tmp_path)
    (pod,) = find(objects, "Pod")
    environment = by_name(pod["spec"]["containers"][0]["env"])
    assert json.loads(environment["MINT_TEST_MODELS"]["value"]) == {
        "quickstart": "http://quickstart-predictor.mint.svc:8080",
        "other": "http://other-predictor.mint.svc:8080",
    }
    assert pod["metadata"]["annotations"]["helm.sh/hook"] == "test"
