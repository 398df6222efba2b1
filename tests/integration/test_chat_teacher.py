"""The chat teacher against our own model server, as the teacher stage runs it: real tokens, real answers, a real store.

The server's student is random, so its rankings mean nothing; they must be exactly those that the server gives.
"""

import io
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import serving_process
from PIL import Image
from serving_process import ServerOptions, running_server

from mint_lib.chat.endpoint import Endpoint
from mint_lib.chat.questions import ChatRequest, Message
from mint_lib.errors import InvalidInput
from mint_lib.records import SPLITS, Case, Ranking, Reference, StageRecord
from mint_lib.rows import case_schema
from mint_lib.server.access import TokensFile, issue_token
from mint_lib.store import Store
from mint_lib.teacher import TeacherConfig, rank_cases
from mint_lib.template import Template

TEXTS = ("short stature", "hearing loss", "a heart defect", "seizures")
RANKING = {"name": "ranking", "shows": ["text"], "prompt": "{case_text}\n{label_names}", "max_tokens": 200}
CHAIN = [
    {"name": "differential", "shows": ["text"], "prompt": "Which diseases? {case_text}", "max_tokens": 8},
    RANKING | {"shows": ["differential"], "prompt": "{differential}\n{label_names}"},
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, str]]:
    """A server that wants a token, and that token."""
    token, entry = issue_token("teacher")
    path = tmp_path_factory.mktemp("access") / "tokens.json"
    path.write_text(TokensFile(tokens=(entry,)).model_dump_json())
    with running_server(ServerOptions(tokens_file=str(path), window_tokens=1024)) as running:
        yield running, token


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, server: tuple[Any, str]) -> pathlib.Path:
    """The folder of kept answers; the server's token is in the environment."""
    # Only this teacher reads it here: the students of these tests run in the server's own process.
    monkeypatch.setenv("MINT_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TEACHER_TOKEN", server[1])
    return tmp_path / "chat"


def write_cases(store: Store, *, with_image: bool = False) -> Reference:
    """12 cases, each text three times among them, in all splits."""
    picture = io.BytesIO()
    Image.new("RGB", (16, 16), "white").save(picture, "PNG")
    with store.write("cases", "toy") as version:
        for split in SPLITS:
            rows = [
                Case(
                    case_id=f"{split}-{number}",
                    group_id=f"{split}-{number}",
                    text=f"canary-{split}: a boy with {text}.",
                    image=picture.getvalue() if with_image else None,
                    label_id=serving_process.LABELS[number].id,
                    source="toy",
                    synthetic=True,
                )
                for number, text in enumerate(TEXTS)
            ]
            version.add_rows(split, rows, case_schema())
        version.add_json("labels.json", [label.model_dump(mode="json") for label in serving_process.LABELS])
        return version.commit(StageRecord(stage="data", config={}, inputs={}, code_version="test"))


def make_config(url: str, **changes: Any) -> TeacherConfig:
    endpoint = {"base_url": f"{url}/openai/v1", "model": "tiny", "api_key_variable": "TEACHER_TOKEN"}
    config = {
        **{"endpoint": endpoint, "inputs": "text", "steps": [RANKING], "num_answers": 3},
        **{"answer_format": "mint_ranked_list", **changes},
    }
    return TeacherConfig.model_validate({"name": "toy", "seed": 1, "model": "chat", "config": config})


def read_rankings(store: Store, reference: Reference) -> dict[str, Ranking]:
    return {row.case_id: row for split in SPLITS for row in store.read_rows(reference, split, Ranking)}


def read_calls(cache: pathlib.Path) -> list[list[dict[str, Any]]]:
    """The trace of every run, in order."""
    paths = sorted((cache / "traces").glob("*.jsonl"))
    return [[json.loads(line) for line in path.read_text().splitlines()] for path in paths]


