"""The OpenAI routes: models, completions and chat completions, whole or streamed.

Goes in: OpenAI's requests, with `as_case` and `answer_format` beside them. Comes out: OpenAI's answers and server-sent
events. KServe's own OpenAI routes need vLLM, so these are ours, on KServe's server.
"""

import dataclasses
import json
import time
from collections.abc import AsyncIterator
from typing import Any, Literal

from fastapi import APIRouter
from starlette.responses import JSONResponse, Response, StreamingResponse

from mint_lib.engine.requests import Event, FinishReason, Generated, GenerateRequest, Started, TokenMade
from mint_lib.errors import ComputationFailed
from mint_lib.records import Turn
from mint_lib.server.answer_text import StopStrings, TextStream
from mint_lib.server.answers import Answerer, Case, check_modality
from mint_lib.server.calls import current_call
from mint_lib.server.http_errors import BadField, describe_error, describe_for_openai
from mint_lib.server.images import read_data_url
from mint_lib.server.openai_types import AnswerRequest, ChatRequest, CompletionRequest
from mint_lib.server.students import EncodedPrompt, ServedStudent

Kind = Literal["chat.completion", "text_completion"]


@dataclasses.dataclass
class _Answer:
    """An answer on its way: whose, and how far."""

    student: ServedStudent
    kind: Kind
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_answer_tokens: int = 0
    finish_reason: FinishReason | None = None

    @property
    def head(self) -> dict[str, Any]:
        """What every body and chunk begins with."""
        prefix = "chatcmpl" if self.kind == "chat.completion" else "cmpl"
        return {
            "id": f"{prefix}-{current_call().request_id}",
            "created": self.created,
            "model": self.student.name,
            "system_fingerprint": fingerprint(self.student),
        }

    @property
    def usage(self) -> dict[str, Any]:
        """Token counts."""
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": self.num_answer_tokens,
            "total_tokens": self.num_prompt_tokens + self.num_answer_tokens,
            "prompt_tokens_details": {"cached_tokens": self.num_cached_tokens},
        }


def fingerprint(student: ServedStudent) -> str:
    """The beginning of the model reference's digest: it changes with every version."""
    return f"fp_{student.reference.digest.removeprefix('sha256:')[:12]}"


def make_openai_router(answerer: Answerer) -> APIRouter:
    """The routes under /openai/v1."""
    router = APIRouter(prefix="/openai/v1")

    @router.get("/models", response_model=None)
    async def list_models() -> Response:
        names = set(answerer.names())
        return JSONResponse(
            {
                "object": "list",
                "data": [
                    {"id": student.name, "object": "model", "created": 0, "owned_by": str(student.reference)}
                    for student in answerer.lineup.students()
                    if student.name in names
                ],
            }
        )

    @router.post("/completions", response_model=None)
    async def complete(body: CompletionRequest) -> Response:
        student = await answerer.take(body.model)
        if body.as_case:
            prompt = await answerer.encode_case(student, Case(body.prompt))
        else:
            check_modality(student, has_image=False)
            if not body.prompt:
                raise BadField("The prompt is empty. Send the text to continue.", "prompt")
            prompt = EncodedPrompt(
                await answerer.encode(lambda: tuple(student.tokenizer.encode(body.prompt, add_special_tokens=False)))
            )
        return await _respond(answerer, student, body, prompt, "text_completion")

    @router.post("/chat/completions", response_model=None)
    async def chat(body: ChatRequest) -> Response:
        student = await answerer.take(body.model)
        prompt = await _encode_chat(answerer, student, body)
        return await _respond(answerer, student, body, prompt, "chat.completion")

    return router


async def _encode_chat(answerer: Answerer, student: ServedStudent, body: ChatRequest) -> EncodedPrompt:
    """The prompt of a conversation, or of the case that its only message is."""
    first_user = next(message for message in body.messages if message.role == "user")
    if any(message.image_urls for message in body.messages if message is not first_user):
        raise BadField("An image stands in another message than the first user's. Put it there.", "messages")
    if len(first_user.image_urls) > 1:
        raise BadField("The messages hold several images; one is read.", "messages")
    images = [read_data_url(url, answerer.limits) for url in first_user.image_urls]
    image = images[0] if images else None
    if body.as_case:
        return await answerer.encode_case(student, Case(body.messages[0].text, image))
    turns = [Turn(role=message.role, content=message.text) for message in body.messages]
    return await answerer.encode_turns(student, turns, image)


