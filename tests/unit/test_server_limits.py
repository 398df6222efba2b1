import asyncio
import dataclasses
import gc
import json
import math
import time
from typing import Any

import httpx
import pytest

from mint_lib.engine.requests import Failed
from mint_lib.errors import ComputationFailed, DeadlineExceeded, Draining, InvalidInput, Overloaded
from mint_lib.server.strict_json import parse_object

PREDICT = "/v1/models/tiny:predict"
GOOD = b'{"instances": [{"text": "a boy"}]}'
CANARY = "canary-8841"


def post(served: Any, body: Any, *, path: str = PREDICT, content_type: str = "application/json", **headers: str) -> Any:
    return served.ask("POST", path, content=body, headers={"content-type": content_type, **headers})


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"null",
        b'"text"',
        b"{",
        b'{"instances": [{"text": NaN}]}',
        b'{"parameters": {"top_k": Infinity}}',
        b'{"parameters": {"top_k": 1e400}}',
        b'{"parameters": {"top_k": -1e400}}',
        b'{"parameters": {"top_k": 9223372036854775808}}',
        b'{"parameters": {"top_k": ' + b"9" * 5000 + b"}}",
        b'{"instances": [], "instances": []}',
        b'{"instances": [{"text": "a", "text": "b"}]}',
        b'{"instances": [{"text": "\\ud800"}]}',
        b'{"instances": [{"text": "\\u0000"}]}',
        b'{"\\u0000": 1}',
        b'{"instances": [{"text": "\xff\xfe"}]}',
        b"\xef\xbb\xbf" + GOOD,
        b'{"a":' * 33 + b"1" + b"}" * 33,
        b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        GOOD + GOOD,
    ],
    ids=range(21),
)
@pytest.mark.parametrize("path", [PREDICT, "/v2/models/tiny/infer", "/openai/v1/chat/completions"])
def test_body_that_parsers_read_differently_is_refused_without_echo(served: Any, path: str, body: bytes) -> None:
    response = post(served, body.replace(b"a boy", CANARY.encode()), path=path)
    assert response.status_code == 400
    assert CANARY not in response.text
    assert response.json()["error"]
    assert served.engine.requests == []


@pytest.mark.parametrize("depth", [1, 31, 32])
def test_json_up_to_the_depth_is_read(depth: int) -> None:
    body = '{"a":' * depth + "1" + "}" * depth
    assert parse_object(body.encode(), max_depth=32) == json.loads(body)
    with pytest.raises(InvalidInput, match="deeper than"):
        parse_object(body.encode(), max_depth=depth - 1)


def test_json_with_ordinary_content_is_read_as_by_the_standard_parser() -> None:
    content = {"a": [1, -2.5, 1e300, True, None, "ü\U0001f600\n"], "b": {"c": "", "d": -(2**63), "e": 2**63 - 1}}
    assert parse_object(json.dumps(content).encode(), max_depth=5) == content
    assert parse_object(json.dumps(content, ensure_ascii=False).encode(), max_depth=5) == content


@pytest.mark.parametrize(
    ("content_type", "expected"),
    [
        ("application/json", 200),
        ("application/json; charset=utf-8", 200),
        ('Application/JSON;charset="UTF-8"', 200),
        ("application/json; charset=utf-16", 415),
        ("text/plain", 415),
        ("application/octet-stream", 415),
        ("application/cloudevents+json", 415),
        ("", 415),
    ],
)
def test_content_type_other_than_json_is_refused(served: Any, content_type: str, expected: int) -> None:
    assert post(served, GOOD, content_type=content_type).status_code == expected


def test_content_encoding_is_refused(served: Any) -> None:
    assert post(served, GOOD, **{"content-encoding": "gzip"}).status_code == 415


def test_headers_of_cloud_events_and_binary_tensors_change_nothing(served: Any) -> None:
    headers = {"ce-id": "1", "ce-source": "x", "ce-type": "y", "ce-specversion": "1.0"}
    plain = post(served, GOOD)
    marked = post(served, GOOD, **headers, **{"inference-header-content-length": "4"})
    assert marked.json() == plain.json()
    assert not any(name.startswith("ce-") for name in marked.headers)


@pytest.mark.parametrize("size", [1024, 1025])
def test_body_beyond_the_limit_is_refused_with_and_without_a_length(make_served: Any, size: int) -> None:
    served = make_served(limits={"max_body_bytes": 1024})
    body = GOOD + b" " * (size - len(GOOD))

    async def chunks() -> Any:
        for start in range(0, size, 100):
            yield body[start : start + 100]

    for content in (body, chunks()):
        assert post(served, content).status_code == (200 if size <= 1024 else 413)


def test_body_beyond_the_limit_is_not_kept(make_served: Any) -> None:
    served = make_served(limits={"max_body_bytes": 1024})
    num_sent = 0

    async def endless() -> Any:
        nonlocal num_sent
        while num_sent < 1000:
            num_sent += 1
            yield b"x" * 1024**2

    assert post(served, endless()).status_code == 413
    assert num_sent < 100


