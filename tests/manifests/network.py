"""What NetworkPolicies let through, by their documented meaning.

Goes in: NetworkPolicy objects and two endpoints. Comes out: which ports are let through. Source:
kubernetes.io/docs/concepts/services-networking/network-policies and the API reference of networking.k8s.io/v1. It
knows the standard only: no policy of a network plug-in, no kubelet (which reaches the pods of its node always).
"""

import ipaddress
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from manifests.objects import Manifest, matches_selector, namespace_of, select

_NONE: Mapping[str, Any] = MappingProxyType({})


class Endpoint(NamedTuple):
    """One end of a connection: a pod, or an address outside the cluster."""

    name: str
    namespace: str | None = None
    """None is an address outside."""
    labels: Mapping[str, str] = _NONE
    namespace_labels: Mapping[str, str] = _NONE
    address: str | None = None
    """The address; for a pod it counts only where the network plug-in compares pods with address blocks."""
    named_ports: Mapping[str, int] = _NONE


Rules = list[list[dict[str, Any]]] | None
"""Port lists of the rules that hold, an empty one being all ports; None where nothing is forbidden."""


class Passage(NamedTuple):
    """What policies say of one end speaking to another, for all ports at once."""

    target: Endpoint
    out: Rules
    into: Rules

    def takes(self, port: int, protocol: str = "TCP") -> bool:
        """Whether a connection to `port` of the target is allowed at both ends."""
        return all(
            rules is None or any(_is_among(ports, self.target, port, protocol) for ports in rules)
            for rules in (self.out, self.into)
        )

    def takes_any(self) -> bool:
        """Whether there is a port at all that both ends may allow."""
        return self.out != [] and self.into != []


def find_passage(
    objects: Sequence[Manifest], source: Endpoint, target: Endpoint, *, blocks_hold_pods: bool = False
) -> Passage:
    """What the policies say of `source` opening connections to `target`.

    Args:
        objects: All but NetworkPolicies are passed over.
        source: Who opens the connection.
        target: Who is spoken to.
        blocks_hold_pods: Whether an address block also takes in the pods whose addresses lie in it. The standard
            leaves it open, so a proof that nothing passes says True, and a proof that something passes says False.
    """
    policies = list(select(objects, "NetworkPolicy"))
    out = _list_rules(policies, "Egress", source, target, blocks_hold_pods)
    return Passage(target, out, _list_rules(policies, "Ingress", target, source, blocks_hold_pods))


def _list_rules(
    policies: Sequence[Manifest], direction: str, own: Endpoint, other: Endpoint, blocks_hold_pods: bool
) -> Rules:
    """Ports of every rule for `other`. No policy of this direction allows all; several add up."""
    mine = [policy for policy in policies if selects(policy, own) and direction in _list_directions(policy["spec"])]
    if not mine:
        return None
    key, peers = ("egress", "to") if direction == "Egress" else ("ingress", "from")
    return [
        rule.get("ports") or []
        for policy in mine
        for rule in policy["spec"].get(key) or []
        if not rule.get(peers)
        or any(_is_peer(peer, other, namespace_of(policy), blocks_hold_pods) for peer in rule[peers])
    ]


def selects(policy: Manifest, endpoint: Endpoint) -> bool:
    """Whether a policy is about this end at all."""
    if endpoint.namespace is None or endpoint.namespace != namespace_of(policy):
        return False
    return matches_selector(policy["spec"].get("podSelector") or {}, endpoint.labels)


def _list_directions(spec: dict[str, Any]) -> Sequence[str]:
    """`policyTypes`, or its default: always ingress, and egress where rules for it are given."""
    return spec.get("policyTypes") or (["Ingress", "Egress"] if spec.get("egress") else ["Ingress"])


def _is_peer(peer: dict[str, Any], other: Endpoint, namespace: str, blocks_hold_pods: bool) -> bool:
    if "ipBlock" in peer:
        if other.address is None or (other.namespace is not None and not blocks_hold_pods):
            return False
        return _is_in_block(peer["ipBlock"], other.address)
    if other.namespace is None:
        return False
    if "namespaceSelector" in peer:
        labels = {"kubernetes.io/metadata.name": other.namespace, **other.namespace_labels}
        if not matches_selector(peer["namespaceSelector"] or {}, labels):
            return False
    elif other.namespace != namespace:
        return False
    return matches_selector(peer.get("podSelector") or {}, other.labels)


def _is_in_block(block: dict[str, Any], address: str) -> bool:
    ip = ipaddress.ip_address(address)
    return ip in ipaddress.ip_network(block["cidr"]) and not any(
        ip in ipaddress.ip_network(part) for part in block.get("except", [])
    )


def _is_among(ports: list[dict[str, Any]], target: Endpoint, port: int, protocol: str) -> bool:
    return not ports or any(_is_port(one, target, port, protocol) for one in ports)


def _is_port(rule: dict[str, Any], target: Endpoint, port: int, protocol: str) -> bool:
    if rule.get("protocol", "TCP") != protocol:
        return False
    first = rule.get("port")
    if first is None:
        return True
    if isinstance(first, str):  # a port of the pod that is spoken to, by its name
        return target.named_ports.get(first) == port
    return first <= port <= rule.get("endPort", first)
