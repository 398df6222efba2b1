"""The chat client against a server that misbehaves: what is tried again, kept, counted, paid and told."""

import base64
import email.utils
import hashlib
import json
import logging
import pathlib
import pickle
import threading
import time

import pytest
from chat_endpoint import Say, read_image_urls, refuse, running_endpoint, script
from pydantic import ValidationError

import mint_lib.chat
from mint_lib.chat.budget import Budget
from mint_lib.chat.cache import ReplyCache
from mint_lib.chat.client import ChatClient
from mint_lib.chat.endpoint import Endpoint
from mint_lib.chat.questions import ChatRequest, Message, Reply, digest_json
from mint_lib.chat.replies import read_reply
from mint_lib.chat.transport import read_retry_after
from mint_lib.errors import DeadlineExceeded, GateFailed, InvalidInput, MintError, Overloaded, ServingError

CONTENT = "canary-4711 has short stature"
KEY = "sk-canary-key-0815"
PNG = b"\x89PNG\r\n\x1a\n" + b"canary image bytes"
REQUEST = ChatRequest((Message("system", "Be brief."), Message("user", CONTENT)), max_tokens=20)
FAST = {"max_attempts": 3, "attempt_seconds": 5.0, "deadline_seconds": 20.0}
PRICES = {"price_per_million_input": 10_000.0, "price_per_million_output": 50_000.0}


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch):
    monkeypatch.setattr("mint_lib.chat.transport._FIRST_PAUSE_SECONDS", 0.01)


def make_endpoint(server, **changes):
    return Endpoint.model_validate({"base_url": server.base_url, "model": "rules", **FAST, **changes})


def make_client(server, folder, *, keeps_content=False, **changes):
    return ChatClient(make_endpoint(server, **changes), folder=folder, keeps_content=keeps_content)


def ask(client, request=REQUEST, **more):
    with client:
        return client.ask(request, subject="case-1", step="ranking", **more)


def read_trace(folder):
    return [json.loads(line) for path in sorted(folder.glob("traces/*")) for line in path.read_text().splitlines()]


def test_answer_comes_with_its_counts_and_the_request_has_openai_s_shape(tmp_path):
    with running_endpoint(script(Say("hello"))) as server:
        reply = ask(make_client(server, tmp_path))
    assert (reply.text, reply.finish_reason, reply.model) == ("hello", "stop", "rules-1")
    assert (reply.num_input_tokens, reply.num_output_tokens) == (100, 10)
    assert server.paths == ["/v1/chat/completions"]
    assert server.bodies[0] == {
        "model": "rules",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": CONTENT}],
        "max_tokens": 20,
        "temperature": 0.0,
    }
    assert "authorization" not in server.headers[0]


def test_image_travels_as_a_data_url_before_the_text(tmp_path):
    request = ChatRequest((Message("user", "What is it?", (PNG,)),), max_tokens=5, temperature=None)
    with running_endpoint(script(Say("a cell"))) as server:
        ask(make_client(server, tmp_path, max_tokens_field="max_completion_tokens"), request)
    [body] = server.bodies
    assert [part["type"] for part in body["messages"][0]["content"]] == ["image_url", "text"]
    head, _, data = read_image_urls(body)[0].partition(",")
    assert head == "data:image/png;base64"
    assert base64.b64decode(data, validate=True) == PNG
    assert body["max_completion_tokens"] == 5
    assert not {"max_tokens", "temperature"} & set(body)


def test_image_of_another_kind_is_refused(tmp_path):
    request = ChatRequest((Message("user", "What is it?", (b"GIF89a",)),), max_tokens=5)
    with running_endpoint(script(Say())) as server, pytest.raises(InvalidInput, match="neither PNG nor JPEG"):
        ask(make_client(server, tmp_path), request)


@pytest.mark.parametrize(
    "trouble",
    [
        refuse(429, "rate_limit_exceeded", retry_after="0"),
        refuse(500),
        refuse(503),
        refuse(529),
        Say("hello", cut=True),
        Say(raw=b"{ not json"),
        Say(raw=b"[" * 100_000),
        Say(raw=b'{"choices": []}'),
        Say(raw=b'{"choices": [{"message": {"content": 7}}]}'),
        Say(raw=b'{"error": {"message": "upstream"}}'),
    ],
    ids=["429", "500", "503", "529", "cut", "no-json", "deep-json", "no-choice", "no-text", "error-in-200"],
)
def test_passing_trouble_is_weathered(tmp_path, trouble):
    with running_endpoint(script(trouble, trouble, Say("hello"))) as server:
        client = make_client(server, tmp_path)
        assert ask(client).text == "hello"
    assert client.summary()["num_retries"] == 2
    assert [line["attempts"] for line in read_trace(tmp_path)] == [3]


