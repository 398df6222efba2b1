"""A fleet of model servers under load, and who changes its size: a queueing model in simulated time.

Goes in: arrival times, how quick one replica is (recorded from a real server), and a policy. Comes out: the replica
curve, every request's wait, what Prometheus would have scraped, and what the autoscaling rules made of it.

A replica works on up to 8 requests at once, each the slower the more there are; 64 wait, one more is refused. A pod is
scraped every 15 s, the rules are computed at once after it, and Kubernetes acts 10 s later, every 15 s.
"""

import collections
import dataclasses
import heapq
import itertools
import json
import math
import pathlib
import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from benchmarks.scaling import (
    SCRAPE_SECONDS,
    Autoscaler,
    Policy,
    Reading,
    Rules,
    Sample,
    propose_for_cpu,
    propose_for_requests,
)

RECORDED = pathlib.Path(__file__).with_name("recorded_replica.json")
ACT_DELAY_SECONDS = 10
HOUSEKEEPING_SECONDS = 5
MAX_BATCH, MAX_QUEUED = 8, 64
"""The engine's own defaults."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pods:
    """How long a pod takes to come and to go, in seconds."""

    created_to_scraped: float = 20.0
    """Scheduling, image and start of the process."""
    created_to_ready: float = 90.0
    drain: float = 10.0


class Curve(NamedTuple):
    """One replica, which computes with all its CPUs whenever it has a request."""

    requests_per_second: tuple[float, ...]
    """At index n with n requests at work, n from 0 to MAX_BATCH."""


class Outcome(NamedTuple):
    """What came of one run."""

    policy: Policy
    times: list[float]
    """Of every scrape."""
    replicas: list[int]
    ready: list[int]
    arrivals: list[tuple[float, float]]
    """Time and wait of each accepted request, in seconds."""
    refused: list[float]
    num_killed_loading: int
    replica_hours: float
    readings: list[Reading]
    scrapes: dict[str, list[tuple[float, Sample | None]]]
    """By pod. The list ends where the pod is gone."""

    def find_wait(self, quantile: float) -> float:
        """Seconds that this share of the requests waited at most; a refused one waited for ever."""
        waits = sorted([wait for _, wait in self.arrivals] + [math.inf] * len(self.refused))
        return waits[min(len(waits) - 1, int(quantile * len(waits)))]


def load_curve(path: pathlib.Path = RECORDED) -> Curve:
    """The recorded replica, straight lines between its levels.

    Throughput is taken from the CPU time of a request: what else ran on the recording machine changes the wall clock
    much and CPU time little.
    """
    recorded = json.loads(path.read_text())
    levels = [
        (level["num_clients"], recorded["num_cores"] / level["cpu_seconds_per_request"]) for level in recorded["levels"]
    ]

    def interpolate(count: int) -> float:
        for (left, left_rate), (right, right_rate) in itertools.pairwise(levels):
            if left <= count <= right:
                return float(left_rate + (count - left) / (right - left) * (right_rate - left_rate))
        raise ValueError(f"{path.name} holds no level of {count} clients")

    return Curve((0.0, *(interpolate(count) for count in range(1, MAX_BATCH + 1))))


def draw_arrivals(rates: Sequence[tuple[float, float]], *, seed: int) -> list[float]:
    """Poisson arrivals, in seconds; `rates` are (time, requests per second) with straight lines between them."""
    rng, highest, now, arrivals = random.Random(seed), max(rate for _, rate in rates), 0.0, []
    legs = itertools.pairwise(rates)
    left, right = next(legs)
    while True:
        now += rng.expovariate(highest)
        while now > right[0]:
            try:
                left, right = next(legs)
            except StopIteration:
                return arrivals
        share = (now - left[0]) / (right[0] - left[0])
        if rng.random() * highest < left[1] + share * (right[1] - left[1]):
            arrivals.append(now)


class Replica:
    """One pod: requests at work share it, the others wait in order."""

    def __init__(self, name: str, created: float, ready_at: float, scraped_at: float, curve: Curve):
        self.name, self.created, self.ready_at, self.scraped_at, self._curve = (
            name,
            created,
            ready_at,
            scraped_at,
            curve,
        )
        self.ends_at: float | None = None
        """When it may go at the earliest, once it drains."""
        self.wait_sum, self.wait_count, self.busy_seconds = 0.0, 0, 0.0
        self._now, self._done = created, 0.0
        self._running: list[float] = []
        self.queue: collections.deque[tuple[float, float]] = collections.deque()
        self.started: list[tuple[float, float]] = []
        """Arrival and wait of requests whose work has begun, since somebody looked."""

    @property
    def num_running(self) -> int:
        return len(self._running)

    def is_ready(self, now: float) -> bool:
        return self.ready_at <= now and self.ends_at is None

    def advance(self, now: float) -> None:
        """Work until `now`. `_done` is the work that each running request has got, since the pod began."""
        while self._running:
            count = len(self._running)
            speed = self._curve.requests_per_second[count] / count
            end = self._now + (self._running[0] - self._done) / speed
            until = min(end, now)
            self._done += (until - self._now) * speed
            self.busy_seconds += until - self._now
            self._now = until
            if end > now:
                return
            heapq.heappop(self._running)
            if self.queue:
                arrived, work = self.queue.popleft()
                self._start(arrived, work)
        self._now = now

    def accept(self, now: float, work: float) -> bool:
        """Take a request of `work` mean requests, or refuse it."""
        self.advance(now)
        if len(self._running) < MAX_BATCH:
            self._start(now, work)
        elif len(self.queue) < MAX_QUEUED:
            self.queue.append((now, work))
        else:
            return False
        return True

    def _start(self, arrived: float, work: float) -> None:
        wait = self._now - arrived
        self.wait_sum += wait
        self.wait_count += 1
        self.started.append((arrived, wait))
        heapq.heappush(self._running, self._done + work)


def simulate(
    arrivals: Sequence[float],
    policy: Policy,
    *,
    curve: Curve,
    seconds: float,
    pods: Pods = Pods(),
    outages: Sequence[tuple[float, float]] = (),
    evictions: Sequence[float] = (),
    seed: int = 0,
) -> Outcome:
    """One run; scrapes fail during `outages`, and at `evictions` a ready pod dies and is replaced."""
    rng, names = random.Random(seed), iter(range(10**9))
    rules, autoscaler = Rules(policy), Autoscaler(policy)
    outcome = Outcome(policy, [], [], [], [], [], 0, 0.0, [], {})
    replicas: list[Replica] = []
    current, num_killed, replica_seconds = policy.min_replicas, 0, 0.0
    busy_before: dict[str, float] = {}

    def create(now: float, *, is_old: bool = False) -> None:
        early = 0.0 if is_old else 1.0
        replicas.append(
            Replica(
                f"pod-{next(names)}",
                now,
                now + early * pods.created_to_ready,
                now + early * pods.created_to_scraped,
                curve,
            )
        )

    def stop(replica: Replica, now: float) -> int:
        """Returns 1 where it had begun to load."""
        replica.ends_at = now + pods.drain
        if replica.ready_at > now:
            replicas.remove(replica)
        return int(replica.scraped_at < now < replica.ready_at)

    for _ in range(current):
        create(0.0, is_old=True)
    remaining, dies = iter(arrivals), list(evictions)
    arrival = next(remaining, math.inf)
    for now in _count_up(seconds):
        serving = [replica for replica in replicas if replica.is_ready(now - HOUSEKEEPING_SECONDS)]
        while arrival < now:
            if not serving or not rng.choice(serving).accept(arrival, rng.expovariate(1.0)):
                outcome.refused.append(arrival)
            arrival = next(remaining, math.inf)
        for replica in replicas:
            replica.advance(now)
            outcome.arrivals.extend(replica.started)
            replica.started.clear()
        replicas[:] = [pod for pod in replicas if pod.ends_at is None or pod.ends_at > now or pod.num_running]
        replica_seconds += HOUSEKEEPING_SECONDS * len(replicas)
        if dies and dies[0] <= now:
            dies.pop(0)
            replicas.remove(next(replica for replica in replicas if replica.is_ready(now)))
            create(now)
        if now % SCRAPE_SECONDS == 0:
            is_out = any(begin <= now < end for begin, end in outages)
            scrapes = {pod.name: None if is_out else _scrape(pod, now) for pod in replicas if pod.scraped_at <= now}
            for name, sample in scrapes.items():
                outcome.scrapes.setdefault(name, []).append((now, sample))
            outcome.readings.append(rules.evaluate(now, scrapes))
            outcome.times.append(now)
            outcome.replicas.append(current)
            outcome.ready.append(sum(replica.is_ready(now) for replica in replicas))
        if now % SCRAPE_SECONDS == ACT_DELAY_SECONDS and policy.kind != "fixed":
            alive = [replica for replica in replicas if replica.ends_at is None]
            if policy.kind == "requests":
                proposals = propose_for_requests(outcome.readings[-1], current)
            else:
                ready = [replica for replica in alive if replica.is_ready(now)]
                shares = [(pod.busy_seconds - busy_before.get(pod.name, 0.0)) / SCRAPE_SECONDS for pod in ready]
                busy_before = {pod.name: pod.busy_seconds for pod in ready}
                proposals = propose_for_cpu(shares, len(alive) - len(ready), policy.cpu_target, current)
            current = autoscaler.decide(now, current, proposals)
            for _ in range(current - len(alive)):
                create(now)
            # The ReplicaSet removes pods that are not ready first, then those that have been ready for the shortest
            # time (Kubernetes, ReplicaSet, "Scaling a ReplicaSet").
            alive.sort(key=lambda replica: (replica.is_ready(now), -replica.ready_at))
            num_killed += sum(stop(replica, now) for replica in alive[: max(0, len(alive) - current)])
    return outcome._replace(num_killed_loading=num_killed, replica_hours=replica_seconds / 3600)


def _count_up(seconds: float) -> Iterator[int]:
    return iter(range(0, int(seconds) + 1, HOUSEKEEPING_SECONDS))


def _scrape(replica: Replica, now: float) -> Sample:
    return Sample(
        replica.num_running,
        len(replica.queue),
        int(replica.is_ready(now)),
        round(replica.wait_sum, 6),
        replica.wait_count,
    )
