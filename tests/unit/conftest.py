"""Fixtures of the model server's unit tests: the whole application, without a socket, over an engine with a script."""

import asyncio
import dataclasses
import datetime
import json
import pathlib
import threading
import types
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

import httpx
import pytest

from mint_lib.engine.requests import Event, Generated, GenerateRequest, Ranked, RankRequest, Started, TokenMade
from mint_lib.records import Label, Reference

Request = RankRequest | GenerateRequest
Script = Callable[[Request], Iterable[Event | float]]
LABELS = tuple(Label(id=f"OMIM:{number}", name=f"Disease {number}") for number in range(100, 106))
LOG_PROBABILITIES = (-3.0, -0.2, -2.0, -5.0, -6.0, -7.0)


class FakeEngine:
    """Answers with the events of a script; a number in it is a pause in seconds, which a cancellation ends."""

    def __init__(self) -> None:
        self.script: Script = lambda request: rank_all() if isinstance(request, RankRequest) else say([5, 6, 7])
        self.refusal: Exception | None = None
        self.requests: list[Request] = []
        self.cancelled: dict[str, threading.Event] = {}
        self.unfinished: set[str] = set()
        """Ids of requests that were cancelled before their last event."""

    def submit(self, request: Request, deliver: Callable[[Event], None]) -> Any:
        if self.refusal is not None:
            raise self.refusal
        self.requests.append(request)
        cancelled = self.cancelled[request.request_id] = threading.Event()
        events = list(self.script(request))

        def play() -> None:
            for event in events:
                if isinstance(event, float):
                    cancelled.wait(event)
                if cancelled.is_set():
                    self.unfinished.add(request.request_id)
                    return
                if not isinstance(event, float):
                    deliver(event)

        threading.Thread(target=play, daemon=True).start()
        return types.SimpleNamespace(cancel=cancelled.set)


def rank_all() -> list[Event]:
    """A whole ranking."""
    return [
        Started(queue_seconds=0.01, num_prompt_tokens=9, num_cached_tokens=4),
        Ranked(
            log_probabilities=LOG_PROBABILITIES, is_exact=True, num_proven=6, unreached_mass=0.0, num_label_tokens=12
        ),
    ]


def say(token_ids: Iterable[int], *, pause_seconds: float = 0.0, finish_reason: Any = "stop") -> list[Event | float]:
    """A generated answer."""
    ids = list(token_ids)
    events: list[Event | float] = [Started(queue_seconds=0.0, num_prompt_tokens=9, num_cached_tokens=4)]
    for token_id in ids:
        events += [pause_seconds, TokenMade(token_id=token_id)]
    return [*events, Generated(finish_reason=finish_reason, num_new_tokens=len(ids))]


@dataclasses.dataclass
class Served:
    """A server's application and what a test looks at."""

    application: Any
    routes: Any
    engine: FakeEngine
    metrics: Any
    readiness: Any
    lineup: Any
    student: Any
    tokens: dict[str, str]
    """Plain tokens by purpose."""

    def client(self, token: str | None = "all") -> httpx.AsyncClient:
        headers = {"authorization": f"Bearer {self.tokens[token]}"} if token else {}
        transport = httpx.ASGITransport(self.application, raise_app_exceptions=True)
        return httpx.AsyncClient(transport=transport, base_url="http://localhost", headers=headers)

    def run(self, work: Callable[[httpx.AsyncClient], Coroutine[Any, Any, Any]], token: str | None = "all") -> Any:
        async def main() -> Any:
            async with self.client(token) as client:
                return await work(client)

        return asyncio.run(main())

    def ask(self, method: str, path: str, *, token: str | None = "all", **more: Any) -> httpx.Response:
        response: httpx.Response = self.run(lambda client: client.request(method, path, **more), token)
        return response

    def predict(self, body: Any = None, **more: Any) -> httpx.Response:
        body = body or {"instances": [{"text": "a boy"}]}
        return self.ask("POST", "/v1/models/tiny:predict", json=body, **more)

    def chat(self, text: str = "a boy", **more: Any) -> httpx.Response:
        body = {"model": "tiny", "messages": [{"role": "user", "content": text}], **more}
        return self.ask("POST", "/openai/v1/chat/completions", json=body)

    def figures(self) -> str:
        return str(self.metrics.render("")[0].decode())


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    """The tiny student's tokenizer."""
    from mint_lib.student import StudentConfig, load_tokenizer

    return load_tokenizer(StudentConfig(model="tiny"))