@pytest.mark.parametrize(
    ("trouble", "kind"),
    [(refuse(429), Overloaded), (refuse(502), ServingError), (Say("hello", cut=True), ServingError)],
)
def test_trouble_that_stays_ends_after_the_last_attempt(tmp_path, trouble, kind):
    with running_endpoint(script(trouble)) as server:
        with pytest.raises(kind, match=r"127\.0\.0\.1 gave no usable answer in 3 attempts"):
            ask(make_client(server, tmp_path))
        assert len(server.bodies) == 3


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (400, "unsupported_parameter", r"status 400 \(unsupported_parameter\)"),
        (401, "invalid_api_key", "api_key_variable"),
        (403, "", "may use this model"),
        (404, "model_not_found", "base_url and model"),
        (429, "insufficient_quota", "insufficient_quota"),
        (501, "", "status 501"),
    ],
)
def test_lasting_refusal_is_not_tried_again(tmp_path, status, code, words):
    with running_endpoint(script(refuse(status, code))) as server:
        with pytest.raises(InvalidInput, match=words):
            ask(make_client(server, tmp_path))
        assert len(server.bodies) == 1


def test_redirect_is_not_followed(tmp_path):
    with running_endpoint(script(Say("hello"))) as other:
        away = Say(status=307, raw=b"", headers={"location": f"{other.base_url}/chat/completions"})
        with running_endpoint(script(away)) as server, pytest.raises(InvalidInput, match="Redirects are not followed"):
            ask(make_client(server, tmp_path))
        assert other.bodies == []


def test_proxy_of_the_environment_sees_nothing(tmp_path, monkeypatch):
    with running_endpoint(script(Say("stolen"))) as proxy, running_endpoint(script(Say("hello"))) as server:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, proxy.base_url.removesuffix("/v1"))
        monkeypatch.setenv("NO_PROXY", "")
        monkeypatch.setenv("no_proxy", "")
        assert ask(make_client(server, tmp_path)).text == "hello"
        assert proxy.bodies == []


@pytest.mark.parametrize("code", ["content_filter", "context_length_exceeded", "prompt_too_long"])
def test_refusal_of_one_question_is_an_empty_answer_and_is_not_kept(tmp_path, code):
    with running_endpoint(script(refuse(400, code), Say("hello"))) as server:
        client = make_client(server, tmp_path)
        refused = ask(client)
        assert (refused.text, refused.is_refused, refused.finish_reason) == ("", True, code)
        assert ask(client).text == "hello"


def test_retry_after_is_waited_for(tmp_path):
    with running_endpoint(script(refuse(429, retry_after="1"), Say("hello"))) as server:
        started = time.monotonic()
        assert ask(make_client(server, tmp_path)).text == "hello"
    assert time.monotonic() - started >= 1.0


def test_retry_after_beyond_the_deadline_ends_at_once(tmp_path):
    with running_endpoint(script(refuse(429, retry_after="3600"))) as server:
        started = time.monotonic()
        with pytest.raises(Overloaded, match="deadline of 20 seconds") as caught:
            ask(make_client(server, tmp_path))
    assert caught.value.retry_after_seconds == 3600
    assert time.monotonic() - started < 5


def test_retry_after_is_read_as_seconds_and_as_a_date():
    soon = email.utils.formatdate(time.time() + 90, usegmt=True)
    assert read_retry_after("7") == 7.0
    assert read_retry_after(soon) == pytest.approx(90, abs=2)  # dates have whole seconds
    assert read_retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0
    assert [read_retry_after(value) for value in ("", "soon", "-5", "nan", "²")] == [None] * 5


@pytest.mark.parametrize(
    "slow", [Say(wait_seconds=30.0), Say("x" * 4000, drip_seconds=0.01)], ids=["silent", "dripping"]
)
def test_slow_answer_ends_within_the_deadline(tmp_path, slow):
    with running_endpoint(script(slow)) as server:
        started = time.monotonic()
        with pytest.raises((DeadlineExceeded, ServingError)):
            ask(make_client(server, tmp_path, attempt_seconds=0.3, deadline_seconds=0.6))
    assert time.monotonic() - started < 10  # of 30 and 40 seconds


