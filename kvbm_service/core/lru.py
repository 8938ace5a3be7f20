"""The least recently used block goes: the yardstick for whatever claims to choose better."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from collections.abc import Set as AbstractSet

from kvbm_schemas.block import BlockHash


class Lru:
    """Eviction by last use. A chain is put back tail first, so that its head outlives its tail."""

    def __init__(self) -> None:
        self._shown: OrderedDict[int, None] = OrderedDict()
        """The next to go first."""

    def use(self, chain: Sequence[BlockHash], slots: Sequence[int | None], now: float) -> None:
        """Those that are shown go last."""
        for slot in reversed(slots):
            if slot is not None and slot in self._shown:
                self._shown.move_to_end(slot)

    def add(self, blocks: Sequence[BlockHash], slots: Sequence[int], depth: int) -> None:
        """Nothing: a hidden slot has no place in the queue."""

    def adopt(self, slots: Sequence[int]) -> None:
        """The oldest is the first to go."""
        self._shown.update(dict.fromkeys(slots))

    def show(self, slots: Sequence[int]) -> None:
        """They go last: whoever touched them has used them."""
        self._shown.update(dict.fromkeys(reversed(slots)))

    def hide(self, slots: Sequence[int]) -> None:
        """They leave the queue."""
        for slot in slots:
            del self._shown[slot]

    def drop(self, slot: int) -> None:
        """It leaves the queue, if it is in it."""
        self._shown.pop(slot, None)

    def victim(self, spared: AbstractSet[int]) -> int | None:
        """The one that was used longest ago."""
        slot = next((slot for slot in self._shown if slot not in spared), None)
        if slot is not None:
            del self._shown[slot]
        return slot

    def check_integrity(self, shown: AbstractSet[int], hidden: AbstractSet[int]) -> None:
        """Only what is shown is in the queue."""
        assert set(self._shown) == shown, "other slots are in the queue than may go"
