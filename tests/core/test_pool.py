"""The slots of one tier."""

from __future__ import annotations

import pytest

from kvbm_service.core.pool import Pool
from tests.core.builders import block, chain


@pytest.fixture
def pool() -> Pool:
    return Pool(4)


def fill(pool: Pool, names: str) -> list[int]:
    """Store these blocks in one go; the evicted ones make room."""
    slots = pool.reserve(chain(names), fill=1).slots
    pool.commit(slots)
    pool.check_integrity()
    return slots


def test_a_reserved_block_cannot_be_read_before_it_is_committed(pool: Pool) -> None:
    reservation = pool.reserve(chain("ab"), fill=1)
    assert pool.match(chain("ab")) == 0
    assert len(pool) == 0
    assert pool.commit(reservation.slots) == chain("ab")
    assert pool.match(chain("ab")) == 2
    pool.check_integrity()


def test_a_block_on_its_way_is_not_reserved_again(pool: Pool) -> None:
    pool.reserve(chain("ab"), fill=1)
    assert block("a") in pool
    assert pool.reserve(chain("abc"), fill=2).indices == [2]
    pool.check_integrity()


def test_a_block_that_is_here_is_not_reserved_again(pool: Pool) -> None:
    fill(pool, "ab")
    reservation = pool.reserve(chain("abc"), fill=2)
    assert reservation.indices == [2]
    assert reservation.evicted == []


def test_a_match_ends_at_the_first_gap(pool: Pool) -> None:
    fill(pool, "abd")
    assert pool.match(chain("abcd")) == 2
    assert pool.match(chain("abcd"), start=2) == 2
    assert pool.match(chain("abcd"), start=3) == 4


def test_a_match_that_starts_behind_the_chain_is_empty(pool: Pool) -> None:
    assert pool.match(chain("ab"), start=5) == 5


def test_a_full_pool_evicts_the_least_recently_used_block(pool: Pool) -> None:
    for name in "abcd":
        fill(pool, name)
    pool.use([block("a")], now=1.0)
    assert pool.reserve([block("e")], fill=2).evicted == [block("b")]
    pool.check_integrity()


def test_a_chains_tail_is_evicted_before_its_head(pool: Pool) -> None:
    fill(pool, "abcd")
    assert pool.reserve([block("e")], fill=2).evicted == [block("d")]
    assert pool.reserve([block("f")], fill=2).evicted == [block("c")]
    assert pool.match(chain("abcd")) == 2


def test_an_unpinned_chains_tail_is_evicted_before_its_head(pool: Pool) -> None:
    fill(pool, "abcd")
    pool.unpin(pool.pin(chain("abcd")))
    assert pool.reserve([block("e")], fill=2).evicted == [block("d")]


def test_a_used_chains_tail_is_evicted_before_its_head(pool: Pool) -> None:
    fill(pool, "ab")
    fill(pool, "xy")
    pool.use(chain("ab"), now=1.0)
    assert pool.reserve(chain("123"), fill=2).evicted == chain("yxb")


def test_a_pinned_block_is_not_evicted(pool: Pool) -> None:
    fill(pool, "abcd")
    pool.pin(chain("cd"))
    reservation = pool.reserve(chain("wxyz"), fill=2)
    assert reservation.indices == [0, 1]
    assert reservation.evicted == chain("ba")
    assert pool.match(chain("cd")) == 2
    pool.check_integrity()


def test_pins_are_counted(pool: Pool) -> None:
    fill(pool, "a")
    once = pool.pin(chain("a"))
    twice = pool.pin(chain("a"))
    assert once == twice
    pool.unpin(once)
    assert pool.pinned == 1
    pool.unpin(twice)
    assert pool.pinned == 0
    pool.check_integrity()


def test_a_chain_that_names_a_block_twice_can_be_pinned(pool: Pool) -> None:
    fill(pool, "a")
    slots = pool.pin(chain("aa"))
    pool.check_integrity()
    pool.unpin(slots)
    pool.check_integrity()
    assert pool.pinned == 0


def test_an_exhausted_pool_hands_out_what_it_has(pool: Pool) -> None:
    reservation = pool.reserve(chain("abcdef"), fill=1)
    assert reservation.indices == [0, 1, 2, 3]
    assert pool.reserve(chain("x"), fill=2).slots == []
    assert pool.unpinned == 0
    pool.check_integrity()