def test_endless_answer_is_not_read_to_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr("mint_lib.chat.transport._MAX_ANSWER_BYTES", 10_000)
    with running_endpoint(script(Say("x" * 20_000))) as server, pytest.raises(ServingError, match="too long"):
        ask(make_client(server, tmp_path))


def test_closed_port_is_told_by_host(tmp_path):
    with running_endpoint(script(Say())) as server:
        client = make_client(server, tmp_path)
    with pytest.raises(ServingError, match="no connection"):
        ask(client)


def test_same_question_is_asked_once_and_counted_as_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("CHAT_KEY", KEY)
    with running_endpoint(script(Say("hello"))) as server:
        first = ask(make_client(server, tmp_path, api_key_variable="CHAT_KEY"))
        monkeypatch.delenv("CHAT_KEY")  # what is kept needs no key
        again = make_client(server, tmp_path, api_key_variable="CHAT_KEY")
        assert ask(again) == first
        assert len(server.bodies) == 1
        assert again.summary() == {
            **{
                "num_calls": 0,
                "num_cached": 1,
                "num_failed": 0,
                "num_retries": 0,
                "num_input_tokens": 0,
                "num_output_tokens": 0,
            },
            **{"num_calls_without_usage": 0, "answered_by": ["rules-1"], "finish_reasons": {"stop": 1}, "cost": 0.0},
        }


@pytest.mark.parametrize(
    "change", [{"max_tokens": 21}, {"temperature": 0.5}, {"fields": {"top_p": 0.5}}, {"messages": REQUEST.messages[1:]}]
)
def test_another_question_is_another_answer(tmp_path, change):
    with running_endpoint(script(Say("one"), Say("two"))) as server:
        client = make_client(server, tmp_path)
        assert ask(client).text == "one"
        assert ask(client, REQUEST._replace(**change)).text == "two"


def test_another_sample_is_another_answer(tmp_path):
    with running_endpoint(script(Say("one"), Say("two"))) as server:
        client = make_client(server, tmp_path)
        assert [ask(client, sample=sample).text for sample in (0, 1, 0, 1)] == ["one", "two", "one", "two"]


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"null", b"\xff\xfe", "flip", "swap"])
def test_damaged_entry_of_the_cache_is_as_if_it_were_not_there(tmp_path, damage):
    cache = ReplyCache(tmp_path)
    key, other = digest_json("a"), digest_json("b")
    reply = Reply(text="Kidney", finish_reason="stop", model="m", num_input_tokens=1, num_output_tokens=None)
    cache.put(key, reply)
    assert cache.get(key) == reply
    [path] = [path for path in tmp_path.rglob("*") if path.is_file()]
    if damage == "flip":
        path.write_bytes(path.read_bytes().replace(b"Kidney", b"Kidnez"))
    elif damage == "swap":
        cache.put(other, reply)
        [source] = [found for found in tmp_path.rglob("*.json") if found != path]
        path.write_bytes(source.read_bytes())
    else:
        path.write_bytes(damage)
    assert cache.get(key) is None
    cache.put(key, reply)
    assert cache.get(key) == reply
    assert list(tmp_path.rglob(".*")) == []


def test_cache_and_trace_are_for_their_owner_only(tmp_path):
    with running_endpoint(script(Say("hello"))) as server:
        ask(make_client(server, tmp_path / "chat"))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 2
    assert {path.stat().st_mode & 0o077 for path in files} == {0}


def test_cost_is_that_of_the_tokens_the_endpoint_counts(tmp_path):
    with running_endpoint(script(Say("hello"))) as server:
        client = make_client(server, tmp_path, **PRICES)
        ask(client)
    assert client.summary()["cost"] == pytest.approx(100 * 0.01 + 10 * 0.05)
    assert read_trace(tmp_path)[0]["cost"] == pytest.approx(1.5)


def test_uncounted_and_lost_answers_are_paid_at_most(tmp_path):
    endpoint_says = script(Say("hello", cut=True), Say("hello", usage=None))
    with running_endpoint(endpoint_says) as server:
        client = make_client(server, tmp_path, **PRICES)
        ask(client)
        bound = REQUEST.bound_input_tokens(make_endpoint(server)) * 0.01 + 20 * 0.05
    assert client.summary()["cost"] == pytest.approx(2 * bound)
    assert client.summary()["num_calls_without_usage"] == 1


