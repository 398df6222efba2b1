"""From a student's name and a text or image to an answer: leases, tokens, the engine's events, probabilities.

Goes in: names, texts, images and sampling settings of an authorised request. Comes out: ranked labels with
probabilities, or the tokens of an answer as they are made. All routes ask here, so access, deadlines, metrics and
cancellation are the same for each protocol. It knows no HTTP and no protocol's fields.
"""

import asyncio
import contextlib
import dataclasses
import math
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

from mint_lib.engine.requests import (
    Event,
    Failed,
    Generated,
    GenerateRequest,
    Ranked,
    RankRequest,
    Started,
    TokenMade,
)
from mint_lib.errors import ComputationFailed, DeadlineExceeded, InvalidInput, Overloaded
from mint_lib.records import Turn
from mint_lib.server.calls import Call, current_call
from mint_lib.server.http_errors import Refusal
from mint_lib.server.images import check_image
from mint_lib.server.lifecycle import Readiness
from mint_lib.server.limits import RequestLimits
from mint_lib.server.metrics import ServingMetrics
from mint_lib.server.students import EncodedPrompt, Lineup, ServedStudent

if TYPE_CHECKING:
    from mint_lib.engine.scheduler import Engine

_T = TypeVar("_T")
_TOKENISER_THREADS = 2  # a text of the largest size takes a second to tokenise: the event loop must not wait for it


@dataclasses.dataclass(frozen=True)
class Case:
    """What one instance of a request asks about."""

    text: str | None = None
    image: bytes | None = None
    """Encoded, as it was sent."""


@dataclasses.dataclass(frozen=True)
class RankedLabel:
    """One place of a ranking."""

    id: str
    name: str
    probability: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ranking:
    """The answer for one case."""

    labels: tuple[RankedLabel, ...]
    """The first places, most probable first; labels that were not reached are left out."""
    abstained: bool
    """The first label is less probable than the student's threshold."""
    is_exact: bool
    """The whole label set was scored."""
    num_proven: int
    """So many of the places are certain; all where it is exact."""
    is_calibrated: bool
    num_prompt_tokens: int
    num_cached_tokens: int


