"""What a rank's disk tier promises: `DiskTier` on real files, with real faults."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvbm_service.adapters.copies import Column, CpuCopies
from kvbm_service.adapters.disk import DiskLost
from kvbm_service.adapters.disk_lane import FAILED_BATCHES
from kvbm_service.errors import LayoutError, TransferError
from tests.contracts.disk_rank import (
    LAYOUTS,
    PADDED,
    POOL,
    SLOTS,
    WHOLE,
    DiskRank,
    hop,
    in_host,
    on_disk,
)

Open = Callable[..., DiskRank]


@pytest.fixture
def open_rank(tmp_path: Path) -> Iterator[Open]:
    opened: list[DiskRank] = []

    def open_rank(parts: tuple[int, ...] = PADDED, **options: Any) -> DiskRank:
        opened.append(DiskRank(tmp_path, parts, **options))
        return opened[-1]

    yield open_rank
    for rank in opened:
        rank.close()


@pytest.fixture(params=LAYOUTS)
def rank(request: pytest.FixtureRequest, open_rank: Open) -> DiskRank:
    return open_rank(LAYOUTS[request.param])


def spilled(rank: DiskRank, slots: list[int], fill: int = 7) -> None:
    """Let disk slot s hold device block s, by way of host slot s."""
    rank.host.save(on_disk(slots, slots))
    assert rank.disk.spill(hop(slots, slots, slots, of=1, fill=fill)).all()


# -- moving blocks -----------------------------------------------------------------------------


def test_a_saved_block_loads_back_byte_for_byte_and_touches_no_other(rank: DiskRank) -> None:
    rank.fill_pool(seed=1)
    saved = [rank.block(number) for number in (3, 0, 23)]
    assert rank.disk.save(on_disk([15, 2, 0], [3, 0, 23])).tolist() == [True] * 3
    rank.fill_pool(seed=2)
    before = rank.pool()

    assert rank.disk.load(on_disk([15, 2, 0], [7, 8, 1])).tolist() == [True] * 3

    after = rank.pool()
    assert [after[number] for number in (7, 8, 1)] == saved
    others = set(range(POOL)) - {7, 8, 1}
    assert all(after[number] == before[number] for number in others)


def test_a_spilled_block_is_fetched_into_another_slot_and_stamped_anew(rank: DiskRank) -> None:
    rank.fill_pool(seed=1)
    names = [40, 41, 42]
    expected = [rank.block(number) for number in (5, 6, 7)]
    rank.host.save(in_host([10, 11, 12], [5, 6, 7], names, fill=3))
    assert rank.disk.spill(hop(names, [10, 11, 12], [60, 2, 33], of=3, fill=9)).all()

    assert rank.disk.fetch(hop(names, [60, 2, 33], [1, 47, 0], of=9, fill=4)).all()

    assert [rank.in_slot(slot) for slot in (1, 47, 0)] == expected
    rank.fill_pool(seed=0)
    assert rank.host.load(in_host([1, 47, 0], [20, 21, 22], names, fill=4)).all()
    assert [rank.block(number) for number in (20, 21, 22)] == expected


@pytest.mark.parametrize("batch_blocks", [1, 3, 16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_more_blocks_than_go_at_a_time_all_arrive_in_their_places(
    open_rank: Open, layout: str, batch_blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvbm_service.adapters.disk_lane.LEAST_BATCH_BYTES", 1)
    rank = open_rank(LAYOUTS[layout], batch_blocks=batch_blocks, batches=2)
    rank.fill_pool(seed=1)
    expected = rank.pool()
    draw = np.random.default_rng(3)
    disk, everything = draw.permutation(SLOTS)[:POOL].tolist(), list(range(POOL))
    rank.host.save(in_host(everything, everything, disk))
    assert rank.disk.spill(hop(disk, everything, disk, of=1, fill=2)).all()
    rank.fill_pool(seed=0)
    assert rank.disk.load(on_disk(disk, everything, fill=2)).all()
    assert rank.pool() == expected
    there = draw.permutation(POOL).tolist()
    assert rank.disk.fetch(hop(disk, disk, there, of=2, fill=3)).all()
    assert [rank.in_slot(slot) for slot in there] == expected


def test_nothing_is_a_transfer_too(rank: DiskRank) -> None:
    assert len(rank.disk.save(on_disk([], []))) == 0
    assert len(rank.disk.load(on_disk([], []))) == 0
    assert len(rank.disk.spill(hop([], [], [], of=1, fill=1))) == 0
    assert len(rank.disk.fetch(hop([], [], [], of=1, fill=1))) == 0


def test_reading_and_writing_at_the_same_time_disturb_nobody(open_rank: Open) -> None:
    rank = open_rank(WHOLE)
    rank.fill_pool(seed=1)
    half, others = list(range(24)), list(range(24, 48))
    expected = rank.pool()
    spilled(rank, half)
    rank.host.save(on_disk(others, others))

    def write() -> bool:
        return all(
            rank.disk.spill(hop(others, others, others, of=1, fill=fill)).all()
            for fill in range(2, 30)
        )

    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(write)
        for _ in range(30):
            assert rank.disk.load(on_disk(half, half, fill=7)).all()
            assert rank.pool() == expected
        assert writing.result()
    assert rank.disk.load(on_disk(others, others, fill=29)).all()
    assert rank.pool() == expected


# -- what is not what was asked for ------------------------------------------------------------


def test_a_disk_slot_that_holds_another_block_is_not_read_and_the_others_are(
    rank: DiskRank,
) -> None:
    rank.fill_pool(seed=1)
    rank.disk.save(on_disk([4, 6], [4, 6]))
    rank.disk.save(on_disk([5], [5], fill=2))
    untouched = rank.block(5)
    assert rank.disk.load(on_disk([4, 5, 6], [4, 5, 6])).tolist() == [True, False, True]
    assert rank.block(5) == untouched
    assert rank.disk.load(on_disk([5], [5], fill=2)).all()
    assert rank.disk.mismatches == 0


def test_a_host_slot_that_holds_another_block_is_not_spilled_and_what_was_there_is_gone(
    rank: DiskRank,
) -> None:
    rank.fill_pool(seed=1)
    spilled(rank, [4, 5, 6])
    rank.slab.clear(np.array([5], np.uint32))
    assert rank.disk.spill(hop([4, 5, 6], [4, 5, 6], [4, 5, 6], of=1, fill=8)).tolist() == [
        True, False, True,
    ]  # fmt: skip
    assert rank.disk.load(on_disk([4, 5, 6], [4, 5, 6], fill=8)).tolist() == [True, False, True]
    assert not rank.disk.load(on_disk([5], [5], fill=7)).any()


def test_the_header_of_a_slot_is_clear_when_its_block_did_not_come(rank: DiskRank) -> None:
    rank.fill_pool(seed=1)
    spilled(rank, [4, 5])
    rank.damage(5, 100, b"damage")
    assert rank.disk.fetch(hop([4, 5], [4, 5], [4, 5], of=7, fill=2)).tolist() == [True, False]
    assert rank.host.load(on_disk([4, 5], [4, 5], fill=2)).tolist() == [True, False]
    assert not rank.host.load(on_disk([5], [5], fill=1)).any()


@pytest.mark.parametrize("at", [0, 4100, 8191])
def test_one_flipped_bit_is_seen_counted_and_forgotten(
    rank: DiskRank, at: int, caplog: pytest.LogCaptureFixture
) -> None:
    rank.fill_pool(seed=1)
    spilled(rank, [4, 5, 6])
    rank.damage(5, at, bytes([rank.in_file(5)[at] ^ 4]))
    untouched = rank.block(5)

    assert rank.disk.load(on_disk([4, 5, 6], [4, 5, 6], fill=7)).tolist() == [True, False, True]

    assert rank.disk.mismatches == 1
    assert "not what was written" in caplog.text
    assert rank.block(5) == untouched
    assert sorted(rank.disk.contents().slots.tolist()) == [4, 6]
    assert not rank.disk.load(on_disk([5], [5], fill=7)).any()
    assert rank.disk.mismatches == 1, "it is not read a second time"


def test_the_bytes_of_one_block_are_not_those_of_another(rank: DiskRank) -> None:
    rank.fill_pool(seed=1)
    spilled(rank, [4, 5])
    rank.damage(5, 0, rank.in_file(4))
    assert rank.disk.load(on_disk([4, 5], [4, 5], fill=7)).tolist() == [True, False]


def test_damage_in_the_slab_is_not_spilled_where_blocks_are_verified(open_rank: Open) -> None:
    rank = open_rank(verify=True)
    rank.fill_pool(seed=1)
    rank.host.save(on_disk([4, 5], [4, 5]))
    rank.slab.blocks[5, 17] ^= 1
    assert rank.disk.spill(hop([4, 5], [4, 5], [4, 5], of=1, fill=2)).tolist() == [True, False]
    assert rank.disk.fetch(hop([4], [4], [9], of=2, fill=3)).all()
    rank.slab.blocks[9, 17] ^= 1
    assert not rank.host.load(in_host([9], [4], [4], fill=3)).any()


def test_numbers_that_do_not_exist_are_refused_before_anything_is_written(rank: DiskRank) -> None:
    rank.fill_pool(seed=1)
    spilled(rank, [4])
    acts: list[Callable[[], object]] = [
        lambda: rank.disk.save(on_disk([4, SLOTS], [1, 2])),
        lambda: rank.disk.save(on_disk([4, 5], [1, POOL])),
        lambda: rank.disk.load(on_disk([4, 5], [1, POOL])),
        lambda: rank.disk.load(on_disk([4, SLOTS], [1, 2])),
        lambda: rank.disk.spill(hop([4, 5], [4, POOL], [4, 5], of=1, fill=2)),
        lambda: rank.disk.fetch(hop([4, 5], [4, 5], [4, POOL], of=7, fill=2)),
        lambda: rank.disk.save(on_disk([4, 5], [1])),
    ]
    for act in acts:
        with pytest.raises(TransferError):
            act()
    assert rank.disk.load(on_disk([4], [4], fill=7)).all()


class FailingCopies(CpuCopies):
    """A device that fails at a copy to come."""

    left = 0

    def copy(self, to: Column, source: Column, lengths: Column) -> None:
        self.left -= 1
        if self.left == 0:
            raise TransferError("the device failed")
        super().copy(to, source, lengths)


def test_a_device_that_fails_in_the_middle_spoils_no_later_transfer(
    open_rank: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvbm_service.adapters.disk_lane.LEAST_BATCH_BYTES", 1)
    copies = FailingCopies()
    rank = open_rank(copies=copies, batch_blocks=4)
    rank.fill_pool(seed=1)
    expected, everything = rank.pool(), list(range(POOL))
    for move in (rank.disk.save, rank.disk.load):
        copies.left = 3
        with pytest.raises(TransferError, match="device"):
            move(on_disk(everything, everything))
        assert rank.disk.save(on_disk(everything, everything)).all()
        assert rank.disk.load(on_disk(everything, everything)).all()
        assert rank.pool() == expected


# -- another life ------------------------------------------------------------------------------


def test_another_life_finds_its_blocks_oldest_first(rank: DiskRank) -> None:
    rank.fill_pool(seed=1)
    expected = [rank.block(number) for number in (1, 2, 3)]
    for slot, fill in ((1, 30), (2, 10), (3, 20)):
        spilled(rank, [slot], fill=fill)

    rank = rank.reopened()

    contents = rank.disk.contents()
    assert contents.slots.tolist() == [2, 3, 1]
    assert contents.fills.tolist() == [10, 20, 30]
    assert contents.hashes.tolist() == [[3, 1000], [4, 1000], [2, 1000]]
    assert rank.disk.load(on_disk([1], [1], fill=30)).all()
    assert rank.disk.load(on_disk([2], [2], fill=10)).all()
    assert rank.disk.load(on_disk([3], [3], fill=20)).all()
    assert [rank.block(number) for number in (1, 2, 3)] == expected
    rank.close()


def test_of_a_block_that_is_there_twice_the_newest_is_found(open_rank: Open) -> None:
    rank = open_rank()
    rank.host.save(in_host([1], [1], [40]))
    for target, fill in ((3, 5), (9, 8), (6, 7)):
        rank.disk.spill(hop([40], [1], [target], of=1, fill=fill))
    rank.disk.save(on_disk([2], [2], fill=6))
    contents = rank.disk.contents()
    assert contents.slots.tolist() == [2, 9]
    assert contents.fills.tolist() == [6, 8]


@pytest.mark.parametrize(
    "change", [{"identity": "another model"}, {"slots": SLOTS + 1}], ids=["identity", "slots"]
)
def test_what_another_engine_left_is_not_believed(
    tmp_path: Path, change: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    rank = DiskRank(tmp_path)
    spilled(rank, [1, 2])
    rank = rank.reopened(**change)
    assert len(rank.disk.contents().slots) == 0
    assert not rank.disk.load(on_disk([1], [1], fill=7)).any()
    assert caplog.text.count("starts empty") == (0 if "slots" in change else 1)
    spilled(rank, [1, 2])
    rank.close()


def test_blocks_of_another_size_are_not_believed(tmp_path: Path) -> None:
    DiskRank(tmp_path, PADDED, slots=32).close()
    rank = DiskRank(tmp_path, (4096, 4096, 8192), slots=16)
    assert len(rank.disk.contents().slots) == 0
    rank.close()


def test_files_belong_to_us_alone_and_stay_when_the_directory_goes(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    rank = DiskRank(home)
    assert [path.stat().st_mode & 0o777 for path in (rank.file, rank.index)] == [0o600] * 2
    for path in home.iterdir():
        path.unlink()
    home.rmdir()
    spilled(rank, [1, 2, 3])
    assert rank.disk.load(on_disk([1, 2, 3], [1, 2, 3], fill=7)).all()
    rank.close()


def test_without_o_direct_all_is_the_same_but_slower(
    open_rank: Open, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    rank = open_rank(direct=False)
    rank.fill_pool(seed=1)
    expected = rank.block(5)
    spilled(rank, [5])
    rank.fill_pool(seed=0)
    assert rank.disk.load(on_disk([5], [5], fill=7)).all()
    assert rank.block(5) == expected
    assert "page cache" in caplog.text


def test_a_backend_that_nixl_does_not_have_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(LayoutError, match=r"NOSUCH.*KVBM_DISK_BACKEND"):
        DiskRank(tmp_path, backend="NOSUCH")


# -- a disk that fails -------------------------------------------------------------------------


@pytest.mark.parametrize("queue", ["use_aio", "use_uring"])
def test_where_the_file_ends_too_soon_the_blocks_before_are_still_read(
    open_rank: Open, queue: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvbm_service.adapters.disk_agent._POSIX_QUEUES", (queue,))
    monkeypatch.setattr("kvbm_service.adapters.disk_lane.MAX_GIVEN_UP", 20)
    monkeypatch.setattr("kvbm_service.adapters.disk_lane.FAILED_BATCHES", 20)
    monkeypatch.setattr("kvbm_service.adapters.disk_lane.LEAST_BATCH_BYTES", 1)
    rank = open_rank(batch_blocks=3)
    rank.fill_pool(seed=1)
    everything = list(range(POOL))
    expected = rank.pool()
    spilled(rank, everything)
    os.truncate(rank.file, 20 * rank.row_bytes)
    rank.fill_pool(seed=0)
    arrived = rank.disk.load(on_disk(everything, everything, fill=7))
    assert arrived.tolist() == [number < 20 for number in everything]
    assert [rank.block(number) for number in range(20)] == expected[:20]
    assert all(not any(rank.block(number)) for number in range(20, POOL))
    assert rank.disk.failures == POOL - 20
    assert sorted(rank.disk.contents().slots.tolist()) == everything[:20]


def test_a_disk_that_reads_nothing_any_more_is_given_up_for_good(rank: DiskRank) -> None:
    spilled(rank, list(range(8)))
    os.truncate(rank.file, 0)
    for slot in range(FAILED_BATCHES - 1):
        assert not rank.disk.load(on_disk([slot], [slot], fill=7)).any()
    with pytest.raises(DiskLost, match=r"0 of 8192 bytes.*read of slot 5"):
        rank.disk.fetch(hop([5], [5], [5], of=7, fill=2))
    for act in (rank.disk.load, rank.disk.save):
        with pytest.raises(DiskLost, match="read of slot 5"):
            act(on_disk([6], [6], fill=7))


def test_failures_between_successes_do_not_give_the_disk_up(rank: DiskRank) -> None:
    spilled(rank, list(range(24)))
    os.truncate(rank.file, 10 * rank.row_bytes)
    for slot in range(8):
        assert not rank.disk.load(on_disk([slot + 12], [1], fill=7)).any()
        assert rank.disk.load(on_disk([slot], [1], fill=7)).all()
    assert rank.disk.failures == 8


def test_a_disk_that_refuses_to_be_written_is_given_up_with_its_reason(rank: DiskRank) -> None:
    spilled(rank, [1])
    tiers = rank.fd
    read_only = os.open(rank.file, os.O_RDONLY | os.O_DIRECT)
    os.dup2(read_only, tiers)
    os.close(read_only)
    with pytest.raises(DiskLost, match=r"Bad file descriptor \(write of slot 2\)"):
        rank.disk.save(on_disk([2], [2]))
    with pytest.raises(DiskLost, match="Bad file descriptor"):
        rank.disk.load(on_disk([1], [1], fill=7))