def test_instances_beyond_the_limit_are_refused_with_counts(make_served: Any) -> None:
    served = make_served(limits={"max_instances": 2})
    assert served.predict({"instances": [{"text": "a"}] * 2}).status_code == 200
    response = served.predict({"instances": [{"text": "a"}] * 3})
    assert response.status_code == 400
    assert "3 cases" in response.json()["error"]


def test_prompt_beyond_the_window_is_refused_with_counts(served: Any) -> None:
    num_tokens = len(served.student.encode_turns(served.student.template.prompt("boy " * 400)).ids)
    response = served.predict({"instances": [{"text": "a"}, {"text": "boy " * 400}]})
    assert response.status_code == 400
    assert response.json()["code"] == "prompt_too_long"
    assert f"{num_tokens} tokens" in response.json()["error"]
    assert "256 tokens" in response.json()["error"]
    assert response.json()["error"].startswith("Case 1:")
    assert served.engine.requests == []


@pytest.mark.parametrize(
    ("error", "status", "retry"),
    [
        (Overloaded("Full.", 7.2), 429, "8"),
        (Draining("Down."), 503, "5"),
        (DeadlineExceeded("Late."), 504, None),
        (ComputationFailed("Broken."), 500, None),
        (InvalidInput("Bad."), 400, None),
        (RuntimeError(CANARY), 500, None),
    ],
)
def test_error_of_the_engine_has_its_status(served: Any, error: Exception, status: int, retry: str | None) -> None:
    def when_asked() -> None:
        served.engine.refusal = error

    def while_running() -> None:
        served.engine.refusal = None
        served.engine.script = lambda _: [Failed(error=error)]

    for prepare in (when_asked, while_running):
        prepare()
        for response in (served.predict(), served.chat()):
            assert response.status_code == status
            assert response.headers.get("retry-after") == retry
            assert CANARY not in response.text
            assert response.headers["x-request-id"] in response.text


def test_deadline_that_passes_ends_the_request_and_its_work(make_served: Any, script: Any) -> None:
    served = make_served(limits={"deadline_seconds": 0.3})
    served.engine.script = lambda _: [30.0, *script.rank_all()]
    started = time.monotonic()
    response = served.predict(headers={"x-request-id": "late"})
    assert response.status_code == 504
    assert time.monotonic() - started < 5
    assert served.engine.cancelled["late"].wait(5)


def test_deadline_of_the_client_is_taken_if_shorter(served: Any) -> None:
    served.predict(headers={"x-request-timeout-seconds": "7.5"})
    served.predict(headers={"x-request-timeout-seconds": "900"})
    left = [request.deadline - time.monotonic() for request in served.engine.requests]
    assert 6 < left[0] <= 7.5
    assert 55 < left[1] <= 60


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "soon", ""])
def test_deadline_of_the_client_that_is_no_number_is_refused(served: Any, value: str) -> None:
    assert served.predict(headers={"x-request-timeout-seconds": value}).status_code == 400


def test_requests_beyond_the_concurrency_are_refused_and_health_is_not(make_served: Any, script: Any) -> None:
    served = make_served(limits={"max_concurrent": 2})
    served.engine.script = lambda _: [0.5, *script.rank_all()]

    async def work(client: httpx.AsyncClient) -> tuple[list[int], int]:
        body = {"instances": [{"text": "a"}]}
        running = [asyncio.create_task(client.post(PREDICT, json=body)) for _ in range(5)]
        await asyncio.sleep(0.1)
        health = await client.get("/healthz")
        return sorted(response.status_code for response in await asyncio.gather(*running)), health.status_code

    assert served.run(work) == ([200, 200, 429, 429, 429], 200)
    assert served.predict().status_code == 200


@pytest.mark.parametrize("path", [PREDICT, "/openai/v1/chat/completions"])
def test_client_that_goes_away_ends_its_work(served: Any, script: Any, path: str) -> None:
    served.engine.script = lambda _: [0.05, *script.say([5] * 3, pause_seconds=20.0)]
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "stream": True}
    body = json.dumps(chat if "openai" in path else {"instances": [{"text": "a"}]}).encode()
    messages = asyncio.run(abandon(served, path, body))
    assert served.engine.cancelled["gone"].wait(5)
    assert 'outcome="abandoned"' in served.figures()
    assert all(message.get("status", 200) == 200 for message in messages)


async def abandon(served: Any, path: str, body: bytes) -> list[Any]:
    """Send a request as a server would and report a disconnect once the engine has it."""
    headers = {
        "authorization": f"Bearer {served.tokens['all']}",
        "content-type": "application/json",
        "x-request-id": "gone",
    }
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
    }
    incoming = [{"type": "http.request", "body": body, "more_body": False}]
    messages: list[Any] = []

    async def receive() -> Any:
        if incoming:
            return incoming.pop()
        while "gone" not in served.engine.cancelled:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        messages.append(message)

    await asyncio.wait_for(served.application(scope, receive, send), 10)
    return messages


