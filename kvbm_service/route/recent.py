"""Which prefixes an engine was sent lately: the registry does not know what is on devices. Pure."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from kvbm_schemas.block import BlockHash

MAX_REMEMBERED = 32_768
"""Blocks remembered for each engine; beyond, those sent longest ago are forgotten."""


class Recent:
    """The blocks that one engine was sent, the least recent first."""

    def __init__(self, capacity: int = MAX_REMEMBERED) -> None:
        self._capacity = capacity
        self._blocks: OrderedDict[BlockHash, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._blocks)

    def sent(self, chain: Sequence[BlockHash]) -> None:
        """A prompt that begins with these blocks went there. A chain loses its tail first."""
        for block in reversed(chain):
            self._blocks[block] = None
            self._blocks.move_to_end(block)
        while len(self._blocks) > self._capacity:
            self._blocks.popitem(last=False)

    def prefix(self, chain: Sequence[BlockHash]) -> int:
        """How many blocks at the beginning of `chain` it was sent before."""
        for at, block in enumerate(chain):
            if block not in self._blocks:
                return at
        return len(chain)

    def forget(self) -> None:
        """The engine has lost everything."""
        self._blocks.clear()
