"""The model server as a real process on loopback, asked by httpx and by the public `openai` client."""

import asyncio
import json
import math
import pathlib
import socket
import statistics
import time
from collections.abc import Iterator
from typing import Any

import httpx
import psutil
import pytest
import serving_process
from serving_process import ServerOptions, running_server

from mint_lib.server.access import TokensFile, issue_token

TEXT = "A boy with short stature, hearing loss and a heart defect."
CANARY = "canary-9917"


@pytest.fixture(scope="module")
def server() -> Iterator[Any]:
    """A server without tokens."""
    with running_server(ServerOptions()) as running:
        yield running


@pytest.fixture(scope="module")
def expected() -> dict[str, float]:
    """Probability of each label id for TEXT, by the training side's own ranking."""
    from mint_lib.reading import TextReader
    from mint_lib.student import StudentConfig, load_student, load_tokenizer, rank_labels
    from mint_lib.template import Template

    config = StudentConfig(model="tiny")
    template = Template.load("rare_disease_brief").with_num_answers(3)
    labels = serving_process.LABELS
    scores = rank_labels(
        load_student(config), TextReader(load_tokenizer(config)), template, labels, [template.prompt(TEXT)]
    )
    return {label.id: math.exp(score) for label, score in zip(labels, scores[0], strict=True)}


@pytest.fixture
def openai_client(server: Any) -> Any:
    """The public client."""
    openai = pytest.importorskip("openai", reason="the public openai client is not installed")
    return openai.OpenAI(base_url=f"{server.url}/openai/v1", api_key="none", max_retries=0)


def test_ranking_over_http_is_that_of_the_training_side(server: Any, expected: dict[str, float]) -> None:
    answer = httpx.post(f"{server.url}/v1/models/tiny:predict", json={"instances": [{"text": TEXT}] * 3}).json()
    assert len(answer["predictions"]) == 3
    for prediction in answer["predictions"]:
        found = {label["id"]: label["probability"] for label in prediction["labels"]}
        # Another order of float32 sums.
        assert found == pytest.approx(expected, abs=1e-4)
        assert prediction["exact"] is True
    assert answer["model"]["reference"] == str(serving_process.REFERENCE)


def test_openai_client_gets_whole_answers_and_streams(openai_client: Any) -> None:
    assert [model.id for model in openai_client.models.list()] == ["tiny"]
    ask = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_completion_tokens": 20}
    whole = openai_client.chat.completions.create(**ask)
    chunks = list(openai_client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert streamed == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage
    assert whole.usage.completion_tokens <= 20
    assert whole.choices[0].finish_reason in ("stop", "length")
    prompt = {"model": "tiny", "prompt": "The patient", "max_tokens": 8}
    text = openai_client.completions.create(**prompt).choices[0].text
    pieces = [chunk.choices[0].text for chunk in openai_client.completions.create(**prompt, stream=True)]
    assert "".join(pieces) == text


def test_openai_client_gets_a_ranked_list_of_the_label_set(openai_client: Any) -> None:
    from mint_lib.template import Template

    answer = openai_client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": TEXT}],
        temperature=1.5,
        seed=4,
        extra_body={"as_case": True, "answer_format": "ranked_list"},
    )
    names = Template.load("rare_disease_brief").with_num_answers(3).parse(answer.choices[0].message.content)
    assert answer.choices[0].finish_reason == "stop"
    assert len(names) == len(set(names)) == 3
    assert set(names) <= set(serving_process.NAMES)


def test_openai_client_gets_the_same_answer_for_the_same_seed(openai_client: Any) -> None:
    def ask(seed: int) -> str:
        answer = openai_client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "hello"}], max_tokens=30, temperature=1.0, seed=seed
        )
        return str(answer.choices[0].message.content)

    assert ask(1) == ask(1)
    assert len({ask(seed) for seed in range(5)}) > 1


def test_openai_client_raises_its_own_errors(openai_client: Any) -> None:
    import openai

    ask = {"messages": [{"role": "user", "content": "hello"}]}
    with pytest.raises(openai.BadRequestError, match="bogus") as caught:
        openai_client.chat.completions.create(model="tiny", **ask, extra_body={"bogus": 1})
    assert caught.value.param == "bogus"
    with pytest.raises(openai.NotFoundError):
        openai_client.chat.completions.create(model="nobody", **ask)
    with pytest.raises(openai.BadRequestError, match="512 tokens"):
        openai_client.chat.completions.create(model="tiny", **ask, max_tokens=5000)


