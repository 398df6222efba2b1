"""Ranks a closed label set: says what the model must compute next, takes the numbers, and ends with the ranking.

Goes in: a label trie, limits, and log-probabilities of the edges that were asked for. Comes out: waves of places to
compute, then a `Ranked`. A small set is scored whole. A large one is searched best first: a prefix's probability
bounds the sum of all labels below it, so most of the set is never computed and what remains unknown has a known bound.
It knows no model and no tensor.
"""

import dataclasses
import heapq
import math
from collections.abc import Iterable, Sequence

from mint_lib.engine.label_trie import LabelTrie
from mint_lib.engine.requests import EngineLimits, Ranked
from mint_lib.errors import ComputationFailed

_WHOLE_WAVE_PLACES = 512  # bounds the memory of one pass
_SEARCH_WAVE_PLACES = 128
_UNREACHED_MASS = 1e-3


@dataclasses.dataclass(frozen=True, slots=True)
class Wave:
    """Places to compute in one pass and the edges wanted from it.

    Places are numbered over all waves of a ranking in the order in which they are given. The position of a place is
    that of its parent plus one; -1 is the prompt's last token. All edges that leave a place are wanted in the wave
    that computes it, one after another, so equal sources are neighbours.
    """

    token_ids: tuple[int, ...]
    """The token at each new place."""
    parents: tuple[int, ...]
    """The place that each new place follows: of this wave or an earlier one, or -1."""
    sources: tuple[int, ...]
    """The place that predicts each edge's token: of this wave, or -1 in the first wave."""
    targets: tuple[int, ...]
    """The token that each edge predicts."""


