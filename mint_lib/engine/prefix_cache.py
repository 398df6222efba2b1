"""Prefix cache: keys and values of prompt beginnings, kept for later prompts of the same tenant and adapter.

Goes in: blocks of 32 tokens with their keys and values. Comes out: the blocks a new prompt begins with. A block belongs
to exactly one chain of earlier blocks, and tokens are compared, not digests of them: two prefixes cannot be mistaken
for each other. At an image's places the SHA-256 of what is seen is compared. Chains of different owners never meet, so
nobody can learn from a faster answer what another tenant asked. The least recently used blocks go first, and never a
block before those that follow it. Not for several threads.
"""

import collections
import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from mint_lib.engine.requests import PrefixToken

if TYPE_CHECKING:
    import torch

BLOCK_TOKENS = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Owner:
    """Who may use a prefix, and the weights it was computed with."""

    tenant: str
    adapter: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Key:
    """What a block is found by: what it follows, and its tokens."""

    follows: "Owner | int"
    """The owner for a first block, else the serial number of the block before."""
    tokens: tuple[PrefixToken, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Block:
    key: _Key
    owner: Owner
    serial: int
    memory: "torch.Tensor"
    num_bytes: int


class PrefixCache:
    """Blocks of keys and values, at most `limit_bytes` of them."""

    def __init__(self, limit_bytes: int):
        self._limit_bytes = limit_bytes
        self._blocks: collections.OrderedDict[_Key, _Block] = collections.OrderedDict()
        self._serials = itertools.count()
        self._num_evicted = 0
        self.num_bytes = 0

    def find(self, owner: Owner, tokens: Sequence[PrefixToken]) -> "list[torch.Tensor]":
        """Memory of the longest known chain of blocks that `tokens` begins with."""
        chain = self._find_chain(owner, tokens)
        self._touch(chain)
        return [block.memory for block in chain]

    def count_cached(self, owner: Owner, tokens: Sequence[PrefixToken]) -> int:
        """How many tokens `find` would give the memory of."""
        return len(self._find_chain(owner, tokens)) * BLOCK_TOKENS

    def store(
        self, owner: Owner, tokens: Sequence[PrefixToken], copy_out: "Callable[[int, int], torch.Tensor]"
    ) -> None:
        """Keep the full blocks of `tokens`; `copy_out(start, stop)` gives the memory of those not there yet."""
        chain = self._find_chain(owner, tokens)
        self._touch(chain)
        for start in range(len(chain) * BLOCK_TOKENS, len(tokens) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
            memory = copy_out(start, start + BLOCK_TOKENS)
            num_bytes = memory.numel() * memory.element_size()
            if not self._make_room(num_bytes, kept={block.serial for block in chain}):
                break
            key = _Key(follows=chain[-1].serial if chain else owner, tokens=tuple(tokens[start : start + BLOCK_TOKENS]))
            block = _Block(key=key, owner=owner, serial=next(self._serials), memory=memory, num_bytes=num_bytes)
            self._blocks[key] = block
            self.num_bytes += num_bytes
            chain.append(block)
        self._touch(chain)

    def drop_adapter(self, adapter: str) -> None:
        """Forget what was computed with `adapter`."""
        for block in [block for block in self._blocks.values() if block.owner.adapter == adapter]:
            self._remove(block)

    def take_num_evicted(self) -> int:
        """Blocks evicted since the last call."""
        num_evicted, self._num_evicted = self._num_evicted, 0
        return num_evicted

    def _find_chain(self, owner: Owner, tokens: Sequence[PrefixToken]) -> list[_Block]:
        chain: list[_Block] = []
        for start in range(0, len(tokens) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
            follows = chain[-1].serial if chain else owner
            block = self._blocks.get(_Key(follows=follows, tokens=tuple(tokens[start : start + BLOCK_TOKENS])))
            if block is None:
                break
            chain.append(block)
        return chain

    def _touch(self, chain: Sequence[_Block]) -> None:
        # The last block first: so a block is always more recent than those that follow it, and the oldest of all has
        # none that follow it.
        for block in reversed(chain):
            self._blocks.move_to_end(block.key)

    def _make_room(self, num_bytes: int, *, kept: set[int]) -> bool:
        while self.num_bytes + num_bytes > self._limit_bytes:
            oldest = next(iter(self._blocks.values()), None)
            if oldest is None or oldest.serial in kept:
                return False
            self._remove(oldest)
            self._num_evicted += 1
        return True

    def _remove(self, block: _Block) -> None:
        del self._blocks[block.key]
        self.num_bytes -= block.num_bytes
