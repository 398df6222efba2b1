"""What NetworkPolicies mean, by the documentation's own examples, and the platform's flows under every option."""

from typing import Any

import pytest
from manifests import flows, sample
from manifests.network import Endpoint, find_passage
from manifests.objects import Manifest

HUB = {"hub": {"isAllowed": True}}
OPTIONS = [
    HUB,
    {"chat": {"isAllowed": True}},
    {"network": {"podIdentity": True}},
    {"network": {"clients": [{"namespace": "clinic", "podLabels": {"app": "portal"}}]}},
    {"network": {"s3": {"namespace": "seaweedfs", "podLabels": {"app": "seaweedfs"}, "ports": [8333]}}},
    {"network": {"dns": {"cacheAddresses": ["169.254.20.10"]}}},
    {"monitoring": {"enabled": False}},
    {"endpointTest": {"enabled": False}},
]


def merge(base: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    return base | {
        key: merge(base[key], value) if isinstance(value, dict) and isinstance(base.get(key), dict) else value
        for key, value in more.items()
    }


@pytest.mark.parametrize("option", OPTIONS, ids=str)
def test_flow_table_with_another_option_is_not_met_by_the_same_policies(option: dict[str, Any]) -> None:
    installation = sample.list_sample()
    assert flows.find_flow_faults(installation, sample.VALUES) == []
    assert flows.find_flow_faults(installation, merge(sample.VALUES, option))


def egress(*blocks: dict[str, Any]) -> Manifest:
    rule = {"to": [{"ipBlock": block} for block in blocks], "ports": [{"protocol": "TCP", "port": 443}]}
    chosen = {
        "matchExpressions": [{"key": "app.kubernetes.io/component", "operator": "In", "values": ["server", "step"]}]
    }
    chosen["matchExpressions"][0]["values"] += ["ray-head", "ray-worker"]
    spec = {"podSelector": chosen | {"matchLabels": {"app.kubernetes.io/part-of": "mint"}}}
    spec |= {"policyTypes": ["Egress"], "egress": [rule]}
    metadata = {"name": "to-hub", "namespace": "mint"}
    return {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": metadata, "spec": spec}


@pytest.mark.parametrize(
    ("exceptions", "reached"),
    [
        (["10.0.0.0/8", "169.254.0.0/16"], set()),
        (["169.254.0.0/16"], {"private", "dns", "stranger-here"}),
        (["10.0.0.0/8"], {"metadata", "pod-identity"}),
        (["10.0.0.0/8", "169.254.169.254/32"], {"pod-identity"}),
    ],
)
def test_hub_open_to_the_internet_reaches_what_is_not_taken_out(exceptions: list[str], reached: set[str]) -> None:
    installation = sample.list_sample()
    policy = egress({"cidr": "0.0.0.0/0", "except": exceptions})
    found = flows.find_flow_faults([*installation, policy], merge(sample.VALUES, HUB))
    targets = {finding.subject.partition(" -> ")[2] for finding in found}
    assert {finding.rule for finding in found} <= {"flow-more"}
    assert reached <= targets
    assert bool(reached) == bool(targets)


# The examples of kubernetes.io/docs/concepts/services-networking/network-policies, and what they say in words.
def policy_of(spec: dict[str, Any]) -> Manifest:
    return {"kind": "NetworkPolicy", "metadata": {"name": "p", "namespace": "default"}, "spec": spec}


DB = Endpoint("db", "default", {"role": "db"})
FRONTEND = Endpoint("frontend", "default", {"role": "frontend"})
OTHER = Endpoint("other", "default", {"role": "other"})
PROJECT = Endpoint("project", "away", {}, {"project": "myproject"})
DOCUMENTED = policy_of(
    {
        "podSelector": {"matchLabels": {"role": "db"}},
        "policyTypes": ["Ingress", "Egress"],
        "ingress": [
            {
                "from": [
                    {"ipBlock": {"cidr": "172.17.0.0/16", "except": ["172.17.1.0/24"]}},
                    {"namespaceSelector": {"matchLabels": {"project": "myproject"}}},
                    {"podSelector": {"matchLabels": {"role": "frontend"}}},
                ],
                "ports": [{"protocol": "TCP", "port": 6379}],
            }
        ],
        "egress": [{"to": [{"ipBlock": {"cidr": "10.0.0.0/24"}}], "ports": [{"protocol": "TCP", "port": 5978}]}],
    }
)


def outside(address: str) -> Endpoint:
    return Endpoint(address, address=address)


@pytest.mark.parametrize(
    ("source", "target", "port", "protocol", "passes"),
    [
        (FRONTEND, DB, 6379, "TCP", True),
        (PROJECT, DB, 6379, "TCP", True),
        (outside("172.17.0.9"), DB, 6379, "TCP", True),
        (outside("172.17.2.1"), DB, 6379, "TCP", True),
        (outside("172.17.1.9"), DB, 6379, "TCP", False),
        (outside("172.18.0.1"), DB, 6379, "TCP", False),
        (OTHER, DB, 6379, "TCP", False),
        (FRONTEND._replace(namespace="away"), DB, 6379, "TCP", False),
        (FRONTEND, DB, 6380, "TCP", False),
        (FRONTEND, DB, 6379, "UDP", False),
        (DB, outside("10.0.0.7"), 5978, "TCP", True),
        (DB, outside("10.0.1.7"), 5978, "TCP", False),
        (DB, outside("10.0.0.7"), 5979, "TCP", False),
        (DB, FRONTEND, 80, "TCP", False),
        (FRONTEND, OTHER, 80, "TCP", True),
    ],
)
def test_documented_policy_lets_through_what_its_documentation_says(
    source: Endpoint, target: Endpoint, port: int, protocol: str, passes: bool
) -> None:
    assert find_passage([DOCUMENTED], source, target).takes(port, protocol) is passes


@pytest.mark.parametrize(
    ("spec", "into", "out"),
    [
        ({"podSelector": {}, "policyTypes": ["Ingress"]}, False, True),
        ({"podSelector": {}, "ingress": [{}], "policyTypes": ["Ingress"]}, True, True),
        ({"podSelector": {}, "policyTypes": ["Egress"]}, True, False),
        ({"podSelector": {}, "egress": [{}], "policyTypes": ["Egress"]}, True, True),
        ({"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}, False, False),
        ({"podSelector": {}}, False, True),
        ({"podSelector": {}, "egress": [{"ports": [{"port": 1}]}]}, False, False),
        ({"podSelector": {"matchLabels": {"role": "none"}}, "policyTypes": ["Ingress", "Egress"]}, True, True),
    ],
)
def test_default_policy_closes_the_directions_that_it_names(spec: dict[str, Any], into: bool, out: bool) -> None:
    policies = [policy_of(spec)]
    assert find_passage(policies, PROJECT, DB).takes(80) is into
    assert find_passage(policies, DB, PROJECT).takes(80) is out


def test_port_range_and_named_port_take_their_ports_alone() -> None:
    ports = [{"protocol": "TCP", "port": 32000, "endPort": 32768}, {"protocol": "TCP", "port": "web"}]
    policies = [policy_of({"podSelector": {}, "ingress": [{"ports": ports}], "policyTypes": ["Ingress"]})]
    passage = find_passage(policies, FRONTEND, DB._replace(named_ports={"web": 8080}))
    assert [passage.takes(port) for port in (31999, 32000, 32768, 32769, 8080, 80)] == [
        False,
        True,
        True,
        False,
        True,
        False,
    ]


def test_selectors_of_pod_and_namespace_in_one_peer_must_both_hold() -> None:
    both = {
        "namespaceSelector": {"matchExpressions": [{"key": "project", "operator": "In", "values": ["myproject"]}]},
        "podSelector": {"matchLabels": {"role": "client"}},
    }
    apart = [{key: value} for key, value in both.items()]
    client = PROJECT._replace(labels={"role": "client"})
    for peers, expected in (([both], [True, False, False]), (apart, [True, True, True])):
        policies = [policy_of({"podSelector": {}, "ingress": [{"from": peers}], "policyTypes": ["Ingress"]})]
        ends = [client, PROJECT, Endpoint("local", "default", {"role": "client"})]
        assert [find_passage(policies, end, DB).takes(80) for end in ends] == expected


def test_policies_add_up_and_never_take_away() -> None:
    open_to = {"podSelector": {}, "ingress": [{"from": [{"podSelector": {}}]}], "policyTypes": ["Ingress"]}
    closed = {"podSelector": {}, "policyTypes": ["Ingress"]}
    assert find_passage([policy_of(closed), policy_of(open_to)], OTHER, DB).takes(80)
    assert not find_passage([policy_of(closed), policy_of(open_to)], PROJECT, DB).takes(80)
