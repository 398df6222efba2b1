"""Who may speak to whom in the platform's namespace, and the proof over all pairs of pods and addresses.

Goes in: rendered objects, and the values they were rendered from (for the addresses of the others). Comes out:
findings: a connection that passes and should not, or should and does not. The table in `list_flows` is the whole truth;
what it does not name must not pass, on any port tried. It does not know how policies are written.
"""

import functools
import ipaddress
import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from manifests.network import Endpoint, find_passage, selects
from manifests.objects import Finding, Manifest, namespace_of, select
from manifests.pods import Pod

SERVER, HEAD_API, POD_IDENTITY = 8080, 8265, 80
_OURS = ("server", "step", "teacher-step", "ray-head", "ray-worker", "ray-submitter", "endpoint-test")
_STORE_USERS = ("server", "step", "teacher-step", "ray-head", "ray-worker")
_OTHER_PORTS = (
    *(22, 53, 80, 443, 2379, 2746, 3306, 5432, 6379, 6443, 8000, 8080, 8081, 8265, 8333, 8443, 8887, 8888, 9000, 9001),
    *(9090, 9093, 10001, 10002, 10250, 11434, 19999, 20000, 30000, 44217, 52365, 65535),
)
"""Ports that nothing in the table names are tried, too: of Ray, of databases, of kubelets, and some of nobody."""


_DRIVER = {"pipelines.kubeflow.org/v2_component": "true"}
"""The label that Kubeflow gives to all pods of a run, its own included."""
_LINK_LOCAL = ("169.254.", "fd00:ec2:", "fe80:")


class Flow(NamedTuple):
    """A connection that is meant to be."""

    source: str
    target: str
    ports: Sequence[int] | None
    """None is every port."""
    protocols: Sequence[str] = ("TCP",)


def list_flows(values: dict[str, Any]) -> list[Flow]:
    """Every connection that is meant to be, by the names of `list_endpoints`."""
    network, flows = values["network"], []
    # Requests come in by the gateway alone, figures go out to Prometheus alone; the test is a pod of its own.
    if network["gateway"]["namespace"]:
        flows.append(Flow("gateway", "server", [SERVER]))
    if values["monitoring"]["enabled"]:
        flows.append(Flow("prometheus", "server", [SERVER]))
    if values["endpointTest"]["enabled"]:
        flows.append(Flow("endpoint-test", "server", [SERVER]))
    flows += [Flow(f"client-{index}", "server", [SERVER]) for index, _ in enumerate(network["clients"])]
    # What computes reads and writes the store, and the hub where that is allowed.
    for source in _STORE_USERS:
        flows.append(Flow(source, "s3", network["s3"]["ports"]))
        if values["hub"]["isAllowed"]:
            flows.append(Flow(source, "internet", network["hub"]["ports"]))
        if network["podIdentity"]:
            flows.append(Flow(source, "pod-identity", [POD_IDENTITY]))
    # Cases go to a chat model from teacher steps alone: not from their Ray jobs, not from other steps.
    if values["chat"]["isAllowed"]:
        flows.append(Flow("teacher-step", "chat", network["chat"]["ports"]))
    # Steps ask the API server for Ray jobs, and Kubeflow for their inputs; so do Kubeflow's own pods of a run.
    for source in ("step", "teacher-step", "kfp-driver"):
        flows.append(Flow(source, "api-server", network["apiServer"]["ports"]))
        flows += [
            Flow(source, f"kubeflow-{index}", service["ports"])
            for index, service in enumerate(network["kubeflow"]["services"])
        ]
    # Ray: jobs come in by the head's job API; nodes talk among themselves on ports that Ray picks.
    flows += [Flow(source, "ray-head", [HEAD_API]) for source in ("ray-submitter", "kuberay-operator")]
    nodes = ("ray-head", "ray-worker")
    flows += [Flow(source, target, None) for source in nodes for target in nodes]
    # Everybody in the namespace asks for names.
    for source in (*_OURS, *(f"half-{name}" for name in _OURS), "kfp-driver", "stranger-here"):
        flows.append(Flow(source, "dns", [network["dns"]["port"]], ("UDP", "TCP")))
        if network["dns"]["cacheAddresses"]:
            flows.append(Flow(source, "dns-cache", [network["dns"]["port"]], ("UDP", "TCP")))
    return flows