def test_budget_stops_before_it_is_exceeded(tmp_path):
    with running_endpoint(script(Say("hello"))) as server:
        client = make_client(server, tmp_path, max_cost=8.0, **PRICES)
        with pytest.raises(GateFailed, match=r"max_cost of 8 .* is spent") as caught:
            [ask(client, sample=sample) for sample in range(100)]
    assert 3 <= len(server.bodies) < 6
    assert client.summary()["cost"] == pytest.approx(1.5 * len(server.bodies))
    assert client.summary()["cost"] <= 8.0
    assert CONTENT not in str(caught.value)


def test_budget_counts_calls_under_way():
    budget = Budget(1.0)
    budget.reserve(0.6)
    with pytest.raises(GateFailed, match=r"0\.6 set aside"):
        budget.reserve(0.6)
    budget.settle(0.6, cost=0.1)
    budget.reserve(0.6)
    assert budget.spent == pytest.approx(0.1)


@pytest.mark.parametrize("status", [400, 401, 404, 418, 429, 500])
def test_errors_logs_and_trace_hold_neither_content_nor_key(tmp_path, monkeypatch, caplog, status):
    monkeypatch.setenv("CHAT_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    echo = refuse(status, CONTENT, words=f"{CONTENT} {KEY}", **{"x_echo": CONTENT})
    request = ChatRequest((Message("user", CONTENT, (PNG,)),), max_tokens=5)
    with running_endpoint(script(echo)) as server:
        client = make_client(server, tmp_path, api_key_variable="CHAT_KEY")
        with pytest.raises(MintError) as caught:
            ask(client, request)
        assert server.headers[0]["authorization"] == f"Bearer {KEY}"
        server.answer = script(Say(f"{CONTENT} {KEY}"))
        ask(client, request)
    copy = pickle.loads(pickle.dumps(caught.value))
    lines = [path.read_text() for path in tmp_path.glob("traces/*")]
    seen = " ".join([str(caught.value), repr(copy), *lines, *(record.getMessage() for record in caplog.records)])
    assert len(lines[0].splitlines()) == 2
    assert "canary" not in seen
    assert caught.value.__cause__ is None


def test_trace_holds_content_only_where_it_is_asked_for(tmp_path):
    request = ChatRequest((Message("user", CONTENT, (PNG,)),), max_tokens=5)
    with running_endpoint(script(Say("the answer"))) as server:
        ask(make_client(server, tmp_path, keeps_content=True), request)
    [line] = read_trace(tmp_path)
    assert line["answer"] == "the answer"
    assert line["messages"][0]["text"] == CONTENT
    assert line["messages"][0]["images"][0].startswith("sha256:")
    assert line["response"] == f"sha256:{hashlib.sha256(b'the answer').hexdigest()}"


def test_trace_of_a_failed_run_holds_what_was_answered_before_and_what_failed(tmp_path):
    with running_endpoint(script(Say("one"), Say("two", cut=True))) as server:
        client = make_client(server, tmp_path, **PRICES)
        ask(client)
        with pytest.raises(ServingError):
            ask(client, sample=1)
    first, second = read_trace(tmp_path)
    assert (first["sample"], first["error"], first["attempts"]) == (0, None, 1)
    assert (second["sample"], second["response"], second["attempts"]) == (1, None, 3)
    assert "cut off" in second["error"]
    assert first["cost"] + second["cost"] == pytest.approx(client.summary()["cost"])
    assert (client.summary()["num_calls"], client.summary()["num_failed"]) == (2, 1)


def test_end_of_the_block_ends_calls_that_wait(tmp_path):
    caught = []
    with running_endpoint(script(refuse(503, retry_after="15"))) as server:
        client = make_client(server, tmp_path)

        def call():
            try:
                client.ask(REQUEST, subject="case", step="step")
            except MintError as error:
                caught.append(error)

        with client:
            thread = threading.Thread(target=call)
            thread.start()
            while not server.bodies:
                time.sleep(0.01)
            time.sleep(0.1)
        thread.join(3)
        assert not thread.is_alive()
    assert isinstance(caught[0], ServingError)
    with pytest.raises(ServingError, match="run stops"):
        client.ask(REQUEST, subject="case", step="step")


def test_answer_under_way_is_kept_when_the_block_is_told_to_stop(tmp_path):
    with running_endpoint(script(Say("hello", wait_seconds=0.4))) as server:
        client = make_client(server, tmp_path)
        with client:
            thread = threading.Thread(target=lambda: client.ask(REQUEST, subject="case", step="step"))
            thread.start()
            while not server.bodies:
                time.sleep(0.01)
            client.stop()
            thread.join(5)
        assert ask(client).text == "hello"
        assert len(server.bodies) == 1


def test_reply_in_parts_is_joined():
    parts = [{"type": "thinking", "text": "no"}, {"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    reply = read_reply(json.dumps({"choices": [{"message": {"content": parts}}]}).encode())
    assert reply is not None
    assert reply.text == "ab"


def test_reply_with_half_a_surrogate_pair_can_be_sent_on(tmp_path):
    reply = read_reply(b'{"choices": [{"message": {"content": "a \\ud800 b"}, "finish_reason": "<script>"}]}')
    assert reply is not None
    assert reply.text.encode() == b"a ? b"
    assert reply.finish_reason == ""
    ReplyCache(tmp_path).put(digest_json("k"), reply)
    assert ReplyCache(tmp_path).get(digest_json("k")) == reply


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"base_url": "ftp://host/v1"}, "must be an address"),
        ({"base_url": "https://user:canary@host/v1"}, "must be an address"),
        ({"base_url": "https://host/v1?key=canary"}, "must be an address"),
        ({"base_url": "https://allowed\\@other/v1"}, "must be an address"),
        ({"base_url": "https://h\u00f6st/v1"}, "must be an address"),
        ({"base_url": "http://127.0.0.1:99999999/v1"}, "must be an address"),
        ({"base_url": "https://api.example.org/v1"}, "allow_sending_cases_to: api.example.org"),
        (
            {"base_url": "https://api.example.org/v1", "allow_sending_cases_to": "example.org"},
            "allow_sending_cases_to: api.example.org",
        ),
        ({"base_url": "http://0.0.0.0/v1"}, "allow_sending_cases_to"),
        ({"base_url": "http://2130706433/v1"}, "allow_sending_cases_to"),
        ({"api_key_variable": "sk-canary"}, "never the key itself"),
        ({"max_cost": 1.0}, "max_cost needs prices"),
        ({"api_key": "canary"}, "Extra inputs"),
    ],
)
def test_endpoint_that_may_not_be_asked_is_refused(change, words):
    from mint_lib.plugins import describe_validation_error

    values = {"base_url": "http://127.0.0.1:1/v1", "model": "m", **change}
    with pytest.raises(ValidationError, match=words) as caught:
        Endpoint.model_validate(values)
    assert "canary" not in describe_validation_error(caught.value, Endpoint, where="endpoint")


