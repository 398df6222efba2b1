"""The alert rules against promtool, against the server's own metrics, and inside a real Prometheus."""

import contextlib
import json
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from serving_process import ServerOptions, running_server

from mint_lib.server.access import issue_token
from mint_lib.server.calls import ROUTES
from mint_lib.server.lifecycle import Readiness
from mint_lib.server.metrics import ServingMetrics
from mint_lib.server.students import Lineup

FILES = Path(__file__).parents[2] / "helm" / "files"
RULE_FILES = (FILES / "serving-alerts.yaml", FILES / "serving-autoscaling.yaml")
CASE_FILES = [Path(__file__).with_name(f"serving_{name}_test.yaml") for name in ("alerts", "autoscaling")]
GROUPS = [group for file in RULE_FILES for group in yaml.safe_load(file.read_text())["groups"]]
ALERTS = {rule["alert"]: rule for group in GROUPS for rule in group["rules"] if "alert" in rule}
RECORDED = {rule["record"] for group in GROUPS for rule in group["rules"] if "record" in rule}
EXPRESSIONS = [rule["expr"] for group in GROUPS for rule in group["rules"]]
RATIOS = (
    "mint_serving:error_share:ratio5m",
    "mint_serving:overloaded_share:ratio5m",
    "mint_serving:label_share:ratio1h",
)
SETTINGS = {
    f"mint_serving:setting_{name}": value
    for name, value in {"requests_per_replica": 3, "queue_wait_seconds": 1, "max_replicas": 4}.items()
}
"""What the chart records of each service."""
SCALING = ("mint_serving:wanted_replicas", "mint_serving:hold")
needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")


def list_outcomes(metrics: ServingMetrics) -> set[str]:
    for status in (*range(400, 600), 200):
        metrics.see_request(route="/metrics", model="", status=status, problem="", seconds=0.1)
    return {
        sample.labels["outcome"]
        for family in metrics.registry.collect()
        for sample in family.samples
        if "outcome" in sample.labels
    }