def _label(name: str) -> dict[str, str]:
    """Component and stage of a pod of ours. Ray's pods are a teacher's: what is a step's must not be theirs."""
    stage = {"step": "data", "server": "serving"}.get(name, "teacher")
    return {"app.kubernetes.io/component": name.removeprefix("teacher-"), "mint.platform/stage": stage}


def list_later_pods(namespace: str) -> list[Pod]:
    """The pods that no chart renders, as far as selectors see them: of runs, of Ray jobs, of Kubeflow."""
    ours = {"app.kubernetes.io/part-of": "mint"}
    labels = [ours | _label(name) for name in _OURS] + [dict(_DRIVER)]
    labels[0]["serving.kserve.io/inferenceservice"] = "later"
    return [Pod(f"Pod {namespace}/later-{index}", "", namespace, "", one, {}, {}) for index, one in enumerate(labels)]


def list_endpoints(values: dict[str, Any]) -> dict[str, Endpoint]:
    """All ends that are tried: our pods, those of others that we know, strangers, and addresses outside."""
    network, home = values["network"], values["namespace"]["name"]
    addresses = (f"10.244.{index // 250}.{index % 250 + 1}" for index in range(10_000))

    def pod(name: str, namespace: str, labels: dict[str, str] | None) -> Endpoint:
        return Endpoint(name, namespace, labels or {}, {}, next(addresses), {"http1": SERVER})

    ours = {"app.kubernetes.io/part-of": "mint"}
    ends = [pod(name, home, ours | _label(name)) for name in _OURS]
    ends += [pod("kfp-driver", home, _DRIVER)]
    ends += [pod("stranger-here", home, {"app": "shell"})]
    ends += [pod("server-of-others", "elsewhere", ours | _label("server"))]
    ends += [pod("prometheus", values["monitoring"]["prometheusNamespace"], network["prometheus"]["podLabels"])]
    ends += [pod("kuberay-operator", network["kuberay"]["namespace"], network["kuberay"]["podLabels"])]
    ends += [pod("dns", network["dns"]["namespace"], network["dns"]["podLabels"])]
    if network["gateway"]["namespace"]:
        ends += [pod("gateway", network["gateway"]["namespace"], network["gateway"]["podLabels"])]
    for index, client in enumerate(network["clients"]):
        ends += [pod(f"client-{index}", client["namespace"], client.get("podLabels"))]
    for index, service in enumerate(network["kubeflow"]["services"]):
        ends += [pod(f"kubeflow-{index}", network["kubeflow"]["namespace"], service["podLabels"])]
    outside = {"metadata": "169.254.169.254", "pod-identity": "169.254.170.23", "metadata-6": "fd00:ec2::254"}
    for name in ("s3", "chat") if values["chat"]["isAllowed"] else ("s3",):
        if network[name]["namespace"]:
            ends += [pod(name, network[name]["namespace"], network[name]["podLabels"])]
        else:
            outside[name] = _first(network[name]["cidrs"])
    # What has some of the labels, or the right ones in the wrong place, is a stranger all the same.
    ends += [pod(f"half-{name}", home, _label(name)) for name in _OURS]
    ends += [pod(f"copy-of-{end.name}", "strangers", dict(end.labels)) for end in ends if end.namespace != home]
    for namespace in {end.namespace for end in ends if end.namespace not in (None, home)} | {"strangers"}:
        ends += [pod(f"stranger-in-{namespace}", str(namespace), {"app": "shell"})]
    outside |= {
        "internet": "93.184.215.14",
        "private": "10.99.98.97",
        "api-server": _first(network["apiServer"]["cidrs"]),
    }
    if network["dns"]["cacheAddresses"]:
        outside["dns-cache"] = network["dns"]["cacheAddresses"][0]
    ends += [Endpoint(name, address=address) for name, address in outside.items()]
    return {end.name: end for end in ends}