def test_student_is_kept_until_the_requests_that_it_answers_end(served: Any, script: Any) -> None:
    retired: list[Any] = []
    served.engine.script = lambda _: [0.4, *script.rank_all()]

    async def work(client: httpx.AsyncClient) -> tuple[int, httpx.Response]:
        running = asyncio.create_task(client.post(PREDICT, json={"instances": [{"text": "a"}]}))
        while not served.engine.requests:
            await asyncio.sleep(0.01)
        gc.collect()
        reference = served.student.reference.model_copy(update={"version": "v000008"})
        served.lineup.put(dataclasses.replace(served.student, reference=reference), retire=retired.append)
        return len(retired), await running

    num_retired_before, response = served.run(work)
    assert num_retired_before == 0
    assert retired == [served.student]
    assert response.json()["model"]["reference"] == str(served.student.reference)
    assert served.predict().json()["model"]["reference"] != str(served.student.reference)


def test_student_is_released_when_its_request_ends(served: Any) -> None:
    retired: list[Any] = []
    successor = dataclasses.replace(served.student)
    for _ in range(3):
        assert served.predict().status_code == 200
        assert served.chat(stream=True).status_code == 200
    served.engine.refusal = Overloaded("Full.")
    served.predict()
    served.lineup.put(successor, retire=retired.append)
    assert retired == [served.student]


@pytest.mark.parametrize(
    ("given", "is_kept"),
    [
        ("abc-1.2_X", True),
        ("x" * 64, True),
        ("x" * 65, False),
        ("", False),
        ("a b", False),
        ("a%0d%0aset-cookie:x", False),
        ("é", False),
    ],
)
def test_request_id_of_the_client_is_taken_if_it_is_one_plain_word(served: Any, given: str, is_kept: bool) -> None:
    response = served.ask("GET", "/nowhere", headers=[("x-request-id", given.encode())])
    assert (response.headers["x-request-id"] == given) is is_kept
    assert response.json()["request_id"] == response.headers["x-request-id"]


@pytest.mark.parametrize(
    "name",
    [
        "../../etc",
        "..%2f..%2fetc",
        "%2e%2e",
        "..",
        "x" * 10_000,
        "ü\u202e",
        "a%0ab",
        "a%00b",
        "%7B%7Bx%7D%7D",
        "a:b",
    ],
)
def test_model_name_that_nobody_has_finds_nothing(served: Any, name: str, caplog: Any) -> None:
    caplog.set_level("DEBUG", logger="mint_lib")
    for method, path in (("GET", f"/v1/models/{name}"), ("POST", f"/v2/models/{name}/infer")):
        body = {"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": ["a"]}]}
        response = served.ask(method, path, json=body if method == "POST" else None)
        assert response.status_code == 404
        assert len(response.text) < 500
    answer = served.ask("POST", "/openai/v1/completions", json={"model": name[:200], "prompt": "a"})
    assert answer.status_code == 404
    shown = caplog.text + served.figures()
    assert not any(piece in shown for piece in (name, "etc", "x" * 100, "\u202e", "a:b"))


def test_loading_server_is_alive_but_not_ready(make_served: Any) -> None:
    served = make_served()
    served.readiness._state = "loading"
    assert served.ask("GET", "/healthz", token=None).status_code == 200
    for path in ("/readyz", "/v2/health/ready", "/v1/models/tiny", "/v2/models/tiny/ready"):
        response = served.ask("GET", path)
        assert response.status_code == 503
        assert int(response.headers["retry-after"]) >= 1


def test_draining_server_is_not_ready_but_answers(served: Any) -> None:
    served.readiness.begin_drain()
    assert served.ask("GET", "/readyz", token=None).status_code == 503
    assert served.ask("GET", "/v1/models/tiny").status_code == 503
    response = served.predict()
    assert response.status_code == 200
    assert response.headers["connection"] == "close"


def test_probabilities_are_the_scores_divided_by_the_temperature(make_served: Any, script: Any) -> None:
    for temperature in (1.0, 2.5):
        served = make_served(temperature=temperature, num_calibration_cases=40, abstain_below=0.75)
        prediction = served.predict({"instances": [{"text": "a"}], "parameters": {"top_k": 6}}).json()["predictions"][0]
        weights = [math.exp(score / temperature) for score in script.scores]
        expected = sorted((weight / sum(weights) for weight in weights), reverse=True)
        found = [label["probability"] for label in prediction["labels"]]
        # The same double arithmetic in another order.
        assert found == pytest.approx(expected, rel=1e-12)
        assert prediction["labels"][0]["name"] == script.labels[1].name
        assert prediction["calibrated"] is True
        assert prediction["abstained"] is (expected[0] < 0.75)
