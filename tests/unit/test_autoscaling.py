"""The autoscaling rules: the simulation computes them as Prometheus does, and what they do to a fleet of servers."""

import itertools
import math
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from benchmarks.fleet import Outcome, draw_arrivals, load_curve, simulate
from benchmarks.scaling import (
    SCRAPE_SECONDS,
    Autoscaler,
    Policy,
    Reading,
    Sample,
    propose_for_cpu,
    propose_for_requests,
)
from crd_schema import CRD_FOLDER, find_schema_errors
from helm_tools import CHART, VALUES_FILES, render_chart

RULES = CHART / "files" / "serving-autoscaling.yaml"
DEFAULTS = yaml.safe_load((CHART / "values.yaml").read_text())
SERVICE = 'job="mint/m",namespace="mint",service="m"'
POLICY = Policy(kind="requests", min_replicas=2, max_replicas=10)
CURVE = load_curve()
CAPACITY = CURVE.requests_per_second[8]
LENGTH = 6600.0
KEDA_MODEL = {
    "models[0].name": "m",
    "models[0].modality": "text",
    "models[0].reference": "model/m@champion",
    "models[0].autoscaling.mode": "keda",
    "models[0].autoscaling.min": "2",
    "models[0].autoscaling.max": "10",
}
needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")


def run_burst(policy: Policy = POLICY, **options: Any) -> Outcome:
    """Little load, a burst of twenty minutes, little load again until it is nearly two hours."""
    low, high = 0.4 * CAPACITY, 4.5 * CAPACITY
    rates = [(0.0, low), (900.0, low), (901.0, high), (2100.0, high), (2101.0, low), (LENGTH, low)]
    return simulate(draw_arrivals(rates, seed=3), policy, curve=CURVE, seconds=LENGTH, **options)


def make_rules_test(outcome: Outcome, rules: Path) -> dict[str, Any]:
    """A case for `promtool test rules`: what was scraped goes in, what the simulation computed must come out."""
    times = [reading.time for reading in outcome.readings]
    series = [
        {"series": f"mint_serving:setting_{name}{{{SERVICE}}}", "values": f"{value}x{len(times)}"}
        for name, value in {
            "requests_per_replica": POLICY.requests_per_replica,
            "queue_wait_seconds": POLICY.queue_wait_seconds,
            "max_replicas": POLICY.max_replicas,
        }.items()
    ]
    columns = {
        "mint_serving_running_requests": lambda sample: sample.running,
        "mint_serving_queue_depth": lambda sample: sample.queued,
        "mint_serving_ready": lambda sample: sample.ready,
        "mint_serving_queue_wait_seconds_sum": lambda sample: sample.wait_sum,
        "mint_serving_queue_wait_seconds_count": lambda sample: sample.wait_count,
    }
    for pod, scrapes in outcome.scrapes.items():
        labels = f'{SERVICE},pod="{pod}",instance="{pod}"'
        before = [f"_x{int(scrapes[0][0] / SCRAPE_SECONDS)}"] if scrapes[0][0] else []
        for name, read in columns.items():
            values = ["stale" if sample is None else format(read(sample), "f") for _, sample in scrapes]
            series.append({"series": f"{name}{{{labels}}}", "values": " ".join([*before, *values, "stale"])})
        up = [str(int(sample is not None)) for _, sample in scrapes]
        series.append({"series": f"up{{{labels}}}", "values": " ".join([*before, *up, "stale"])})
    checks = [
        {
            "expr": f"mint_serving:{name}",
            "eval_time": f"{int(reading.time)}s",
            "exp_samples": [] if value is None else [{"labels": f"mint_serving:{name}{{{SERVICE}}}", "value": value}],
        }
        for reading in outcome.readings
        for name, value in (("wanted_replicas", reading.wanted), ("hold", reading.hold))
    ]
    case = {"interval": f"{SCRAPE_SECONDS}s", "input_series": series, "promql_expr_test": checks}
    return {"rule_files": [str(rules)], "evaluation_interval": f"{SCRAPE_SECONDS}s", "tests": [case]}


