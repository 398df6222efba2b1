import json
from typing import Any

import jsonschema
import pytest

from mint_lib.errors import Overloaded
from mint_lib.server.calls import ROUTES

TENSOR = {"name": "text", "shape": [2], "datatype": "BYTES", "data": ["a boy", "a girl"]}
BODIES = {
    "/v1/models/{model_name}:predict": [
        {"instances": [{"text": "a boy"}]},
        {"instances": [{"text": "a boy"}, {"text": "b"}], "parameters": {"top_k": 2}},
    ],
    "/v2/models/{model_name}/infer": [
        {"inputs": [TENSOR]},
        {"id": "7", "inputs": [TENSOR], "parameters": {"top_k": 3}, "outputs": [{"name": "probability"}]},
    ],
    "/openai/v1/completions": [{"model": "tiny", "prompt": "a"}, {"model": "tiny", "prompt": "a", "max_tokens": 3}],
    "/openai/v1/chat/completions": [
        {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "stop": ["x"], "temperature": 1},
        {"model": "tiny", "messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}], "as_case": True},
    ],
}


@pytest.fixture
def document(served: Any) -> Any:
    return served.ask("GET", "/openapi.json").json()


def check(document: Any, schema: Any, value: Any) -> None:
    jsonschema.Draft202012Validator({**schema, "components": document["components"]}).validate(value)


def operations(document: Any) -> list[tuple[str, str, Any]]:
    """Method, path and operation of all."""
    return [(method.upper(), path, found) for path, item in document["paths"].items() for method, found in item.items()]


def routes_of(router: Any) -> set[tuple[str, str]]:
    """Method and path of every route, those of included routers too."""
    found = set()
    for route in router.routes:
        if hasattr(route, "methods"):
            found |= {(method, route.path) for method in route.methods}
        else:
            found |= routes_of(route.original_router)
    return found


def test_document_lists_every_route_and_no_other(served: Any, document: Any) -> None:
    table = {(route.method, route.path) for route in ROUTES}
    assert {(method, path) for method, path, _ in operations(document)} == table
    assert routes_of(served.routes) == table


def test_document_has_valid_schemas(document: Any) -> None:
    for schema in document["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)
    text = json.dumps(document)
    for reference in {part.split('"')[0] for part in text.split('"#/components/schemas/')[1:]}:
        assert reference in document["components"]["schemas"]


def test_document_is_true_of_good_answers(served: Any, document: Any) -> None:
    num_checked = 0
    for method, path, operation in operations(document):
        for body in BODIES.get(path, [None]):
            if body is not None:
                check(document, operation["requestBody"]["content"]["application/json"]["schema"], body)
            response = served.ask(method, path.replace("{model_name}", "tiny"), json=body)
            assert response.status_code == 200, (path, response.text)
            kind = response.headers["content-type"].split(";")[0]
            schema = operation["responses"]["200"]["content"][kind]["schema"]
            check(document, schema, response.json() if kind == "application/json" else response.text)
            num_checked += 1
    assert num_checked >= 22


@pytest.mark.parametrize("kind", ["ChatChunk", "CompletionChunk"])
def test_document_is_true_of_chunks(served: Any, document: Any, events_of: Any, kind: str) -> None:
    path = "/openai/v1/chat/completions" if kind == "ChatChunk" else "/openai/v1/completions"
    body = {**BODIES[path][0], "stream": True, "stream_options": {"include_usage": True}}
    events = events_of(served.ask("POST", path, json=body))
    for event in events[:-1]:
        check(document, {"$ref": f"#/components/schemas/{kind}"}, event)
    assert len(events) >= 5


def test_document_is_true_of_errors(served: Any, document: Any) -> None:
    seen = set()
    for method, path, operation in operations(document):
        place = path.replace("{model_name}", "tiny")
        answers = [
            served.ask(method, place, token=None),
            served.ask(method, place, token="other"),
            served.ask("PUT", place),
            served.ask(method, path.replace("{model_name}", "nobody"), json=BODIES.get(path, [None])[0]),
        ]
        if method == "POST":
            answers.append(served.ask(method, place, json={"bogus": 1}))
            answers.append(served.ask(method, place, content=b"{}", headers={"content-type": "text/plain"}))
            answers.append(served.ask(method, place, json={"a": "x" * 2_000_000}))
            served.engine.refusal = Overloaded("Full.")
            answers.append(served.ask(method, place, json=BODIES[path][0]))
            served.engine.refusal = None
        for response in answers:
            assert "x-request-id" in response.headers
            if response.status_code == 200:
                continue
            described = operation["responses"][str(response.status_code)]
            check(document, described["content"]["application/json"]["schema"], response.json())
            seen.add(response.status_code)
    assert seen == {400, 401, 403, 404, 405, 413, 415, 429}


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"instances": []},
        {"instances": "a"},
        {"instances": [{"text": 3}]},
        {"instances": [{"text": "a", "bogus": 1}]},
        {"instances": [{"text": "a"}], "bogus": 1},
        {"instances": [{"text": "a"}], "parameters": {"top_k": 0}},
        {"instances": [{"text": "a"}], "parameters": {"top_k": True}},
        {"instances": [{"text": "a", "image": "x"}]},
    ],
)
def test_v1_body_that_is_wrong_is_refused_by_server_and_document(served: Any, document: Any, body: Any) -> None:
    schema = document["paths"]["/v1/models/{model_name}:predict"]["post"]["requestBody"]["content"]["application/json"]
    with pytest.raises(jsonschema.ValidationError):
        check(document, schema["schema"], body)
    assert served.predict(body or {"none": 1}).status_code == 400


