"""Which prompt trees an optimiser step sees, which worker runs which of them, and in which forward passes.

Goes in: the lengths of all trees, a seed, and this worker's place. Comes out, step by step, this worker's passes. The
trees of a step depend on the seed alone, so any number of workers computes the same gradients, but for rounding. A
position is a step's number: nothing else has to be kept to go on from it.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from mint_lib.packing import group_by_length


class Pass(NamedTuple):
    """One forward and backward pass."""

    trees: tuple[int, ...]
    """Indices of trees of similar length."""
    counts: bool
    """False for a pass that only keeps a worker in step with the others; its loss is multiplied by 0."""


class StepOrder:
    """The passes of every step of an epoch, for one worker: a batch sampler."""

    def __init__(
        self,
        lengths: "np.ndarray | Sequence[int]",
        *,
        trees_per_batch: int,
        batch_tokens: int,
        seed: int,
        rank: int = 0,
        num_workers: int = 1,
    ):
        """Order trees of `lengths` places; a pass has at most `batch_tokens`, padding included, or one tree."""
        self._lengths = np.asarray(lengths)
        self._trees_per_batch = trees_per_batch
        self._batch_tokens = batch_tokens
        self._seed = seed
        self._rank = rank
        self._num_workers = num_workers
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, counted from 0; each has its own order."""
        self._epoch = epoch

    def __len__(self) -> int:
        """Steps of an epoch; the last one may have fewer trees."""
        return -(-len(self._lengths) // self._trees_per_batch)

    def __iter__(self) -> Iterator[list[Pass]]:
        order = np.random.default_rng([self._seed, self._epoch]).permutation(len(self._lengths))
        for start in range(0, len(order), self._trees_per_batch):
            yield self.share(order[start : start + self._trees_per_batch])

    def share(self, trees: "np.ndarray | Sequence[int]") -> list[Pass]:
        """This worker's passes over `trees`, which are divided into parts of about as many places each."""
        ordered = sorted((int(tree) for tree in trees), key=lambda tree: (-self._lengths[tree], tree))
        lengths = self._lengths[ordered].astype(np.int64)
        # A tree belongs to the part that its middle lies in; neighbours are of similar length, so little is padding.
        middles = lengths.cumsum() - lengths / 2
        parts = (middles * self._num_workers / lengths.sum()).astype(int)
        passes_of: list[list[Pass]] = [[] for _ in range(self._num_workers)]
        for worker in range(self._num_workers):
            members = [tree for tree, part in zip(ordered, parts, strict=True) if part == worker]
            groups = group_by_length([int(self._lengths[tree]) for tree in members], max_tokens=self._batch_tokens)
            passes_of[worker] = [Pass(tuple(members[index] for index in group), counts=True) for group in groups]
        mine = passes_of[self._rank]
        # All workers add up their gradients in the same pass, so everybody must have as many.
        num_idle = max(map(len, passes_of)) - len(mine)
        shortest = next(passes for passes in reversed(passes_of) if passes)[-1]
        return mine + [shortest._replace(counts=False)] * num_idle
