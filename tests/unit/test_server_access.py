import datetime
import hashlib
import json
import logging
import os
from typing import Any

import pytest

from mint_lib.errors import InvalidInput
from mint_lib.server.access import AccessConfig, TokenBook, TokensFile, issue_token
from mint_lib.server.app import build_server
from mint_lib.server.calls import ROUTES, find_route
from mint_lib.server.lifecycle import Readiness
from mint_lib.server.limits import RequestLimits
from mint_lib.server.metrics import ServingMetrics
from mint_lib.server.students import Lineup

BODIES = {
    "/v1/models/{model_name}:predict": {"instances": [{"text": "a boy"}]},
    "/v2/models/{model_name}/infer": {
        "inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": ["a boy"]}]
    },
    "/openai/v1/completions": {"model": "tiny", "prompt": "a boy"},
    "/openai/v1/chat/completions": {"model": "tiny", "messages": [{"role": "user", "content": "a boy"}]},
}
CLOSED = [route for route in ROUTES if route.needs != "nothing"]


def ask(served: Any, route: Any, token: str | None) -> Any:
    path = route.path.replace("{model_name}", "tiny")
    more = {"json": BODIES[route.path]} if route.method == "POST" else {}
    return served.ask(route.method, path, token=token, **more)


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.path)
def test_access_with_a_valid_token_is_given(served: Any, route: Any) -> None:
    assert ask(served, route, "all").status_code == 200


@pytest.mark.parametrize("token", [None, "bad", "expired"])
@pytest.mark.parametrize("route", CLOSED, ids=lambda route: route.path)
def test_access_without_a_valid_token_is_refused_on_every_closed_route(
    served: Any, route: Any, token: str | None
) -> None:
    response = ask(served, route, token)
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert "tiny" not in response.text


def test_access_refusals_do_not_tell_unknown_from_expired(served: Any) -> None:
    texts = []
    for token in ("bad", "expired"):
        response = served.predict(token=token, headers={"x-request-id": "same"})
        texts.append((response.status_code, response.text))
    assert texts[0] == texts[1]


@pytest.mark.parametrize("route", [r for r in CLOSED if "{model_name}" in r.path or r.path in BODIES])
def test_access_of_another_tenants_token_to_a_model_is_refused(served: Any, route: Any) -> None:
    assert ask(served, route, "other").status_code == 403


def test_access_of_a_limited_token_does_not_tell_which_models_exist(served: Any) -> None:
    answers = [
        served.ask("GET", f"/v1/models/{name}", token="other", headers={"x-request-id": "same"})
        for name in ("tiny", "nobody")
    ]
    assert {answer.status_code for answer in answers} == {403}
    assert answers[0].text == answers[1].text
    for path in ("/v1/models", "/v2/models", "/openai/v1/models"):
        assert "tiny" not in served.ask("GET", path, token="other").text
        assert "tiny" in served.ask("GET", path).text


@pytest.mark.parametrize("route", CLOSED, ids=lambda route: route.path)
def test_access_without_the_scope_is_refused(served: Any, route: Any) -> None:
    for token, scope in (("infer", "infer"), ("metrics", "metrics")):
        expected = 200 if route.needs in ("token", scope) else 403
        assert ask(served, route, token).status_code == expected


@pytest.mark.parametrize(
    "path", ["/v2/repository/models/tiny/unload", "/v2/repository/models/tiny/load", "/v1/models/tiny:explain", "/docs"]
)
def test_access_to_routes_of_kserve_that_we_do_not_serve_finds_nothing(served: Any, path: str) -> None:
    assert served.ask("POST", path, json={}).status_code == 404
    assert served.ask("POST", path, json={}, token=None).status_code == 401


@pytest.mark.parametrize("header", ["Basic abc", "Bearer", "Bearer  ", "bearer x y", "Bearer " + "x" * 9000])
def test_access_with_a_malformed_header_is_refused(served: Any, header: str) -> None:
    response = served.ask("GET", "/v1/models", token=None, headers={"authorization": header})
    assert response.status_code == 401


def test_access_with_two_authorization_headers_is_refused(served: Any) -> None:
    pair = ("authorization", f"Bearer {served.tokens['all']}")
    assert served.ask("GET", "/v1/models", token=None, headers=[pair]).status_code == 200
    assert served.ask("GET", "/v1/models", token=None, headers=[pair, pair]).status_code == 401


