"""Keys and values of one request: what attention remembers of the tokens that were computed for it.

Goes in: the keys and values of new tokens, layer by layer, and blocks of them kept from an earlier request. Comes out:
views of everything computed so far. Each request has memory of its own and only places that it wrote itself are read,
so nothing of one request can be seen by another. This module knows neither models nor tokens.

Shape suffixes: L layers, K key-value heads, T places, Q new places, D head size, 2 keys and values.
"""

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_GROWTH_PLACES = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Geometry:
    """Shape of a model's keys and values, and where they are."""

    num_layers: int
    num_heads: int
    """Key-value heads."""
    head_size: int
    dtype: "torch.dtype"
    device: "torch.device"


class KeyValues:
    """The keys and values of one request, growing as places are reserved."""

    def __init__(self, geometry: Geometry):
        self._geometry = geometry
        self._memory_L2KTD = self._allocate(0)

    def reserve(self, num_places: int) -> None:
        """Have memory for `num_places` places; what was written stays."""
        capacity = self._memory_L2KTD.shape[3]
        if num_places <= capacity:
            return
        # Half as much again, so that an answer which grows token by token is copied a few times only.
        wanted = max(num_places, capacity + capacity // 2)
        grown_L2KTD = self._allocate(-(-wanted // _GROWTH_PLACES) * _GROWTH_PLACES)
        grown_L2KTD[:, :, :, :capacity] = self._memory_L2KTD
        self._memory_L2KTD = grown_L2KTD

    def write(self, layer: int, start: int, keys_KQD: "torch.Tensor", values_KQD: "torch.Tensor") -> None:
        """Put the keys and values of a layer's new tokens at the places from `start` on."""
        places = slice(start, start + keys_KQD.shape[1])
        self._memory_L2KTD[layer, 0, :, places] = keys_KQD
        self._memory_L2KTD[layer, 1, :, places] = values_KQD

    def view(self, layer: int, num_places: int) -> tuple["torch.Tensor", "torch.Tensor"]:
        """The layer's first `num_places` keys and values, [K, T, D] each, without a copy."""
        memory_2KTD = self._memory_L2KTD[layer, :, :, :num_places]
        return memory_2KTD[0], memory_2KTD[1]

    def copy_out(self, start: int, stop: int) -> "torch.Tensor":
        """A copy of the places from `start` to `stop` of all layers, [L, 2, K, T, D]."""
        return self._memory_L2KTD[:, :, :, start:stop].clone()

    def copy_in(self, start: int, block_L2KTD: "torch.Tensor") -> None:
        """Put what `copy_out` gave at the places from `start` on."""
        self._memory_L2KTD[:, :, :, start : start + block_L2KTD.shape[3]] = block_L2KTD

    def _allocate(self, num_places: int) -> "torch.Tensor":
        import torch

        size = (self._geometry.num_layers, 2, self._geometry.num_heads, num_places, self._geometry.head_size)
        return torch.empty(size, dtype=self._geometry.dtype, device=self._geometry.device)