def test_stage_ranks_every_case_as_the_server_answers_and_a_repeat_asks_nothing(
    store: Store, server: tuple[Any, str], cache: pathlib.Path
) -> None:
    running, token = server
    cases = write_cases(store)
    reference = rank_cases(make_config(running.url), store=store, cases=cases)
    rankings = read_rankings(store, reference)
    assert len(rankings) == 12
    names = {label.name: label.id for label in serving_process.LABELS}
    lines = "\n".join(f"- {name}" for name in names)
    instruction = (
        "List exactly 3 of the names above, most likely first, spelled as above, no explanation, in this format:\n"
        "RANKED_LIST:\n1. 'name'"
    )
    prompt = f"canary-test: a boy with {TEXTS[2]}.\n{lines}\n\n{instruction}"
    body = {
        **{"model": "tiny", "messages": [{"role": "user", "content": prompt}], "answer_format": "ranked_list"},
        **{"temperature": 0.0, "max_tokens": 200},
    }
    headers = {"authorization": f"Bearer {token}"}
    answer = httpx.post(f"{running.url}/openai/v1/chat/completions", json=body, headers=headers, timeout=60).json()
    listed = Template.load("rare_disease_brief").parse(answer["choices"][0]["message"]["content"])
    assert len(listed) == 3
    assert rankings["test-2"].label_ids[:3] == tuple(names[name] for name in listed)
    assert rankings["test-2"].probabilities[2] > rankings["test-2"].probabilities[3]
    endpoint = Endpoint(base_url=running.url, model="tiny")
    bound = ChatRequest((Message("user", prompt),), max_tokens=200).bound_input_tokens(endpoint)
    assert answer["usage"]["prompt_tokens"] <= bound  # which the budget relies on
    facts = store.read_json(reference, "qualification.json")
    assert facts["fitting"] == {"host": "127.0.0.1", "model": "tiny", "steps": ["ranking"]}
    assert facts["num_cases"] == 4
    assert facts["scoring"]["num_calls"] == facts["scoring"]["num_cases"] == 12
    assert facts["scoring"]["num_unparsed"] == 0
    assert len(store.read_bytes(reference, "trace.jsonl").splitlines()) == 12

    [calls] = read_calls(cache)
    assert len(calls) == 12  # validation is scored twice and asked about once
    assert {call["num_input_tokens"] > 50 for call in calls} == {True}
    again = rank_cases(make_config(running.url), store=store, cases=cases)
    assert read_rankings(store, again) == rankings
    assert [call["cached"] for call in read_calls(cache)[1]] == [True] * 12
    stored = b"".join(store.read_bytes(again, path) for path in store.files(again) if "json" in path)
    traces = "".join(path.read_text() for path in (cache / "traces").iterdir())
    assert "canary" not in traces
    assert b"canary" not in stored
    assert token.encode() not in stored


def test_stage_runs_a_chain(store: Store, server: tuple[Any, str], cache: pathlib.Path) -> None:
    reference = rank_cases(
        make_config(server[0].url, steps=CHAIN, max_unparsed_share=1.0), store=store, cases=write_cases(store)
    )
    assert len(read_rankings(store, reference)) == 12
    [calls] = read_calls(cache)
    first = [call for call in calls if call["step"] == "differential"]
    second = [call for call in calls if call["step"] == "ranking"]
    assert len(first) == 12
    # A random student may say nothing; then its case is not asked on.
    empty = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert len(second) == len([call for call in first if call["response"] != empty]) > 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"inputs": "image", "steps": [RANKING | {"shows": ["image"], "prompt": "{label_names}"}]}, "status 400"),
        ({"answer_format": "json_schema"}, "answer_format"),
    ],
    ids=["image-to-a-text-student", "unknown-field"],
)
def test_request_that_the_server_refuses_ends_the_stage_without_a_version(
    store: Store, server: tuple[Any, str], cache: pathlib.Path, change: dict[str, Any], words: str
) -> None:
    cases = write_cases(store, with_image=True)
    with pytest.raises(InvalidInput, match=words) as caught:
        rank_cases(make_config(server[0].url, **change), store=store, cases=cases)
    assert "canary" not in str(caught.value)
    assert store.list_versions("rankings", "toy") == []


def test_token_that_is_not_known_ends_the_stage(
    store: Store, server: tuple[Any, str], cache: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEACHER_TOKEN", issue_token("somebody")[0])
    with pytest.raises(InvalidInput, match="status 401"):
        rank_cases(make_config(server[0].url), store=store, cases=write_cases(store))