def find_flow_faults(objects: Sequence[Manifest], values: dict[str, Any]) -> list[Finding]:
    """Every difference between the table and what the policies let through, over all pairs and ports.

    Where both ends are in the platform's namespace each of them must refuse by itself what is not meant: one policy
    too wide then opens nothing yet.
    """
    policies = list(select(objects, "NetworkPolicy"))
    return _check_default(policies, values["namespace"]["name"]) + _check_pairs(
        json.dumps(policies, sort_keys=True), json.dumps(values, sort_keys=True)
    )


def _check_default(policies: Sequence[Manifest], home: str) -> list[Finding]:
    for policy in policies:
        spec = policy["spec"]
        is_for_all = not spec.get("podSelector") and sorted(spec.get("policyTypes", [])) == ["Egress", "Ingress"]
        if namespace_of(policy) == home and is_for_all and not spec.get("ingress") and not spec.get("egress"):
            return []
    return [Finding("default-deny", f"Namespace -/{home}", "", "no policy refuses all traffic of all pods by default")]


@functools.cache
def _check_pairs(packed_policies: str, packed_values: str) -> list[Finding]:
    policies, values = json.loads(packed_policies), json.loads(packed_values)
    ends, meant = list_endpoints(values), list_flows(values)
    home, network = values["namespace"]["name"], values["network"]
    ports = sorted({*_OTHER_PORTS, *(port for flow in meant for port in flow.ports or ())})
    selected: dict[str, set[str]] = {}
    for policy in policies:
        names = {end.name for end in ends.values() if selects(policy, end)}
        selected.setdefault(policy["metadata"]["name"], set()).update(names)
    found = []
    for source in ends.values():
        for target in ends.values():
            if home not in (source.namespace, target.namespace):
                continue
            ruling = [
                policy for policy in policies if {source.name, target.name} & selected[policy["metadata"]["name"]]
            ]
            loose = find_passage(ruling, source, target, blocks_hold_pods=True)
            doors = (
                [loose._replace(out=None), loose._replace(into=None)]
                if source.namespace == target.namespace
                else [loose]
            )
            flows = [flow for flow in meant if (flow.source, flow.target) == (source.name, target.name)]
            if not flows and not any(door.takes_any() for door in doors):
                continue
            strict = find_passage(ruling, source, target)
            subject = f"{source.name} -> {target.name}"
            for protocol, port in _list_tries(ports):
                if any(flow.ports is None or (protocol in flow.protocols and port in flow.ports) for flow in flows):
                    rule, is_wrong = "flow-less", not strict.takes(port, protocol)
                else:
                    passes = any(door.takes(port, protocol) for door in doors)
                    rule = "flow-more"
                    is_wrong = passes and not _is_by_address(source, target, port, protocol, meant, network)
                if is_wrong:
                    words = "does not pass" if rule == "flow-less" else "passes, or one of the two ends lets it"
                    found.append(Finding(rule, subject, "", f"{protocol} {port} {words}"))
    return found


def _list_tries(ports: Sequence[int]) -> Iterator[tuple[str, int]]:
    yield from (("TCP", port) for port in ports)
    yield from (("UDP", port) for port in (53, 123, 443, SERVER))
    yield "SCTP", SERVER


def _is_by_address(
    source: Endpoint, target: Endpoint, port: int, protocol: str, meant: Sequence[Flow], network: dict[str, Any]
) -> bool:
    """Whether an address outside stands for a meant one too: the store and the hub may be anywhere on the internet."""
    if target.address is None or target.namespace is not None or target.address.startswith(_LINK_LOCAL):
        return False
    blocks = {"s3": network["s3"]["cidrs"], "api-server": network["apiServer"]["cidrs"]}
    for name, part in (("internet", network["hub"]), ("chat", network["chat"])):
        if not _is_within(target.address, part["exceptCidrs"]):
            blocks[name] = part["cidrs"]
    return any(
        flow.source == source.name
        and protocol in flow.protocols
        and port in (flow.ports or ())
        and _is_within(target.address, blocks.get(flow.target, ()))
        for flow in meant
    )


def _is_within(address: str, blocks: Sequence[str]) -> bool:
    return any(ipaddress.ip_address(address) in ipaddress.ip_network(block) for block in blocks)


def _first(blocks: Sequence[str]) -> str:
    """An address of the first block."""
    network = ipaddress.ip_network(blocks[0])
    return str(network[1] if network.num_addresses > 2 else network[0])
