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
        self._eviction = eviction or HitDensity(capacity)
        self._free = list(range(capacity - 1, -1, -1))
        self._slots: dict[BlockHash, int] = {}
        """Where each block is, or is on its way to."""
        self._filling: set[int] = set()
        """The slots of those on their way."""
        self._names: list[BlockHash | None] = [None] * capacity
        self._pins = [0] * capacity
        self._fills = [0] * capacity
        self._pinned = 0
        self._pinned_nameless = 0
        """Of the pinned slots, those whose name was taken away."""

    # -- looking -------------------------------------------------------------------

    def __contains__(self, block: BlockHash) -> bool:
        """Whether the block is here or on its way, so that saving it again is needless."""
        return block in self._slots

    def __len__(self) -> int:
        """How many blocks can be read."""
        return len(self._slots) - len(self._filling)

    def readable(self, block: BlockHash) -> bool:
        """Whether the block can be read."""
        return self.slot(block) is not None

    def slot(self, block: BlockHash) -> int | None:
        """Where the block can be read."""
        slot = self._slots.get(block)
        return None if slot in self._filling else slot

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
        idle = len(self) - (self._pinned - self._pinned_nameless)
        return len(self._free) + idle

    def match(self, chain: Sequence[BlockHash], start: int = 0) -> int:
        """The end of the run of readable blocks that begins at `start`."""
        return start + len(self._run(chain, start))

    def _run(self, chain: Sequence[BlockHash], start: int) -> list[int]:
        """The slots of the run of readable blocks that begins at `start`."""
        find, filling = self._slots.get, self._filling
        slots: list[int] = []
        for block in islice(chain, start, None):
            slot = find(block)
            if slot is None or slot in filling:
                break
            slots.append(slot)
        return slots

    def match_without(self, chain: Sequence[BlockHash], start: int, other: Pool) -> int:
        """The end of the run that begins at `start`, of blocks readable here and not in `other`."""
        end = start
        for block in islice(chain, start, None):
            if self.slot(block) is None or other.slot(block) is not None:
                break
            end += 1
        return end

    def absent(self, chain: Sequence[BlockHash], indices: Iterable[int]) -> list[int]:
        """Those of `indices` whose block of the chain cannot be read."""
        return [index for index in indices if self.slot(chain[index]) is None]

    def pinnable(self, chain: Sequence[BlockHash], room: int) -> int:
        """The length of the longest head of this readable chain that pins at most `room` more."""
        for index, block in enumerate(chain):
            if self._pins[self._slots[block]] == 0:
                if room <= 0:
                    return index
                room -= 1
        return len(chain)

    def blocks(self) -> list[BlockHash]:
        """Every readable block."""
        return [block for block, slot in self._slots.items() if slot not in self._filling]

    def names(self, start: int, stop: int) -> list[BlockHash]:
        """The readable blocks in the slots from `start` to before `stop`."""
        filling = self._filling
        return [
            block
            for slot, block in enumerate(self._names[start:stop], start)
            if block is not None and slot not in filling
        ]

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
        self, chain: Sequence[BlockHash], fill: int, after: BlockHash | None = None
    ) -> Reservation:
        """Take slots for the blocks of `chain` that are not here, in order, evicting as needed.

        Takes as many as there is room for; blocks of the chain that are here already are not
        evicted for its others. `after` is the block before `chain[0]` in its request: to be
        given for blocks that were in no `use`, so that they are evicted before it.
        """
        known = self._slots
        absent = {block: index for index, block in enumerate(chain) if block not in known}
        if not absent:
            return Reservation([], [], [])
        slots, evicted = self._take(len(absent), chain)
        blocks = list(islice(absent, len(slots)))
        indices = list(islice(absent.values(), len(slots)))
        known.update(zip(blocks, slots, strict=True))
        self._filling.update(slots)
        names, fills = self._names, self._fills
        for block, slot in zip(blocks, slots, strict=True):
            names[slot] = block
            fills[slot] = fill
        if indices:
            before = chain[indices[0] - 1] if indices[0] else after
            place = None if before is None else known.get(before)
            self._eviction.add(blocks, slots, place)
        return Reservation(indices, slots, evicted)

    def _take(self, wanted: int, chain: Sequence[BlockHash]) -> tuple[list[int], list[BlockHash]]:
        """Up to `wanted` slots, free ones first, and the blocks that had to go for the others."""
        free, known, names = self._free, self._slots, self._names
        rest = max(0, len(free) - wanted)
        slots = free[rest:]
        slots.reverse()
        del free[rest:]
        if len(slots) == wanted:
            return slots, []
        spared = {known[block] for block in chain if block in known}
        victims = self._eviction.victims(wanted - len(slots), spared)
        evicted = [block for slot in victims if (block := names[slot]) is not None]
        assert len(evicted) == len(victims), "a slot without a block was to go"
        for block in evicted:
            del known[block]
        return slots + victims, evicted

    def commit(self, slots: Sequence[int]) -> list[BlockHash]:
        """The bytes of these slots are in place: their blocks can be read now.

        `slots` are in chain order. Returns the blocks that became readable: those whose name
        was taken away meanwhile did not, and their slots are free.
        """
        names = self._names
        stored = [block for slot in slots if (block := names[slot]) is not None]
        if len(stored) < len(slots):
            self._free += [slot for slot in slots if names[slot] is None]
            slots = [slot for slot in slots if names[slot] is not None]
        self._filling.difference_update(slots)
        self._eviction.show(slots)
        return stored

    def abort(self, slots: Iterable[int]) -> None:
        """The bytes of these slots did not arrive: the slots are free."""
        for slot in slots:
            block = self._names[slot]
            if block is not None:
                del self._slots[block]
                self._filling.remove(slot)
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
        known, names, stamps = self._slots, self._names, self._fills
        taken: list[bool] = []
        for block, slot, fill in zip(blocks, slots, fills, strict=True):
            good = slot < self.capacity and free[slot] == 1 and block not in known
            if good:
                free[slot] = 0
                known[block] = slot
                names[slot] = block
                stamps[slot] = fill
            taken.append(good)
        self._free = [slot for slot in self._free if free[slot]]
        self._eviction.adopt(list(compress(blocks, taken)), list(compress(slots, taken)))
        return taken

    # -- keeping -------------------------------------------------------------------

    def pin(self, chain: Iterable[BlockHash]) -> list[int]:
        """Keep these readable blocks where they are. Returns their slots."""
        known = self._slots
        return self._pin([known[block] for block in chain])

    def pin_run(self, chain: Sequence[BlockHash], start: int = 0) -> list[int]:
        """Keep the run of readable blocks that begins at `start`. Returns their slots."""
        return self._pin(self._run(chain, start))

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
        slot = self.slot(block)
        if slot is None:
            return False
        del self._slots[block]
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
        for block, slot in self._slots.items():
            self._names[slot] = None
            self._eviction.drop(block, slot)
        self._slots.clear()
        self._filling.clear()

    def check_integrity(self) -> None:
        """Every slot is in exactly one state, and all the tables agree about it."""
        free = set(self._free)
        known, filling = set(self._slots.values()), self._filling
        ready = known - filling
        assert len(free) == len(self._free), "a slot is free twice"
        assert len(known) == len(self._slots), "two blocks in one slot"
        assert not free & known, "a free slot is in use"
        assert filling <= known, "a slot is filled with nothing"
        pinned = {slot for slot, pins in enumerate(self._pins) if pins}
        assert all(pins >= 0 for pins in self._pins), "unpinned more often than pinned"
        assert self._pinned == len(pinned), "the count of pinned slots is wrong"
        assert self._pinned_nameless == len(pinned - ready), "the count of nameless slots is wrong"
        assert not pinned & (free | filling), "a pinned slot could be reused"
        for block, slot in self._slots.items():
            assert self._names[slot] == block, "a slot has another name than its block"
        named = {slot for slot, name in enumerate(self._names) if name is not None}
        assert named == known, "a slot has a name but no block"
        self._eviction.check_integrity(shown=ready - pinned, hidden=(ready & pinned) | filling)
