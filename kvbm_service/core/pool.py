"""The slots of one tier: which block is in which slot, and which slot may be reused.

A slot goes through these states:

    free ──reserve──► filling ──commit──► ready ──evict──► free
      │                  │                 ▲ │
      │                  └──abort──► free  │ └──(pins keep it from being evicted)
      └────────────────adopt───────────────┘

`clear` takes the names of all blocks away at once. A slot that someone still touches (it is
filling, or pinned) then has no name, can no longer be found, and is free when they let go.

Which of the ready blocks that nobody pins is evicted, its `Eviction` decides.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import compress, islice
from typing import NamedTuple

from kvbm_schemas.block import BlockHash
from kvbm_service.core.eviction import Eviction
from kvbm_service.core.hit_density import HitDensity


class Reservation(NamedTuple):
    """Slots to fill: `slots[i]` is for the block at `indices[i]` of what was asked for."""

    indices: list[int]
    slots: list[int]
    evicted: list[BlockHash]


class Pool:
    """`capacity` slots and the blocks in them."""

    def __init__(self, capacity: int, eviction: Eviction | None = None) -> None:
        assert capacity > 0
        self.capacity = capacity
        self._eviction = eviction or HitDensity()
        self._free = list(range(capacity - 1, -1, -1))
        self._ready: dict[BlockHash, int] = {}
        self._filling: dict[BlockHash, int] = {}
        self._names: list[BlockHash | None] = [None] * capacity
        self._pins = [0] * capacity
        self._fills = [0] * capacity
        self._pinned = 0
        self._pinned_nameless = 0
        """Of the pinned slots, those whose name was taken away."""

    # -- looking -------------------------------------------------------------------

    def __contains__(self, block: BlockHash) -> bool:
        """Whether the block is here or on its way, so that saving it again is needless."""
        return block in self._ready or block in self._filling

    def __len__(self) -> int:
        """How many blocks can be read."""
        return len(self._ready)

    def readable(self, block: BlockHash) -> bool:
        """Whether the block can be read."""
        return block in self._ready

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
        idle = len(self._ready) - (self._pinned - self._pinned_nameless)
        return len(self._free) + idle

    def match(self, chain: Sequence[BlockHash], start: int = 0) -> int:
        """The end of the run of readable blocks that begins at `start`."""
        end = start
        for block in islice(chain, start, None):
            if block not in self._ready:
                break
            end += 1
        return end

    def match_without(self, chain: Sequence[BlockHash], start: int, other: Pool) -> int:
        """The end of the run that begins at `start`, of blocks readable here and not in `other`."""
        here, there = self._ready, other._ready
        end = start
        for block in islice(chain, start, None):
            if block not in here or block in there:
                break
            end += 1
        return end

    def absent(self, chain: Sequence[BlockHash], indices: Iterable[int]) -> list[int]:
        """Those of `indices` whose block of the chain cannot be read."""
        ready = self._ready
        return [index for index in indices if chain[index] not in ready]

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

    def use(self, chain: Sequence[BlockHash], now: float) -> None:
        """A request with this whole chain, from its first block on, has come; `now` in seconds.

        This is what makes a block worth keeping. Those that are not here matter, too: when
        they are stored, it is known what request they are of.
        """
        self._eviction.use(chain, now)

    # -- filling -------------------------------------------------------------------

    def reserve(
        self,
        chain: Sequence[BlockHash],
        fill: int,
        depth: int = 0,
        after: BlockHash | None = None,
    ) -> Reservation:
        """Take slots for the blocks of `chain` that are not here, in order, evicting as needed.

        Takes as many as there is room for; blocks of the chain that are here already are not
        evicted for its others. `depth` is the place of `chain[0]` in its request, and `after`
        the block before it: to be given for blocks that were in no `use`, so that they are
        evicted before it.
        """
        ready, filling = self._ready, self._filling
        absent: dict[BlockHash, int] = {}
        for index, block in enumerate(chain):
            if block not in ready and block not in filling:
                absent.setdefault(block, index)
        if not absent:
            return Reservation([], [], [])
        indices = list(absent.values())
        slots, evicted = self._take(len(indices), chain)
        del indices[len(slots) :]
        blocks = [chain[index] for index in indices]
        filling.update(zip(blocks, slots, strict=True))
        for block, slot in zip(blocks, slots, strict=True):
            self._names[slot] = block
            self._fills[slot] = fill
        if indices:
            before = chain[indices[0] - 1] if indices[0] else after
            place = None if before is None else ready.get(before, filling.get(before))
            self._eviction.add(blocks, slots, depth + indices[0], place)
        return Reservation(indices, slots, evicted)

    def _take(self, wanted: int, chain: Sequence[BlockHash]) -> tuple[list[int], list[BlockHash]]:
        """Up to `wanted` slots, free ones first, and the blocks that had to go for the others."""
        slots = [self._free.pop() for _ in range(min(wanted, len(self._free)))]
        if len(slots) == wanted:
            return slots, []
        spared = {self._ready[block] for block in chain if block in self._ready}
        victims = self._eviction.victims(wanted - len(slots), spared)
        evicted: list[BlockHash] = []
        for slot in victims:
            block = self._names[slot]
            assert block is not None, "a slot without a block was to go"
            del self._ready[block]
            evicted.append(block)
        return slots + victims, evicted

    def commit(self, slots: Sequence[int]) -> list[BlockHash]:
        """The bytes of these slots are in place: their blocks can be read now.

        `slots` are in chain order. Returns the blocks that became readable: those whose name
        was taken away meanwhile did not, and their slots are free.
        """
        stored: list[BlockHash] = []
        shown: list[int] = []
        for slot in slots:
            block = self._names[slot]
            if block is None:
                self._free.append(slot)
                continue
            del self._filling[block]
            self._ready[block] = slot
            shown.append(slot)
            stored.append(block)
        self._eviction.show(shown)
        return stored

    def abort(self, slots: Iterable[int]) -> None:
        """The bytes of these slots did not arrive: the slots are free."""
        for slot in slots:
            block = self._names[slot]
            if block is not None:
                del self._filling[block]
                self._names[slot] = None
                self._eviction.drop(block, slot)
            self._free.append(slot)

    def adopt(
        self, blocks: Sequence[BlockHash], slots: Sequence[int], fills: Sequence[int]
    ) -> list[bool]:
        """Take over blocks whose bytes an earlier life left in these slots, oldest first.

        Returns which of them are here now: not those whose slot is not free (or not of this
        pool), and of a block that is there twice, or already here, only the first.
        """
        free = bytearray(self.capacity)
        for slot in self._free:
            free[slot] = 1
        ready, filling, names, stamps = self._ready, self._filling, self._names, self._fills
        taken: list[bool] = []
        for block, slot, fill in zip(blocks, slots, fills, strict=True):
            good = slot < self.capacity and free[slot] == 1 and block not in ready
            good = good and block not in filling
            if good:
                free[slot] = 0
                ready[block] = slot
                names[slot] = block
                stamps[slot] = fill
            taken.append(good)
        self._free = [slot for slot in self._free if free[slot]]
        self._eviction.adopt(list(compress(blocks, taken)), list(compress(slots, taken)))
        return taken

    # -- keeping -------------------------------------------------------------------

    def pin(self, chain: Iterable[BlockHash]) -> list[int]:
        """Keep these readable blocks where they are. Returns their slots."""
        ready = self._ready
        return self._pin([ready[block] for block in chain])

    def pin_run(self, chain: Sequence[BlockHash], start: int = 0) -> list[int]:
        """Keep the run of readable blocks that begins at `start`. Returns their slots."""
        find = self._ready.get
        slots: list[int] = []
        for block in islice(chain, start, None):
            slot = find(block)
            if slot is None:
                break
            slots.append(slot)
        return self._pin(slots)

    def _pin(self, slots: list[int]) -> list[int]:
        pins = self._pins
        hidden: list[int] = []
        for slot in slots:
            if not pins[slot]:
                hidden.append(slot)
            pins[slot] += 1
        self._pinned += len(hidden)
        self._eviction.hide(hidden)
        return slots

    def unpin(self, slots: Sequence[int]) -> None:
        """Undo one `pin` of each of these slots, given in chain order."""
        pins = self._pins
        shown: list[int] = []
        for slot in slots:
            pins[slot] -= 1
            if pins[slot]:
                continue
            self._pinned -= 1
            if self._names[slot] is None:
                self._pinned_nameless -= 1
                self._free.append(slot)
            else:
                shown.append(slot)
        self._eviction.show(shown)

    # -- dropping ------------------------------------------------------------------

    def drop(self, block: BlockHash) -> bool:
        """Forget one readable block, whoever may be reading it. False if it is not here."""
        slot = self._ready.pop(block, None)
        if slot is None:
            return False
        self._names[slot] = None
        self._eviction.drop(block, slot)
        if self._pins[slot] == 0:
            self._free.append(slot)
        else:
            self._pinned_nameless += 1
        return True

    def clear(self) -> None:
        """Forget every block, those being filled included."""
        for block in self.blocks():
            self.drop(block)
        for block, slot in self._filling.items():
            self._names[slot] = None
            self._eviction.drop(block, slot)
        self._filling.clear()

    def check_integrity(self) -> None:
        """Every slot is in exactly one state, and all the tables agree about it."""
        free = set(self._free)
        ready, filling = set(self._ready.values()), set(self._filling.values())
        assert len(free) == len(self._free), "a slot is free twice"
        assert len(ready) == len(self._ready), "two blocks in one slot"
        assert len(filling) == len(self._filling), "two blocks filling one slot"
        assert not free & (ready | filling), "a free slot is in use"
        assert not ready & filling, "a slot is ready and filling"
        pinned = {slot for slot, pins in enumerate(self._pins) if pins}
        assert all(pins >= 0 for pins in self._pins), "unpinned more often than pinned"
        assert self._pinned == len(pinned), "the count of pinned slots is wrong"
        assert self._pinned_nameless == len(pinned - ready), "the count of nameless slots is wrong"
        assert not pinned & (free | filling), "a pinned slot could be reused"
        for block, slot in [*self._ready.items(), *self._filling.items()]:
            assert self._names[slot] == block, "a slot has another name than its block"
        named = {slot for slot, name in enumerate(self._names) if name is not None}
        assert named == ready | filling, "a slot has a name but no block"
        self._eviction.check_integrity(shown=ready - pinned, hidden=(ready & pinned) | filling)