def test_a_chain_does_not_evict_its_own_blocks() -> None:
    pool = Pool(2)
    fill(pool, "a")
    reservation = pool.reserve(chain("abc"), fill=2)
    assert reservation.indices == [1]
    assert reservation.evicted == []
    assert pool.match(chain("a")) == 1
    pool.check_integrity()


def test_an_aborted_slot_is_free_and_its_block_unknown(pool: Pool) -> None:
    pool.abort(pool.reserve(chain("abcd"), fill=1).slots)
    assert block("a") not in pool
    assert pool.used == 0
    pool.check_integrity()


def test_each_fill_leaves_its_stamp(pool: Pool) -> None:
    first = pool.reserve(chain("ab"), fill=7)
    second = pool.reserve(chain("c"), fill=8)
    assert pool.fills([*first.slots, *second.slots]) == [7, 7, 8]


def test_a_dropped_block_is_gone_and_its_slot_free(pool: Pool) -> None:
    fill(pool, "ab")
    assert pool.drop(block("a"))
    assert not pool.drop(block("a"))
    assert pool.match(chain("ab")) == 0
    assert pool.used == 1
    pool.check_integrity()


def test_a_dropped_block_that_is_being_read_keeps_its_slot_until_the_reader_is_done() -> None:
    pool = Pool(1)
    fill(pool, "a")
    slots = pool.pin(chain("a"))
    pool.drop(block("a"))
    pool.check_integrity()
    assert pool.reserve(chain("b"), fill=2).slots == []
    pool.unpin(slots)
    assert pool.reserve(chain("b"), fill=2).slots == slots
    pool.check_integrity()


def test_clearing_forgets_every_block(pool: Pool) -> None:
    fill(pool, "abc")
    pool.clear()
    assert (len(pool), pool.used) == (0, 0)
    pool.check_integrity()


def test_clearing_leaves_slots_that_are_being_filled_to_who_fills_them(pool: Pool) -> None:
    slots = pool.reserve(chain("abcd"), fill=1).slots
    pool.clear()
    pool.check_integrity()
    assert block("a") not in pool
    assert pool.reserve(chain("x"), fill=2).slots == []
    assert pool.commit(slots[:2]) == []
    pool.abort(slots[2:])
    assert (len(pool), pool.used) == (0, 0)
    pool.check_integrity()


def test_a_block_saved_again_after_clearing_is_not_taken_for_the_first_one(pool: Pool) -> None:
    before = pool.reserve(chain("a"), fill=1).slots
    pool.clear()
    after = pool.reserve(chain("a"), fill=2).slots
    assert pool.commit(before) == []
    assert pool.match(chain("a")) == 0
    assert pool.commit(after) == chain("a")
    assert pool.pin(chain("a")) == after
    pool.check_integrity()


def test_clearing_leaves_pinned_slots_to_who_pinned_them(pool: Pool) -> None:
    fill(pool, "abcd")
    slots = pool.pin(chain("ab"))
    pool.clear()
    pool.check_integrity()
    assert (len(pool), pool.used, pool.pinned) == (0, 2, 2)
    pool.unpin(slots)
    assert (pool.used, pool.pinned) == (0, 0)
    pool.check_integrity()


def test_found_blocks_are_readable_where_they_were_found(pool: Pool) -> None:
    assert pool.adopt(chain("ab"), [3, 0], [7, 8]) == [True, True]
    assert pool.pin(chain("ab")) == [3, 0]
    assert pool.fills([3, 0]) == [7, 8]
    pool.check_integrity()


def test_found_blocks_go_oldest_first(pool: Pool) -> None:
    pool.adopt(chain("abc"), [2, 1, 0], [1, 2, 3])
    assert pool.reserve(chain("xyz"), fill=4).evicted == chain("ab")
    pool.check_integrity()


def test_a_block_is_not_found_in_a_slot_that_is_in_use(pool: Pool) -> None:
    fill(pool, "a")
    (taken,) = pool.pin(chain("a"))
    assert pool.adopt(chain("bac"), [taken, 1, 4], [2, 2, 2]) == [False, False, False]
    assert pool.adopt(chain("dde"), [1, 2, 1], [3, 3, 3]) == [True, False, False]
    pool.check_integrity()
