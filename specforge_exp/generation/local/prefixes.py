"""Keys and values of what was computed before, in blocks, the least recently used given up first.

Shape suffixes: P blocks of the pool, N of them, X tokens of a block, S slots, C tokens of a slot,
H heads, D of a head.
"""

from collections import OrderedDict
from collections.abc import Iterator

import torch
from torch import Tensor

from specforge_exp.generation.local.slots import Slots

BLOCK = 16
Key = tuple[int, tuple[int, ...]]


class Prefixes:
    """A pool of blocks of 16 tokens; a block is found by the one before it and its tokens.

    A block is younger in the order of use than all that follow it, so those are given up first and
    no block is ever left without the ones before it.

    Args:
        slots: where sequences live.
        limit: bytes that the pool may take; below one block: no cache.
    """

    def __init__(self, slots: Slots, limit: int) -> None:
        self.slots = slots
        self.size = limit // (BLOCK * slots.token_bytes)
        self.pools = [s.new_empty(self.size, s.shape[1], BLOCK, s.shape[3]) for s in slots.stores]
        self.places: OrderedDict[Key, int] = OrderedDict()

    def match(self, ids: list[int]) -> tuple[list[int], Key | None]:
        """Places of the blocks that ids begins with, leaving a token to compute at least.

        Also the key of the first whole block that is missing, if there is one: two sequences with
        the same one would compute the same.
        """
        keys: list[Key] = []
        places: list[int] = []
        missing = None
        for start in range(0, (len(ids) - 1) // BLOCK * BLOCK if self.size else 0, BLOCK):
            key = (places[-1] if places else -1, tuple(ids[start : start + BLOCK]))
            if key not in self.places:
                missing = key
                break
            keys.append(key)
            places.append(self.places[key])
        self._touch(keys)
        return places, missing

    def load(self, slot: int, places: list[int]) -> None:
        """Copy blocks to the beginning of a slot."""
        tokens = len(places) * BLOCK
        self.slots.reserve(tokens)
        at_N = torch.tensor(places, device=self.slots.device)
        for store_SHCD, pool_PHXD in self._pairs():
            blocks_NHXD = pool_PHXD.index_select(0, at_N)
            store_SHCD[slot, :, :tokens] = blocks_NHXD.transpose(0, 1).flatten(1, 2)

    def keep(self, slot: int, ids: list[int]) -> None:
        """Remember the whole blocks of ids, whose keys and values are in a slot."""
        chain: list[Key] = []
        new: list[int] = []
        place = -1
        for start in range(0, min(len(ids) // BLOCK, self.size) * BLOCK, BLOCK):
            key = (place, tuple(ids[start : start + BLOCK]))
            chain.append(key)
            if key in self.places:
                place = self.places[key]
                self.places.move_to_end(key)
                continue
            free = len(self.places)
            place = free if free < self.size else self.places.popitem(last=False)[1]
            self.places[key] = place
            new.append(place)
        self._touch(chain)
        if not new:
            return
        begin = (len(chain) - len(new)) * BLOCK
        at_N = torch.tensor(new, device=self.slots.device)
        for store_SHCD, pool_PHXD in self._pairs():
            blocks_HNXD = store_SHCD[slot, :, begin : len(chain) * BLOCK].unflatten(1, (-1, BLOCK))
            pool_PHXD.index_copy_(0, at_N, blocks_HNXD.transpose(0, 1))

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(self.slots.stores, self.pools, strict=True)

    def _touch(self, chain: list[Key]) -> None:
        for key in reversed(chain):
            self.places.move_to_end(key)