def ask_promtool(outcome: Outcome, folder: Path, rules: Path = RULES) -> subprocess.CompletedProcess[str]:
    file = folder / "test.yaml"
    file.write_text(yaml.safe_dump(make_rules_test(outcome, rules)))
    return subprocess.run(["promtool", "test", "rules", file], capture_output=True, text=True)


@pytest.fixture(scope="module")
def eventful() -> Outcome:
    """A burst during which a pod is lost, and the metrics too, twice."""
    return run_burst(outages=((1200.0, 1500.0), (3000.0, 5100.0)), evictions=(1600.0, 2700.0))


@needs_promtool
def test_simulation_computes_the_rules_as_promtool_does(eventful: Outcome, tmp_path: Path) -> None:
    # Each kind of answer occurs, so that none of them is compared with nothing.
    assert {reading.wanted is None for reading in eventful.readings} == {True, False}
    assert {reading.hold for reading in eventful.readings} == {None, 0.0, 1.0}
    assert len({reading.wanted for reading in eventful.readings}) > 5
    done = ask_promtool(eventful, tmp_path)
    assert done.returncode == 0, (done.stdout + done.stderr)[:3000]


@needs_promtool
@pytest.mark.parametrize(
    ("part", "other"),
    [
        ("[50s])\n          / on", "[80s])\n          / on"),
        ("> 1, 2)", "> 1, 3)"),
        ("((1 + mint_serving", "((2 + mint_serving"),
        ("or up == 0", "or up == 2"),
        ("replicas:count[50s]", "replicas:count[20s]"),
    ],
)
def test_simulation_differs_from_rules_with_one_part_changed(
    eventful: Outcome, tmp_path: Path, part: str, other: str
) -> None:
    text = RULES.read_text()
    assert text.count(part) == 1
    changed = tmp_path / "rules.yaml"
    changed.write_text(text.replace(part, other))
    assert ask_promtool(eventful, tmp_path, changed).returncode != 0


def test_policy_of_the_simulation_holds_the_chart_defaults() -> None:
    values = DEFAULTS["autoscaling"]
    assert values["requestsPerReplica"] == POLICY.requests_per_replica
    assert values["queueWaitSeconds"] == POLICY.queue_wait_seconds
    assert values["scaleUpPods"] == POLICY.up_pods
    assert values["scaleUpPeriodSeconds"] == POLICY.up_period_seconds
    assert values["scaleDownStabilisationSeconds"] == POLICY.down_stabilisation_seconds
    assert values["scaleDownPeriodSeconds"] == POLICY.down_period_seconds
    assert DEFAULTS["monitoring"]["scrapeInterval"] == f"{SCRAPE_SECONDS}s"


def test_fleet_grows_with_a_burst_and_returns_to_its_floor() -> None:
    outcome = run_burst()
    assert max(outcome.replicas) >= 6
    assert min(outcome.replicas) == POLICY.min_replicas
    assert outcome.replicas[-1] == POLICY.min_replicas
    first_more = next(at for at, count in zip(outcome.times, outcome.replicas, strict=True) if count > 2)
    assert first_more <= 901 + 3 * SCRAPE_SECONDS


def test_fleet_under_a_burst_waits_less_than_its_floor_and_costs_less_than_its_peak() -> None:
    scaled = run_burst()
    floor = run_burst(Policy(kind="fixed", min_replicas=2, max_replicas=2))
    peak = run_burst(Policy(kind="fixed", min_replicas=10, max_replicas=10))
    assert len(scaled.refused) < 0.2 * len(floor.refused)
    assert scaled.replica_hours < 0.7 * peak.replica_hours
    # Of those who come once the new pods are there, 95 % wait no longer than with all ten replicas all the time.
    late = [wait for arrived, wait in scaled.arrivals if arrived > 901 + 180]
    assert sorted(late)[int(0.95 * len(late))] <= peak.find_wait(0.95) + 0.1


@pytest.mark.parametrize("evicted_at", [2200.0 + 75 * step for step in range(20)])
def test_fleet_that_shrinks_never_removes_a_pod_that_loads(evicted_at: float) -> None:
    assert run_burst(evictions=(evicted_at,)).num_killed_loading == 0


