"""The offload filter: what is let onto the disk, and what is forgotten."""

from __future__ import annotations

import pytest

from kvbm_schemas.block import BlockHash
from kvbm_service.core.offload_filter import HIGHEST_FREQUENCY, OffloadFilter


def name(number: int) -> BlockHash:
    """Little endian, so that the first bytes differ as those of real names do."""
    return BlockHash(number.to_bytes(16, "little"))


A, B, C, D = map(name, range(4))


def test_a_block_is_refused_at_first_sight_and_accepted_at_the_second() -> None:
    frequencies = OffloadFilter()
    assert frequencies.offer([A], now=0) == [False]
    assert frequencies.offer([A, B], now=1) == [True, False]


def test_each_block_of_a_batch_counts_on_its_own() -> None:
    assert OffloadFilter().offer([A, B, A, A, C], now=0) == [False, False, True, True, False]


@pytest.mark.parametrize(
    ("least", "accepted"),
    [
        (1, [True, True, True, True]),
        (2, [False, True, True, True]),
        (3, [False, False, True, True]),
        (8, [False, False, False, True]),
    ],
)
def test_the_least_frequency_is_reached_by_doubling(least: int, accepted: list[bool]) -> None:
    assert OffloadFilter(min_frequency=least).offer([A] * 4, now=0) == accepted


def test_a_block_seen_once_is_forgotten_at_the_next_decay_step() -> None:
    frequencies = OffloadFilter(decay_seconds=600)
    frequencies.offer([A], now=599)
    assert frequencies.offer([A], now=600) == [False]


def test_a_frequency_falls_by_one_at_each_decay_step_however_many_passed_unseen() -> None:
    frequencies = OffloadFilter(decay_seconds=600)
    frequencies.offer([A] * 4 + [B] * 3, now=0)
    assert (frequencies.frequency(A), frequencies.frequency(B)) == (8, 4)
    frequencies.offer([], now=3 * 600)
    assert (frequencies.frequency(A), frequencies.frequency(B)) == (5, 1)
    frequencies.offer([B], now=3 * 600)
    frequencies.offer([], now=6 * 600)
    assert (frequencies.frequency(A), frequencies.frequency(B)) == (2, 0)
    assert frequencies.offer([A, B], now=6 * 600) == [True, False]


def test_doubling_ends_so_that_every_block_is_forgotten_some_day() -> None:
    frequencies = OffloadFilter(decay_seconds=1)
    frequencies.offer([A] * 100, now=0)
    assert frequencies.frequency(A) == HIGHEST_FREQUENCY
    frequencies.offer([], now=HIGHEST_FREQUENCY)
    assert frequencies.frequency(A) == 0


def test_a_clock_that_steps_back_gives_nothing_back() -> None:
    frequencies = OffloadFilter(decay_seconds=1)
    frequencies.offer([A, A, A], now=10)
    frequencies.offer([], now=12)
    frequencies.offer([], now=10)
    assert frequencies.frequency(A) == 2


def test_the_least_frequency_gives_way_to_a_newcomer() -> None:
    frequencies = OffloadFilter(max_entries=3)
    frequencies.offer([A, A, B, C, C], now=0)
    frequencies.offer([D], now=1)
    assert [frequencies.frequency(block) for block in (A, B, C, D)] == [2, 0, 2, 1]


def test_of_blocks_seen_once_the_oldest_gives_way() -> None:
    frequencies = OffloadFilter(max_entries=3)
    frequencies.offer([A, B, C, D], now=0)
    assert [frequencies.frequency(block) for block in (A, B, C, D)] == [0, 1, 1, 1]


def test_a_flood_of_new_blocks_does_not_wash_out_what_is_in_demand() -> None:
    frequencies = OffloadFilter(max_entries=8192)
    wanted = [name(number) for number in range(1000)]
    frequencies.offer(wanted + wanted, now=0)
    frequencies.offer(map(name, range(1000, 100_000)), now=1)
    assert len(frequencies) <= 8192
    assert all(frequencies.offer(wanted, now=2))
    frequencies.check_integrity()


def test_a_decay_step_is_worked_off_little_by_little() -> None:
    """A million blocks at once would hold up the engine's scheduler."""
    frequencies = OffloadFilter(decay_seconds=600)
    frequencies.offer(map(name, range(100_000)), now=0)
    newcomers = [name(number) for number in range(1_000_000, 1_020_000)]
    for newcomer in newcomers[:2000]:
        before = len(frequencies)
        frequencies.offer([newcomer], now=600)
        assert len(frequencies) > before - 64
    assert len(frequencies) < 100_000
    frequencies.offer(newcomers, now=601)
    assert len(frequencies) == len(newcomers)
    frequencies.check_integrity()


def test_what_many_blocks_were_hit_for_is_not_paid_by_one_newcomer() -> None:
    frequencies = OffloadFilter(max_entries=4096)
    blocks = [name(number) for number in range(4096)]
    frequencies.offer(blocks + blocks, now=0)
    (shard,) = frequencies._shards
    frequencies.offer([name(5000)], now=1)
    (longest, *_) = sorted(map(len, shard._queues.values()), reverse=True)
    assert longest > 3000, "nearly all blocks still wait where they did"
    assert len(frequencies) == 4096
    frequencies.check_integrity()
