"""The batch: the requests that are being computed, and one step of all of them.

Goes in: entries of the waiting line, as there is room for them. Comes out: one forward pass per step, and the events
that follow from it. What fails, fails alone: a pass that raises is repeated request by request. Everything here runs in
the engine's thread. It knows no locks and no files.

Shape suffixes: W wanted places of a segment, V vocabulary.
"""

import collections
import functools
import logging
import random
import time
from collections.abc import Callable, Sequence
from typing import TypedDict

from mint_lib.engine.adapters import Adapters
from mint_lib.engine.forward import ForwardPass, Segment
from mint_lib.engine.key_values import KeyValues
from mint_lib.engine.prefix_cache import BLOCK_TOKENS, Owner, PrefixCache
from mint_lib.engine.requests import EngineLimits, EngineObserver, Event, Failed, RankRequest, Started
from mint_lib.engine.runs import GenerateRun, RankRun, See, StepKind
from mint_lib.engine.waiting_line import Entry
from mint_lib.errors import ComputationFailed, DeadlineExceeded, MintError

logger = logging.getLogger(__name__)
LATE = "The answer was not ready in time. Allow more time, or try again later."


class _Parts(TypedDict):
    """What runs of both kinds are made with."""

    key_values: KeyValues
    prefixes: PrefixCache
    owner: Owner
    see: See


