"""The block index: which nodes hold a block, in which tier. Made for millions of blocks.

One open-addressing table, 20 bytes a slot: the block's name (two words) and the number of
its holder set (holder_sets.py). A holder is (node number, tier) as one small number.

What was decided, and why:

- *A lookup reads every block of its answer.* No step of a chain waits for the one before, so
  the processor fetches many slots at once. Jumping ahead to the chain's end, and believing
  what lies between, would be faster still, but would promise blocks evicted from the middle
  and pass over the node that has them all.
- *Names may be chosen by an enemy.* Slots come from a seeded, strongly universal hash of all
  16 bytes, and no block lies more than `MAX_PROBES` slots behind its own: one that would is
  not taken in and counted as `crowded`. Not knowing a block only costs a reuse.
- *The slot is the hash scaled to the table's length.* Any length will do, and rebuilding
  walks the old and the new table in the same order, which is many times faster than at random.
- *Dropping a node is instant.* Its number is marked dead and left out of every answer; its
  copies are swept out when they are a fifth of all, or when numbers run out.
- *Growing, shrinking and sweeping are the same rebuild*, amortised over the blocks that made it
  necessary. Nothing else runs meanwhile: about 30 ms per million blocks,
  during which questions wait, and with a deadline of a few milliseconds miss.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kvbm_schemas.block import HASH_BYTES, Tier
from kvbm_service.core import holder_sets
from kvbm_service.core.compiled import Compiler
from kvbm_service.core.holder_sets import NO_SET

Array = npt.NDArray[Any]

compiled = Compiler(holder_sets)

MAX_NODES = 4_096 - 1
"""Nodes that can be in one index at a time, those dropped but not yet swept out included."""
MAX_BLOCKS_PER_NODE = 1 << 25
"""Copies of one node that are kept; what it stores beyond is ignored and counted."""
MAX_PROBES = 512
"""A block lies at most this many slots behind the one its hash names."""
MAX_RUNS = 1_024
"""Longest answer to a lookup, in runs: the most that a `Located` may carry."""

MIN_SLOTS = 1_024
FULL = 2 / 3
"""Share of slots in use at which the table grows."""
GROWTH = 1.5
SPARSE = 1 / 8
"""Share of slots in use at which the table shrinks."""
DEAD = 1 / 5
"""Share of copies of dropped nodes at which they are swept out."""

SLOT = np.dtype([("low", np.uint64), ("high", np.uint64), ("set", np.uint32)])

TIERS = (Tier.HOST, Tier.DISK, Tier.DEVICE)
"""In the order in which a reader prefers them: the tier's number is its place here."""
_NUMBER = {tier: number for number, tier in enumerate(TIERS)}
_TIER_BITS = 2
_TIER_MASK = (1 << _TIER_BITS) - 1

_USED = holder_sets.STATE_WORDS
_CROWDED = _USED + 1
_REFUSED = _USED + 2
_STATE_WORDS = _USED + 3

_AHEAD = 64
"""Keys that a lookup fetches first; then as many again as it has found, and so on."""
_32 = np.uint64(32)
_LOW_HALF = np.uint64(0xFFFFFFFF)


class Run(NamedTuple):
    """`blocks` consecutive blocks of a chain from index `start`, all with one holder."""

    node: int
    tier: Tier
    start: int
    blocks: int


# The compiled loops. `slots`, `words`, `sets`, `interned`, `state` together are the index.


@compiled
def _home(low: Any, high: Any, words: Array, length: Any) -> Any:
    mixed = (
        words[0]
        + words[1] * (low & _LOW_HALF)
        + words[2] * (low >> _32)
        + words[3] * (high & _LOW_HALF)
        + words[4] * (high >> _32)
    )
    return np.int64(((mixed >> _32) * np.uint64(length)) >> _32)


@compiled
def _find_from(slots: Array, home: Any, low: Any, high: Any) -> Any:
    """The slot of a block; else minus the free slot for it, less one; or -len(slots)."""
    for at in range(home, home + MAX_PROBES):
        if slots[at].set == 0:
            return -at - 1
        if slots[at].low == low and slots[at].high == high:
            return at
    return -len(slots)


@compiled
def _find(slots: Array, words: Array, low: Any, high: Any) -> Any:
    return _find_from(slots, _home(low, high, words, len(slots) - MAX_PROBES), low, high)


