"""Reads what an endpoint sends back, which may be anything.

Goes in: bytes of a response. Comes out: a `Reply`, or the code of an error. Only codes that are known are passed on,
because an endpoint may repeat what it was sent in any of its words.
"""

import json
import re
from typing import Any

from mint_lib.chat.questions import Reply

_NAME = re.compile(r"[\w.:/@+-]{1,200}", re.ASCII)
_KNOWN_CODES = frozenset(
    {
        *("content_filter", "content_policy_violation", "context_length_exceeded", "insufficient_quota"),
        *("invalid_api_key", "invalid_image", "invalid_input", "model_not_found", "not_found", "prompt_too_long"),
        *("rate_limit_exceeded", "unsupported_parameter", "unsupported_value", "overloaded", "unauthorized"),
    }
)


def read_reply(data: bytes) -> Reply | None:
    """The reply in a body of status 200; none where it is not a chat completion."""
    body = _read_object(data)
    choices = body.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(choice, dict) or not isinstance(message, dict):
        return None
    content = _read_content(message.get("content"))
    if content is None:
        return None
    names = [_read_name(body.get("model")), _read_name(body.get("system_fingerprint"))]
    usage = body.get("usage")
    counts = usage if isinstance(usage, dict) else {}
    return Reply(
        text=content.encode("utf-8", "replace").decode(),  # JSON can spell half a surrogate pair
        finish_reason=_read_name(choice.get("finish_reason")),
        model=" ".join(name for name in names if name),
        num_input_tokens=_read_count(counts.get("prompt_tokens")),
        num_output_tokens=_read_count(counts.get("completion_tokens")),
    )


def find_error_code(data: bytes) -> str:
    """The code of an error in OpenAI's shape if it is one that we know, else an empty text."""
    error = _read_object(data).get("error")
    found = [error.get("code"), error.get("type")] if isinstance(error, dict) else []
    return next((code for code in found if isinstance(code, str) and code in _KNOWN_CODES), "")


def _read_content(content: object) -> str | None:
    """The text of an answer, which some endpoints send in parts; empty for null, none for anything else."""
    if isinstance(content, list):
        texts = [part.get("text", "") for part in content if isinstance(part, dict) and part.get("type") == "text"]
        return "".join(texts) if all(isinstance(text, str) for text in texts) else None
    return content if isinstance(content, str) else "" if content is None else None


def _read_object(data: bytes) -> dict[str, Any]:
    """The JSON object in `data`; an empty one where there is none."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _read_name(value: object) -> str:
    return value if isinstance(value, str) and _NAME.fullmatch(value) else ""


def _read_count(value: object) -> int | None:
    is_count = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10**9
    return value if is_count else None  # type: ignore[return-value]
