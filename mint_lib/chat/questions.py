"""What a chat model is asked, and what it answered, as records that know nothing of the wire around them.

Goes in: turns with images, and how long and in which form the answer may be. Comes out: the JSON body of OpenAI's chat
route, its digest, and the most tokens it can cost. Images travel as data URLs, before the text of their turn.
"""

import base64
import hashlib
import json
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict

from mint_lib.chat.endpoint import Endpoint
from mint_lib.errors import InvalidInput

_KINDS = ((b"\x89PNG\r\n\x1a\n", "png"), (b"\xff\xd8\xff", "jpeg"))
_TURN_TOKENS = 16  # what a chat template puts around a turn


class Message(NamedTuple):
    """One turn."""

    role: Literal["system", "user", "assistant"]
    text: str
    images: tuple[bytes, ...] = ()
    """Encoded PNG or JPEG."""


class ChatRequest(NamedTuple):
    """A question."""

    messages: tuple[Message, ...]
    max_tokens: int
    temperature: float | None = 0.0
    """None: the endpoint's own."""
    fields: dict[str, Any] | None = None
    """Further fields of the body, for instance OpenAI's `response_format`."""

    def body(self, endpoint: Endpoint) -> dict[str, Any]:
        """The JSON body of the chat route."""
        content: dict[str, Any] = {
            "model": endpoint.model,
            "messages": [{"role": message.role, "content": _write_content(message)} for message in self.messages],
            endpoint.max_tokens_field: self.max_tokens,
        }
        if self.temperature is not None:
            content["temperature"] = self.temperature
        return content | (self.fields or {})

    def bound_input_tokens(self, endpoint: Endpoint) -> int:
        """At most so many tokens are sent: a token is a byte or more, and an image takes `image_tokens`."""
        texts = [message.text for message in self.messages] + [json.dumps(self.fields or {})]
        num_images = sum(len(message.images) for message in self.messages)
        return (
            sum(len(text.encode()) for text in texts)
            + _TURN_TOKENS * len(self.messages)
            + num_images * endpoint.image_tokens
        )


class Reply(BaseModel):
    """An answer."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    text: str
    """Empty where there was no answer."""
    finish_reason: str
    """As the endpoint says: `stop`, `length`, `content_filter`."""
    model: str
    """Who answered, as the endpoint says, with its fingerprint where it tells one."""
    num_input_tokens: int | None
    """None: the endpoint did not say."""
    num_output_tokens: int | None
    is_refused: bool = False
    """The endpoint does not answer this one question, for instance for what it holds."""


def digest_json(value: object) -> str:
    """`sha256:...` of canonical JSON."""
    data = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return f"sha256:{hashlib.sha256(data.encode()).hexdigest()}"


def _write_content(message: Message) -> str | list[dict[str, Any]]:
    """The content of a turn: its text, or its images and then its text."""
    if not message.images:
        return message.text
    parts: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": _write_data_url(image)}} for image in message.images
    ]
    return [*parts, {"type": "text", "text": message.text}]


def _write_data_url(image: bytes) -> str:
    kind = next((kind for start, kind in _KINDS if image.startswith(start)), None)
    if kind is None:
        raise InvalidInput("An image is neither PNG nor JPEG. Make the cases again with the data stage.")
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"