class Batch:
    """Requests that left the queue, until they are answered."""

    def __init__(
        self,
        *,
        forward_pass: ForwardPass,
        adapters: Adapters,
        prefixes: PrefixCache,
        limits: EngineLimits,
        observer: EngineObserver,
        see: See,
        seed: int,
    ):
        """`see` computes the features of a prompt's images."""
        self._forward_pass = forward_pass
        self._adapters = adapters
        self._prefixes = prefixes
        self._limits = limits
        self._observer = observer
        self._see = see
        self._seeds = random.Random(seed)
        self._runs: dict[Entry, GenerateRun | RankRun] = {}
        self._num_answered = 0

    def __len__(self) -> int:
        return len(self._runs)

    def step(self, take_next: Callable[[Callable[[Entry], bool]], Entry | None]) -> int:
        """Begin requests, compute once and tell the clients; returns how many requests were answered.

        `take_next(condition)` takes the next entry out of the waiting line if it meets the condition.
        """
        self._drop_unwanted()
        segments: dict[Entry, Segment] = {}
        budget = self._limits.step_tokens
        for entry, run in list(self._runs.items()):
            if run.is_answering:
                self._plan(entry, run.num_waiting_tokens, segments)
            # The first prompt takes what there is room for; others join where all of them fits.
            elif budget == self._limits.step_tokens or run.num_waiting_tokens <= budget:
                budget -= self._plan(entry, budget, segments)
        self._admit(budget, segments, take_next)
        self._compute(segments)
        num_answered, self._num_answered = self._num_answered, 0
        return num_answered

    def entries(self, adapter: str | None = None) -> list[Entry]:
        """The requests in the batch; those of one adapter's key if it is given."""
        return [entry for entry in self._runs if adapter in (None, entry.request.adapter)]

    def fail(self, entry: Entry, error: Exception) -> None:
        """End a request, of this batch or of the waiting line, with `error`."""
        self._runs.pop(entry, None)
        hand_over(entry, Failed(error=error))

    def _drop_unwanted(self) -> None:
        now = time.monotonic()
        for entry in list(self._runs):
            if entry.is_cancelled:
                del self._runs[entry]
            elif entry.request.deadline < now:
                self.fail(entry, DeadlineExceeded(LATE))

    def _admit(
        self,
        budget: int,
        segments: dict[Entry, Segment],
        take_next: Callable[[Callable[[Entry], bool]], Entry | None],
    ) -> None:
        """Begin requests while there is room for them, and plan what this pass computes of their prompts."""
        while len(self._runs) < self._limits.max_batch:
            entry = take_next(functools.partial(self._has_room, segments, budget))
            if entry is None:
                return
            run = self._begin(entry)
            if run is not None and (budget == self._limits.step_tokens or run.num_waiting_tokens <= budget):
                budget -= self._plan(entry, budget, segments)

    def _has_room(self, segments: dict[Entry, Segment], room: int, entry: Entry) -> bool:
        """Whether the prompt of `entry` should be begun in this pass."""
        if room == self._limits.step_tokens:
            return True
        prefix, owner = entry.request.prefix, self._owner(entry)
        num_cached = self._prefixes.count_cached(owner, prefix[:-1])
        if len(prefix) - num_cached > room:
            return False
        # A prompt that goes on as one of this pass does can take that one's blocks in the next pass.
        shared = prefix[: num_cached + BLOCK_TOKENS]
        return len(shared) < num_cached + BLOCK_TOKENS or not any(
            other.request.prefix[: len(shared)] == shared and self._owner(other) == owner
            for other in segments
            if not self._runs[other].is_answering
        )

    def _begin(self, entry: Entry) -> GenerateRun | RankRun | None:
        """Start to work on `entry`; None if it is over already."""
        request = entry.request
        run: GenerateRun | RankRun
        try:
            parts = _Parts(
                key_values=KeyValues(self._forward_pass.geometry),
                prefixes=self._prefixes,
                owner=self._owner(entry),
                see=self._see,
            )
            if isinstance(request, RankRequest):
                run = RankRun(request, limits=self._limits, **parts)
            else:
                seed = request.seed if request.seed is not None else self._seeds.getrandbits(63)
                run = GenerateRun(request, seed=seed, **parts)
        except Exception as error:
            self.fail(entry, wrap(error))
            return None
        self._runs[entry] = run
        started = Started(
            queue_seconds=time.monotonic() - entry.queued_at,
            num_prompt_tokens=len(request.prompt_ids),
            num_cached_tokens=run.num_cached_tokens,
        )
        self._deliver(entry, [started, *run.tell()])
        return None if run.is_done else run

    def _plan(self, entry: Entry, max_tokens: int, segments: dict[Entry, Segment]) -> int:
        """Have the next tokens of `entry` computed in this pass; returns how many they are."""
        try:
            segments[entry] = self._runs[entry].next_segment(max_tokens)
        except Exception as error:
            self.fail(entry, wrap(error))
            return 0
        return len(segments[entry].token_ids)

    def _compute(self, segments: dict[Entry, Segment]) -> None:
        """One pass over `segments`; if it raises, one for each."""
        if not segments:
            return
        try:
            logits = self._forward_pass.run(list(segments.values()))
        except Exception as error:
            if len(segments) == 1:
                for entry in segments:
                    self.fail(entry, wrap(error))
                return
            self._observer.see_isolation()
            for entry, segment in segments.items():
                self._compute({entry: segment})
            return
        self._tell_step(segments)
        for (entry, segment), logits_WV in zip(segments.items(), logits, strict=True):
            try:
                events = self._runs[entry].take(segment, logits_WV)
            except Exception as error:
                self.fail(entry, wrap(error))
            else:
                self._deliver(entry, events)

    def _tell_step(self, segments: dict[Entry, Segment]) -> None:
        counts: collections.Counter[StepKind] = collections.Counter()
        rows: collections.Counter[StepKind] = collections.Counter()
        for entry, segment in segments.items():
            for kind, num_tokens in self._runs[entry].count_kinds(segment).items():
                counts[kind] += num_tokens
                rows[kind] += num_tokens > 0
        for kind, num_tokens in counts.items():
            if num_tokens:
                self._observer.see_step(kind=kind, num_rows=rows[kind], num_tokens=num_tokens)

    def _deliver(self, entry: Entry, events: Sequence[Event]) -> None:
        """Give `events` to the client, and forget the request if they end it."""
        if self._runs[entry].is_done:
            del self._runs[entry]
            self._num_answered += 1
        for event in events:
            hand_over(entry, event)

    def _owner(self, entry: Entry) -> Owner:
        return Owner(tenant=entry.request.tenant, adapter=self._adapters.names[entry.request.adapter])


def hand_over(entry: Entry, event: Event) -> None:
    """Give `event` to the client of `entry`; one that cannot take it is not asked again."""
    if entry.is_cancelled:
        return
    try:
        entry.deliver(event)
    except Exception as error:
        logger.warning("an event could not be delivered (%s); its request is dropped", type(error).__name__)
        entry.is_cancelled = True


def wrap(error: Exception) -> MintError:
    """What a client is told of `error`: never the text of another package's exception, which may hold content."""
    if isinstance(error, MintError):
        return error
    logger.warning("a request failed in the engine (%s)", type(error).__name__)
    return ComputationFailed(
        f"The model failed on this request ({type(error).__name__}); others are not affected. Send it again once; if "
        "it fails again, shorten or change its text."
    )