class Answerer:
    """Answers for one server."""

    def __init__(self, lineup: Lineup, *, limits: RequestLimits, metrics: ServingMetrics, readiness: Readiness):
        self.lineup = lineup
        self.limits = limits
        self._metrics = metrics
        self._readiness = readiness
        self._num_image_bytes = 0
        self._pool = ThreadPoolExecutor(_TOKENISER_THREADS, thread_name_prefix="tokenise")

    def names(self) -> list[str]:
        """Names of the students that the current call may ask."""
        grant = current_call().grant
        return [name for name in self.lineup.names() if grant is not None and grant.allows(name)]

    def check_name(self, name: str) -> None:
        """Refuse a name that the current call may not ask (403) or that nobody has (404; 503 while loading).

        A token that lists its models gets 403 for every other name, so that it does not learn which exist.
        """
        grant = current_call().grant
        if grant is None or not grant.allows(name):
            raise Refusal(403, "forbidden", "This token does not allow this model. GET /v1/models lists those it does.")
        if name not in self.lineup.names():
            if self._readiness.state == "loading":
                self._readiness.check()
            with self.lineup.lease(name):  # raises NotFound, in the lineup's words
                pass
        current_call().model = name

    async def take(self, name: str) -> ServedStudent:
        """The student called `name`, kept until the current call ends."""
        self.check_name(name)
        lease = self.lineup.lease(name)
        student = lease.__enter__()
        # The last lease of a replaced student frees it, which may wait for the engine: not on the event loop.
        current_call().resources.push_async_callback(asyncio.to_thread, lease.__exit__, None, None, None)
        return student

    async def encode(self, function: Callable[[], _T]) -> _T:
        """`function()`, which tokenises or decodes, on a thread beside the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, function)

    async def encode_case(self, student: ServedStudent, case: Case) -> EncodedPrompt:
        """The prompt for one case.

        Raises:
            InvalidInput: an image for a student that reads text, none for one that reads images or a text beside it, a
                broken image, an empty text or a control token in it, or a prompt beyond the window.
            Overloaded: too many images are in the server.
        """

        def encode() -> EncodedPrompt:
            check_modality(student, has_image=case.image is not None)
            if case.image is None:
                check_text(student, case.text or "")
                return student.encode_case(case.text or "")
            if case.text:
                raise InvalidInput(
                    f"{student.name} is asked about an image alone, in words of its own. Leave the text out."
                )
            return self._see_image(case.image, lambda image: student.encode_case(image))

        return self._hold(await self.encode(encode))

    async def encode_turns(
        self, student: ServedStudent, turns: Sequence[Turn], image: bytes | None = None
    ) -> EncodedPrompt:
        """A conversation's tokens, ending where the answer begins; `image` belongs to the first user turn."""

        def encode() -> EncodedPrompt:
            check_modality(student, has_image=image is not None)
            for turn in turns:
                check_text(student, turn.content)
            if image is None:
                return student.encode_turns(turns)
            return self._see_image(image, lambda image: student.encode_turns(turns, (image,)))

        return self._hold(await self.encode(encode))

    def _see_image(self, data: bytes, encode: Callable[[bytes], EncodedPrompt]) -> EncodedPrompt:
        """What `encode` makes of an image that was found in order."""
        started = time.monotonic()
        prompt = encode(check_image(data, self.limits))
        self._metrics.see_image(num_bytes=len(data), seconds=time.monotonic() - started)
        return prompt

    def _hold(self, prompt: EncodedPrompt) -> EncodedPrompt:
        """`prompt`, its images counted until the current call ends. Runs on the event loop."""
        num_bytes = prompt.images.num_bytes if prompt.images is not None else 0
        if num_bytes:
            if self._num_image_bytes + num_bytes > self.limits.max_prepared_image_bytes:
                raise Overloaded("The server is busy with other images. Try again in 1 s.", 1.0)
            self._num_image_bytes += num_bytes
            current_call().resources.callback(self._let_go, num_bytes)
        return prompt

    def _let_go(self, num_bytes: int) -> None:
        self._num_image_bytes -= num_bytes

    async def rank(self, student: ServedStudent, prompts: Sequence[EncodedPrompt], *, top_k: int) -> list[Ranking]:
        """Rankings of the label set for prompts of `encode_case`; all of them, or the first error."""
        tasks = [asyncio.create_task(self._rank_one(student, prompt, top_k)) for prompt in prompts]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _rank_one(self, student: ServedStudent, prompt: EncodedPrompt, top_k: int) -> Ranking:
        call = current_call()
        request = RankRequest(
            request_id=call.request_id,
            tenant=call.tenant,
            adapter=student.adapter,
            prompt_ids=prompt.ids,
            images=prompt.images,
            deadline=call.deadline,
            trie=student.trie,
            num_proven=min(top_k, len(student.labels)),
        )
        started: Started | None = None
        async with contextlib.aclosing(ask(student.engine, request)) as events:
            async for event in events:
                if isinstance(event, Started):
                    started = event
                    self._see_start(call, event)
                elif isinstance(event, Ranked):
                    ranking = read_ranking(student, event, started, top_k=top_k)
                    first = ranking.labels[0]
                    self._metrics.see_ranking(
                        model=call.model, label_id=first.id, probability=first.probability, abstained=ranking.abstained
                    )
                    return ranking
        raise ComputationFailed("The engine ended a ranking without a result. Try again.")

    async def generate(self, request: GenerateRequest, student: ServedStudent) -> AsyncGenerator[Event]:
        """Events of an answer: Started, TokenMade as they come, Generated. Close it to stop the work."""
        call = current_call()
        last = time.monotonic()
        is_first = True
        async with contextlib.aclosing(ask(student.engine, request)) as events:
            async for event in events:
                if isinstance(event, Started):
                    self._see_start(call, event)
                elif isinstance(event, TokenMade):
                    now = time.monotonic()
                    self._metrics.see_token(model=call.model, seconds=now - last, is_first=is_first)
                    last, is_first = now, False
                yield event

    def _see_start(self, call: Call, event: Started) -> None:
        self._metrics.see_start(
            model=call.model,
            queue_seconds=event.queue_seconds,
            num_prompt_tokens=event.num_prompt_tokens,
            num_cached_tokens=event.num_cached_tokens,
        )


