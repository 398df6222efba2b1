"""Who decides on the number of replicas: our rules under KEDA, or Kubernetes by CPU.

Goes in: what Prometheus scraped, or the CPU use of pods. Comes out: the next number of replicas. `Rules` computes
helm/files/serving-autoscaling.yaml as Prometheus does, which a test proves with promtool. `Autoscaler` follows the
documentation of the Horizontal Pod Autoscaler: tolerance, stabilisation, policies, and no step down while a figure is
missing.
"""

import collections
import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

SCRAPE_SECONDS = 15
WINDOW_SECONDS, LONG_WINDOW_SECONDS = 50, 290
"""Of the rules."""
UP_SECONDS = 30 * 60
"""So long a job is known to be a model server's."""
TOLERANCE = 0.1
"""Of the Horizontal Pod Autoscaler, by default."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
    """Who decides on the number of replicas. Values are the chart's defaults."""

    kind: Literal["requests", "cpu", "fixed"]
    min_replicas: int
    max_replicas: int
    requests_per_replica: float = 3.0
    queue_wait_seconds: float = 1.0
    up_pods: int = 4
    up_period_seconds: int = 60
    down_stabilisation_seconds: int = 300
    down_period_seconds: int = 120
    cpu_target: float = 0.7


class Sample(NamedTuple):
    """One scrape of one pod; None in place of it: the scrape failed."""

    running: int
    queued: int
    ready: int
    wait_sum: float
    wait_count: int


class Reading(NamedTuple):
    """What the rules say at one time; None: nothing."""

    time: float
    wanted: float | None
    hold: float | None


class Rules:
    """helm/files/serving-autoscaling.yaml over scrapes, as Prometheus computes it."""

    def __init__(self, policy: Policy):
        self._policy = policy
        self._waits: dict[str, collections.deque[tuple[float, float, float]]] = {}
        self._sums: collections.deque[tuple[float, int, int]] = collections.deque()
        """Time, requests in the servers, ready replicas."""
        self._counts: collections.deque[tuple[float, int]] = collections.deque()
        self._seen = -math.inf

    def evaluate(self, now: float, scrapes: dict[str, Sample | None]) -> Reading:
        """What the rules record at `now`, after these scrapes of all pods that are targets."""
        good = {name: sample for name, sample in scrapes.items() if sample is not None}
        for name, sample in good.items():
            self._waits.setdefault(name, collections.deque()).append((now, sample.wait_sum, sample.wait_count))
        num_requests = sum(sample.running + sample.queued for sample in good.values())
        if good:
            self._sums.append((now, num_requests, sum(sample.ready for sample in good.values())))
            self._counts.append((now, len(good)))
            self._seen = now
        _forget(self._counts, now - WINDOW_SECONDS)
        _forget(self._sums, now - LONG_WINDOW_SECONDS)
        for series in self._waits.values():
            _forget(series, now - WINDOW_SECONDS)
        num_ready = sum(sample.ready for sample in good.values()) if good else None
        num_unready = sum(sample.ready == 0 for sample in good.values())
        if now - self._seen <= UP_SECONDS:
            num_unready += sum(sample is None for sample in scrapes.values())
        has_lost = bool(good) and len(good) < max(count for _, count in self._counts)
        hold = None if not good and not num_unready else float(num_unready > 0 or has_lost)
        return Reading(now, self._count_wanted(now, num_ready), hold)

    def _count_wanted(self, now: float, num_ready: int | None) -> float | None:
        recent = [count for at, count, _ in self._sums if at > now - WINDOW_SECONDS]
        if not recent:
            return None
        target = self._policy.requests_per_replica
        for_requests = math.ceil(math.fsum(recent) / len(recent) / target)
        requests, ready = (math.fsum(point[column] for point in self._sums) / len(self._sums) for column in (1, 2))
        busy = ready * requests / (ready + requests) if ready + requests > 0 else 0.0
        for_work = math.ceil(busy * ((1 + target) / target))
        sums, counts = (
            sum(find_rate([(point[0], point[column]) for point in series], now) for series in self._waits.values())
            for column in (1, 2)
        )
        pressure = sums / counts / self._policy.queue_wait_seconds if counts > 0 else 0.0
        for_wait = math.ceil(num_ready * min(pressure, 2)) if num_ready is not None and pressure > 1 else 0
        return float(max(for_requests, for_work, for_wait))