@pytest.mark.parametrize(
    "body",
    [
        {"inputs": []},
        {"inputs": [{**TENSOR, "name": "other"}]},
        {"inputs": [{**TENSOR, "datatype": "FP32", "data": [1.0, 2.0]}]},
        {"inputs": [{**TENSOR, "shape": [2, 1]}]},
        {"inputs": [{**TENSOR, "data": [1, 2]}]},
        {"inputs": [TENSOR], "parameters": {"top_k": 0}},
        {"inputs": [TENSOR], "parameters": {"binary_data_output": True}},
        {"inputs": [TENSOR], "outputs": [{"name": "secret"}]},
        {"inputs": [{"name": "canary-3"}]},
        {"inputs": "canary-3"},
    ],
)
def test_v2_body_that_is_wrong_is_refused_by_server_and_document(served: Any, document: Any, body: Any) -> None:
    schema = document["paths"]["/v2/models/{model_name}/infer"]["post"]["requestBody"]["content"]["application/json"]
    with pytest.raises(jsonschema.ValidationError):
        check(document, schema["schema"], body)
    response = served.ask("POST", "/v2/models/tiny/infer", json=body)
    assert response.status_code == 400
    assert "canary-3" not in response.text


@pytest.mark.parametrize(
    "inputs",
    [
        [{**TENSOR, "shape": [3]}],
        [{**TENSOR, "shape": [0], "data": []}],
        [TENSOR, TENSOR],
        [TENSOR, {"name": "image", "shape": [1], "datatype": "BYTES", "data": ["AAAA"]}],
        [{"name": "image", "shape": [1], "datatype": "BYTES", "data": ["AAAA"]}],
    ],
)
def test_v2_tensors_that_contradict_each_other_are_refused(served: Any, inputs: Any) -> None:
    assert served.ask("POST", "/v2/models/tiny/infer", json={"inputs": inputs}).status_code == 400


def test_v2_answer_is_the_v1_answer_in_tensors(served: Any) -> None:
    v1 = served.predict({"instances": [{"text": "a boy"}, {"text": "a girl"}], "parameters": {"top_k": 2}}).json()
    v2 = served.ask("POST", "/v2/models/tiny/infer", json={"id": "7", "inputs": [TENSOR], "parameters": {"top_k": 2}})
    body = v2.json()
    tensors = {tensor["name"]: tensor for tensor in body["outputs"]}
    labels = [label for prediction in v1["predictions"] for label in prediction["labels"]]
    assert body["id"] == "7"
    assert tensors["label_id"]["shape"] == tensors["probability"]["shape"] == [2, 2]
    assert tensors["label_id"]["data"] == [label["id"] for label in labels]
    assert tensors["label_name"]["data"] == [label["name"] for label in labels]
    assert tensors["probability"]["data"] == [label["probability"] for label in labels]
    assert tensors["abstained"]["data"] == [prediction["abstained"] for prediction in v1["predictions"]]
    assert body["parameters"]["reference"] == v1["model"]["reference"] == str(served.student.reference)


def test_v1_answer_tells_the_model_and_its_limits(served: Any) -> None:
    assert served.predict().json()["model"] == {
        "name": "tiny",
        "reference": str(served.student.reference),
        "intended_use": "Tests.",
        "limits": ["None of it is true."],
        "precision": "float32",
    }


def test_root_is_the_state_where_the_page_is_off(served: Any) -> None:
    assert served.ask("GET", "/", token=None).json() == {"status": "alive"}