class LabelRanking:
    """One ranking in progress. Call `next_wave`, compute it and call `take`, until there is no wave; then `result`."""

    def __init__(self, trie: LabelTrie, limits: EngineLimits, num_proven: int):
        self._header = trie.header
        self._trie = trie.trie
        self._is_whole = trie.num_tokens <= limits.exact_trie_tokens
        self._budget = limits.bounded_label_tokens
        self._num_wanted = min(num_proven, trie.num_labels)
        self._num_places = 0
        self._place_of: dict[int, int] = {}
        self._asked: list[int] = []
        self._scores: dict[int, float] = {0: 0.0}
        self._open = [0]
        self._reached: list[int] = []
        self._left_whole = [node for node, below in enumerate(trie.trie.children) if below] if self._is_whole else []

    def next_wave(self) -> Wave | None:
        """What to compute next; None where `result` can be asked for."""
        assert not self._asked, "the last wave's numbers were not given"
        if self._is_whole:
            room = _WHOLE_WAVE_PLACES - (len(self._header) if not self._num_places else 0)
            nodes, self._left_whole = self._left_whole[: max(room, 1)], self._left_whole[max(room, 1) :]
        else:
            nodes = self._choose()
        return self._make_wave(nodes) if nodes else None

    def take(self, log_probabilities: Sequence[float]) -> None:
        """The natural log-probability of each edge of the last wave, in its order.

        Raises:
            ComputationFailed: one is not finite.
        """
        for node, value in zip(self._asked, log_probabilities, strict=True):
            if not math.isfinite(value):
                raise ComputationFailed("The model gave numbers that are not finite for a label.")
            # Rounding can lift a certain token above 1; a prefix must never be worth less than what is below it.
            self._scores[node] = self._scores[self._trie.parents[node]] + min(value, 0.0)
            if not self._trie.children[node]:
                self._reached.append(node)
            elif node not in self._place_of:
                self._open.append(node)
        self._asked = []

    def result(self) -> Ranked:
        """The ranking. Probabilities are shares of the labels reached, so they sum to 1."""
        trie = self._trie
        reached = _sum_logs(self._scores[node] for node in self._reached)
        log_probabilities = [-math.inf] * len(trie.leaves)
        for node in self._reached:
            log_probabilities[trie.sequence_of[node]] = self._scores[node] - reached
        bound = max((self._scores[node] for node in self._open), default=-math.inf)
        return Ranked(
            log_probabilities=tuple(log_probabilities),
            is_exact=not self._open,
            num_proven=sum(self._scores[node] >= bound for node in self._reached),
            unreached_mass=self._share_unreached(),
            num_label_tokens=self._num_places,
        )

    def _choose(self) -> list[int]:
        """The inner nodes to compute next, parents before children: open prefixes of greatest mass and their chains."""
        if self._is_done():
            return []
        order = sorted(self._open, key=lambda node: (-self._scores[node], node))
        nodes: list[int] = []
        num_free = self._budget - self._num_places - (len(self._header) if not self._num_places else 0)
        for node in order[: self._count_needed(order)]:
            chain = self._chain(node)
            if nodes and len(nodes) + len(chain) > _SEARCH_WAVE_PLACES:
                break
            # Without any label there is no answer: the best prefix is then followed past the budget.
            if len(nodes) + len(chain) > num_free and (nodes or self._reached):
                break
            nodes += chain
        return nodes

    def _is_done(self) -> bool:
        if not self._open:
            return True
        bound = max(self._scores[node] for node in self._open)
        num_proven = sum(self._scores[node] >= bound for node in self._reached)
        return num_proven >= self._num_wanted and self._share_unreached() <= _UNREACHED_MASS

    def _count_needed(self, order: Sequence[int]) -> int:
        """How many of the open prefixes, greatest first, stand between the present state and the end of the search.

        The smallest ones whose masses together are below the share that may stay unreached need no computing, unless
        they outweigh the last label that must be proven. All others must be computed in any order of search.
        """
        allowed = _sum_logs(self._scores[node] for node in (*self._open, *self._reached)) + math.log(_UNREACHED_MASS)
        num_needed, tail = len(order), 0.0
        while num_needed and (tail := tail + math.exp(self._scores[order[num_needed - 1]] - allowed)) <= 1.0:
            num_needed -= 1
        leading = heapq.nlargest(self._num_wanted, (self._scores[node] for node in self._reached))
        bar = leading[-1] if len(leading) == self._num_wanted else -math.inf
        while num_needed < len(order) and self._scores[order[num_needed]] > bar:
            num_needed += 1
        return num_needed

    def _chain(self, node: int) -> list[int]:
        """`node` and the inner nodes that follow it without a choice."""
        chain = [node]
        while len(below := self._trie.children[chain[-1]]) == 1 and self._trie.children[below[0]]:
            chain.append(below[0])
        return chain

    def _make_wave(self, nodes: Sequence[int]) -> Wave:
        tokens, parents, sources = [], [], []
        for node in nodes:
            if node:
                tokens.append(self._trie.tokens[node])
                parents.append(self._place_of[self._trie.parents[node]])
            else:
                tokens += self._header
                parents += range(-1, len(self._header) - 1)
            self._place_of[node] = self._num_places + len(tokens) - 1
            self._asked += self._trie.children[node]
            sources += [self._place_of[node]] * len(self._trie.children[node])
        self._num_places += len(tokens)
        self._open = [node for node in self._open if node not in self._place_of]
        targets = tuple(self._trie.tokens[node] for node in self._asked)
        return Wave(token_ids=tuple(tokens), parents=tuple(parents), sources=tuple(sources), targets=targets)

    def _share_unreached(self) -> float:
        """The open prefixes' share of all mass that may belong to labels."""
        unreached = _sum_logs(self._scores[node] for node in self._open)
        everything = _sum_logs(self._scores[node] for node in (*self._open, *self._reached))
        return math.exp(unreached - everything) if unreached > -math.inf else 0.0


def _sum_logs(values: Iterable[float]) -> float:
    """The logarithm of the sum of what `values` are logarithms of; -inf for none."""
    logs = list(values)
    largest = max(logs, default=-math.inf)
    return largest + math.log(math.fsum(math.exp(value - largest) for value in logs)) if logs else -math.inf
