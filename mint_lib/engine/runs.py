"""Runs: how far one request has come, which of its tokens are computed next, and what the numbers mean for it.

Goes in: a request and, after each pass, logits. Comes out: segments for the next pass and the events that answer the
request. A ranking and a generated answer begin alike, with their prompt. A run knows neither the queue nor other runs.

Shape suffixes: Q tokens of a segment, T places that a segment sees, W wanted places, V vocabulary, S edges,
I places that stand for images, E hidden size.
"""

import abc
import bisect
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from mint_lib.engine.decoding import Answer
from mint_lib.engine.forward import Segment
from mint_lib.engine.key_values import KeyValues
from mint_lib.engine.prefix_cache import BLOCK_TOKENS, Owner, PrefixCache
from mint_lib.engine.prompt_images import PromptImages
from mint_lib.engine.ranking import LabelRanking, Wave
from mint_lib.engine.requests import (
    EngineLimits,
    Event,
    Generated,
    GenerateRequest,
    RankRequest,
    Request,
    TokenMade,
)
from mint_lib.errors import ComputationFailed

if TYPE_CHECKING:
    import torch

StepKind = Literal["prompt", "decode", "labels"]
See = Callable[[PromptImages], "torch.Tensor"]
"""From a prompt's images to what is read at their places, [I, E]."""


class Run(abc.ABC):
    """A request that is being computed."""

    def __init__(self, request: Request, *, key_values: KeyValues, prefixes: PrefixCache, owner: Owner, see: See):
        self.is_done = False
        self._prompt_ids = request.prompt_ids
        self._prefix = request.prefix
        self._key_values = key_values
        self._prefixes = prefixes
        self._owner = owner
        self._is_prompt_stored = False
        # The last token is always computed: its hidden state predicts the answer.
        blocks = prefixes.find(owner, self._prefix[:-1])
        self.num_cached_tokens = len(blocks) * BLOCK_TOKENS
        key_values.reserve(len(self._prompt_ids))
        for index, block in enumerate(blocks):
            key_values.copy_in(index * BLOCK_TOKENS, block)
        self._num_computed = self.num_cached_tokens
        self._image_places = request.images.places if request.images is not None else ()
        self._image_features: torch.Tensor | None = None
        # Images whose places all come from the cache need not be looked at again.
        if request.images is not None and any(place >= self._num_computed for place in self._image_places):
            self._image_features = see(request.images)

    @property
    @abc.abstractmethod
    def num_waiting_tokens(self) -> int:
        """Tokens that can be computed in the next pass."""

    @property
    def is_answering(self) -> bool:
        """Whether it computes an answer that grows token by token, and no prompt or labels."""
        return False

    def tell(self) -> list[Event]:
        """Events that have not been told; some need no computation."""
        return []

    @abc.abstractmethod
    def next_segment(self, max_tokens: int) -> Segment:
        """What to compute next; of a prompt at most `max_tokens`. The same again until `take` was called."""

    @abc.abstractmethod
    def count_kinds(self, segment: Segment) -> dict[StepKind, int]:
        """How many of the segment's tokens are for what."""

    def take(self, segment: Segment, logits_WV: "torch.Tensor") -> list[Event]:
        """Go on by what the pass gave for `segment`; the events that follow from it.

        Raises:
            ComputationFailed: the logits are not finite.
        """
        # A sum is finite only if all its terms are, and takes a twentieth of the time of looking at each.
        if not math.isfinite(float(logits_WV.sum())):
            raise ComputationFailed(
                "The model gave numbers that are not finite for this request. Others are not affected; if it happens "
                "again with other requests, the model itself is broken."
            )
        self._num_computed += len(segment.token_ids)
        # A chunk without wanted places says nothing on whether its numbers are finite: nothing is kept of it as yet.
        if segment.wanted and not self._is_prompt_stored:
            self._prefixes.store(self._owner, self._prefix, self._key_values.copy_out)
            self._is_prompt_stored = True
            self._image_features = None
        return self._go_on(logits_WV) if segment.wanted else []

    @abc.abstractmethod
    def _go_on(self, logits_WV: "torch.Tensor") -> list[Event]:
        """What follows from the logits of the wanted places."""

    def _make_segment(
        self,
        token_ids: tuple[int, ...],
        *,
        positions: tuple[int, ...] | None = None,
        seen_QT: "torch.Tensor | None" = None,
        wanted: tuple[int, ...],
    ) -> Segment:
        start, stop = self._num_computed, self._num_computed + len(token_ids)
        self._key_values.reserve(stop)
        image_places: tuple[int, ...] = ()
        features_IE = self._image_features
        if features_IE is not None:
            within = slice(*(bisect.bisect_left(self._image_places, place) for place in (start, stop)))
            image_places, features_IE = (
                tuple(place - start for place in self._image_places[within]),
                features_IE[within],
            )
        return Segment(
            key_values=self._key_values,
            start=start,
            token_ids=token_ids,
            positions=positions,
            seen=seen_QT,
            wanted=wanted,
            adapter=self._owner.adapter,
            image_places=image_places,
            image_features=features_IE,
        )