@compiled
def _empty(slots: Array, words: Array, hole: Any) -> None:
    """Free a slot, and move up the blocks that probing would miss behind it."""
    at = hole + 1
    while slots[at].set != 0:  # the last slot is always free
        if _home(slots[at].low, slots[at].high, words, len(slots) - MAX_PROBES) <= hole:
            slots[hole] = slots[at]
            hole = at
        at += 1
    slots[hole].set = 0


@compiled
def _store(
    slots: Array,
    words: Array,
    sets: Array,
    interned: Array,
    state: Array,
    copies: Array,
    stack: Array,
    keys: Array,
    done: Any,
    holder: Any,
    limit: Any,
) -> Any:
    """Add `holder` to `keys[done:]`. Returns how many are done: fewer than all asks for room."""
    full = np.int64((len(slots) - MAX_PROBES) * FULL)
    first = holder & ~_TIER_MASK
    left = limit - copies[first : first + _TIER_MASK].sum()
    before = after = NO_SET  # most blocks of a batch go from one set to one other
    for number in range(done, len(keys)):
        if left <= 0:
            state[_REFUSED] += len(keys) - number
            break
        if state[_USED] >= full:
            return number
        low, high = keys[number, 0], keys[number, 1]
        at = _find(slots, words, low, high)
        if at == -len(slots):
            state[_CROWDED] += 1
            continue
        one = slots[at].set if at >= 0 else np.uint32(0)
        if one != before:
            if not holder_sets.room_for(sets, state, one):
                return number
            before = one
            after = holder_sets.plus(sets, interned, state, one, holder, stack)
        if after == one:
            continue
        if at < 0:
            at = -at - 1
            state[_USED] += 1
            slots[at].low = low
            slots[at].high = high
        slots[at].set = after
        sets[after].refs += 1
        copies[holder] += 1
        left -= 1
        holder_sets.release(sets, interned, state, one)
    return len(keys)


@compiled
def _remove(
    slots: Array,
    words: Array,
    sets: Array,
    interned: Array,
    state: Array,
    copies: Array,
    stack: Array,
    keys: Array,
    done: Any,
    holder: Any,
) -> Any:
    """Take `holder` from `keys[done:]`. Returns how many are done: fewer than all asks for room."""
    before = after = NO_SET
    for number in range(done, len(keys)):
        at = _find(slots, words, keys[number, 0], keys[number, 1])
        if at < 0:
            continue
        one = slots[at].set
        if one != before:
            if not holder_sets.room_for(sets, state, one):
                return number
            before = one
            after = holder_sets.minus(sets, interned, state, one, holder, stack)
        if after == one:
            continue
        copies[holder] -= 1
        if after == 0:
            state[_USED] -= 1
            _empty(slots, words, at)
        else:
            slots[at].set = after
            sets[after].refs += 1
        holder_sets.release(sets, interned, state, one)
    return len(keys)


@compiled
def _move(
    slots: Array,
    became: Array,
    fresh: Array,
    words: Array,
    sets: Array,
    interned: Array,
    state: Array,
    copies: Array,
) -> None:
    """Move all blocks to the table `fresh`, with what `became` of their holder sets."""
    for at in range(len(slots)):
        one = became[slots[at].set]
        if one == 0:
            continue
        to = -_find(fresh, words, slots[at].low, slots[at].high) - 1
        if to == len(fresh) - 1:
            state[_CROWDED] += 1
            while one != 0:
                copies[sets[one].holder] -= 1
                one = sets[one].parent
            continue
        fresh[to] = slots[at]
        fresh[to].set = one
        sets[one].refs += 1
        state[_USED] += 1
    for one in became:  # sets of which every block was crowded out
        if one != 0 and sets[one].depth > 0 and sets[one].refs == 0:
            sets[one].refs = 1
            holder_sets.release(sets, interned, state, one)


@compiled
def _count_alive(slots: Array, became: Array) -> Any:
    alive = 0
    for at in range(len(slots)):
        alive += became[slots[at].set] != 0
    return alive


