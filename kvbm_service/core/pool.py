"""The slots of one tier: which block is in which slot, and which slot may be reused.

A slot goes through these states:

    free ──reserve──► filling ──commit──► ready ──evict──► free
                         │                  │
                         └──abort──► free   └──(pins keep it from being evicted)

`clear` takes the names of all blocks away at once. A slot that someone still touches (it is
filling, or pinned) then has no name, can no longer be found, and is free when they let go.

Eviction takes the slot least recently used; a chain is put back tail first, so that its head
outlives its tail.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import NamedTuple

from kvbm_schemas.block import BlockHash


class Reservation(NamedTuple):
    """Slots to fill: `slots[i]` is for the block at `indices[i]` of what was asked for."""

    indices: list[int]
    slots: list[int]
    evicted: list[BlockHash]


class Pool:
    """`capacity` slots and the blocks in them."""

    def __init__(self, capacity: int) -> None:
        assert capacity > 0
        self.capacity = capacity
        self._free = list(range(capacity - 1, -1, -1))
        self._ready: dict[BlockHash, int] = {}
        self._filling: dict[BlockHash, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()
        """Ready and unpinned slots, the next to evict first."""
        self._names: list[BlockHash | None] = [None] * capacity
        self._pins = [0] * capacity
        self._fills = [0] * capacity
        self._pinned = 0

    # -- looking -------------------------------------------------------------------

    def __contains__(self, block: BlockHash) -> bool:
        """Whether the block is here or on its way, so that saving it again is needless."""
        return block in self._ready or block in self._filling

    def __len__(self) -> int:
        """How many blocks can be read."""
        return len(self._ready)

    @property
    def pinned(self) -> int:
        """How many slots are pinned."""
        return self._pinned

    @property
    def used(self) -> int:
        """How many slots are not free."""
        return self.capacity - len(self._free)

    @property
    def unpinned(self) -> int:
        """How many slots `reserve` could hand out now."""
        return len(self._free) + len(self._idle)

    def match(self, chain: Sequence[BlockHash], start: int = 0) -> int:
        """The end of the run of readable blocks that begins at `start`."""
        end = start
        for block in islice(chain, start, None):
            if block not in self._ready:
                break
            end += 1
        return end

    def pinnable(self, chain: Sequence[BlockHash], room: int) -> int:
        """The length of the longest head of this readable chain that pins at most `room` more."""
        for index, block in enumerate(chain):
            if self._pins[self._ready[block]] == 0:
                if room <= 0:
                    return index
                room -= 1
        return len(chain)

    def blocks(self) -> list[BlockHash]:
        """Every readable block."""
        return list(self._ready)

    def fills(self, slots: Iterable[int]) -> list[int]:
        """The fill stamps of these slots."""
        return [self._fills[slot] for slot in slots]

    # -- filling -------------------------------------------------------------------

    def reserve(self, chain: Sequence[BlockHash], fill: int) -> Reservation:
        """Take slots for the blocks of `chain` that are not here, in order, evicting as needed.

        Takes as many as there is room for; blocks of the chain that are here already count as
        just used, and are not evicted for its others.
        """
        self.touch(chain)
        spared = set(chain)
        indices: list[int] = []
        slots: list[int] = []
        evicted: list[BlockHash] = []
        for index, block in enumerate(chain):
            if block in self._ready or block in self._filling:
                continue
            if self._free:
                slot = self._free.pop()
            elif (victim := self._next_victim()) is not None and victim not in spared:
                slot = self._ready.pop(victim)
                del self._idle[slot]
                evicted.append(victim)
            else:
                break
            self._filling[block] = slot
            self._names[slot] = block
            self._fills[slot] = fill
            indices.append(index)
            slots.append(slot)
        return Reservation(indices, slots, evicted)

    def _next_victim(self) -> BlockHash | None:
        return self._names[next(iter(self._idle))] if self._idle else None

    def commit(self, slots: Sequence[int]) -> list[BlockHash]:
        """The bytes of these slots are in place: their blocks can be read now.

        `slots` are in chain order. Returns the blocks that became readable: those whose name
        was taken away meanwhile did not, and their slots are free.
        """
        stored: list[BlockHash] = []
        for slot in reversed(slots):
            block = self._names[slot]
            if block is None:
                self._free.append(slot)
                continue
            del self._filling[block]
            self._ready[block] = slot
            self._idle[slot] = None
            stored.append(block)
        stored.reverse()
        return stored

    def abort(self, slots: Iterable[int]) -> None:
        """The bytes of these slots did not arrive: the slots are free."""
        for slot in slots:
            block = self._names[slot]
            if block is not None:
                del self._filling[block]
                self._names[slot] = None
            self._free.append(slot)

    # -- keeping -------------------------------------------------------------------

    def pin(self, chain: Iterable[BlockHash]) -> list[int]:
        """Keep these readable blocks where they are. Returns their slots."""
        slots = [self._ready[block] for block in chain]
        pins, idle = self._pins, self._idle
        for slot in slots:
            if not pins[slot]:
                del idle[slot]
                self._pinned += 1
            pins[slot] += 1
        return slots

    def unpin(self, slots: Sequence[int]) -> None:
        """Undo one `pin` of each of these slots, given in chain order; they count as just used."""
        pins, idle = self._pins, self._idle
        for slot in reversed(slots):
            pins[slot] -= 1
            if pins[slot]:
                continue
            self._pinned -= 1
            if self._names[slot] is None:
                self._free.append(slot)
            else:
                idle[slot] = None

    def touch(self, chain: Sequence[BlockHash]) -> None:
        """These blocks were just used; those that are not here do not matter."""
        for block in reversed(chain):
            slot = self._ready.get(block)
            if slot is not None and slot in self._idle:
                self._idle.move_to_end(slot)

    # -- dropping ------------------------------------------------------------------

    def drop(self, block: BlockHash) -> bool:
        """Forget one readable block, whoever may be reading it. False if it is not here."""
        slot = self._ready.pop(block, None)
        if slot is None:
            return False
        self._names[slot] = None
        if self._pins[slot] == 0:
            del self._idle[slot]
            self._free.append(slot)
        return True

    def clear(self) -> None:
        """Forget every block, those being filled included."""
        for block in self.blocks():
            self.drop(block)
        for slot in self._filling.values():
            self._names[slot] = None
        self._filling.clear()

    def check_integrity(self) -> None:
        """Every slot is in exactly one state, and all the tables agree about it."""
        free, idle = set(self._free), set(self._idle)
        ready, filling = set(self._ready.values()), set(self._filling.values())
        assert len(free) == len(self._free), "a slot is free twice"
        assert len(ready) == len(self._ready), "two blocks in one slot"
        assert len(filling) == len(self._filling), "two blocks filling one slot"
        assert not free & (ready | filling | idle), "a free slot is in use"
        assert not ready & filling, "a slot is ready and filling"
        assert idle <= ready, "a slot without a block waits for eviction"
        pinned = {slot for slot, pins in enumerate(self._pins) if pins}
        assert all(pins >= 0 for pins in self._pins), "unpinned more often than pinned"
        assert self._pinned == len(pinned), "the count of pinned slots is wrong"
        assert not pinned & (free | filling | idle), "a pinned slot could be reused"
        assert ready - pinned == idle, "an unpinned slot cannot be evicted"
        for block, slot in [*self._ready.items(), *self._filling.items()]:
            assert self._names[slot] == block, "a slot has another name than its block"
        named = {slot for slot, name in enumerate(self._names) if name is not None}
        assert named == ready | filling, "a slot has a name but no block"
