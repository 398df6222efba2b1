"""The order of the data: the same steps and passes for any number of workers, resumable from a step's number alone."""

import itertools

import numpy as np
import pytest

from mint_lib.training.step_order import StepOrder

LENGTHS = np.random.default_rng(3).integers(20, 200, 53)


def order_of(rank=0, num_workers=1, **changes):
    options = {"trees_per_batch": 8, "batch_tokens": 400, "seed": 5}
    return StepOrder(LENGTHS, rank=rank, num_workers=num_workers, **(options | changes))


def steps_of(num_workers, epoch=0, **changes):
    """For each step, the passes of all workers."""
    orders = [order_of(rank, num_workers, **changes) for rank in range(num_workers)]
    for order in orders:
        order.set_epoch(epoch)
    return list(zip(*orders, strict=True))


@pytest.mark.parametrize("num_workers", [1, 2, 3, 5])
def test_order_steps_do_not_depend_on_the_number_of_workers(num_workers):
    alone = steps_of(1)
    shared = steps_of(num_workers)
    assert len(shared) == len(alone) == len(order_of()) == 7
    for (passes,), dealt in zip(alone, shared, strict=True):
        seen = sorted(tree for worker in dealt for one in worker if one.counts for tree in one.trees)
        assert seen == sorted(tree for one in passes for tree in one.trees)
        assert len({len(worker) for worker in dealt}) == 1, "everybody makes as many passes"


@pytest.mark.parametrize("batch_tokens", [400, 10**6])
def test_order_two_workers_have_about_as_much_to_do(batch_tokens):
    for dealt in steps_of(2, batch_tokens=batch_tokens, trees_per_batch=16)[:-1]:
        places = [sum(LENGTHS[list(one.trees)].sum() for one in worker if one.counts) for worker in dealt]
        assert max(places) - min(places) <= LENGTHS.max()


def test_order_every_tree_is_seen_once_an_epoch_and_in_another_order_in_the_next():
    epochs = [[tree for (passes,) in steps_of(1, epoch) for one in passes for tree in one.trees] for epoch in (0, 1)]
    assert all(sorted(trees) == list(range(len(LENGTHS))) for trees in epochs)
    assert epochs[0] != epochs[1]
    assert steps_of(1, 1) == steps_of(1, 1)
    assert steps_of(1, 1) != steps_of(1, 1, seed=6)


def test_order_passes_hold_at_most_the_tokens_asked_for_padding_included():
    widths = []
    for (passes,) in steps_of(1):
        for one in passes:
            longest = max(LENGTHS[list(one.trees)])
            widths.append(longest * len(one.trees))
            assert widths[-1] <= 400 or len(one.trees) == 1
    assert any(width > 200 for width in widths), "trees share passes"
    alone = steps_of(1, batch_tokens=10)
    assert all(len(one.trees) == 1 for (passes,) in alone for one in passes)


def test_order_worker_without_a_pass_of_its_own_runs_one_that_does_not_count():
    dealt = steps_of(5, trees_per_batch=2, batch_tokens=10**6)[0]
    assert sorted(one.counts for (one,) in dealt) == [False, False, False, True, True]
    assert len({one.trees for (one,) in dealt if one.counts}) == 2


def test_order_is_taken_up_in_the_middle_of_an_epoch():
    whole = list(order_of())
    assert list(itertools.islice(order_of(), 4, None)) == whole[4:]