def test_fleet_without_the_hold_removes_pods_that_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "benchmarks.fleet.propose_for_requests", lambda reading, current: propose_for_requests(reading, current)[:1]
    )
    removed = [run_burst(evictions=(2200.0 + 75 * step,)).num_killed_loading for step in range(20)]
    assert sum(removed) > 0


def test_fleet_whose_metrics_are_missing_keeps_its_replicas() -> None:
    begin, end = 2400.0, 4800.0
    outcome = run_burst(outages=((begin, end),))
    during = {
        count for at, count in zip(outcome.times, outcome.replicas, strict=True) if begin + SCRAPE_SECONDS < at <= end
    }
    assert len(during) == 1
    assert during.pop() > POLICY.min_replicas
    assert outcome.replicas[-1] < max(outcome.replicas)


@pytest.mark.parametrize(
    ("wanted", "hold", "current", "next_count"),
    [
        (3.0, 0.0, 3, 3),
        (5.0, 0.0, 3, 5),
        (5.0, 1.0, 3, 5),  # more may come while one loads
        (2.0, 0.0, 3, 2),
        (2.0, 1.0, 3, 3),  # a pod loads
        (2.0, None, 3, 3),  # a figure is missing
        (None, 0.0, 3, 3),
        (None, None, 3, 3),
        (5.0, None, 3, 5),  # more is allowed then
        (0.0, 0.0, 3, 2),  # the floor
        (50.0, 0.0, 8, 10),  # the ceiling
    ],
)
def test_autoscaler_takes_the_larger_answer_and_shrinks_only_when_both_are_known(
    wanted: float | None, hold: float | None, current: int, next_count: int
) -> None:
    policy = Policy(kind="requests", min_replicas=2, max_replicas=10, down_stabilisation_seconds=0)
    proposals = propose_for_requests(Reading(0.0, wanted, hold), current)
    assert Autoscaler(policy).decide(1000.0, current, proposals) == next_count


def test_autoscaler_adds_at_most_its_policy_and_removes_one_at_a_time() -> None:
    autoscaler, current, seen = Autoscaler(POLICY), 2, []
    for now in range(0, 2400, 15):
        wanted = 10.0 if now < 300 else 2.0
        current = autoscaler.decide(float(now), current, propose_for_requests(Reading(now, wanted, 0.0), current))
        seen.append((now, current))
    ups = [(now, count) for now, count in seen if now < 300]
    assert ups[0][1] == 6
    assert next(now for now, count in ups if count == 10) == POLICY.up_period_seconds
    downs = [now for (_, left), (now, right) in itertools.pairwise(seen) if right < left]
    assert downs[0] >= 285 + POLICY.down_stabilisation_seconds
    assert all(right - left >= POLICY.down_period_seconds for left, right in itertools.pairwise(downs))


def test_cpu_autoscaler_counts_loading_pods_as_idle() -> None:
    # 3 x 1.0 over 3 ready and 2 loading pods is 60 %, below the target: no sixth pod, and none is removed either.
    assert propose_for_cpu([1.0, 1.0, 1.0], 2, 0.7, 5) == [5]
    assert propose_for_cpu([1.0, 1.0, 1.0], 0, 0.7, 3) == [5]
    assert propose_for_cpu([], 2, 0.7, 2) == [None]


def test_wait_quantile_counts_refused_requests_as_endless() -> None:
    outcome = Outcome(POLICY, [], [], [], [(0.0, 1.0)] * 9, [5.0], 0, 0.0, [], {"a": [(0.0, Sample(0, 0, 1, 0.0, 0))]})
    assert outcome.find_wait(0.5) == 1.0
    assert outcome.find_wait(0.95) == math.inf


def find_objects(kind: str, **sets: str) -> dict[str, dict[str, Any]]:
    objects = render_chart((), KEDA_MODEL | sets)
    return {item["metadata"]["name"]: item for item in objects if item["kind"] == kind}


