"""The least recently used block goes: the yardstick for whatever claims to choose better."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from itertools import islice

from kvbm_schemas.block import BlockHash


class Lru:
    """Eviction by last use. A chain is put back tail first, so that its head outlives its tail."""

    def __init__(self) -> None:
        self._slots: dict[BlockHash, int] = {}
        self._blocks: dict[int, BlockHash] = {}
        self._shown: OrderedDict[int, None] = OrderedDict()
        """The next to go first."""

    def use(self, chain: Sequence[BlockHash], now: float) -> None:
        """Those that are shown go last."""
        for block in reversed(chain):
            slot = self._slots.get(block)
            if slot is not None and slot in self._shown:
                self._shown.move_to_end(slot)

    def add(self, blocks: Sequence[BlockHash], slots: Sequence[int], after: int | None) -> None:
        """A hidden slot has no place in the queue."""
        self._slots.update(zip(blocks, slots, strict=True))
        self._blocks.update(zip(slots, blocks, strict=True))

    def adopt(self, blocks: Sequence[BlockHash], slots: Sequence[int]) -> None:
        """The oldest is the first to go."""
        self.add(blocks, slots, None)
        self._shown.update(dict.fromkeys(slots))

    def show(self, slots: Sequence[int]) -> None:
        """They go last: whoever touched them has used them."""
        self._shown.update(dict.fromkeys(reversed(slots)))

    def hide(self, slots: Sequence[int]) -> None:
        """They leave the queue."""
        for slot in slots:
            del self._shown[slot]

    def drop(self, block: BlockHash, slot: int) -> None:
        """It leaves the queue, if it is in it."""
        self._shown.pop(slot, None)
        del self._slots[block], self._blocks[slot]

    def victims(self, wanted: int, spared: AbstractSet[int]) -> list[int]:
        """Those that were used longest ago."""
        victims = list(islice((slot for slot in self._shown if slot not in spared), wanted))
        for slot in victims:
            self.drop(self._blocks[slot], slot)
        return victims

    def check_integrity(self, shown: AbstractSet[int], hidden: AbstractSet[int]) -> None:
        """Only what is shown is in the queue."""
        assert set(self._shown) == shown, "other slots are in the queue than may go"
        assert set(self._blocks) == shown | hidden, "other slots are known than are in use"
        assert self._slots == {block: slot for slot, block in self._blocks.items()}
