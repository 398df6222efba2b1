"""Requests one at a time on the whole model, for image students whose images are no embeddings in their prompt.

Goes in: entries of the waiting line. Comes out: the events that answer them, as from a `Batch`. A ranking is one pass
for as many labels as fit; an answer is the model's own generation, with every token chosen here. Nothing is kept from
one request for the next. It knows no locks and no files.

Shape suffixes: V vocabulary, A labels.
"""

import logging
import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mint_lib.engine.batch import LATE, hand_over, wrap
from mint_lib.engine.decoding import Answer
from mint_lib.engine.requests import (
    EngineLimits,
    EngineObserver,
    Failed,
    Generated,
    GenerateRequest,
    Ranked,
    RankRequest,
    Started,
    TokenMade,
)
from mint_lib.engine.waiting_line import Entry
from mint_lib.errors import ComputationFailed, DeadlineExceeded, Draining
from mint_lib.packing import PackedTrees, Tree, collate_trees, move_to, pack_tree, predict_edges, sum_answers

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)
CollateImages = Callable[["Sequence[Mapping[str, torch.Tensor] | None]", Sequence[Tree], PackedTrees], dict[str, Any]]
"""`Reader.collate_images` of the student."""


class OneByOne:
    """The request that is being computed, if any. It stands where a `Batch` stands."""

    def __init__(
        self,
        model: "PreTrainedModel",
        *,
        collate_images: CollateImages,
        limits: EngineLimits,
        observer: EngineObserver,
        is_stopping: Callable[[], bool],
        seed: int,
    ):
        """`is_stopping` is asked between tokens, as a request is computed to its end within one step."""
        self._model = model
        self._collate_images = collate_images
        self._limits = limits
        self._observer = observer
        self._is_stopping = is_stopping
        self._seeds = random.Random(seed)
        self._running: Entry | None = None

    def __len__(self) -> int:
        return self._running is not None

    def step(self, take_next: Callable[[Callable[[Entry], bool]], Entry | None]) -> int:
        """Answer one request; returns how many were answered."""
        entry = take_next(lambda _: True)
        if entry is None:
            return 0
        self._running = entry
        num_prompt = len(entry.request.prompt_ids)
        waited = time.monotonic() - entry.queued_at
        hand_over(entry, Started(queue_seconds=waited, num_prompt_tokens=num_prompt, num_cached_tokens=0))
        try:
            end = self._rank(entry.request) if isinstance(entry.request, RankRequest) else self._generate(entry)
        except Exception as error:
            self.fail(entry, wrap(error))
            return 0
        self._running = None
        hand_over(entry, end)
        return 1

    def entries(self, adapter: str | None = None) -> list[Entry]:
        """The request that is computed, if it is one of the adapter's key that is given."""
        running = self._running
        return [running] if running is not None and adapter in (None, running.request.adapter) else []

    def fail(self, entry: Entry, error: Exception) -> None:
        """End a request, this one or one of the waiting line, with `error`."""
        if self._running is entry:
            self._running = None
        hand_over(entry, Failed(error=error))

    def _rank(self, request: RankRequest) -> Ranked:
        """Every label exactly; sets of more tokens than `exact_trie_tokens` take several passes."""
        import torch

        header, trie = request.trie.header, request.trie
        paths = [trie.path(label)[len(header) :] for label in range(trie.num_labels)]
        scores: list[torch.Tensor] = []
        first = 0
        with torch.inference_mode():
            while first < len(paths):
                last, num_tokens = first, 0
                while last < len(paths) and (last == first or num_tokens < self._limits.exact_trie_tokens):
                    num_tokens += len(paths[last])
                    last += 1
                tree = pack_tree([*request.prompt_ids, *header], paths[first:last])
                batch = move_to(self._pack(request, tree), self._model.device)
                scores.append(sum_answers(predict_edges(self._model, batch).double(), batch))
                first = last
            score_A = torch.cat(scores)
        if not bool(torch.isfinite(score_A).all()):
            raise ComputationFailed("The model gave numbers that are not finite for this request.")
        self._observer.see_step(kind="prompt", num_rows=1, num_tokens=len(request.prompt_ids))
        self._observer.see_step(kind="labels", num_rows=1, num_tokens=trie.num_tokens)
        return Ranked(
            log_probabilities=tuple(score_A.log_softmax(dim=0).tolist()),
            is_exact=True,
            num_proven=trie.num_labels,
            unreached_mass=0.0,
            num_label_tokens=trie.num_tokens,
        )

    def _generate(self, entry: Entry) -> Generated:
        """The answer, whose tokens are told as they are made."""
        import torch
        from transformers import LogitsProcessorList, StoppingCriteriaList

        request = entry.request
        assert isinstance(request, GenerateRequest)
        seed = request.seed if request.seed is not None else self._seeds.getrandbits(63)
        steps = _Steps(entry, Answer(request, seed=seed), self._is_stopping)
        steps.tell()
        if steps.answer.finish_reason is None:
            tree = pack_tree(request.prompt_ids, [[0]])  # the token behind it takes no place
            batch = self._pack(request, tree)
            inputs: dict[str, Any] = dict(batch["image_inputs"])
            inputs.pop("position_ids", None)  # generation makes its own
            inputs |= {"input_ids": batch["input_ids"], "attention_mask": torch.ones_like(batch["input_ids"])}
            with torch.inference_mode():
                self._model.generate(
                    **move_to(inputs, self._model.device),
                    do_sample=False,
                    temperature=None,
                    top_p=None,
                    top_k=None,
                    # The longest answer that is told, and a place for the token that ends it.
                    max_new_tokens=request.max_new_tokens + 1,
                    eos_token_id=-1,
                    pad_token_id=0,
                    logits_processor=LogitsProcessorList([steps.choose]),
                    stopping_criteria=StoppingCriteriaList([steps.is_over]),
                )
        if steps.error is not None:
            raise steps.error
        num_made = len(steps.answer.token_ids)
        self._observer.see_step(kind="prompt", num_rows=1, num_tokens=len(request.prompt_ids))
        if num_made:
            self._observer.see_step(kind="decode", num_rows=1, num_tokens=num_made)
        # A cancelled answer ends anywhere, and nobody hears of it.
        return Generated(finish_reason=steps.answer.finish_reason or "length", num_new_tokens=num_made)

    def _pack(self, request: RankRequest | GenerateRequest, tree: Tree) -> PackedTrees:
        """The tree as a batch of one, with the request's images."""
        batch = collate_trees([tree], pad_token_id=0)
        inputs = request.images.inputs if request.images is not None else None
        batch["image_inputs"] = self._collate_images([inputs], [tree], batch)
        return batch