async def ask(engine: "Engine", request: RankRequest | GenerateRequest) -> AsyncGenerator[Event]:
    """The engine's events for `request`, ending after the last; closing the iterator cancels the work.

    Raises:
        Overloaded, Draining: the engine takes no more.
        DeadlineExceeded: the request's deadline passed, whether or not the engine noticed.
        MintError: what the engine says of a request that failed.
    """
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[Event] = asyncio.Queue()

    def deliver(event: Event) -> None:
        # A closed loop has nobody left who waits.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(queue.put_nowait, event)

    ticket = engine.submit(request, deliver)
    try:
        while True:
            try:
                async with asyncio.timeout(max(0.0, request.deadline - time.monotonic())):
                    event = await queue.get()
            except TimeoutError:
                raise DeadlineExceeded(
                    "The answer was not ready before the request's deadline. Ask for less, or wait longer."
                ) from None
            if isinstance(event, Failed):
                raise event.error
            yield event
            if isinstance(event, Generated | Ranked):
                return
    finally:
        ticket.cancel()


def check_modality(student: ServedStudent, *, has_image: bool) -> None:
    """Refuse an image that a student cannot read, and a missing one that it needs."""
    if has_image and student.modality == "text":
        raise InvalidInput(f"{student.name} reads text only. Leave the image out, or ask an image student.")
    if not has_image and student.modality == "image":
        raise InvalidInput(f"{student.name} reads images. Send one.")


def check_text(student: ServedStudent, text: str) -> None:
    """Refuse a blank text, and one that spells control tokens: it could open a turn of its own in the prompt."""
    if not text or text.isspace():
        raise InvalidInput("The text is empty. Send the case's text.")
    if any(token and token in text for token in student.tokenizer.all_special_tokens):
        raise InvalidInput("The text spells a control token of the model's chat template. Remove it.")


def read_ranking(student: ServedStudent, ranked: Ranked, started: Started | None, *, top_k: int) -> Ranking:
    """Probabilities from the engine's scores.

    Temperature scaling (Guo et al. 2017, arXiv 1706.04599): the log-probabilities are divided by the temperature that
    was fitted on validation cases and normalised again. Where a large label set was not scored whole, the normaliser
    lacks the labels that were not reached; the ranking says so and does not count as calibrated.
    """
    scaled = [score / student.temperature for score in ranked.log_probabilities]
    highest = max(scaled)
    if not math.isfinite(highest) or any(math.isnan(score) for score in scaled):
        raise ComputationFailed("The model's scores are not finite. Report the request's id.")
    weights = [math.exp(score - highest) for score in scaled]
    total = math.fsum(weights)
    # Equal scores keep the order of the label set, so that an answer does not depend on chance.
    order = sorted((index for index, weight in enumerate(weights) if weight > 0.0), key=lambda index: -scaled[index])
    labels = tuple(
        RankedLabel(student.labels[index].id, student.labels[index].name, weights[index] / total)
        for index in order[:top_k]
    )
    return Ranking(
        labels=labels,
        abstained=labels[0].probability < student.abstain_below,
        is_exact=ranked.is_exact,
        num_proven=len(labels) if ranked.is_exact else min(ranked.num_proven, len(labels)),
        is_calibrated=student.num_calibration_cases > 0 and ranked.is_exact,
        num_prompt_tokens=started.num_prompt_tokens if started else 0,
        num_cached_tokens=started.num_cached_tokens if started else 0,
    )