@needs_promtool
def test_rules_are_accepted_by_promtool() -> None:
    done = subprocess.run(["promtool", "check", "rules", *RULE_FILES], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_rules_with_a_broken_expression_are_refused_by_promtool(tmp_path: Path) -> None:
    broken = tmp_path / "rules.yaml"
    broken.write_text(RULE_FILES[0].read_text().replace("(mint_serving_ready) == 0", "(mint_serving_ready == 0"))
    assert subprocess.run(["promtool", "check", "rules", broken], capture_output=True).returncode != 0


@needs_promtool
def test_alerts_fire_and_stay_silent_as_the_cases_say() -> None:
    done = subprocess.run(["promtool", "test", "rules", *CASE_FILES], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_cases_hold_a_firing_and_a_silent_one_for_each_alert() -> None:
    seen: dict[str, set[bool]] = {name: set() for name in ALERTS}
    for case in (case for file in CASE_FILES for case in yaml.safe_load(file.read_text())["tests"]):
        (check,) = case["promql_expr_test"]
        alert = case["name"].split()[0]
        assert check["expr"] == f'count(ALERTS{{alertname="{alert}",alertstate="firing"}})'
        fires = bool(check["exp_samples"])
        assert (" fires " in case["name"]) == fires
        seen[alert].add(fires)
    assert seen == {name: {True, False} for name in ALERTS}


def test_rules_name_only_metrics_that_the_server_has() -> None:
    metrics = ServingMetrics(Lineup(), Readiness())
    exported: set[str] = set()
    for family in metrics.registry.collect():
        # A metric with labels has no sample before its first use; these are the suffixes that its type will give it.
        suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}.get(family.type, ("",))
        exported |= {family.name + suffix for suffix in suffixes}
    for expression in EXPRESSIONS:
        bare = re.sub(r'"[^"]*"|\b(?:by|on|group_left) \([^)]*\)', "", expression)
        named = set(re.findall(r"\b(?:mint_serving|process)_[a-z_]+", bare)) - {"mint_serving"}
        assert named <= exported, f"not exported: {named - exported}"
        assert set(re.findall(r"\bmint_serving:[a-z0-9_:]+", bare)) <= RECORDED | SETTINGS.keys()


def test_rules_compare_outcomes_and_routes_that_the_server_tells_apart() -> None:
    text = " ".join(EXPRESSIONS)
    outcomes = {word for found in re.findall(r'outcome=~?"([^"]+)"', text) for word in found.split("|")}
    assert outcomes <= list_outcomes(ServingMetrics(Lineup(), Readiness()))
    (pattern,) = set(re.findall(r'route=~"([^"]+)"', text))
    asks_a_model = {route.path for route in ROUTES if route.method == "POST"}
    assert asks_a_model
    assert {route.path for route in ROUTES if re.fullmatch(pattern, route.path)} == asks_a_model


@pytest.mark.parametrize("name", ALERTS)
def test_alert_says_how_bad_it_is_and_what_to_do(name: str) -> None:
    rule = ALERTS[name]
    assert rule["labels"]["severity"] in ("critical", "warning", "info")
    assert rule["annotations"]["summary"].endswith(".")
    assert len(rule["annotations"]["description"].split()) >= 20


def free_port() -> int:
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as listener:
        return int(listener.getsockname()[1])


@pytest.fixture(scope="module")
def monitored(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str, dict[str, str]], Any]]:
    """A function that asks the API of a real Prometheus, which scrapes a real server that has answered requests."""
    binary = shutil.which("prometheus")
    if binary is None:
        pytest.skip("prometheus is not installed")
    folder = tmp_path_factory.mktemp("prometheus")
    asking, asker = issue_token("clinic", scopes=("infer",))
    watching, watcher = issue_token("monitoring", scopes=("metrics",))
    (folder / "tokens.json").write_text(
        json.dumps({"tokens": [entry.model_dump(mode="json") for entry in (asker, watcher)]})
    )
    with running_server(ServerOptions(tokens_file=str(folder / "tokens.json"))) as server:
        client = httpx.Client(base_url=server.url, headers={"authorization": f"Bearer {asking}"}, timeout=60)
        for number in range(5):
            body = {"instances": [{"text": f"Invented case {number}."}]}
            assert client.post("/v1/models/tiny:predict", json=body).status_code == 200
        assert client.post("/v1/models/tiny:predict", json={"instances": []}).status_code == 400
        address = server.url.removeprefix("http://")

        def job(name: str, token: str) -> dict[str, Any]:
            (folder / name).write_text(token)
            credentials = {"type": "Bearer", "credentials_file": str(folder / name)}
            labels = {"namespace": "mint", "service": "tiny"}
            targets = {"targets": [address], "labels": labels}
            return {"job_name": name, "authorization": credentials, "static_configs": [targets]}

        settings = [
            {"record": record, "expr": f"vector({value})", "labels": {"job": "mint"}}
            for record, value in SETTINGS.items()
        ]
        groups = [{"name": "settings", "interval": "1s", "rules": settings}]
        (folder / "settings.yaml").write_text(yaml.safe_dump({"groups": groups}))
        # As often as scrapes are here: the chart's own interval suits scrapes every 15 s.
        scaling = RULE_FILES[1].read_text().replace("interval: 15s", "interval: 1s")
        (folder / "scaling.yaml").write_text(scaling)

        config = {
            "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
            "rule_files": [str(RULE_FILES[0]), str(folder / "scaling.yaml"), str(folder / "settings.yaml")],
            "scrape_configs": [job("mint", watching), job("without-scope", asking), job("unknown", "no-such-token")],
        }
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        url = f"http://127.0.0.1:{free_port()}"
        arguments = [f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}"]
        prometheus = subprocess.Popen(
            [binary, *arguments, f"--web.listen-address={url.removeprefix('http://')}", "--log.level=warn"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

        def ask(path: str, parameters: dict[str, str]) -> Any:
            return httpx.get(f"{url}/api/v1/{path}", params=parameters, timeout=10).raise_for_status().json()["data"]

        try:
            wait_until(lambda: scrape_and_ask(client, ask), prometheus)
            yield ask
        finally:
            prometheus.terminate()
            prometheus.communicate(timeout=30)


def scrape_and_ask(client: httpx.Client, ask: Callable[[str, dict[str, str]], Any]) -> bool:
    """Whether Prometheus has computed what is asked for; sends one more case, as rates need some between scrapes."""
    client.post("/v1/models/tiny:predict", json={"instances": [{"text": "One more invented case."}]})
    computed = (
        'mint_serving:requests:rate5m{outcome="ok"} > 0',
        *RATIOS,
        *SCALING,
        "mint_serving:request_seconds:p95_5m > 0",
    )
    with contextlib.suppress(httpx.HTTPError):
        return all(ask("query", {"query": expression})["result"] for expression in computed)
    return False


def wait_until(holds: Callable[[], bool], process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < deadline, "Prometheus has not scraped and evaluated within a minute"
        time.sleep(0.5)


def test_prometheus_with_a_token_scrapes_the_server(monitored: Callable[[str, dict[str, str]], Any]) -> None:
    (series,) = monitored("query", {"query": 'mint_serving_requests_total{outcome="ok",route=~".*:predict"}'})["result"]
    assert float(series["value"][1]) >= 5
    assert series["metric"]["model"] == "tiny"
    (ready,) = monitored("query", {"query": "mint_serving_ready"})["result"]
    assert ready["value"][1] == "1"
    (bad,) = monitored("query", {"query": 'mint_serving_requests_total{outcome="bad_request"}'})["result"]
    assert float(bad["value"][1]) == 1


def test_prometheus_without_the_right_token_gets_nothing(monitored: Callable[[str, dict[str, str]], Any]) -> None:
    targets = {target["labels"]["job"]: target for target in monitored("targets", {"state": "active"})["activeTargets"]}
    assert {name: target["health"] for name, target in targets.items()} == {
        "mint": "up",
        "without-scope": "down",
        "unknown": "down",
    }
    assert "403" in targets["without-scope"]["lastError"]
    assert "401" in targets["unknown"]["lastError"]


def test_prometheus_evaluates_every_rule_and_a_sound_server_raises_no_alert(
    monitored: Callable[[str, dict[str, str]], Any],
) -> None:
    rules = [rule for group in monitored("rules", {})["groups"] for rule in group["rules"]]
    assert {rule["name"] for rule in rules} == ALERTS.keys() | RECORDED | SETTINGS.keys()
    assert {rule["name"]: rule.get("lastError", "") for rule in rules if rule["health"] != "ok"} == {}
    assert monitored("query", {"query": "ALERTS"})["result"] == []


def test_prometheus_records_what_the_server_answered(monitored: Callable[[str, dict[str, str]], Any]) -> None:
    # Nothing failed, so the shares are 0 rather than missing.
    for name in RATIOS[:2]:
        (share,) = monitored("query", {"query": name})["result"]
        assert float(share["value"][1]) == 0
    shares = monitored("query", {"query": RATIOS[2]})["result"]
    assert sum(float(share["value"][1]) for share in shares) == pytest.approx(1, abs=1e-6)
    (slow,) = monitored("query", {"query": "mint_serving:request_seconds:p95_5m"})["result"]
    assert 0 < float(slow["value"][1]) < 10


def test_prometheus_answers_what_the_autoscaler_asks(monitored: Callable[[str, dict[str, str]], Any]) -> None:
    for name in SCALING:
        (figure,) = monitored("query", {"query": f'{name}{{job="mint"}}'})["result"]
        assert figure["metric"]["service"] == "tiny"
        assert figure["metric"]["namespace"] == "mint"
    # One server that is ready and has nothing to do: nothing is held, and at most a replica is wanted.
    (hold,) = monitored("query", {"query": SCALING[1]})["result"]
    assert hold["value"][1] == "0"
    (wanted,) = monitored("query", {"query": SCALING[0]})["result"]
    assert float(wanted["value"][1]) <= 1