class GenerateRun(Run):
    """An answer that is generated: the prompt, then a few tokens per pass."""

    def __init__(
        self,
        request: GenerateRequest,
        *,
        seed: int,
        key_values: KeyValues,
        prefixes: PrefixCache,
        owner: Owner,
        see: See,
    ):
        super().__init__(request, key_values=key_values, prefixes=prefixes, owner=owner, see=see)
        self._answer = Answer(request, seed=seed)
        self._num_told = 0

    @property
    def num_waiting_tokens(self) -> int:
        """What is left of the prompt, and the answer's tokens that the model has not read."""
        return len(self._prompt_ids) + len(self._answer.token_ids) - self._num_computed

    @property
    def is_answering(self) -> bool:
        """Whether the whole prompt has been computed."""
        return self._num_computed >= len(self._prompt_ids)

    def next_segment(self, max_tokens: int) -> Segment:
        """The next tokens of prompt and answer, without a gap: forced tokens are computed together."""
        num_tokens = self.num_waiting_tokens if self.is_answering else min(self.num_waiting_tokens, max_tokens)
        stop = self._num_computed + num_tokens
        wanted = (num_tokens - 1,) if num_tokens == self.num_waiting_tokens else ()
        num_prompt = len(self._prompt_ids)
        answer_ids = self._answer.token_ids[max(self._num_computed - num_prompt, 0) : max(stop - num_prompt, 0)]
        return self._make_segment((*self._prompt_ids[self._num_computed : stop], *answer_ids), wanted=wanted)

    def count_kinds(self, segment: Segment) -> dict[StepKind, int]:
        """Prompt tokens and tokens of the answer."""
        num_prompt = min(max(len(self._prompt_ids) - segment.start, 0), len(segment.token_ids))
        return {"prompt": num_prompt, "decode": len(segment.token_ids) - num_prompt}

    def tell(self) -> list[Event]:
        """The answer's tokens that have not been told, and its end."""
        fresh = self._answer.token_ids[self._num_told :]
        self._num_told += len(fresh)
        events: list[Event] = [TokenMade(token_id=token_id) for token_id in fresh]
        if self._answer.finish_reason is not None:
            self.is_done = True
            events.append(Generated(finish_reason=self._answer.finish_reason, num_new_tokens=self._num_told))
        return events

    def _go_on(self, logits_WV: "torch.Tensor") -> list[Event]:
        self._answer.take(logits_WV[-1].cpu())
        return self.tell()


