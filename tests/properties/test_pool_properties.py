"""The pool against a deliberately dumb one, which is a dictionary."""

from __future__ import annotations

from itertools import product

import hypothesis.strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvbm_schemas.block import BlockHash
from kvbm_service.core.lru import Lru
from kvbm_service.core.pool import Pool
from tests.core.builders import block

CAPACITY = 6
letters = st.lists(st.sampled_from("abcdefghij"), min_size=1, max_size=5, unique=True)
paths = st.text("xy", min_size=1, max_size=4)
"""Of a tree in which blocks have names as they really have: each says all that is before it."""
chains = st.one_of(
    letters.map(lambda names: [block(name) for name in names]),
    paths.map(lambda path: [block(path[:end]) for end in range(1, len(path) + 1)]),
)
NAMES = [
    *"abcdefghij",
    *("".join(path) for length in range(1, 5) for path in product("xy", repeat=length)),
]
blocks = st.sampled_from([block(name) for name in NAMES])


class PoolMachine(RuleBasedStateMachine):
    """Model: which blocks are readable, which slots are being filled, and who holds pins."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = Pool(CAPACITY)
        self.ready: dict[BlockHash, int] = {}
        self.filling: dict[int, BlockHash | None] = {}
        """Slot → the block it is for; None: cleared meanwhile."""
        self.fills: list[list[int]] = []
        self.pins: list[list[int]] = []
        self.stamp = 0

    def pinned(self) -> set[int]:
        return {slot for slots in self.pins for slot in slots}

    @rule(wanted=chains)
    def reserve(self, wanted: list[BlockHash]) -> None:
        self.stamp += 1
        absent = [
            index
            for index, block in enumerate(wanted)
            if block not in self.ready and block not in self.filling.values()
        ]
        busy = self.pinned() | set(self.filling)
        spared = {slot for block, slot in self.ready.items() if block in wanted}
        room = CAPACITY - len(busy | spared)
        indices, slots, evicted = self.pool.reserve(wanted, self.stamp)
        assert indices == absent[:room]
        assert not set(slots) & busy
        assert len(set(slots)) == len(slots)
        for gone in evicted:
            assert gone not in wanted
            assert self.ready.pop(gone) in slots
        assert not set(slots) & set(self.ready.values())
        assert self.pool.fills(slots) == [self.stamp] * len(slots)
        self.filling.update(zip(slots, (wanted[index] for index in indices), strict=True))
        if slots:
            self.fills.append(slots)

    @precondition(lambda self: self.fills)
    @rule(data=st.data(), good=st.booleans())
    def settle(self, data: st.DataObject, good: bool) -> None:
        slots = self.fills.pop(data.draw(st.integers(0, len(self.fills) - 1)))
        named = [(slot, self.filling.pop(slot)) for slot in slots]
        if good:
            arrived = {block: slot for slot, block in named if block is not None}
            assert self.pool.commit(slots) == list(arrived)
            self.ready.update(arrived)
        else:
            self.pool.abort(slots)

    @rule(wanted=chains)
    def match_and_pin(self, wanted: list[BlockHash]) -> None:
        end = next((i for i, block in enumerate(wanted) if block not in self.ready), len(wanted))
        assert self.pool.match(wanted) == end
        slots = self.pool.pin(wanted[:end])
        assert slots == [self.ready[block] for block in wanted[:end]]
        if slots:
            self.pins.append(slots)

    @rule(wanted=chains, room=st.integers(0, CAPACITY))
    def pinnable(self, wanted: list[BlockHash], room: int) -> None:
        here = wanted[: self.pool.match(wanted)]
        end = self.pool.pinnable(here, room)
        new = [self.ready[block] not in self.pinned() for block in here]
        assert sum(new[:end]) <= room
        assert end == len(here) or sum(new[: end + 1]) > room

    @precondition(lambda self: self.pins)
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        self.pool.unpin(self.pins.pop(data.draw(st.integers(0, len(self.pins) - 1))))

    @rule(wanted=chains)
    def use(self, wanted: list[BlockHash]) -> None:
        self.stamp += 1
        self.pool.use(wanted, now=float(self.stamp))

    @rule(found=st.lists(st.tuples(blocks, st.integers(0, CAPACITY)), max_size=4))
    def adopt(self, found: list[tuple[BlockHash, int]]) -> None:
        self.stamp += 1
        expected = []
        for one, slot in found:
            busy = set(self.ready.values()) | set(self.filling) | self.pinned()
            known = one in self.ready or one in self.filling.values()
            expected.append(slot < CAPACITY and slot not in busy and not known)
            if expected[-1]:
                self.ready[one] = slot
        names, slots = [one for one, _ in found], [slot for _, slot in found]
        assert self.pool.adopt(names, slots, [self.stamp] * len(found)) == expected
        taken = [slot for slot, good in zip(slots, expected, strict=True) if good]
        assert self.pool.fills(taken) == [self.stamp] * len(taken)

    @rule(wanted=chains)
    def drop(self, wanted: list[BlockHash]) -> None:
        assert self.pool.drop(wanted[0]) == (self.ready.pop(wanted[0], None) is not None)

    @rule()
    def clear(self) -> None:
        self.pool.clear()
        self.ready.clear()
        self.filling = dict.fromkeys(self.filling)

    @invariant()
    def it_agrees_with_the_model(self) -> None:
        self.pool.check_integrity()
        assert set(self.pool.blocks()) == set(self.ready)
        assert len(self.pool) == len(self.ready)
        assert self.pool.pinned == len(self.pinned())
        used = set(self.ready.values()) | set(self.filling) | self.pinned()
        assert self.pool.used == len(used)
        unpinned = CAPACITY - len(self.filling) - len(self.pinned())
        assert self.pool.unpinned == unpinned
        for name in NAMES:
            expected = block(name) in self.ready or block(name) in self.filling.values()
            assert (block(name) in self.pool) == expected


TestPool = PoolMachine.TestCase


class LruMachine(RuleBasedStateMachine):
    """Nothing is pinned and every fill succeeds at once: then eviction is plain LRU by chain."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = Pool(CAPACITY, Lru())
        self.order: list[BlockHash] = []

    @rule(wanted=chains)
    def store(self, wanted: list[BlockHash]) -> None:
        here = [block for block in wanted if block in self.order]
        absent = [block for block in wanted if block not in here]
        room = CAPACITY - len(self.order)
        victims = [block for block in self.order if block not in here][: max(0, len(absent) - room)]
        _, slots, evicted = self.pool.reserve(wanted, fill=1)
        assert evicted == victims
        stored = self.pool.commit(slots)
        assert stored == absent[: room + len(victims)]
        self.order = [block for block in self.order if block not in victims] + stored[::-1]

    @rule(wanted=chains)
    def use(self, wanted: list[BlockHash]) -> None:
        self.pool.use(wanted, now=0.0)
        here = [block for block in wanted if block in self.order]
        self.order = [block for block in self.order if block not in here] + here[::-1]


TestLru = LruMachine.TestCase
