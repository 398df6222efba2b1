"""`mint serve` and `mint ask` as a newcomer uses them: real processes, a real store, a model of the tiny student."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import yaml
from stored_models import TEXT, make_adapter, write_model

from mint_lib.records import Reference
from mint_lib.store import Store

MINT = (sys.executable, "-m", "pipelines.cli")
ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def model(store: Store, tmp_path: pathlib.Path) -> Reference:
    return write_model(store, make_adapter(tmp_path / "adapters", 1), calibration=1.5)


def mint(*arguments: str, folder: pathlib.Path, text: str | None = None) -> "subprocess.CompletedProcess[str]":
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [*MINT, *arguments], cwd=folder, env=environment, input=text, capture_output=True, text=True, timeout=180
    )


@contextlib.contextmanager
def serving(*arguments: str, folder: pathlib.Path) -> Iterator["subprocess.Popen[str]"]:
    """`mint serve`, from when it says that it is ready."""
    log = folder / "serve.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [*MINT, "serve", *arguments, "--port", "0"],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
            stdout=output,
            stderr=output,
            text=True,
        )
    try:
        give_up = time.monotonic() + 120
        while "Ready at" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < give_up, log.read_text()
            time.sleep(0.2)
        yield process
    finally:
        process.kill()
        process.wait()


def read_connection(folder: pathlib.Path) -> tuple[str, str]:
    """Address and token."""
    connection = json.loads((folder / ".mint/serve/connection.json").read_text())
    return connection["url"], (folder / connection["token_file"]).read_text()


def test_served_model_is_asked_by_the_command_and_ends_cleanly(model: Reference, tmp_path: pathlib.Path) -> None:
    with serving("model/tiny", folder=tmp_path) as process:
        url, token = read_connection(tmp_path)
        asked = mint("ask", TEXT, folder=tmp_path)
        assert asked.returncode == 0, asked.stderr
        assert str(model) in asked.stdout
        read = mint("ask", "-", "--json", "--top", "2", "--model", "tiny", folder=tmp_path, text=TEXT)
        answer = json.loads(read.stdout)
        assert [len(answer["predictions"][0]["labels"]), answer["predictions"][0]["calibrated"]] == [2, True]
        assert answer["predictions"][0]["labels"][0]["name"] in asked.stdout
        headers = {"Authorization": f"Bearer {token}"}
        assert httpx.get(f"{url}/openapi.json", headers=headers).status_code == 200
        assert "<title>" in httpx.get(url).text
        log = (tmp_path / "serve.log").read_text()
        for way in ("page", "mint ask", "curl", "openai"):
            assert way in log
        assert oct((tmp_path / ".mint/serve/token").stat().st_mode)[-3:] == "600"
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    gone = mint("ask", TEXT, folder=tmp_path)
    assert [gone.returncode, "mint serve" in gone.stderr] == [2, True]


def test_ask_without_anything_to_ask_is_refused(model: Reference, tmp_path: pathlib.Path) -> None:
    empty = mint("ask", "  ", "--url", "http://127.0.0.1:9", folder=tmp_path)
    assert [empty.returncode, "nothing to ask" in empty.stderr] == [2, True]
    nobody = mint("ask", TEXT, "--url", "http://127.0.0.1:9", "--model", "tiny", folder=tmp_path)
    assert [nobody.returncode, "No server answers" in nobody.stderr] == [1, True]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("model/nothing",), 1, "no version"),
        (("model/tiny", "model/tiny"), 2, "Two students would be called 'tiny'"),
        (("Tiny=model/tiny",), 2, "cannot be a model's name"),
        (("model/tiny", "--set", "engine.max_bach=2"), 2, "max_batch"),
        (("model/tiny", "--tokens", "missing.json"), 2, "missing.json"),
        (("model/tiny", "--render"), 2, "--cluster"),
    ],
)
def test_serve_with_a_wrong_argument_is_refused_in_words(
    model: Reference, tmp_path: pathlib.Path, arguments: tuple[str, ...], code: int, words: str
) -> None:
    refused = mint("serve", *arguments, "--port", "0", folder=tmp_path)
    assert refused.returncode == code, refused.stderr
    assert words in refused.stderr
    assert "Traceback" not in refused.stderr


def test_alias_is_followed_to_its_next_version(model: Reference, store: Store, tmp_path: pathlib.Path) -> None:
    store.move_alias("champion", model, who="test", why="test", expected=None)
    following = ("served=model/tiny@champion", "--set", "follow_seconds=0.3")
    with serving(*following, folder=tmp_path):
        url, token = read_connection(tmp_path)
        headers = {"Authorization": f"Bearer {token}"}

        def ask() -> str:
            body = {"instances": [{"text": TEXT}]}
            reply = httpx.post(f"{url}/v1/models/served:predict", json=body, headers=headers, timeout=30)
            assert reply.status_code == 200, reply.text
            return str(reply.json()["model"]["reference"])

        assert ask() == str(model)
        newer = write_model(store, make_adapter(tmp_path / "adapters", 2))
        store.move_alias("champion", newer, who="test", why="test", expected=model)
        give_up = time.monotonic() + 60
        while ask() != str(newer):
            assert time.monotonic() < give_up
            time.sleep(0.2)


def test_rendered_service_names_exactly_this_version(model: Reference, tmp_path: pathlib.Path) -> None:
    digest = "a" * 64
    cluster: dict[str, Any] = {
        "namespace": "mint",
        "images": {name: f"registry.example/mint-{name}@sha256:{digest}" for name in ("serve", "train")},
        "s3": {"endpoint_url": "https://s3.example", "bucket": "mint"},
    }
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump(cluster))
    rendered = mint("serve", "model/tiny", "--render", "--cluster", "cluster.yaml", folder=tmp_path)
    assert rendered.returncode == 0, rendered.stderr
    document = yaml.safe_load(rendered.stdout)
    assert document["kind"] == "InferenceService"
    assert str(model) in document["spec"]["predictor"]["containers"][0]["args"]
    refused = mint("serve", "model/tiny", "--render", "--vllm", "--cluster", "cluster.yaml", folder=tmp_path)
    assert [refused.returncode, "hub" in refused.stderr] == [2, True]
    tagged = cluster["images"] | {"serve": "registry.example/mint:latest"}
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump(cluster | {"images": tagged}))
    moving = mint("serve", "model/tiny", "--render", "--cluster", "cluster.yaml", folder=tmp_path)
    assert [moving.returncode, "image" in moving.stderr] == [2, True]