class RankRun(Run):
    """A ranking: the prompt, whose last part is computed in one pass with the first wave, then further waves."""

    def __init__(
        self,
        request: RankRequest,
        *,
        limits: EngineLimits,
        key_values: KeyValues,
        prefixes: PrefixCache,
        owner: Owner,
        see: See,
    ):
        super().__init__(request, key_values=key_values, prefixes=prefixes, owner=owner, see=see)
        self._ranking = LabelRanking(request.trie, limits, request.num_proven)
        self._wave = self._need_wave()
        # For each place of all waves: the places it sees (itself and what it follows), and its depth below the prompt.
        self._seen: list[tuple[int, ...]] = []

    @property
    def num_waiting_tokens(self) -> int:
        """What is left of the prompt, and the wave."""
        return max(len(self._prompt_ids) - self._num_computed, 0) + len(self._wave.token_ids)

    def next_segment(self, max_tokens: int) -> Segment:
        """A chunk of the prompt, or its rest with the first wave, or a further wave."""
        rest = self._prompt_ids[self._num_computed :]
        if len(rest) > 1 and self.num_waiting_tokens > max_tokens:
            # The last token waits for the wave, as its hidden state predicts the labels' first tokens.
            return self._make_segment(rest[: min(max_tokens, len(rest) - 1)], wanted=())
        wave, num_prompt, num_rest = self._wave, len(self._prompt_ids), len(rest)
        first_place = len(self._seen)
        seen = self._follow(wave)
        sources = self._list_sources()
        return self._make_segment(
            (*rest, *wave.token_ids),
            positions=(
                *range(num_prompt - num_rest, num_prompt),
                *(num_prompt + len(places) - 1 for places in seen),
            ),
            seen_QT=self._make_seen(num_rest, seen, num_places=first_place + len(seen)),
            wanted=tuple(num_rest + source - first_place if source >= 0 else num_rest - 1 for source in sources),
        )

    def count_kinds(self, segment: Segment) -> dict[StepKind, int]:
        """Prompt tokens and label tokens."""
        num_prompt = min(max(len(self._prompt_ids) - segment.start, 0), len(segment.token_ids))
        return {"prompt": num_prompt, "labels": len(segment.token_ids) - num_prompt}

    def _go_on(self, logits_WV: "torch.Tensor") -> list[Event]:
        import torch

        wave = self._wave
        row_of = {source: row for row, source in enumerate(self._list_sources())}
        row_S = torch.tensor([row_of[source] for source in wave.sources], device=logits_WV.device)
        target_S = torch.tensor(wave.targets, device=logits_WV.device)
        log_p_S = logits_WV.log_softmax(dim=1)[row_S, target_S]
        self._ranking.take(log_p_S.tolist())
        self._seen += self._follow(wave)
        following = self._ranking.next_wave()
        if following is None:
            self.is_done = True
            return [self._ranking.result()]
        self._wave = following
        return []

    def _need_wave(self) -> Wave:
        wave = self._ranking.next_wave()
        assert wave is not None, "a ranking begins with a wave"
        return wave

    def _list_sources(self) -> list[int]:
        return list(dict.fromkeys(self._wave.sources))

    def _follow(self, wave: Wave) -> list[tuple[int, ...]]:
        """For each place of `wave`: itself and the places it follows."""
        seen = list(self._seen)
        for parent in wave.parents:
            seen.append((*(seen[parent] if parent >= 0 else ()), len(seen)))
        return seen[len(self._seen) :]

    def _make_seen(self, num_rest: int, seen: list[tuple[int, ...]], *, num_places: int) -> "torch.Tensor":
        """Boolean [Q, T]: the prompt's rest sees the prompt so far; a label's token the prompt and what it follows."""
        import torch

        num_prompt = len(self._prompt_ids)
        seen_QT = torch.zeros(num_rest + len(seen), num_prompt + num_places, dtype=torch.bool)
        seen_QT[:num_rest, :num_prompt] = torch.ones(num_rest, num_prompt, dtype=torch.bool).tril(num_prompt - num_rest)
        seen_QT[num_rest:, :num_prompt] = True
        rows = [num_rest + row for row, places in enumerate(seen) for _ in places]
        columns = [num_prompt + place for places in seen for place in places]
        seen_QT[rows, columns] = True
        return seen_QT