def test_tokens_are_needed_and_public_clients_send_them(tmp_path: pathlib.Path) -> None:
    openai = pytest.importorskip("openai", reason="the public openai client is not installed")
    token, entry = issue_token("clinic-a")
    path = tmp_path / "tokens.json"
    path.write_text(TokensFile(tokens=(entry,)).model_dump_json())
    with running_server(ServerOptions(tokens_file=str(path))) as server:
        client = openai.OpenAI(base_url=f"{server.url}/openai/v1", api_key=token, max_retries=0)
        assert [model.id for model in client.models.list()] == ["tiny"]
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{server.url}/openai/v1", api_key="wrong", max_retries=0).models.list()
        fresh, entry = issue_token("clinic-b")
        path.write_text(TokensFile(tokens=(entry,)).model_dump_json())
        time.sleep(1.1)
        assert httpx.get(f"{server.url}/v1/models", headers={"authorization": f"Bearer {token}"}).status_code == 401
        assert httpx.get(f"{server.url}/v1/models", headers={"authorization": f"Bearer {fresh}"}).status_code == 200
        assert server.end() == 0


@pytest.mark.parametrize("has_length", [True, False])
def test_body_of_50_megabytes_is_refused_with_flat_memory(server: Any, has_length: bool) -> None:
    process = psutil.Process(server.process.pid)
    url = f"{server.url}/v1/models/tiny:predict"
    chunk = b"x" * 65536

    def stream() -> Iterator[bytes]:
        for _ in range(800):
            yield chunk

    before = process.memory_info().rss
    for _ in range(3):
        content: Any = chunk * 800 if has_length else stream()
        response = httpx.post(url, content=content, headers={"content-type": "application/json"}, timeout=30)
        assert response.status_code == 413
    # 150 MB were sent; a server that kept even one body would have grown by 50.
    assert process.memory_info().rss - before < 15 * 1024**2
    assert httpx.post(url, json={"instances": [{"text": TEXT}]}).status_code == 200


def test_client_that_disconnects_stops_the_work(server: Any) -> None:
    def running() -> float:
        return _read_metric(server, "mint_serving_running_requests") + _read_metric(server, "mint_serving_queue_depth")

    body = {"model": "tiny", "prompt": "a", "temperature": 2.0, "stream": True}
    with httpx.stream("POST", f"{server.url}/openai/v1/completions", json=body) as response:
        next(response.iter_lines())
    deadline = time.monotonic() + 10
    while running() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert running() == 0


def test_log_holds_no_content(server: Any) -> None:
    httpx.post(f"{server.url}/v1/models/tiny:predict", json={"instances": [{"text": CANARY}]})
    httpx.post(f"{server.url}/v1/models/{CANARY}:predict", json={"instances": [{"text": CANARY}]})
    httpx.get(f"{server.url}/{CANARY}?{CANARY}", headers={"x-request-id": "last-one"})
    deadline = time.monotonic() + 10
    while not any("last-one" in line for line in server.log) and time.monotonic() < deadline:
        time.sleep(0.05)
    log = "".join(server.log)
    assert "last-one" in log
    assert CANARY not in log
    line = next(line for line in server.log if "last-one" in line)
    entry = json.loads(line[line.index("{") :])
    assert {key: entry[key] for key in ("route", "status", "tenant")} == {
        "route": "other",
        "status": 404,
        "tenant": "anonymous",
    }


def _read_metric(server: Any, name: str) -> float:
    text = httpx.get(f"{server.url}/metrics").text
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    return float(lines[name])


async def _drain(server: Any, num_requests: int) -> tuple[list[int], list[int], float]:
    """Statuses of answers under way at SIGTERM, of readiness after it, and seconds from it to the last answer."""
    async with httpx.AsyncClient(base_url=server.url, timeout=60, limits=httpx.Limits(max_connections=None)) as client:
        body = {"model": "tiny", "prompt": "a", "temperature": 2.0, "max_tokens": 450}
        running = [
            asyncio.create_task(client.post("/openai/v1/completions", json={**body, "seed": seed}))
            for seed in range(num_requests)
        ]
        while await asyncio.to_thread(_read_metric, server, "mint_serving_queue_depth") < num_requests - 10:
            await asyncio.sleep(0.02)
        server.process.terminate()
        told = time.monotonic()
        await asyncio.sleep(0.2)
        probes = ("/readyz", "/v2/health/ready", "/v1/models/tiny")
        readiness = [(await client.get(path)).status_code for path in probes]
        late = await client.post("/openai/v1/completions", json={**body, "max_tokens": 5})
        answers = [*await asyncio.gather(*running), late]
        return [answer.status_code for answer in answers], readiness, time.monotonic() - told


