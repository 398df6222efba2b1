"""The prefix cache: what is found again, by whom, and what goes first."""

import random

import pytest
import torch

from mint_lib.engine.prefix_cache import BLOCK_TOKENS, Owner, PrefixCache

OWNER = Owner(tenant="a", adapter="x")
BLOCK_BYTES = BLOCK_TOKENS * 8


def chain_of(*numbers):
    return tuple(token for number in numbers for token in (*range(1, BLOCK_TOKENS), 1000 + number))


def store(cache, token_ids, owner=OWNER):
    """The memory of a block is the tokens themselves, all from the beginning: so a wrong block shows."""
    cache.store(owner, token_ids, lambda start, stop: torch.tensor(token_ids[start:stop]))


def found(cache, token_ids, owner=OWNER):
    blocks = cache.find(owner, token_ids)
    return tuple(torch.cat(blocks).tolist()) if blocks else ()


def test_prefix_cache_finds_the_longest_common_beginning_in_whole_blocks():
    cache = PrefixCache(100 * BLOCK_BYTES)
    store(cache, (*chain_of(1, 2, 3), 7, 7))
    assert found(cache, (*chain_of(1, 2, 3), 7, 7)) == chain_of(1, 2, 3)
    assert found(cache, chain_of(1, 2, 4)) == chain_of(1, 2)
    assert found(cache, chain_of(1, 2)[:-1]) == chain_of(1)
    assert found(cache, chain_of(2, 3)) == ()
    assert cache.count_cached(OWNER, chain_of(1, 2, 4)) == 2 * BLOCK_TOKENS
    assert cache.num_bytes == 3 * BLOCK_BYTES


@pytest.mark.parametrize("other", [Owner(tenant="b", adapter="x"), Owner(tenant="a", adapter="y")])
def test_prefix_cache_of_another_tenant_or_adapter_finds_nothing(other):
    cache = PrefixCache(100 * BLOCK_BYTES)
    store(cache, chain_of(1, 2))
    assert found(cache, chain_of(1, 2), owner=other) == ()


def test_prefix_cache_drop_adapter_forgets_it_and_nothing_else():
    cache = PrefixCache(100 * BLOCK_BYTES)
    kept = Owner(tenant="a", adapter="y")
    store(cache, chain_of(1, 2))
    store(cache, chain_of(1, 2), owner=kept)
    cache.drop_adapter("x")
    assert found(cache, chain_of(1, 2)) == ()
    assert found(cache, chain_of(1, 2), owner=kept) == chain_of(1, 2)
    assert cache.num_bytes == 2 * BLOCK_BYTES


def test_prefix_cache_full_evicts_the_least_recently_used_chain_from_its_end():
    cache = PrefixCache(4 * BLOCK_BYTES)
    store(cache, chain_of(1, 2))
    store(cache, chain_of(3, 4))
    found(cache, chain_of(1, 2))
    store(cache, chain_of(5))
    assert found(cache, chain_of(3, 4)) == chain_of(3)
    assert found(cache, chain_of(1, 2)) == chain_of(1, 2)
    assert cache.take_num_evicted() == 1
    assert cache.take_num_evicted() == 0


def test_prefix_cache_prompt_longer_than_the_cache_keeps_its_beginning():
    cache = PrefixCache(3 * BLOCK_BYTES)
    store(cache, chain_of(9))
    store(cache, chain_of(1, 2, 3, 4, 5))
    assert found(cache, chain_of(1, 2, 3, 4, 5)) == chain_of(1, 2, 3)
    nothing = PrefixCache(0)
    store(nothing, chain_of(1))
    assert found(nothing, chain_of(1)) == ()
    assert nothing.num_bytes == 0


def test_prefix_cache_random_use_stays_in_its_limit_and_never_gives_other_tokens():
    draw = random.Random(4)
    cache = PrefixCache(7 * BLOCK_BYTES)
    num_found = 0
    for _ in range(2000):
        tokens = chain_of(*(draw.randrange(3) for _ in range(draw.randrange(1, 5))))
        owner = Owner(tenant=draw.choice("ab"), adapter="x")
        memory = found(cache, tokens, owner=owner)
        assert tokens[: len(memory)] == memory
        num_found += len(memory)
        if draw.random() < 0.5:
            store(cache, tokens, owner=owner)
        assert cache.num_bytes <= 7 * BLOCK_BYTES
    assert num_found > 0