def test_scaled_object_asks_for_both_figures_and_shrinks_on_neither_missing() -> None:
    (scaled,) = find_objects("ScaledObject").values()
    spec = scaled["spec"]
    assert spec["scaleTargetRef"] == {"apiVersion": "apps/v1", "kind": "Deployment", "name": "m-predictor"}
    assert (spec["minReplicaCount"], spec["maxReplicaCount"]) == (2, 10)
    assert "fallback" not in spec
    assert "idleReplicaCount" not in spec
    triggers = {trigger["name"]: trigger for trigger in spec["triggers"]}
    assert {name: trigger["metricType"] for name, trigger in triggers.items()} == {
        "wanted-replicas": "AverageValue",
        "hold": "Value",
    }
    for name, trigger in triggers.items():
        assert trigger["metadata"]["ignoreNullValues"] == "false"
        assert trigger["metadata"]["query"] == f'mint_serving:{name.replace("-", "_")}{{job="mint/m"}}'
        assert trigger["metadata"]["threshold"] == "1"
    behaviour = spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
    assert behaviour["scaleDown"]["stabilizationWindowSeconds"] == POLICY.down_stabilisation_seconds
    (service,) = find_objects("InferenceService").values()
    assert service["metadata"]["annotations"]["serving.kserve.io/autoscalerClass"] == "external"


def test_settings_say_what_the_scaled_object_may_do() -> None:
    rules = find_objects("PrometheusRule")["mint-serving-settings"]["spec"]["groups"][0]["rules"]
    assert {rule["record"]: rule["expr"] for rule in rules} == {
        "mint_serving:setting_requests_per_replica": "vector(3)",
        "mint_serving:setting_queue_wait_seconds": "vector(1)",
        "mint_serving:setting_max_replicas": "vector(10)",
    }
    assert {tuple(sorted(rule["labels"].items())) for rule in rules} == {
        (("job", "mint/m"), ("namespace", "mint"), ("service", "m"))
    }


@pytest.mark.parametrize("mode", ["hpa", "none", "knative"])
def test_other_modes_make_no_scaled_object(mode: str) -> None:
    sets = {"models[0].autoscaling.mode": mode}
    assert find_objects("ScaledObject", **sets) == {}
    assert "mint-serving-settings" not in find_objects("PrometheusRule", **sets)


@pytest.mark.parametrize("key", ["monitoring.enabled", "monitoring.rules"])
def test_mode_keda_without_the_rules_is_refused_in_words(key: str) -> None:
    with pytest.raises(ValueError, match=r"needs the rules: set monitoring\.enabled"):
        find_objects("ScaledObject", **{key: "false"})


def test_prometheus_that_wants_a_token_gets_one_by_reference() -> None:
    sets = {
        "autoscaling.prometheusAuthentication.secretName": "thanos",
        "autoscaling.prometheusAuthentication.caKey": "ca.crt",
    }
    (authentication,) = find_objects("TriggerAuthentication", **sets).values()
    assert authentication["spec"]["secretTargetRef"] == [
        {"parameter": "bearerToken", "name": "thanos", "key": "token"},
        {"parameter": "ca", "name": "thanos", "key": "ca.crt"},
    ]
    (scaled,) = find_objects("ScaledObject", **sets).values()
    for trigger in scaled["spec"]["triggers"]:
        assert trigger["authenticationRef"]["name"] == authentication["metadata"]["name"]
        assert trigger["metadata"]["authModes"] == "bearer"
    assert find_objects("TriggerAuthentication") == {}


@pytest.mark.skipif(not CRD_FOLDER.is_dir(), reason=f"no CRD schemas in {CRD_FOLDER}")
@pytest.mark.parametrize("file", VALUES_FILES, ids=lambda file: file.stem)
def test_monitoring_and_autoscaling_objects_fit_their_crds(file: Path) -> None:
    kinds = ("PodMonitor", "PrometheusRule", "ScaledObject")
    objects = [item for item in render_chart((file,)) if item["kind"] in kinds]
    objects += [item for kind in kinds for item in find_objects(kind).values()]
    assert {item["kind"] for item in objects} == set(kinds)
    for item in objects:
        assert find_schema_errors(item) == []
