"""The index beside the disk tier's file: what is torn, misplaced or another's is never believed."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from kvbm_service.adapters.checksums import checksums, copy_checksums, copy_proven, seeds
from kvbm_service.adapters.disk_index import ENTRY, HEADER_BYTES, DiskIndex, names
from kvbm_service.errors import LayoutError
from tests.contracts.disk_rank import named

SLOTS = 40
SLOT_BYTES = 4096


def opened(path: Path, slots: int = SLOTS, identity: str = "ours") -> DiskIndex:
    return DiskIndex(path, slots, SLOT_BYTES, identity)


def full(path: Path, slots: int = SLOTS) -> list[int]:
    """Leave an index whose slot s was filled with stamp s + 1; say which slots."""
    index = opened(path, slots)
    every = np.arange(slots, dtype=np.uint32)
    draw = np.random.default_rng(1)
    hashes = draw.integers(0, 1 << 63, (slots, 2), dtype=np.uint64)
    index.enter(every, hashes, every.astype(np.uint64) + np.uint64(1), hashes[:, 1])
    index.close()
    return every.tolist()


def found(path: Path, slots: int = SLOTS, identity: str = "ours") -> list[int]:
    index = opened(path, slots, identity)
    index.close()
    return index.contents().slots.tolist()  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """A full index, and its bytes."""
    path = tmp_path_factory.mktemp("index") / "index"
    full(path)
    return path, path.read_bytes()


@given(
    entry=st.integers(0, SLOTS - 1), at=st.integers(0, ENTRY.itemsize - 1), flip=st.integers(1, 255)
)
def test_an_entry_with_any_damage_is_ignored_and_the_others_are_not(
    whole: tuple[Path, bytes], entry: int, at: int, flip: int
) -> None:
    path, before = whole
    damaged = bytearray(before)
    damaged[HEADER_BYTES + entry * ENTRY.itemsize + at] ^= flip
    path.write_bytes(damaged)
    assert found(path) == [slot for slot in range(SLOTS) if slot != entry]


@given(entry=st.integers(0, SLOTS - 1), written=st.integers(0, ENTRY.itemsize))
def test_an_entry_written_in_part_over_another_is_ignored(
    whole: tuple[Path, bytes], entry: int, written: int
) -> None:
    path, before = whole
    path.write_bytes(before)
    index = opened(path)
    slot = np.array([entry], np.uint32)
    index.enter(slot, named([7]), np.array([1000], np.uint64), np.array([5], np.uint64))
    index.close()
    start = HEADER_BYTES + entry * ENTRY.itemsize
    new = path.read_bytes()[start : start + written]
    path.write_bytes(before[:start] + new + before[start + written :])
    others = [slot for slot in range(SLOTS) if slot != entry]
    if written == 0:
        assert found(path) == list(range(SLOTS))
    elif written == ENTRY.itemsize:
        assert found(path) == [*others, entry]
    else:
        assert [slot for slot in found(path) if slot != entry] == others


def test_an_entry_in_the_place_of_another_is_ignored(whole: tuple[Path, bytes]) -> None:
    path, before = whole
    size = ENTRY.itemsize
    third = before[HEADER_BYTES + 3 * size : HEADER_BYTES + 4 * size]
    start = HEADER_BYTES + 9 * size
    path.write_bytes(before[:start] + third + before[start + size :])
    assert found(path) == [slot for slot in range(SLOTS) if slot != 9]


@pytest.mark.parametrize(
    "length", [0, 10, HEADER_BYTES - 1, HEADER_BYTES + 10 * ENTRY.itemsize + 7]
)
def test_an_index_that_ends_too_soon_is_read_as_far_as_it_goes(
    whole: tuple[Path, bytes], length: int
) -> None:
    path, before = whole
    path.write_bytes(before[:length])
    assert found(path) == (list(range(10)) if length > HEADER_BYTES else [])
    index = opened(path)
    index.enter(
        np.array([30], np.uint32), named([1]), np.array([99], np.uint64), np.array([0], np.uint64)
    )
    index.close()
    assert found(path)[-1] == 30


@pytest.mark.parametrize("at", [0, 9, 16, 24, 40])
def test_an_index_with_another_header_starts_empty_with_one_line(
    whole: tuple[Path, bytes], at: int, caplog: pytest.LogCaptureFixture
) -> None:
    path, before = whole
    path.write_bytes(before[:at] + bytes([before[at] ^ 1]) + before[at + 1 :])
    assert found(path) == []
    assert caplog.text.count("starts empty") == 1
    caplog.clear()
    assert found(path) == []
    assert not caplog.text


def test_the_entries_of_another_identity_are_not_ours_even_under_our_header(
    whole: tuple[Path, bytes],
) -> None:
    path, before = whole
    path.unlink()
    assert found(path, identity="theirs") == []
    header = path.read_bytes()[:HEADER_BYTES]
    path.write_bytes(header + before[HEADER_BYTES:])
    assert found(path, identity="theirs") == []


def test_cleared_and_dropped_slots_name_nothing_in_this_life_and_the_next(tmp_path: Path) -> None:
    path = tmp_path / "index"
    full(path)
    index = opened(path)
    some = np.array([3, 4, 5], np.uint32)
    seen = index.look(some)
    index.enter(some[:1], named([50]), np.array([77], np.uint64), np.array([1], np.uint64))
    index.drop(some, seen)  # slot 3 says something else by now
    index.clear(np.array([8, 8, 9], np.uint32))
    index.close()
    gone = {4, 5, 8, 9}
    assert sorted(index.contents().slots.tolist()) == sorted(set(range(SLOTS)) - gone)
    assert sorted(found(path)) == sorted(set(range(SLOTS)) - gone)
    assert names(index.look(some[:1]), named([50]), np.array([77], np.uint64)).all()


def test_a_block_named_several_times_is_listed_once_with_its_newest_fill(tmp_path: Path) -> None:
    index = opened(tmp_path / "index")
    fills = [5, 9, 2, 7, 8, 1]
    index.enter(
        np.arange(6, dtype=np.uint32), named([1, 2, 1, 1, 3, 2]), np.array(fills, np.uint64),
        np.zeros(6, np.uint64),
    )  # fmt: skip
    contents = index.contents()
    assert contents.fills.tolist() == [7, 8, 9]
    assert contents.slots.tolist() == [3, 4, 1]
    assert contents.hashes.tolist() == named([1, 3, 2]).tolist()
    index.close()


def test_names_that_share_a_word_are_different_blocks(tmp_path: Path) -> None:
    index = opened(tmp_path / "index")
    hashes = np.array([(1, 2), (1, 3), (4, 2), (1, 2)], np.uint64)
    index.enter(
        np.arange(4, dtype=np.uint32), hashes, np.arange(1, 5, dtype=np.uint64), hashes[:, 0]
    )
    assert index.contents().slots.tolist() == [1, 2, 3]
    index.close()


def test_an_index_that_cannot_be_written_is_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(LayoutError, match="DYN_KVBM_DISK_CACHE_DIR"):
        opened(tmp_path / "nowhere" / "index")


def test_a_hundred_thousand_blocks_are_known_in_a_tenth_of_the_time_promised_for_a_million(
    tmp_path: Path,
) -> None:
    path, count = tmp_path / "index", 100_000
    full(path, count)
    seconds = []
    for _ in range(5):
        began = time.thread_time()
        assert len(found(path, count)) == count
        seconds.append(time.thread_time() - began)
    assert min(seconds) < 0.1


# -- checksums ---------------------------------------------------------------------------------


@pytest.mark.parametrize("nbytes", [4096, 8192, 1 << 20])
def test_checksums_are_those_of_xxh3_seeded_with_the_name(nbytes: int) -> None:
    draw = np.random.default_rng(nbytes)
    blocks = draw.integers(0, 256, (3, nbytes), np.uint8)
    addresses = np.array([block.ctypes.data for block in blocks], np.uint64)
    hashes = draw.integers(0, 1 << 63, (3, 2), dtype=np.uint64)
    expected = [
        xxhash.xxh3_64_intdigest(block.tobytes(), int(seed))
        for block, seed in zip(blocks, seeds(hashes), strict=True)
    ]
    assert checksums(addresses, nbytes, seeds(hashes)).tolist() == expected

    copies = np.zeros_like(blocks)
    to = np.array([copy.ctypes.data for copy in copies], np.uint64)
    assert copy_checksums(to, addresses, nbytes, nbytes, seeds(hashes)).tolist() == expected
    assert (copies == blocks).all()

    copies[:] = 0
    sums = np.array(expected, np.uint64)
    sums[1] ^= np.uint64(1)
    right = copy_proven(to, addresses, nbytes, nbytes, seeds(hashes), sums)
    assert right.tolist() == [True, False, True]
    assert (copies[[0, 2]] == blocks[[0, 2]]).all()
    assert not copies[1].any()


def test_seeds_tell_names_apart_by_either_word() -> None:
    hashes = np.array([(1, 2), (2, 1), (1, 3), (3, 2)], np.uint64)
    assert len(set(seeds(hashes).tolist())) == 4