@pytest.mark.parametrize(
    "base_url", ["http://localhost:8000/v1", "http://[::1]:8000/v1", "http://127.8.9.10/openai/v1/", "http://LOCALHOST"]
)
def test_loopback_needs_no_permission(base_url):
    endpoint = Endpoint(base_url=base_url, model="m")
    assert endpoint.is_local
    assert endpoint.url == f"{base_url.rstrip('/')}/chat/completions"


def test_host_that_is_named_may_see_cases():
    values = {"base_url": "https://Models.example.org:8443/v1", "model": "m"}
    assert Endpoint(**values, allow_sending_cases_to="models.example.org").host == "models.example.org"


@pytest.mark.parametrize(("value", "words"), [(None, "is not set"), ("", "is not set"), ("a\x01b", "no key has")])
def test_key_that_is_missing_or_no_key_is_told_by_its_variable(tmp_path, monkeypatch, value, words):
    monkeypatch.delenv("CHAT_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("CHAT_KEY", value)
    with running_endpoint(script(Say())) as server, pytest.raises(InvalidInput, match=f"CHAT_KEY.*{words}"):
        ask(make_client(server, tmp_path, api_key_variable="CHAT_KEY"))


def test_client_knows_nothing_of_rankings():
    folder = pathlib.Path(mint_lib.chat.__file__).parent
    for name in ("client", "transport", "cache", "trace", "budget", "endpoint", "questions", "replies"):
        source = (folder / f"{name}.py").read_text()
        assert not [word for word in ("Label", "Case,", "mint_lib.teacher", "clinical") if word in source], name