@pytest.fixture
def make_served(tmp_path: pathlib.Path, tiny_tokenizer: Any) -> Callable[..., Served]:
    """A function that makes an application; its keywords change a student, the limits or the access."""
    from mint_lib.server.access import AccessConfig, TokensFile, issue_token
    from mint_lib.server.app import build_server
    from mint_lib.server.lifecycle import Readiness
    from mint_lib.server.limits import RequestLimits
    from mint_lib.server.metrics import ServingMetrics
    from mint_lib.server.students import Lineup, ServedStudent
    from mint_lib.template import Template

    def make(*, limits: dict[str, Any] | None = None, access: str = "tokens", **changes: Any) -> Served:
        engine = FakeEngine()
        student = ServedStudent(
            **{
                "name": "tiny",
                "reference": Reference(kind="model", name="tiny", version="v000007", digest=f"sha256:{'ab' * 32}"),
                "engine": engine,
                "adapter": "tiny-7",
                "tokenizer": tiny_tokenizer,
                "template": Template.load("rare_disease_brief").with_num_answers(3),
                "labels": LABELS,
                "trie": types.SimpleNamespace(depth=8),
                "answer_format": types.SimpleNamespace(max_tokens=40),
                "stop_ids": frozenset({0}),
                "window_tokens": 256,
                "intended_use": "Tests.",
                "limits": ("None of it is true.",),
                "load_seconds": 1.5,
                **changes,
            }
        )
        lineup, readiness = Lineup(), Readiness()
        lineup.put(student, retire=lambda _: None)
        readiness.mark_ready()
        metrics = ServingMetrics(lineup, readiness)
        past = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
        issued = {
            "all": issue_token("clinic-a"),
            "other": issue_token("clinic-b", models=("another",)),
            "expired": issue_token("clinic-a", expires=past),
            "infer": issue_token("clinic-a", scopes=("infer",)),
            "metrics": issue_token("monitoring", scopes=("metrics",)),
        }
        path = tmp_path / "tokens.json"
        path.write_text(TokensFile(tokens=tuple(entry for _, entry in issued.values())).model_dump_json())
        server = build_server(
            lineup,
            access=AccessConfig(mode="tokens", tokens_file=path) if access == "tokens" else AccessConfig(mode="off"),
            limits=RequestLimits(**(limits or {})),
            metrics=metrics,
            readiness=readiness,
            page=False,
            host="127.0.0.1",
            port=0,
            drain_seconds=0.0,
            grace_seconds=5.0,
        )
        tokens = {name: token for name, (token, _) in issued.items()} | {"bad": "not-a-token"}
        return Served(server.application, server.routes, engine, metrics, readiness, lineup, student, tokens)

    return make


@pytest.fixture
def served(make_served: Callable[..., Served]) -> Served:
    """An application as configured by default."""
    return make_served()


@pytest.fixture
def script() -> Any:
    """Builders of scripts: `script.say(ids)`, `script.rank_all()`."""
    return types.SimpleNamespace(say=say, rank_all=rank_all, scores=LOG_PROBABILITIES, labels=LABELS)


def read_events(response: httpx.Response) -> list[Any]:
    """The JSON of a response's server-sent events, `[DONE]` as it is."""
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


@pytest.fixture
def events_of() -> Callable[[httpx.Response], list[Any]]:
    """A function that reads server-sent events."""
    return read_events