@pytest.mark.parametrize(
    ("host", "expected"), [("localhost:80", 200), ("127.0.0.1", 200), ("[::1]:9", 200), ("evil.example:80", 403)]
)
def test_access_that_is_off_answers_to_loopback_names_only(make_served: Any, host: str, expected: int) -> None:
    served = make_served(access="off")
    assert served.ask("GET", "/v1/models", token=None, headers={"host": host}).status_code == expected


def test_access_that_is_off_gives_the_tenant_anonymous(make_served: Any) -> None:
    served = make_served(access="off")
    assert served.predict(token=None).status_code == 200
    assert served.engine.requests[0].tenant == "anonymous"


def test_access_that_is_off_on_a_public_address_is_refused() -> None:
    lineup, readiness = Lineup(), Readiness()
    with pytest.raises(InvalidInput, match=r"loopback.*0\.0\.0\.0"):
        build_server(
            lineup,
            access=AccessConfig(mode="off"),
            limits=RequestLimits(),
            metrics=ServingMetrics(lineup, readiness),
            readiness=readiness,
            page=False,
            host="0.0.0.0",
            port=0,
            drain_seconds=0.0,
            grace_seconds=1.0,
        )


@pytest.mark.parametrize("values", [{"mode": "tokens"}, {"mode": "off", "tokens_file": "x"}, {"mode": "none"}])
def test_access_config_that_contradicts_itself_is_refused(values: Any) -> None:
    with pytest.raises(ValueError, match="tokens"):
        AccessConfig(**values)


def test_tenant_of_the_token_reaches_the_engine(served: Any) -> None:
    served.predict()
    assert served.engine.requests[0].tenant == "clinic-a"


@pytest.fixture
def book(tmp_path: Any) -> Any:
    """A book of one token whose file a test replaces."""

    class Book:
        failures = 0

        def __init__(self) -> None:
            self.path = tmp_path / "tokens.json"
            self.token, entry = issue_token("clinic-a")
            self.write(TokensFile(tokens=(entry,)).model_dump_json())
            self.book = TokenBook(self.path, tell_failure=self.fail)

        def fail(self) -> None:
            self.failures += 1

        def write(self, text: str) -> None:
            fresh = self.path.with_suffix(".new")
            fresh.write_text(text)
            os.replace(fresh, self.path)

    return Book()


def test_tokens_file_never_holds_the_token(book: Any) -> None:
    text = book.path.read_text()
    assert book.token not in text
    assert hashlib.sha256(book.token.encode()).hexdigest() in text


def test_tokens_file_that_changes_is_read_again(book: Any) -> None:
    token, entry = issue_token("clinic-b", expires=datetime.datetime(2999, 1, 1, tzinfo=datetime.UTC))
    book.write(TokensFile(tokens=(entry,)).model_dump_json())
    book.book.refresh()
    assert book.book.find(token).tenant == "clinic-b"
    assert book.book.find(book.token) is None


@pytest.mark.parametrize(
    "text",
    ["", "{", '{"tokens": [{"sha256": "x"}]}', '{"tokens": 3}', '{"token": []}', "null"],
)
def test_tokens_file_that_breaks_keeps_the_old_tokens(book: Any, text: str, caplog: Any) -> None:
    with caplog.at_level(logging.INFO):
        book.write(text)
        book.book.refresh()
        book.book.refresh()
    assert book.book.find(book.token).tenant == "clinic-a"
    assert book.failures == 1


def test_tokens_file_that_vanishes_keeps_the_old_tokens(book: Any) -> None:
    book.path.unlink()
    book.book.refresh()
    assert book.book.find(book.token).tenant == "clinic-a"
    assert book.failures == 1


def test_tokens_file_with_a_token_twice_is_refused(book: Any) -> None:
    entries = json.loads(book.path.read_text())["tokens"] * 2
    book.write(json.dumps({"tokens": entries}))
    with pytest.raises(InvalidInput, match="tokens file"):
        TokenBook(book.path, tell_failure=book.fail)


@pytest.mark.parametrize(
    ("method", "path", "expected"),
    [
        ("POST", "/v1/models/a:predict", "/v1/models/{model_name}:predict"),
        ("GET", "/v1/models/a", "/v1/models/{model_name}"),
        ("POST", "/v2/models/a/infer", "/v2/models/{model_name}/infer"),
        ("DELETE", "/metrics", "/metrics"),
        ("GET", "/v1/models/../../etc", None),
        ("GET", "/v1/models/", None),
        ("GET", "/v1/models/a\n", None),
        ("GET", "/v1/models/a:explain", None),
        ("GET", "//metrics", None),
    ],
)
def test_route_of_a_path_is_found(method: str, path: str, expected: str | None) -> None:
    route = find_route(method, path)
    assert (route.path if route else None) == expected