def test_server_that_is_told_to_end_answers_everything_first() -> None:
    drain_seconds = 2.0
    with running_server(ServerOptions(max_batch=4, drain_seconds=drain_seconds)) as server:
        statuses, readiness, seconds = asyncio.run(_drain(server, 28))
        assert readiness == [503, 503, 503]
        assert statuses == [200] * 29
        assert seconds > drain_seconds, "nothing was under way when the server stopped listening: give it more to do"
        assert server.process.wait(30) == 0
        port = int(server.url.rsplit(":", 1)[1])
        with pytest.raises(OSError), socket.create_connection(("127.0.0.1", port), timeout=2):
            pass


def test_server_that_is_told_to_end_while_loading_ends_at_once() -> None:
    with running_server(ServerOptions(load_seconds=60, drain_seconds=30), wait_until_ready=False) as server:
        assert httpx.get(f"{server.url}/healthz").status_code == 200
        assert httpx.get(f"{server.url}/readyz").status_code == 503
        answer = httpx.post(f"{server.url}/v1/models/tiny:predict", json={"instances": [{"text": TEXT}]})
        assert answer.status_code == 503
        started = time.monotonic()
        assert server.end() == 0
        assert time.monotonic() - started < 5


def test_server_under_ten_times_its_load_refuses_with_a_time_and_stays_quick() -> None:
    async def flood(url: str) -> list[tuple[int, str | None, float]]:
        async def ask(client: httpx.AsyncClient, seed: int) -> tuple[int, str | None, float]:
            body = {"model": "tiny", "prompt": "a", "temperature": 2.0, "max_tokens": 24, "seed": seed}
            started = time.monotonic()
            answer = await client.post("/openai/v1/completions", json=body)
            return answer.status_code, answer.headers.get("retry-after"), time.monotonic() - started

        async with httpx.AsyncClient(base_url=url, timeout=60, limits=httpx.Limits(max_connections=None)) as client:
            return list(await asyncio.gather(*(ask(client, seed) for seed in range(80))))

    with running_server(ServerOptions(max_batch=2, max_queued=6, drain_seconds=0)) as server:
        answers = asyncio.run(flood(server.url))
        assert {status for status, _, _ in answers} == {200, 429}
        assert all(retry and 1 <= int(retry) <= 60 for status, retry, _ in answers if status == 429)
        assert statistics.quantiles([s for status, _, s in answers if status == 200], n=20)[-1] < 20
        assert httpx.get(f"{server.url}/readyz").status_code == 200


def test_page_has_a_policy_with_a_fresh_nonce() -> None:
    with running_server(ServerOptions(page=True), wait_until_ready=False) as server:
        first, second = httpx.get(server.url), httpx.get(server.url)
        assert first.headers["content-type"].startswith("text/html")
        policies = [answer.headers["content-security-policy"] for answer in (first, second)]
        assert policies[0] != policies[1]
        nonce = policies[0].split("script-src 'nonce-")[1].split("'")[0]
        assert f'nonce="{nonce}"' in first.text
        assert "{{nonce}}" not in first.text
        assert "default-src 'none'" in policies[0]


def test_address_that_is_taken_is_refused_in_words(server: Any) -> None:
    from mint_lib.errors import InvalidInput
    from mint_lib.server.access import AccessConfig
    from mint_lib.server.app import build_server
    from mint_lib.server.lifecycle import Readiness
    from mint_lib.server.limits import RequestLimits
    from mint_lib.server.metrics import ServingMetrics
    from mint_lib.server.students import Lineup

    lineup, readiness = Lineup(), Readiness()
    second = build_server(
        lineup,
        access=AccessConfig(mode="off"),
        limits=RequestLimits(),
        metrics=ServingMetrics(lineup, readiness),
        readiness=readiness,
        page=False,
        host="127.0.0.1",
        port=int(server.url.rsplit(":", 1)[1]),
        drain_seconds=0,
        grace_seconds=1,
    )
    with pytest.raises(InvalidInput, match="another port"):
        second.bind()
