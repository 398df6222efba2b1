"""Which prompt trees an optimiser step sees, in which forward passes, and which worker runs which of them.

Goes in: the lengths of all trees, a seed, and this worker's place. Comes out, step by step, this worker's passes. The
trees of a step and their division into passes depend on the seed alone, so any number of workers computes the same
gradients, but for rounding. A position is a step's number: nothing else has to be kept to go on from it.
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
        """This worker's passes over `trees`: the longest are dealt out first, so that all workers get alike."""
        lengths = [int(self._lengths[tree]) for tree in trees]
        groups = group_by_length(lengths, max_tokens=self._batch_tokens)
        passes = [Pass(tuple(int(trees[index]) for index in group), counts=True) for group in groups]
        mine = passes[self._rank :: self._num_workers]
        num_rounds = -(-len(passes) // self._num_workers)
        # All workers add up their gradients in the same pass, so everybody must have as many.
        return mine + [passes[-1]._replace(counts=False)] * (num_rounds - len(mine))
