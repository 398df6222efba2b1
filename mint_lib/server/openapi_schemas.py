"""Schemas of what the server answers, and of V2 requests, whose record is KServe's and laxer than what we accept.

Goes in: nothing. Comes out: JSON schemas (2020-12) by name. Objects are closed: an answer with one field more is not
true to them.
"""

from typing import Any

Schema = dict[str, Any]
STRING: Schema = {"type": "string"}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_PROBABILITY: Schema = {"type": "number", "minimum": 0, "maximum": 1}


def _object(optional: tuple[str, ...] = (), /, **properties: Schema) -> Schema:
    """An object with exactly these properties; those of `optional` may be missing."""
    return {
        "type": "object",
        "properties": properties,
        "required": [name for name in properties if name not in optional],
        "additionalProperties": False,
    }


def _list(items: Schema, **more: Any) -> Schema:
    return {"type": "array", "items": items, **more}


def _tensor(name: str, datatype: str, items: Schema) -> Schema:
    return _object(
        ("parameters",),
        name={"const": name},
        datatype={"const": datatype},
        shape=_list(_COUNT),
        parameters={"type": "null"},
        data=_list(items),
    )


def refer(name: str) -> Schema:
    """A reference to the schema called `name`."""
    return {"$ref": f"#/components/schemas/{name}"}


_USAGE = _object(
    prompt_tokens=_COUNT,
    completion_tokens=_COUNT,
    total_tokens=_COUNT,
    prompt_tokens_details=_object(cached_tokens=_COUNT),
)
_FINISH: Schema = {"enum": ["stop", "length", None]}
_TENSOR_METADATA = _object(name=STRING, datatype=STRING, shape=_list({"type": "integer"}))


def _openai_answer(kind: str, **choice: Schema) -> Schema:
    return _object(
        id=STRING,
        created=_COUNT,
        model=STRING,
        system_fingerprint=STRING,
        object={"const": kind},
        choices=_list(_object(index=_COUNT, finish_reason=_FINISH, logprobs={"type": "null"}, **choice)),
        usage=_USAGE,
    )


def _openai_chunk(kind: str, **choice: Schema) -> Schema:
    answer = _openai_answer(kind, **choice)
    answer["properties"]["usage"] = {"oneOf": [_USAGE, {"type": "null"}]}
    answer["required"].remove("usage")
    return answer


SCHEMAS: dict[str, Schema] = {
    "Error": _object(error=STRING, code=STRING, request_id=STRING),
    "OpenAIError": _object(
        error=_object(
            message=STRING,
            type=STRING,
            code=STRING,
            param={"type": ["string", "null"]},
            request_id=STRING,
        )
    ),
    "State": _object(status={"enum": ["alive", "ready"]}),
    "ModelNames": _object(models=_list(STRING)),
    "ModelReady": _object(name=STRING, ready={"const": True}),
    "Live": _object(live={"const": True}),
    "Ready": _object(ready={"const": True}),
    "ServerMetadata": _object(name=STRING, version=STRING, extensions=_list(STRING, maxItems=0)),
    "ModelMetadata": _object(
        ("versions",),
        name=STRING,
        versions={"type": ["array", "null"]},
        platform=STRING,
        inputs=_list(_TENSOR_METADATA),
        outputs=_list(_TENSOR_METADATA),
    ),
    "Predictions": _object(
        predictions=_list(
            _object(
                labels=_list(_object(id=STRING, name=STRING, probability=_PROBABILITY), minItems=1),
                abstained={"type": "boolean", "description": "The first label is below the model's threshold."},
                exact={"type": "boolean", "description": "The whole label set was scored."},
                proven={**_COUNT, "description": "So many of the given places are certain."},
                calibrated={"type": "boolean", "description": "Probabilities are calibrated on validation cases."},
                prompt_tokens=_COUNT,
                cached_tokens=_COUNT,
            )
        ),
        model=_object(
            name=STRING,
            reference=STRING,
            intended_use=STRING,
            limits=_list(STRING),
            precision={"enum": ["float32", "bfloat16", "int8"]},
        ),
    ),
    "InferRequest": _object(
        ("id", "parameters", "outputs"),
        id=STRING,
        parameters=refer("PredictParameters"),
        inputs=_list(
            _object(
                name={"enum": ["text", "image"]},
                datatype={"const": "BYTES"},
                shape=_list(_COUNT, minItems=1, maxItems=1),
                data=_list(STRING),
            ),
            minItems=1,
            maxItems=2,
        ),
        outputs=_list(_object(name={"enum": ["label_id", "label_name", "probability", "abstained"]})),
    ),
    "InferResponse": _object(
        ("model_version",),
        id=STRING,
        model_name=STRING,
        model_version={"type": ["string", "null"]},
        parameters=_object(
            reference=STRING,
            intended_use=STRING,
            precision=STRING,
            exact={"type": "boolean"},
            calibrated={"type": "boolean"},
        ),
        outputs=_list(
            {
                "oneOf": [
                    _tensor("label_id", "BYTES", STRING),
                    _tensor("label_name", "BYTES", STRING),
                    _tensor("probability", "FP64", _PROBABILITY),
                    _tensor("abstained", "BOOL", {"type": "boolean"}),
                ]
            }
        ),
    ),
    "OpenAIModels": _object(
        object={"const": "list"},
        data=_list(_object(id=STRING, object={"const": "model"}, created=_COUNT, owned_by=STRING)),
    ),
    "ChatAnswer": _openai_answer(
        "chat.completion",
        message=_object(role={"const": "assistant"}, content=STRING, refusal={"type": "null"}),
    ),
    "ChatChunk": _openai_chunk(
        "chat.completion.chunk", delta=_object(("role", "content"), role={"const": "assistant"}, content=STRING)
    ),
    "Completion": _openai_answer("text_completion", text=STRING),
    "CompletionChunk": _openai_chunk("text_completion", text=STRING),
}