class _Steps:
    """What generation asks between two tokens: which comes next, and whether it was the last."""

    def __init__(self, entry: Entry, answer: Answer, is_stopping: Callable[[], bool]):
        self.answer = answer
        self.error: Exception | None = None
        self._entry = entry
        self._is_stopping = is_stopping
        self._num_told = 0
        self._num_given = 0

    def tell(self) -> None:
        """Hand over what of the answer has not been told."""
        for token_id in self.answer.token_ids[self._num_told :]:
            hand_over(self._entry, TokenMade(token_id=token_id))
        self._num_told = len(self.answer.token_ids)

    def choose(self, _input_ids: "torch.Tensor", scores_1V: "torch.Tensor") -> "torch.Tensor":
        """`scores_1V` with all but the next token of the answer ruled out."""
        import torch

        if self._num_given == len(self.answer.token_ids) and self.answer.finish_reason is None:
            logits_V = scores_1V[0].float().cpu()
            if bool(torch.isfinite(logits_V).any()) and not bool(torch.isnan(logits_V).any()):
                self.answer.take(logits_V)
                self.tell()
            else:
                self.error = ComputationFailed("The model gave numbers that are not finite for this request.")
        made = self.answer.token_ids
        token_id = made[self._num_given] if self._num_given < len(made) else 0
        self._num_given += 1
        only_1V = torch.full_like(scores_1V, -torch.inf)
        only_1V[0, token_id] = 0.0
        return only_1V

    def is_over(self, input_ids: "torch.Tensor", _scores: Any) -> "torch.Tensor":
        """Whether nothing more is to be computed, for the one row."""
        import torch

        if self._is_stopping():
            self.error = Draining("The server is shutting down. Send the request again; another one will answer.")
        elif self._entry.request.deadline < time.monotonic():
            self.error = DeadlineExceeded(LATE)
        is_told = self.answer.finish_reason is not None and self._num_given >= len(self.answer.token_ids)
        is_over = self.error is not None or self._entry.is_cancelled or is_told
        return torch.full((len(input_ids),), is_over, device=input_ids.device)
