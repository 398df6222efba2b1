"""From a fault in a real server to Alertmanager, through a real Prometheus that scrapes it and fires our rule."""

import contextlib
import json
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

RULES = Path(__file__).parents[2] / "helm" / "files" / "serving-alerts.yaml"
ALERT = "MintServingTokensFileBroken"
"""A rule that waits for nothing, so that the test needs not to."""


def require(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


def free_port() -> int:
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as listener:
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def running(*command: str) -> Iterator["subprocess.Popen[bytes]"]:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(30)


def wait_for(look: Callable[[], Any], *, seconds: float = 50.0) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.HTTPError):
            if found := look():
                return found
        time.sleep(0.3)
    raise AssertionError("nothing came in time")


def test_fault_of_a_server_reaches_alertmanager_with_words_and_labels(tmp_path: Path) -> None:
    prometheus, alertmanager = require("prometheus"), require("prometheus-alertmanager")
    token, watcher = issue_token("monitoring", scopes=("metrics",))
    tokens_file = tmp_path / "tokens.json"
    tokens_file.write_text(json.dumps({"tokens": [watcher.model_dump(mode="json")]}))
    (tmp_path / "token").write_text(token)
    manager_address, prometheus_address = f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"
    route = {"receiver": "nobody", "group_by": ["alertname", "job"], "group_wait": "1s"}
    (tmp_path / "alertmanager.yml").write_text(yaml.safe_dump({"route": route, "receivers": [{"name": "nobody"}]}))

    def list_alerts() -> list[dict[str, Any]]:
        reply = httpx.get(f"http://{manager_address}/api/v2/alerts", timeout=5).raise_for_status()
        return [alert for alert in reply.json() if alert["labels"]["alertname"].startswith("MintServing")]

    def has_scraped() -> bool:
        query = {"query": "mint_serving_tokens_file_reload_failures_total"}
        reply = httpx.get(f"http://{prometheus_address}/api/v1/query", params=query, timeout=5).raise_for_status()
        return [series["value"][1] for series in reply.json()["data"]["result"]] == ["0"]

    with contextlib.ExitStack() as stack:
        server = stack.enter_context(running_server(ServerOptions(tokens_file=str(tokens_file))))
        labels = {"namespace": "mint", "service": "tiny"}
        scrape = {
            "job_name": "mint/tiny",
            "authorization": {"type": "Bearer", "credentials_file": str(tmp_path / "token")},
            "static_configs": [{"targets": [server.url.removeprefix("http://")], "labels": labels}],
        }
        config = {
            "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
            "rule_files": [str(RULES)],
            "scrape_configs": [scrape],
            "alerting": {"alertmanagers": [{"static_configs": [{"targets": [manager_address]}]}]},
        }
        (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
        stack.enter_context(
            running(
                alertmanager,
                f"--config.file={tmp_path / 'alertmanager.yml'}",
                f"--storage.path={tmp_path / 'alertmanager'}",
                f"--web.listen-address={manager_address}",
                "--cluster.listen-address=",
            )
        )
        stack.enter_context(
            running(
                prometheus,
                f"--config.file={tmp_path / 'prometheus.yml'}",
                f"--storage.tsdb.path={tmp_path / 'prometheus'}",
                f"--web.listen-address={prometheus_address}",
            )
        )
        wait_for(has_scraped)
        assert wait_for(lambda: [list_alerts()]) == [[]]  # it answers, and a sound server sends nothing
        tokens_file.write_text("{broken")
        (alert,) = wait_for(list_alerts)
    assert alert["labels"]["alertname"] == ALERT
    assert alert["labels"]["severity"] == "warning"
    assert {key: alert["labels"][key] for key in ("job", "namespace", "service")} == {"job": "mint/tiny", **labels}
    assert alert["status"]["state"] == "active"
    assert alert["annotations"]["summary"].endswith("cannot read its new tokens file.")
    assert "{broken" not in json.dumps(alert)
