"""Bodies of the OpenAI routes: what is accepted, field by field. Anything else is refused by name.

Goes in: JSON. Comes out: frozen records. They hold no default that a model decides.
"""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

_STRICT = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)
StopString = Annotated[str, Field(min_length=1, max_length=256)]


class StreamOptions(BaseModel):
    """Options of a streamed answer."""

    model_config = _STRICT

    include_usage: bool = False
    """Send token counts in a last chunk."""


class AnswerRequest(BaseModel):
    """What both routes have in common."""

    model_config = _STRICT

    model: Annotated[str, Field(max_length=256)]
    """Name of a served student."""
    stream: bool = False
    """Send the answer as server-sent events while it is made."""
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    """Longest answer in tokens; left out, all that the window leaves."""
    temperature: Annotated[float, Field(ge=0.0, le=2.0)] | None = None
    """0 or left out: the most probable token each time, so that equal requests get equal answers."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=4)] | None = None
    """Up to four strings before which the answer ends."""
    n: Literal[1] | None = None
    user: Annotated[str, Field(max_length=1024)] | None = None
    """Ignored: the token says who asks."""
    as_case: bool = False
    """The text is a case's text and is put into the template that the student was trained on."""
    answer_format: Literal["free", "ranked_list"] = "free"
    """`ranked_list`: only the template's ranked list of names of the label set can come out."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        if self.answer_format == "ranked_list" and self.stops:
            raise ValueError("a ranked_list is complete by itself: leave stop out")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def wanted_tokens(self) -> int | None:
        """Longest answer that was asked for."""
        return self.max_tokens


class CompletionRequest(AnswerRequest):
    """POST /openai/v1/completions."""

    prompt: str
    """Text to continue, without a chat template unless `as_case` is set."""


class TextPart(BaseModel):
    """Text within a message."""

    model_config = _STRICT

    type: Literal["text"]
    text: str


class ImageAddress(BaseModel):
    """Where an image is: in the URL itself."""

    model_config = _STRICT

    url: str
    """data:image/png;base64,... (or jpeg, webp). Nothing is fetched."""
    detail: Literal["auto", "low", "high"] | None = None
    """Ignored."""


class ImagePart(BaseModel):
    """An image within a message."""

    model_config = _STRICT

    type: Literal["image_url"]
    image_url: ImageAddress


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(BaseModel):
    """One turn of a conversation."""

    model_config = _STRICT

    role: Literal["system", "user", "assistant"]
    content: str | Annotated[list[Part], Field(min_length=1, max_length=64)]

    @property
    def text(self) -> str:
        """Its text, parts joined by line breaks."""
        if isinstance(self.content, str):
            return self.content
        return "\n".join(part.text for part in self.content if isinstance(part, TextPart))

    @property
    def image_urls(self) -> list[str]:
        """Its images' URLs."""
        if isinstance(self.content, str):
            return []
        return [part.image_url.url for part in self.content if isinstance(part, ImagePart)]


class ChatRequest(AnswerRequest):
    """POST /openai/v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=256)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    """The newer name of max_tokens."""

    @model_validator(mode="after")
    def _ends_with_the_user(self) -> Self:
        if self.messages[-1].role != "user":
            raise ValueError("the last message must be the user's")
        if self.as_case and len(self.messages) != 1:
            raise ValueError("as_case takes one user message and no other turn: the template brings its own")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("give max_completion_tokens or max_tokens, not both")
        return self

    @property
    def wanted_tokens(self) -> int | None:
        """Longest answer that was asked for."""
        return self.max_completion_tokens or self.max_tokens