@compiled
def _fetch(
    slots: Array, words: Array, keys: Array, start: Any, stop: Any, homes: Array, found: Array
) -> None:
    """Write the holder sets of `keys[start:stop]` to `found`; unknown blocks have the empty one.

    The middle loop only touches memory, neither waiting for any of it nor branching on it (what
    it writes has no meaning): so many slots are on their way at once, and then in the cache.
    """
    length = len(slots) - MAX_PROBES
    for number in range(start, stop):
        homes[number] = _home(keys[number, 0], keys[number, 1], words, length)
    for number in range(start, stop):
        found[number] = np.uint32(slots[homes[number]].low) + slots[homes[number] + 1].set
    for number in range(start, stop):
        at = _find_from(slots, homes[number], keys[number, 0], keys[number, 1])
        found[number] = slots[at].set if at >= 0 else np.uint32(0)


@compiled
def _readable(sets: Array, one: Any, dead: Array, asker: Any, holders: Array) -> Any:
    """Write who of a set can be read by `asker`, greatest first; how many."""
    count = 0
    while one != 0:
        holder = sets[one].holder
        if not dead[holder] and holder >> _TIER_BITS != asker:
            holders[count] = holder
            count += 1
        one = sets[one].parent
    return count


@compiled
def _keep(sets: Array, one: Any, holders: Array, count: Any) -> Any:
    """Keep only holders that are in a set, too; how many. If none is, all stay."""
    kept = 0
    number = 0
    while one != 0 and number < count:
        holder = sets[one].holder
        while number < count and holders[number] > holder:
            number += 1
        if number < count and holders[number] == holder:
            holders[kept] = holder
            kept += 1
            number += 1
        one = sets[one].parent
    return kept


@compiled
def _choose(holders: Array, count: Any, spread: Any) -> Any:
    """One of those with the cheapest tier; which one, `spread` decides."""
    best = _TIER_MASK
    equals = 0
    for number in range(count):
        tier = holders[number] & _TIER_MASK
        if tier < best:
            best = tier
            equals = 0
        equals += tier == best
    skip = np.int64(spread % np.uint64(equals))
    for number in range(count):
        if holders[number] & _TIER_MASK == best:
            if skip == 0:
                return np.int64(holders[number])
            skip -= 1
    return np.int64(0)


@compiled
def _lookup(
    slots: Array,
    words: Array,
    sets: Array,
    dead: Array,
    keys: Array,
    asker: Any,
    homes: Array,
    found: Array,
    holders: Array,
    runs: Array,
) -> Any:
    """Write the greedy cover of the chain's longest known prefix to `runs`; how many runs."""
    fetched = 0
    start = 0
    for number in range(len(runs)):
        count = 0
        at = start
        last = np.uint32(0)
        while at < len(keys):
            if at == fetched:
                fetched = min(fetched + max(fetched, _AHEAD), len(keys))
                _fetch(slots, words, keys, at, fetched, homes, found)
            one = found[at]
            if one != last:
                if at == start:
                    kept = _readable(sets, one, dead, asker, holders)
                else:
                    kept = _keep(sets, one, holders, count)
                if kept == 0:
                    break
                count = kept
                last = one
            elif one == 0:
                break
            at += 1
        if at == start:
            return number
        spread = keys[start, 0] + np.uint64(asker + 1)
        runs[number, 0] = _choose(holders, count, spread)
        runs[number, 1] = start
        runs[number, 2] = at - start
        start = at
    return len(runs)


