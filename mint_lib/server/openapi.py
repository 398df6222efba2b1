"""The OpenAPI document: what is accepted, what comes back, and with which errors, for every route.

Goes in: the route table and the records that bodies are checked with. Comes out: the document as a dict. Schemas of
requests are those of the very records, so they cannot differ; a test checks the answers of a running server against the
rest.
"""

from typing import Any

from pydantic import BaseModel

from mint_lib.server.calls import ROUTES, Route
from mint_lib.server.openai_types import ChatRequest, CompletionRequest
from mint_lib.server.openapi_schemas import SCHEMAS, STRING, Schema, refer

_STREAM = "One event a line, `data: ` and a chunk, or an error as the last; `data: [DONE]` ends a whole answer. Chunk: "
# Route path: what it does, schema of the body, content types of a good answer with their schemas.
_OPERATIONS: dict[str, tuple[str, str | None, dict[str, Schema]]] = {
    "/": ("The page, or the server's state where the page is off.", None, {}),
    "/healthz": ("Whether the process is alive.", None, {"application/json": refer("State")}),
    "/readyz": ("Whether requests should be sent here.", None, {"application/json": refer("State")}),
    "/metrics": ("Figures for Prometheus.", None, {"text/plain": STRING, "application/openmetrics-text": STRING}),
    "/openapi.json": ("This document.", None, {"application/json": {"type": "object"}}),
    "/v1/models": ("Models that the token allows.", None, {"application/json": refer("ModelNames")}),
    "/v1/models/{model_name}": ("Whether a model is ready.", None, {"application/json": refer("ModelReady")}),
    "/v1/models/{model_name}:predict": (
        "Rank the closed label set for each case.",
        "PredictRequest",
        {"application/json": refer("Predictions")},
    ),
    "/v2": ("The server.", None, {"application/json": refer("ServerMetadata")}),
    "/v2/health/live": ("Whether the server is alive.", None, {"application/json": refer("Live")}),
    "/v2/health/ready": ("Whether requests should be sent here.", None, {"application/json": refer("Ready")}),
    "/v2/models": ("Models that the token allows.", None, {"application/json": refer("ModelNames")}),
    "/v2/models/{model_name}": ("A model's tensors.", None, {"application/json": refer("ModelMetadata")}),
    "/v2/models/{model_name}/ready": ("Whether a model is ready.", None, {"application/json": refer("ModelReady")}),
    "/v2/models/{model_name}/infer": (
        "Rank the closed label set for each case, as tensors.",
        "InferRequest",
        {"application/json": refer("InferResponse")},
    ),
    "/openai/v1/models": ("Models that the token allows.", None, {"application/json": refer("OpenAIModels")}),
    "/openai/v1/completions": (
        "Continue a text, or answer a case.",
        "CompletionRequest",
        {
            "application/json": refer("Completion"),
            "text/event-stream": {"type": "string", "description": f"{_STREAM}CompletionChunk."},
        },
    ),
    "/openai/v1/chat/completions": (
        "Answer a conversation, or a case.",
        "ChatRequest",
        {
            "application/json": refer("ChatAnswer"),
            "text/event-stream": {"type": "string", "description": f"{_STREAM}ChatChunk."},
        },
    ),
}
_ERRORS = {
    "400": "The request is not acceptable; the message says why and what is.",
    "401": "No valid token.",
    "403": "The token does not allow this.",
    "404": "No such model or route.",
    "405": "No such method.",
    "413": "The body is too large.",
    "415": "The body is not JSON.",
    "429": "Too much waits already. Retry-After says when to try again.",
    "500": "A mistake of the server or a failed computation.",
    "503": "Loading or shutting down. Retry-After says when to try again.",
    "504": "The deadline passed.",
}
_ID_HEADER = {"x-request-id": {"schema": STRING, "description": "The request's id, the client's own if it sent one."}}


def build_document(*, version: str, request_bodies: dict[str, type[BaseModel]], has_page: bool) -> dict[str, Any]:
    """The document, OpenAPI 3.1.

    Args:
        version: The server's version.
        request_bodies: Records of V1 bodies by name (their module imports KServe).
        has_page: The page is served at `/`.
    """
    schemas = dict(SCHEMAS)
    records: dict[str, type[BaseModel]] = {
        "ChatRequest": ChatRequest,
        "CompletionRequest": CompletionRequest,
        **request_bodies,
    }
    for name, record in records.items():
        schema = record.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas.update(schema.pop("$defs", {}))
        schemas[name] = schema
    paths: dict[str, dict[str, Schema]] = {}
    for route in ROUTES:
        paths.setdefault(route.path, {})[route.method.lower()] = _describe(route, has_page=has_page)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "MINT model server",
            "version": version,
            "description": "Ranked answers and chat of aligned students. Research use; not a medical device.",
        },
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"token": []}],
    }


def _describe(route: Route, *, has_page: bool) -> Schema:
    """The operation of one route."""
    words, body, answers = _OPERATIONS[route.path]
    if route.path == "/":
        answers = {"text/html": STRING} if has_page else {"application/json": refer("State")}
    error = refer("OpenAIError" if route.path.startswith("/openai/") else "Error")
    good = {
        "description": "The answer.",
        "headers": _ID_HEADER,
        "content": {k: {"schema": v} for k, v in answers.items()},
    }
    bad = {
        status: {"description": text, "headers": _ID_HEADER, "content": {"application/json": {"schema": error}}}
        for status, text in _ERRORS.items()
        if route.needs != "nothing" or status in ("400", "404", "405", "500", "503", "504")
    }
    operation: Schema = {"summary": words, "responses": {"200": good, **bad}}
    parameters: list[Schema] = [
        {
            "name": "x-request-timeout-seconds",
            "in": "header",
            "schema": {"type": "number", "exclusiveMinimum": 0},
            "description": "A shorter deadline than the server's.",
        },
        {
            "name": "x-request-id",
            "in": "header",
            "schema": {"type": "string", "pattern": "^[A-Za-z0-9._-]{1,64}$"},
            "description": "An id for this request; others are replaced.",
        },
    ]
    if "{model_name}" in route.path:
        parameters.append({"name": "model_name", "in": "path", "required": True, "schema": STRING})
    operation["parameters"] = parameters
    if body is not None:
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": refer(body)}}}
    if route.needs == "nothing":
        operation["security"] = []
    return operation