async def _respond(
    answerer: Answerer, student: ServedStudent, body: AnswerRequest, prompt: EncodedPrompt, kind: Kind
) -> Response:
    """The answer, whole, or as events once the engine has begun with it."""
    request = _make_request(student, body, prompt)
    events = answerer.generate(request, student)
    current_call().resources.push_async_callback(events.aclose)
    # What can be refused is refused before the answer's head is sent: a full queue, a deadline while waiting.
    started = await anext(events)
    if not isinstance(started, Started):
        raise ComputationFailed("The engine began an answer out of order. Try again.")
    answer = _Answer(
        student,
        kind,
        num_prompt_tokens=started.num_prompt_tokens,
        num_cached_tokens=started.num_cached_tokens,
    )
    pieces = _read_pieces(answer, events, body.stops)
    if body.stream:
        with_usage = body.stream_options is not None and body.stream_options.include_usage
        return StreamingResponse(_write_events(answer, pieces, with_usage=with_usage), media_type="text/event-stream")
    text = "".join([piece async for piece in pieces])
    return JSONResponse(_write_whole(answer, text))


def _make_request(student: ServedStudent, body: AnswerRequest, prompt: EncodedPrompt) -> GenerateRequest:
    """What the engine is asked.

    Raises:
        InvalidInput: the window or `max_tokens` has no room for the answer.
    """
    call = current_call()
    answer_format = student.answer_format if body.answer_format == "ranked_list" else None
    wanted = body.wanted_tokens
    if answer_format is not None:
        if wanted is not None and wanted < answer_format.max_tokens:
            raise BadField(
                f"A ranked list of this model takes up to {answer_format.max_tokens} tokens and is never cut; "
                f"max_tokens is {wanted}. Give at least so many, or leave it out.",
                "max_tokens",
            )
        wanted = answer_format.max_tokens
    return GenerateRequest(
        request_id=call.request_id,
        tenant=call.tenant,
        adapter=student.adapter,
        prompt_ids=prompt.ids,
        images=prompt.images,
        deadline=call.deadline,
        max_new_tokens=student.room_for(prompt.ids, wanted),
        stop_ids=student.stop_ids,
        temperature=body.temperature or 0.0,
        top_p=1.0 if body.top_p is None else body.top_p,
        seed=body.seed,
        answer_format=answer_format,
    )


async def _read_pieces(answer: _Answer, events: AsyncIterator[Event], stops: tuple[str, ...]) -> AsyncIterator[str]:
    """The answer's text, piece by piece; sets counts and finish reason of `answer`."""
    text = TextStream(answer.student.tokenizer)
    filtered = StopStrings(stops)
    async for event in events:
        if isinstance(event, TokenMade):
            answer.num_answer_tokens += 1
            piece = filtered.add(text.add(event.token_id))
            if piece:
                yield piece
            if filtered.is_stopped:
                break
        elif isinstance(event, Generated):
            answer.finish_reason = event.finish_reason
            piece = filtered.add(text.finish())
            if not filtered.is_stopped:
                piece += filtered.finish()
            if piece:
                yield piece
    if filtered.is_stopped:
        answer.finish_reason = "stop"


def _write_whole(answer: _Answer, text: str) -> dict[str, Any]:
    """The body of an answer that is not streamed."""
    choice: dict[str, Any] = {"index": 0, "finish_reason": answer.finish_reason, "logprobs": None}
    if answer.kind == "chat.completion":
        choice["message"] = {"role": "assistant", "content": text, "refusal": None}
    else:
        choice["text"] = text
    return {**answer.head, "object": answer.kind, "choices": [choice], "usage": answer.usage}


async def _write_events(answer: _Answer, pieces: AsyncIterator[str], *, with_usage: bool) -> AsyncIterator[bytes]:
    """The answer as server-sent events; an error on the way is the last of them."""
    kind = "chat.completion.chunk" if answer.kind == "chat.completion" else "text_completion"

    def chunk(**fields: Any) -> bytes:
        usage = {"usage": None} if with_usage else {}
        return _event({**answer.head, "object": kind, **usage, **fields})

    def choice(piece: str | None, finish_reason: str | None, **more: str) -> list[dict[str, Any]]:
        content: dict[str, Any]
        if answer.kind == "chat.completion":
            content = {"delta": {**more, **({} if piece is None else {"content": piece})}}
        else:
            content = {"text": piece or ""}
        return [{"index": 0, **content, "logprobs": None, "finish_reason": finish_reason}]

    try:
        if answer.kind == "chat.completion":
            yield chunk(choices=choice("", None, role="assistant"))
        async for piece in pieces:
            yield chunk(choices=choice(piece, None))
        yield chunk(choices=choice(None, answer.finish_reason))
        if with_usage:
            yield chunk(choices=[], usage=answer.usage)
        yield b"data: [DONE]\n\n"
    except Exception as error:
        problem = describe_error(error)
        call = current_call()
        call.problem = problem.code
        yield _event({"error": {**describe_for_openai(problem), "request_id": call.request_id}})


def _event(content: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(content)}\n\n".encode()