class BlockIndex:
    """Who holds which block, for one scope. Nodes go by the numbers that `add_node` gives.

    `seed` should be a secret of the process. Not safe for use from two threads at once.
    """

    def __init__(self, seed: int, blocks_per_node: int = MAX_BLOCKS_PER_NODE) -> None:
        self._words = _expand(seed)
        self._blocks_per_node = blocks_per_node
        self._slots = np.zeros(MIN_SLOTS + MAX_PROBES, SLOT)
        self._sets, self._interned, self._state = _empty_sets(0)
        self._copies = np.zeros(holder_sets.MAX_HOLDERS, np.int64)
        self._dead = np.zeros(holder_sets.MAX_HOLDERS, np.bool_)
        self._stack = np.zeros(holder_sets.MAX_HOLDERS, np.uint16)
        self._found = np.zeros(_AHEAD, np.uint32)
        self._homes = np.zeros(_AHEAD, np.int64)
        self._runs = np.zeros((MAX_RUNS, 3), np.int64)
        self._free: list[int] = []
        self._dropped: list[int] = []
        self._nodes = 0

    # Nodes

    def add_node(self) -> int | None:
        """A number for a node that holds nothing yet; None when there are `MAX_NODES`."""
        if not self._free and self._nodes == MAX_NODES and self._dropped:
            self.sweep()
        if self._free:
            return self._free.pop()
        if self._nodes == MAX_NODES:
            return None
        self._nodes += 1
        return self._nodes - 1

    def drop_node(self, node: int) -> None:
        """Forget a node and all its copies. Its number means nothing from now on."""
        self._dead[_holders_of(node)] = True
        self._dropped.append(node)
        dead = int(self._copies[self._dead].sum())
        if dead > MIN_SLOTS and dead > DEAD * int(self._copies.sum()):
            self.sweep()

    # Events

    def store(self, node: int, tier: Tier, packed: bytes) -> None:
        """`node` now has these blocks in `tier`. What it had there before does not matter."""
        keys = _keys(packed)
        holder = _holder(node, tier)
        done = 0
        while True:
            done = _store(
                self._slots,
                self._words,
                self._sets,
                self._interned,
                self._state,
                self._copies,
                self._stack,
                keys,
                done,
                holder,
                self._blocks_per_node,
            )
            if done == len(keys):
                return
            self._make_room()

    def remove(self, node: int, tier: Tier, packed: bytes) -> None:
        """`node` no longer has these blocks in `tier`, if it ever had."""
        keys = _keys(packed)
        holder = _holder(node, tier)
        done = 0
        while True:
            done = _remove(
                self._slots,
                self._words,
                self._sets,
                self._interned,
                self._state,
                self._copies,
                self._stack,
                keys,
                done,
                holder,
            )
            if done == len(keys):
                break
            self._make_room()
        if self._length > MIN_SLOTS and len(self) < SPARSE * self._length:
            self._rebuild(_length_for(len(self)))

    # Questions

    def lookup(self, packed: bytes, asker: int | None = None) -> list[Run]:
        """Cover the chain's longest known prefix with as long runs as can be had.

        At each position the holder with the longest run from there is taken; of equals one in
        host memory before disk before device, and of those one picked by asker and block, so
        that readers spread. Ends where nobody but `asker` has the next block.
        """
        keys = _keys(packed)
        if len(keys) > len(self._found):
            self._found = np.zeros(len(keys), np.uint32)
            self._homes = np.zeros(len(keys), np.int64)
        count = _lookup(
            self._slots,
            self._words,
            self._sets,
            self._dead,
            keys,
            -1 if asker is None else asker,
            self._homes,
            self._found,
            self._stack,
            self._runs,
        )
        return [
            Run(holder >> _TIER_BITS, TIERS[holder & _TIER_MASK], start, length)
            for holder, start, length in self._runs[:count].tolist()
        ]

    def locate(self, packed: bytes) -> list[tuple[tuple[int, Tier], ...]]:
        """The holders of each block, as (node, tier), in ascending order."""
        keys = _keys(packed)
        found = np.zeros(len(keys), np.uint32)
        homes = np.zeros(len(keys), np.int64)
        _fetch(self._slots, self._words, keys, 0, len(keys), homes, found)
        known: dict[int, tuple[tuple[int, Tier], ...]] = {}
        placements = []
        for one in found.tolist():
            if one not in known:
                known[one] = tuple(
                    (holder >> _TIER_BITS, TIERS[holder & _TIER_MASK])
                    for holder in reversed(holder_sets.members(self._sets, one))
                    if not self._dead[holder]
                )
            placements.append(known[one])
        return placements

    def copies(self, node: int) -> int:
        """How many copies `node` has, in all tiers together."""
        return int(self._copies[_holders_of(node)].sum())

    def __len__(self) -> int:
        """Blocks known, those that only dropped nodes held included until they are swept out."""
        return int(self._state[_USED])

    @property
    def all_copies(self) -> int:
        """Copies of all nodes in all tiers."""
        return int(self._copies[~self._dead].sum())

    @property
    def crowded(self) -> int:
        """Blocks not taken in because too many others lay where they belong."""
        return int(self._state[_CROWDED])

    @property
    def refused(self) -> int:
        """Copies ignored because their node already had as many as it may."""
        return int(self._state[_REFUSED])

    @property
    def bytes_held(self) -> int:
        """Memory of the index."""
        arrays = (self._slots, self._sets, self._interned, self._copies, self._dead, self._stack)
        return sum(array.nbytes for array in arrays) + self._found.nbytes + self._runs.nbytes

    # Upkeep

    def sweep(self) -> None:
        """Remove what dropped nodes held, and make their numbers usable again."""
        self._rebuild(None)

    @property
    def _length(self) -> int:
        return len(self._slots) - MAX_PROBES

    def _make_room(self) -> None:
        """Rebuild with more of whatever ran out."""
        full = len(self) >= int(self._length * FULL)
        self._rebuild(int(self._length * GROWTH) if full else self._length)

    def _rebuild(self, length: int | None) -> None:
        """Move everything but dropped nodes' copies to new arrays; `length` None: as needed."""
        live = int(self._state[holder_sets.LIVE])
        deepest = int(self._sets["depth"].max())  # one change can need as many entries
        room = live + max(deepest + 2, live >> 1, len(self) >> 4)
        sets, interned, state = _empty_sets(room)
        state[_CROWDED], state[_REFUSED] = self._state[_CROWDED], self._state[_REFUSED]
        became = holder_sets.copy_without(
            self._sets, self._state, self._dead, sets, interned, state
        )
        if length is None:
            length = _length_for(int(_count_alive(self._slots, became)))
        fresh = np.zeros(length + MAX_PROBES, SLOT)
        _move(self._slots, became, fresh, self._words, sets, interned, state, self._copies)
        self._slots, self._sets, self._interned, self._state = fresh, sets, interned, state
        self._copies[self._dead] = 0
        self._dead[:] = False
        self._free += self._dropped
        self._dropped = []

    def check_integrity(self) -> None:
        """Assert that the index is sound. Slow: for tests and idle times."""
        used = np.flatnonzero(self._slots["set"])
        assert len(used) == len(self) <= self._length, "blocks are counted"
        assert self._slots["set"][-1] == 0, "the last slot is free"
        names = {(int(self._slots[at]["low"]), int(self._slots[at]["high"])) for at in used}
        assert len(names) == len(used), "no block is there twice"
        for at in used:
            slot = self._slots[at]
            assert _find(self._slots, self._words, slot["low"], slot["high"]) == at, "found again"
        numbers, counts = np.unique(self._slots["set"][used], return_counts=True)
        blocks_with = dict(zip(numbers.tolist(), counts.tolist(), strict=True))
        holder_sets.check_integrity(self._sets, self._interned, self._state, blocks_with)
        copies = np.zeros_like(self._copies)
        for one, count in blocks_with.items():
            copies[holder_sets.members(self._sets, one)] += count
        assert (copies == self._copies).all(), "copies are counted"
        idle = set(self._free)
        assert len(idle) == len(self._free), "a number is free once"
        assert idle.isdisjoint(self._dropped), "a dropped number is not free yet"
        assert not any(self._copies[_holders_of(node)].any() for node in idle), "free is empty"
        dead = {int(holder) >> _TIER_BITS for holder in np.flatnonzero(self._dead)}
        assert dead == set(self._dropped), "dropped nodes are dead"


