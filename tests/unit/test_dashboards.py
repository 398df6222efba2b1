"""What the chart gives to Grafana and to the Prometheus operator: dashboards, rules and the scrape."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from helm_tools import CHART, render_chart

from mint_lib.server.lifecycle import Readiness
from mint_lib.server.metrics import ServingMetrics
from mint_lib.server.students import Lineup

DASHBOARDS = sorted((CHART / "files" / "dashboards").glob("*.json"))
RULE_FILES = sorted((CHART / "files").glob("serving-*.yaml"))
RULES = [rule for file in RULE_FILES for group in yaml.safe_load(file.read_text())["groups"] for rule in group["rules"]]
SETTINGS = {f"mint_serving:setting_{name}" for name in ("requests_per_replica", "queue_wait_seconds", "max_replicas")}
GRAFANAS_OWN = {"__rate_interval", "__interval", "__range"}
UNITS = {"short", "s", "bytes", "percentunit", "reqps"}
PANELS = {"timeseries", "stat", "table", "heatmap"}
needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
each_dashboard = pytest.mark.parametrize("file", DASHBOARDS, ids=lambda file: file.stem)


def load_panels(dashboard: dict[str, Any]) -> list[dict[str, Any]]:
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def list_targets(dashboard: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for panel in load_panels(dashboard):
        yield from panel["targets"]


def fill_in(expression: str) -> str:
    """The expression as Grafana sends it, with invented values of its variables."""
    return re.sub(
        r"\$\{?\w+\}?", lambda found: "5m" if "interval" in found[0] or "range" in found[0] else "x", expression
    )


def list_metrics() -> set[str]:
    """Every series that a server, the rules or the chart's settings bring about."""
    exported = set()
    for family in ServingMetrics(Lineup(), Readiness()).registry.collect():
        suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}.get(family.type, ("",))
        exported |= {family.name + suffix for suffix in suffixes}
    return exported | SETTINGS | {rule["record"] for rule in RULES if "record" in rule} | {"ALERTS", "up"}


def find_metrics(expression: str) -> dict[str, set[str]]:
    """Names of the metrics in an expression, each with the labels that it is selected by."""
    import promql_parser

    found: dict[str, set[str]] = {}
    waiting = [promql_parser.parse(fill_in(expression))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, promql_parser.VectorSelector):
            found.setdefault(node.name, set()).update(matcher.name for matcher in node.matchers.matchers)
        waiting += [
            part
            for name in ("expr", "lhs", "rhs", "vector_selector", "param")
            if (part := getattr(node, name, None)) is not None
        ]
        waiting += list(getattr(node, "args", None) or [])
    return found


def find_faults(dashboard: dict[str, Any]) -> list[str]:
    """What is wrong with the dashboard's expressions and variables."""
    known, faults = list_metrics(), []
    defined = {variable["name"] for variable in dashboard["templating"]["list"]}
    queries = [variable["definition"] for variable in dashboard["templating"]["list"] if "definition" in variable]
    asked = [re.sub(r"^label_values\((.*), *\w+\)$", r"\1", query) for query in queries]
    for expression in [*asked, *(target["expr"] for target in list_targets(dashboard))]:
        try:
            found = find_metrics(expression)
        except ValueError as error:
            faults.append(f"{expression}: {error}")
            continue
        if not found:
            faults.append(f"{expression}: no metric")
        faults += [f"unknown metric {name}" for name in found.keys() - known]
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(dashboard)))
    faults += [f"variable {name} is used and not defined" for name in used - defined - GRAFANAS_OWN]
    faults += [f"variable {name} is defined and not used" for name in defined - used]
    return faults


@each_dashboard
def test_dashboard_asks_only_for_what_exists(file: Path) -> None:
    assert find_faults(json.loads(file.read_text())) == []


@each_dashboard
@pytest.mark.parametrize(
    ("part", "other"),
    [
        ("mint_serving_ready", "mint_serving_redy"),
        ("sum by (", "sum by (("),
        ('"name": "service"', '"name": "services"'),
        ("$namespace", "$namespaces"),
    ],
)
def test_dashboard_with_one_thing_misspelt_is_caught(file: Path, part: str, other: str) -> None:
    text = file.read_text()
    assert part in text
    assert find_faults(json.loads(text.replace(part, other, 1))) != []


def test_every_metric_of_every_expression_is_caught_when_misspelt() -> None:
    for file in DASHBOARDS:
        for target in list_targets(json.loads(file.read_text())):
            for name in find_metrics(target["expr"]):
                misspelt = re.sub(rf"\b{name}\b", f"{name}x", target["expr"], count=1)
                assert find_metrics(misspelt).keys() - list_metrics(), misspelt


