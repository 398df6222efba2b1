"""The chart's `helm test` pod against a real model server, with tokens made as the chart's README says."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from helm_tools import render_chart
from serving_process import ServerOptions, running_server
from typer.testing import CliRunner

from pipelines.cli import app


def make_token(tokens_file: Path, tenant: str, *options: str) -> str:
    done = CliRunner().invoke(app, ["token", tenant, "--file", str(tokens_file), *options])
    assert done.exit_code == 0, done.output
    return done.stdout.strip()


def ask_models(models: dict[str, str], token: str, *, seconds: float) -> tuple[int, str]:
    """Exit code and log of the test pod's command, run here."""
    (pod,) = (item for item in render_chart() if item["kind"] == "Pod")
    container: dict[str, Any] = pod["spec"]["containers"][0]
    given = {"MINT_TEST_MODELS": json.dumps(models), "MINT_TEST_SECONDS": str(seconds), "MINT_TEST_TOKEN": token}
    done = subprocess.run(
        [sys.executable, *container["command"][1:], *container["args"]],
        env=os.environ | given | {"NO_PROXY": "127.0.0.1"},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def test_endpoint_test_waits_for_a_real_server_and_gets_a_ranking_with_the_right_token(tmp_path: Path) -> None:
    tokens_file = tmp_path / "tokens.json"
    test_token = make_token(tokens_file, "helm-test", "--expires-days", "90")
    metrics_token = make_token(tokens_file, "prometheus", "--scope", "metrics")
    options = ServerOptions(tokens_file=str(tokens_file), load_seconds=3.0)
    with running_server(options, wait_until_ready=False) as server:
        code, log = ask_models({"tiny": server.url}, test_token, seconds=120)
        assert (code, "tiny: ready, ranked 3 labels" in log) == (0, True), log
        code, log = ask_models({"tiny": server.url, "other": server.url}, test_token, seconds=20)
        assert code == 1
        assert "other answered with status 404" in log
        code, log = ask_models({"tiny": server.url}, metrics_token, seconds=20)
        assert (code, "tiny answered with status 403" in log) == (1, True), log
        code, log = ask_models({"tiny": server.url}, "unknown", seconds=20)
        assert (code, "tiny answered with status 401" in log) == (1, True), log
