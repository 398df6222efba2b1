"""Decoding: which token comes next in one answer, and when the answer is complete.

Goes in: a request and, step by step, the logits of its next token. Comes out: the answer's tokens. Choices depend on
the request and its seed alone, never on what else is computed. Where an answer format leaves one token only, it is
taken without asking the model. It knows neither the model nor the queue.

Shape suffixes: V vocabulary, C candidates.
"""

from typing import TYPE_CHECKING

from mint_lib.engine.requests import FinishReason, GenerateRequest

if TYPE_CHECKING:
    import torch

_FIRST_CANDIDATES = 256


class Answer:
    """An answer that is being made."""

    def __init__(self, request: GenerateRequest, *, seed: int):
        import torch

        self._request = request
        self._generator = torch.Generator().manual_seed(seed)
        self._format = request.answer_format
        self._state = self._format.start() if self._format is not None else None
        self.token_ids: list[int] = []
        """Without the token that ends the answer."""
        self.finish_reason: FinishReason | None = None
        self._allowed = self._list_allowed()
        self._take_forced()

    def take(self, logits_V: "torch.Tensor") -> None:
        """Choose the next token by its logits (float32, on the CPU) and take those that are forced after it."""
        allowed = self._allowed
        candidate_logits_C = logits_V if allowed is None else logits_V[list(allowed)]
        choice = choose_candidate(
            candidate_logits_C,
            temperature=self._request.temperature,
            top_p=self._request.top_p,
            generator=self._generator,
        )
        self._append(choice if allowed is None else allowed[choice])
        self._take_forced()

    def _take_forced(self) -> None:
        while self.finish_reason is None and self._allowed is not None and len(self._allowed) == 1:
            self._append(self._allowed[0])

    def _append(self, token_id: int) -> None:
        if self._format is not None and self._state is not None:
            self._state = self._format.advance(self._state, token_id)
            self._allowed = self._list_allowed()
        # A format that allows nothing more has taken its last token: the one that ends the turn.
        if token_id in self._request.stop_ids or self._allowed == ():
            self.finish_reason = "stop"
            return
        self.token_ids.append(token_id)
        if len(self.token_ids) == self._request.max_new_tokens:
            self.finish_reason = "length"

    def _list_allowed(self) -> tuple[int, ...] | None:
        if self._format is None or self._state is None:
            return None
        return self._format.allowed(self._state)


def choose_candidate(
    logits_C: "torch.Tensor", *, temperature: float, top_p: float, generator: "torch.Generator"
) -> int:
    """Index of the chosen candidate: the likeliest at temperature 0, else drawn.

    `top_p` keeps the likeliest candidates whose probabilities first add up to it (nucleus sampling, Holtzman et al.
    2019, arXiv 1904.09751). One number is drawn from `generator` per call and looked up in the candidates' cumulated
    float64 probabilities, so rounding in the logits almost never changes the choice.
    """
    import torch

    if temperature == 0.0:
        return int(logits_C.argmax())
    draw = torch.rand((), dtype=torch.float64, generator=generator)
    probability_C = (logits_C.double() / temperature).softmax(0)
    if top_p >= 1.0:
        return _look_up(probability_C, draw)
    # Sorting a whole vocabulary takes longer than the rest of the choice; the nucleus is nearly always among the first.
    for num_candidates in (min(_FIRST_CANDIDATES, len(probability_C)), len(probability_C)):
        kept_C, index_C = probability_C.topk(num_candidates)
        before_C = kept_C.cumsum(0) - kept_C
        if num_candidates == len(probability_C) or before_C[-1] >= top_p:
            break
    nucleus_C = kept_C[before_C < top_p]
    return int(index_C[_look_up(nucleus_C, draw)])


def _look_up(weight_C: "torch.Tensor", draw: "torch.Tensor") -> int:
    import torch

    cumulated_C = weight_C.cumsum(0)
    index = int(torch.searchsorted(cumulated_C, draw * cumulated_C[-1], right=True))
    return min(index, len(weight_C) - 1)