@each_dashboard
@needs_promtool
def test_dashboard_expressions_are_accepted_by_promtool(file: Path, tmp_path: Path) -> None:
    rules = [
        {"record": f"check:number_{number}", "expr": fill_in(target["expr"])}
        for number, target in enumerate(list_targets(json.loads(file.read_text())))
    ]
    checked = tmp_path / "rules.yaml"
    checked.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    done = subprocess.run(["promtool", "check", "rules", checked], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@each_dashboard
def test_dashboard_selects_namespace_and_service_everywhere(file: Path) -> None:
    for target in list_targets(json.loads(file.read_text())):
        for name, labels in find_metrics(target["expr"]).items():
            assert {"namespace", "service"} <= labels, f"{name} in {target['expr']}"


@each_dashboard
def test_dashboard_has_the_shape_that_grafana_loads(file: Path) -> None:
    dashboard = json.loads(file.read_text())
    assert dashboard["uid"] == f"mint-{file.stem}"
    assert "id" not in dashboard  # a number of another Grafana would overwrite a dashboard there
    assert dashboard["schemaVersion"] >= 36  # data sources by uid and type
    assert isinstance(dashboard["time"]["from"], str)
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells
    source = {"type": "prometheus", "uid": "${datasource}"}
    for panel in load_panels(dashboard):
        assert panel["type"] in PANELS
        assert panel["datasource"] == source
        assert [target["refId"] for target in panel["targets"]] == list("ABCDEFGH")[: len(panel["targets"])]
        assert all(target["datasource"] == source for target in panel["targets"])
        if panel["type"] in ("timeseries", "stat"):
            assert panel["fieldConfig"]["defaults"]["unit"] in UNITS


@each_dashboard
def test_dashboard_panel_says_what_it_shows(file: Path) -> None:
    panels = load_panels(json.loads(file.read_text()))
    titles = [panel["title"] for panel in panels]
    assert len(titles) == len(set(titles))
    for panel in panels:
        assert panel["description"].endswith(".")
        assert panel["description"].rstrip(".") != panel["title"]


def test_chart_puts_each_dashboard_into_a_config_map_unchanged() -> None:
    maps = [
        item
        for item in render_chart()
        if item["kind"] == "ConfigMap" and item["metadata"]["labels"].get("grafana_dashboard") == "1"
    ]
    contents = {name: json.loads(text) for item in maps for name, text in item["data"].items()}
    assert contents == {f"mint-{file.name}": json.loads(file.read_text()) for file in DASHBOARDS}
    assert len(maps) == len(DASHBOARDS)


def find_rules(**sets: str) -> dict[str, dict[str, Any]]:
    objects = [item for item in render_chart((), sets) if item["kind"] == "PrometheusRule"]
    return {item["metadata"]["name"].removeprefix("mint-"): item["spec"] for item in objects}


@needs_promtool
def test_chart_hands_on_the_rules_unchanged_and_promtool_accepts_them(tmp_path: Path) -> None:
    specs = find_rules()
    assert specs == {file.stem: yaml.safe_load(file.read_text()) for file in RULE_FILES}
    for name, spec in specs.items():
        (tmp_path / name).write_text(yaml.safe_dump(spec))
        done = subprocess.run(["promtool", "check", "rules", tmp_path / name], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_chart_adds_labels_to_alerts_only_and_keeps_their_own() -> None:
    plain, labelled = find_rules(), find_rules(**{"monitoring.alertLabels.team": "genomics"})
    for name, spec in labelled.items():
        for group, before in zip(spec["groups"], plain[name]["groups"], strict=True):
            for rule, was in zip(group["rules"], before["rules"], strict=True):
                added = {"team": "genomics"} if "alert" in rule else {}
                assert rule.get("labels", {}) == was.get("labels", {}) | added


def test_scrape_shows_a_token_by_reference_and_names_the_job_after_the_service() -> None:
    (monitor,) = (item for item in render_chart() if item["kind"] == "PodMonitor")
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    assert endpoint["authorization"] == {
        "type": "Bearer",
        "credentials": {"name": "mint-metrics-token", "key": "token"},
    }
    service = "__meta_kubernetes_pod_label_serving_kserve_io_inferenceservice"
    by_target = {rule["targetLabel"]: rule for rule in endpoint["relabelings"]}
    assert by_target["service"]["sourceLabels"] == [service]
    assert by_target["job"]["sourceLabels"] == ["__meta_kubernetes_namespace", service]
    assert by_target["job"]["separator"] == "/"


@pytest.mark.parametrize(
    ("key", "kinds"),
    [
        ("monitoring.enabled", {"PodMonitor", "PrometheusRule", "ConfigMap"}),
        ("monitoring.podMonitor", {"PodMonitor"}),
        ("monitoring.rules", {"PrometheusRule"}),
        ("monitoring.dashboards", {"ConfigMap"}),
    ],
)
def test_part_of_monitoring_that_is_off_makes_no_object(key: str, kinds: set[str]) -> None:
    def count(objects: list[dict[str, Any]]) -> dict[str, int]:
        watched = [
            item["kind"]
            for item in objects
            if item["kind"] in ("PodMonitor", "PrometheusRule")
            or item["metadata"].get("labels", {}).get("grafana_dashboard")
        ]
        return {kind: watched.count(kind) for kind in watched}

    everything = count(render_chart())
    assert everything.keys() == {"PodMonitor", "PrometheusRule", "ConfigMap"}
    left = count(render_chart((), {key: "false"}))
    assert left == {kind: number for kind, number in everything.items() if kind not in kinds}
