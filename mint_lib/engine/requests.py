"""What the engine is asked and what it tells: plain records of token ids and numbers.

Goes in: nothing. Comes out: the requests, the events that answer them, the limits, and the observer that is told what
the engine does. No text of a case, no HTTP, and of tensors those of a prompt's images only.
"""

import dataclasses
import functools
from typing import TYPE_CHECKING, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from mint_lib.engine.answer_format import AnswerFormat
    from mint_lib.engine.label_trie import LabelTrie
    from mint_lib.engine.prompt_images import PromptImages

FinishReason = Literal["stop", "length"]
PrefixToken = int | tuple[str, int]
"""What a place of a prompt holds: a token, or a piece of an image, by the images' digest and the piece's number."""


class EngineLimits(BaseModel):
    """How much the engine does at once."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    max_batch: int = Field(default=8, ge=1, le=256)
    """Answers that are decoded together."""
    max_queued: int = Field(default=64, ge=1)
    """Requests that wait; one more is refused with 429."""
    max_queued_per_tenant: int = Field(default=32, ge=1)
    """Requests of one tenant that wait."""
    step_tokens: int = Field(default=256, ge=16)
    """Prompt tokens computed between two decoding steps, so that a long prompt does not hold up running answers."""
    prefix_cache_mib: int = Field(default=512, ge=0)
    """Memory for prompt prefixes that later requests of the same tenant and student use again; 0 turns it off."""
    exact_trie_tokens: int = Field(default=1024, ge=16)
    """Label sets of up to so many distinct tokens are scored whole; larger ones best first, with a proven bound."""
    bounded_label_tokens: int = Field(default=4096, ge=64)
    """Label tokens that one ranking of a larger set may compute before it answers with the bound reached."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What both kinds of request have."""

    request_id: str
    tenant: str
    """Prefixes are shared within a tenant only."""
    adapter: str
    """Key of an adapter that `Engine.add_adapter` was given."""
    prompt_ids: tuple[int, ...]
    images: "PromptImages | None" = None
    """What stands at the prompt's image tokens; None: it is all text."""
    deadline: float
    """`time.monotonic()` after which nobody wants the answer."""

    @functools.cached_property
    def prefix(self) -> tuple[PrefixToken, ...]:
        """What equal beginnings of prompts are told by. Image tokens are the same for every image, so images count."""
        if self.images is None:
            return self.prompt_ids
        held: list[PrefixToken] = list(self.prompt_ids)
        for number, place in enumerate(self.images.places):
            held[place] = (self.images.digest, number)
        return tuple(held)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankRequest(Request):
    """Score every label of a closed set as the first name of the answer."""

    trie: "LabelTrie"
    num_proven: int = 5
    """For sets too large to be scored whole: how many leading labels must be proven to be the leading ones."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateRequest(Request):
    """Continue the prompt."""

    max_new_tokens: int
    stop_ids: frozenset[int]
    temperature: float = 0.0
    """0: greedy."""
    top_p: float = 1.0
    seed: int | None = None
    """None: drawn by the engine. The same seed gives the same answer whatever else is in the batch."""
    answer_format: "AnswerFormat | None" = None
    """Only answers of this format can come out."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Started:
    """A request left the queue."""

    queue_seconds: float
    num_prompt_tokens: int
    num_cached_tokens: int
    """Prompt tokens that were taken from the prefix cache."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenMade:
    """One more token of the answer. The token that ends the answer is not told."""

    token_id: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generated:
    """The answer is complete: it ended by itself or reached `max_new_tokens`."""

    finish_reason: FinishReason
    num_new_tokens: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ranked:
    """Scores over the label set.

    `log_probabilities[i]` is the natural logarithm of label i's probability, normalised over the label set. Where the
    set was not scored whole (`is_exact` False), labels that were not reached hold -inf, the first `num_proven` places
    of the order are proven, and a given probability p is never too low and at most `p * unreached_mass` too high.
    """

    log_probabilities: tuple[float, ...]
    is_exact: bool
    num_proven: int
    unreached_mass: float
    num_label_tokens: int
    """Label tokens computed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Failed:
    """The request ended without an answer; `error` is of `mint_lib.errors` and holds no content."""

    error: Exception


Event = Started | TokenMade | Generated | Ranked | Failed


class EngineObserver(Protocol):
    """Told what the engine does, from its own thread. Must be quick and must not raise."""

    def see_step(self, *, kind: Literal["prompt", "decode", "labels"], num_rows: int, num_tokens: int) -> None:
        """A forward pass computed `num_tokens` tokens of this kind for `num_rows` requests.

        A pass with several kinds is told once for each.
        """

    def see_queue(self, *, num_queued: int, num_running: int) -> None:
        """The queue or the batch changed."""

    def see_prefix_cache(self, *, num_bytes: int, num_evicted_blocks: int) -> None:
        """The prefix cache changed; evictions are those since the last call."""

    def see_isolation(self) -> None:
        """A batch failed and its requests are tried one by one."""