def _forget(series: "collections.deque[Any]", until: float) -> None:
    while series and series[0][0] <= until:
        series.popleft()


def find_rate(points: Sequence[tuple[float, float]], now: float) -> float:
    """Prometheus' rate() of a counter that never falls (extrapolatedRate in promql/functions.go)."""
    if len(points) < 2:
        return 0.0
    (first, low), (last, high) = points[0], points[-1]
    sampled, to_start, to_end = last - first, first - (now - WINDOW_SECONDS), now - last
    if high > low:
        to_start = min(to_start, sampled * low / (high - low))
    mean_gap = sampled / (len(points) - 1)
    covered = sampled + sum(gap if gap < 1.1 * mean_gap else mean_gap / 2 for gap in (to_start, to_end))
    return (high - low) * covered / sampled / WINDOW_SECONDS


class Autoscaler:
    """The Horizontal Pod Autoscaler: from proposals to a number, with stabilisation and policies."""

    def __init__(self, policy: Policy):
        self._policy = policy
        self._proposed: list[tuple[float, int]] = []
        self._changes: list[tuple[float, int]] = []

    def decide(self, now: float, current: int, proposals: Sequence[int | None]) -> int:
        """The next number of replicas; None among the proposals is a figure that could not be had."""
        known = [proposal for proposal in proposals if proposal is not None]
        # "If any of these metrics cannot be converted into a desired replica count and a scale down is suggested by
        # the metrics which can be fetched, scaling is skipped" (kubernetes.io, Horizontal Pod Autoscaling).
        if not known or (len(known) < len(proposals) and max(known) < current):
            return current
        wanted, policy = max(known), self._policy
        is_default = policy.kind == "cpu"  # KServe's own HPA keeps Kubernetes' default behaviour
        stabilisation = 300 if is_default else policy.down_stabilisation_seconds
        self._proposed = [entry for entry in self._proposed if entry[0] > now - stabilisation] + [(now, wanted)]
        wanted = max(wanted, min(current, max(count for _, count in self._proposed)))
        if wanted > current:
            period = 15 if is_default else policy.up_period_seconds
            start = current - self._sum_changes(now - period, 1)
            limit = max(2 * start, start + 4) if is_default else start + policy.up_pods
            wanted = max(current, min(wanted, limit))
        elif wanted < current and not is_default:
            start = current + self._sum_changes(now - policy.down_period_seconds, -1)
            wanted = min(current, max(wanted, start - 1))
        wanted = min(max(wanted, policy.min_replicas), policy.max_replicas)
        if wanted != current:
            self._changes.append((now, wanted - current))
        return wanted

    def _sum_changes(self, since: float, sign: int) -> int:
        return sum(sign * change for time, change in self._changes if time > since and sign * change > 0)


def propose_for_requests(reading: Reading, current: int) -> list[int | None]:
    """Of both triggers of the ScaledObject: wanted as AverageValue, hold as Value."""
    by_wanted: int | None = None
    if reading.wanted is not None:
        is_near = abs(reading.wanted / current - 1) <= TOLERANCE
        by_wanted = current if is_near else math.ceil(reading.wanted)
    # A ratio of 1 is within the tolerance: the number that there is. A ratio of 0 asks for none.
    by_hold = None if reading.hold is None else (current if reading.hold else 0)
    return [by_wanted, by_hold]


def propose_for_cpu(shares: Sequence[float], num_unready: int, target: float, current: int) -> list[int | None]:
    """Of CPU utilisation: pods that are not ready count as idle where more are asked for, and not at all otherwise."""
    if not shares:
        return [None]
    ratio = sum(shares) / len(shares) / target
    if abs(ratio - 1) <= TOLERANCE:
        return [current]
    if ratio > 1 and num_unready:
        count = len(shares) + num_unready
        cautious = sum(shares) / count / target
        return [max(current, math.ceil(cautious * count)) if cautious > 1 + TOLERANCE else current]
    return [math.ceil(ratio * len(shares))]