def compile_now() -> None:
    """Compile all loops, which otherwise happens at first use (seconds; kept on disk)."""
    index = BlockIndex(seed=0)
    node, packed = index.add_node(), bytes(HASH_BYTES)
    assert node is not None
    index.store(node, Tier.HOST, packed)
    index.lookup(packed)
    index.locate(packed)
    index.sweep()
    index.remove(node, Tier.HOST, packed)


def _holder(node: int, tier: Tier) -> int:
    return node << _TIER_BITS | _NUMBER[tier]


def _holders_of(node: int) -> slice:
    return slice(node << _TIER_BITS, (node << _TIER_BITS) + len(TIERS))


def _keys(packed: bytes) -> Array:
    return np.frombuffer(packed, np.uint64).reshape(-1, 2)


def _length_for(blocks: int) -> int:
    """Slots for a table that is half full."""
    return max(MIN_SLOTS, 2 * blocks)


def _empty_sets(room: int) -> tuple[Array, Array, Array]:
    """A store of holder sets, with the index's own counts behind its state."""
    sets, interned, state = holder_sets.empty_store(room)
    return sets, interned, np.concatenate([state, np.zeros(_STATE_WORDS - len(state), np.int64)])


def _expand(seed: int) -> Array:
    """Five words from one, each bit of which depends on all of `seed` (splitmix64)."""
    mask = (1 << 64) - 1
    words = []
    for number in range(1, 6):
        word = (seed + number * 0x9E3779B97F4A7C15) & mask
        word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & mask
        word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & mask
        words.append(word ^ (word >> 31))
    return np.array(words, np.uint64)
