"""The default choice of what goes, by itself."""

from __future__ import annotations

from kvbm_schemas.block import BlockHash
from kvbm_service.core.hit_density import AWAITED_SEGMENTS, GHOSTS, HitDensity
from kvbm_service.core.pool import Pool
from tests.core.builders import block


def path(names: str) -> list[BlockHash]:
    """A chain whose blocks have names that say all that is before them, as real ones do."""
    return [block(names[:end]) for end in range(1, len(names) + 1)]


def ask(pool: Pool, names: str, now: float) -> list[BlockHash]:
    """A request comes, and what is missing is stored. Returns what had to go."""
    pool.use(path(names), now)
    _, slots, evicted = pool.reserve(path(names), fill=1)
    pool.commit(slots)
    pool.check_integrity()
    return evicted


def test_a_shared_head_outlives_every_tail_behind_it() -> None:
    pool = Pool(6)
    ask(pool, "shab", 0.0)
    ask(pool, "shcd", 1.0)
    evicted = ask(pool, "xyzw", 2.0)
    assert evicted
    assert not {block("s"), block("sh")} & set(evicted)
    assert block("shab") in evicted


def test_a_block_whose_kids_are_in_use_goes_only_when_nothing_else_may() -> None:
    pool = Pool(4)
    ask(pool, "ab", 0.0)
    ask(pool, "xy", 1.0)
    pool.pin([block("ab")])
    assert ask(pool, "p", 2.0) == [block("xy")]
    assert ask(pool, "q", 3.0) in ([block("x")], [block("p")])


def test_what_the_engine_has_made_itself_goes_before_what_it_follows() -> None:
    pool = Pool(4)
    ask(pool, "ab", 0.0)
    for end in (3, 4):
        chain = path("abcd")
        slots = pool.reserve(chain[end - 1 : end], 2, after=chain[end - 2]).slots
        pool.commit(slots)
        pool.check_integrity()
    assert ask(pool, "xyz", 1.0) == [block("abcd"), block("abc"), block("ab")]


def test_blocks_that_are_stored_one_by_one_in_any_order_are_of_their_request() -> None:
    pool = Pool(5)
    pool.use(path("abcde"), 0.0)
    for index in (2, 4, 0, 3, 1):
        pool.commit(pool.reserve([path("abcde")[index]], fill=1).slots)
        pool.check_integrity()
    assert ask(pool, "vwxyz", 1.0) == path("abcde")[::-1]


def test_a_conversation_that_goes_on_outlives_those_that_did_not() -> None:
    pool = Pool(64)
    now = 0.0
    for number in range(400):
        talk = chr(0x100 + number // 4)
        turn = number % 4
        ask(pool, talk + "abcdefghijkl"[: 3 + 3 * turn], now)
        for stranger in range(2):
            ask(pool, chr(0x1000 + 2 * number + stranger) + "12345678", now + 1)
        now += 30.0
    assert pool.match(path(talk + "abcdefghijk")) >= 9


def test_equal_uses_lead_to_equal_evictions() -> None:
    def run() -> list[list[BlockHash]]:
        pool = Pool(9)
        return [ask(pool, "abc"[n % 3] * (n % 5 + 1) + "xy"[n % 2], n * 1.5) for n in range(300)]

    assert run() == run()


def test_a_clock_that_stands_still_is_no_trouble() -> None:
    pool = Pool(4)
    for number in range(100):
        ask(pool, chr(97 + number % 9) + "xyz"[: number % 4], 0.0)


def test_what_is_remembered_of_the_past_is_limited() -> None:
    eviction = HitDensity(8)
    pool = Pool(8, eviction)
    for number in range(GHOSTS + 500):
        pool.use([block(f"{number}")], float(number))
    assert len(eviction._ghosts) <= GHOSTS
    assert len(eviction._tree) <= GHOSTS + 8
    assert len(eviction._awaiting) <= AWAITED_SEGMENTS
    assert sum(map(len, eviction._odds._ages)) <= GHOSTS + 8
    pool.check_integrity()


def test_found_blocks_are_known_again_once_they_are_used() -> None:
    pool = Pool(6)
    pool.adopt([block("z"), *path("ab")], [0, 1, 2], [1, 1, 1])
    ask(pool, "ab", 1.0)
    assert ask(pool, "pqrs", 2.0) == [block("z")]
    assert pool.match(path("ab")) == 2
