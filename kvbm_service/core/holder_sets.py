"""Holder sets: who holds a block, as one small number that many blocks share.

Blocks travel in chains, so few different sets of holders exist, however many blocks there
are. A set is kept as a path in a trie: its number is that of its greatest holder's entry,
whose parent is the set without that holder, down to the empty set, which is 0.

    {3, 7, 9}  =  9 → 7 → 3 → 0

So a set costs one fixed-size entry, adding the newest holder costs one look-up, and a set
that shares its lower part with another shares the entries. `refs` counts the blocks that
have the set plus the entries standing on it; an entry without either is free to be reused.

A store is three arrays: `sets` (entries), `interned` (hash table: parent and holder → entry)
and `state` (see the indices below). These functions are called from compiled loops only.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kvbm_service.core.compiled import Compiler

Array = npt.NDArray[Any]

compiled = Compiler()

SET = np.dtype(
    [("parent", np.uint32), ("refs", np.uint32), ("holder", np.uint16), ("depth", np.uint16)]
)
NO_SET = np.uint32(0xFFFFFFFF)
"""Never the number of a set."""
MAX_HOLDERS = 1 << 14
"""Holder numbers are smaller than this, so no set is larger either."""

LIVE = 0
"""Index in `state`: sets there are, the empty one included."""
FREE = 1
"""Index in `state`: first entry of the list of free ones (linked by `parent`), or 0."""
TOP = 2
"""Index in `state`: entries from here on were never used."""
STATE_WORDS = 3

_SPREAD_PARENT = np.uint64(0x9E3779B97F4A7C15)
_SPREAD_HOLDER = np.uint64(0xC2B2AE3D27D4EB4F)
_32 = np.uint64(32)


def empty_store(room: int) -> tuple[Array, Array, Array]:
    """Make `sets`, `interned` and `state` with room for at least `room` sets."""
    room = max(room, 64)
    interned = np.zeros(room + room // 2, np.uint32)
    state = np.zeros(STATE_WORDS, np.int64)
    state[LIVE] = state[TOP] = 1  # the empty set
    return np.zeros(room, SET), interned, state


@compiled
def _place(parent: Any, holder: Any, interned: Array) -> Any:
    mixed = (np.uint64(parent) + np.uint64(1)) * _SPREAD_PARENT
    mixed = (mixed ^ (mixed >> _32) ^ np.uint64(holder)) * _SPREAD_HOLDER
    return np.int64(((mixed >> _32) * np.uint64(len(interned))) >> _32)


@compiled
def _after(at: Any, interned: Array) -> Any:
    return at + 1 if at + 1 < len(interned) else 0


@compiled
def room_for(sets: Array, state: Array, one: Any) -> Any:
    """Whether `one` with a holder more or less is sure to find free entries."""
    return len(sets) - state[LIVE] > np.int64(sets[one].depth) + 1


@compiled
def child(sets: Array, interned: Array, state: Array, parent: Any, holder: Any) -> Any:
    """The set `parent` plus `holder`, which is greater than all in it.

    A set made here has no references yet: the caller sees to it that it gets one.
    """
    at = _place(parent, holder, interned)
    while interned[at] != 0:
        one = interned[at]
        if sets[one].parent == parent and sets[one].holder == holder:
            return one
        at = _after(at, interned)
    if state[FREE] != 0:
        one = np.uint32(state[FREE])
        state[FREE] = sets[one].parent
    else:
        one = np.uint32(state[TOP])
        state[TOP] += 1
    state[LIVE] += 1
    interned[at] = one
    sets[one].parent = parent
    sets[one].holder = holder
    sets[one].depth = sets[parent].depth + 1
    sets[one].refs = 0
    sets[parent].refs += 1
    return one


@compiled
def plus(sets: Array, interned: Array, state: Array, one: Any, holder: Any, stack: Array) -> Any:
    """The set `one` with `holder` in it. `room_for(one)` holds."""
    below = one
    height = 0
    while below != 0 and sets[below].holder > holder:
        stack[height] = sets[below].holder
        height += 1
        below = sets[below].parent
    if below != 0 and sets[below].holder == holder:
        return one
    below = child(sets, interned, state, below, holder)
    while height > 0:
        height -= 1
        below = child(sets, interned, state, below, stack[height])
    return below


@compiled
def minus(sets: Array, interned: Array, state: Array, one: Any, holder: Any, stack: Array) -> Any:
    """The set `one` without `holder`. `room_for(one)` holds."""
    below = one
    height = 0
    while below != 0 and sets[below].holder > holder:
        stack[height] = sets[below].holder
        height += 1
        below = sets[below].parent
    if below == 0 or sets[below].holder != holder:
        return one
    below = sets[below].parent
    while height > 0:
        height -= 1
        below = child(sets, interned, state, below, stack[height])
    return below


@compiled
def release(sets: Array, interned: Array, state: Array, one: Any) -> None:
    """Give one reference to `one` back, and free it if that was the last."""
    if one == 0:
        return
    sets[one].refs -= 1
    while one != 0 and sets[one].refs == 0:
        parent = sets[one].parent
        _forget(sets, interned, one)
        sets[one].parent = state[FREE]
        sets[one].depth = 0
        state[FREE] = one
        state[LIVE] -= 1
        sets[parent].refs -= 1
        one = parent


@compiled
def _forget(sets: Array, interned: Array, one: Any) -> None:
    size = len(interned)
    hole = _place(sets[one].parent, sets[one].holder, interned)
    while interned[hole] != one:
        hole = _after(hole, interned)
    at = _after(hole, interned)
    while interned[at] != 0:  # close the hole with entries that probing would miss behind it
        other = interned[at]
        home = _place(sets[other].parent, sets[other].holder, interned)
        if (at - home + size) % size >= (at - hole + size) % size:
            interned[hole] = other
            hole = at
        at = _after(at, interned)
    interned[hole] = 0


@compiled
def copy_without(
    sets: Array, state: Array, dead: Array, fresh: Array, interned: Array, fresh_state: Array
) -> Array:
    """Copy all sets, less `dead` holders, into an empty store; what became of each number.

    References from blocks are not copied: whoever moves the blocks counts them anew.
    """
    became = np.full(state[TOP], NO_SET, np.uint32)
    became[0] = 0
    path = np.empty(MAX_HOLDERS, np.uint32)
    for number in range(1, state[TOP]):
        if sets[number].refs == 0:
            became[number] = 0
            continue
        one = np.uint32(number)
        height = 0
        while became[one] == NO_SET:
            path[height] = one
            height += 1
            one = sets[one].parent
        below = became[one]
        while height > 0:
            height -= 1
            holder = sets[path[height]].holder
            if not dead[holder]:
                below = child(fresh, interned, fresh_state, below, holder)
            became[path[height]] = below
    return became


def members(sets: Array, one: int) -> list[int]:
    """The holders in a set, greatest first."""
    found = []
    while one:
        found.append(int(sets[one]["holder"]))
        one = int(sets[one]["parent"])
    return found


def check_integrity(
    sets: Array, interned: Array, state: Array, blocks_with: dict[int, int]
) -> None:
    """Assert that the store is sound, given how many blocks have each set."""
    refs = dict(blocks_with)
    live = {int(one) for one in interned if one}
    assert len(live) == state[LIVE] - 1 == np.count_nonzero(interned), "sets are counted"
    seen = set()
    for one in live:
        parent, holder = int(sets[one]["parent"]), int(sets[one]["holder"])
        assert parent == 0 or parent in live, "a set stands on a live one"
        assert parent == 0 or sets[parent]["holder"] < holder, "holders ascend"
        assert sets[one]["depth"] == sets[parent]["depth"] + 1, "depth counts holders"
        seen.add((parent, holder))
        refs[parent] = refs.get(parent, 0) + 1
    assert len(seen) == len(live), "no set exists twice"
    assert sets[0]["depth"] == 0, "the empty set is empty"
    assert sets[0]["refs"] == refs.pop(0, 0), "sets of one are counted"
    assert set(refs) == live, "every set is used, every used one is there"
    for one, count in refs.items():
        assert sets[one]["refs"] == count, "references are counted"
    free, one = 0, int(state[FREE])
    while one:
        assert one not in live, "a free entry is not interned"
        assert sets[one]["refs"] == 0, "a free entry is not used"
        free, one = free + 1, int(sets[one]["parent"])
    assert free + state[LIVE] == state[TOP] <= len(sets), "entries are live, free or unused"
