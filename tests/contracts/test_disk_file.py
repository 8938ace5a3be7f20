"""The disk tier's file: reserved as a whole or refused in words, on file systems good and bad."""

from __future__ import annotations

import logging
import os
import resource
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from kvbm_schemas.subjects import Scope
from kvbm_service.adapters import disk_file, disk_lane
from kvbm_service.adapters.disk import DiskLost
from kvbm_service.adapters.disk_file import DiskFile
from kvbm_service.adapters.homes import Home, turn
from kvbm_service.errors import LayoutError
from tests.contracts.disk_rank import POOL, WHOLE, DiskRank, on_disk
from tests.contracts.file_systems import Mount, OnLoop, frozen

MIB = 1 << 20
EVERYTHING = list(range(POOL))


@contextmanager
def largest_file(nbytes: int) -> Iterator[None]:
    """Let writes beyond `nbytes` of any file fail, for this process."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def files(home: Path) -> list[str]:
    """What is there beside the lock of whoever allocates."""
    return [path.name for path in home.iterdir() if path.name != "turn"]


def test_a_file_is_really_reserved_and_its_progress_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(disk_file, "PROGRESS_SECONDS", 0.0)
    monkeypatch.setattr(disk_file, "STEP_BYTES", 4 * MIB)
    file = DiskFile(tmp_path / "blocks", 10 * MIB)
    assert os.fstat(file.fd).st_blocks * 512 >= 10 * MIB
    assert os.fstat(file.fd).st_size == 10 * MIB
    assert not file.kept
    file.close()
    assert caplog.text.count("of 0.0 GB allocated") == 3


def test_a_file_of_the_right_size_is_kept_and_any_other_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "blocks"
    DiskFile(path, MIB).close()
    path.write_bytes(b"x" * MIB)
    kept = DiskFile(path, MIB)
    assert kept.kept
    assert os.pread(kept.fd, 1, 0) == b"x" if not kept.direct else path.read_bytes() == b"x" * MIB
    kept.close()
    replaced = DiskFile(path, 2 * MIB)
    assert not replaced.kept
    replaced.close()
    assert path.read_bytes() == bytes(2 * MIB)


def test_ranks_that_allocate_at_once_do_not_count_the_same_room_twice(mount: Mount) -> None:
    where = mount("tmpfs", "-o", "size=4m")
    left = Home.claim(where, Scope("default", "one-model"), "its life", "A_SETTING")
    DiskFile(left.path / "blocks", 2 * MIB).close()
    left.close()
    ours = Home.claim(where, Scope("default", "another"), "our life", "A_SETTING")
    with ThreadPoolExecutor(2) as pool:
        with turn(ours.path):
            paths = [ours.path / f"rank-{rank}.blocks" for rank in range(2)]
            made = [pool.submit(DiskFile, path, MIB + MIB // 2) for path in paths]
            assert not wait(made, 0.2).done, "another rank allocates"
        for file in made:
            file.result(30.0).close()
    assert not left.path.exists()


def test_a_file_that_does_not_fit_is_refused_with_the_settings_to_change(tmp_path: Path) -> None:
    with pytest.raises(LayoutError, match=r"free in .*DYN_KVBM_DISK_CACHE_GB.*DISK_CACHE_DIR"):
        DiskFile(tmp_path / "blocks", 1 << 60)
    assert not files(tmp_path)


def test_a_file_that_cannot_be_completed_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_file, "STEP_BYTES", MIB)
    with largest_file(3 * MIB), pytest.raises(LayoutError, match="DYN_KVBM_DISK_CACHE_GB"):
        DiskFile(tmp_path / "blocks", 8 * MIB)
    assert not files(tmp_path)


def test_what_a_kill_left_half_made_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "blocks.new").write_bytes(b"x" * 100)
    DiskFile(tmp_path / "blocks", MIB).close()
    assert files(tmp_path) == ["blocks"]


def test_a_directory_that_cannot_be_written_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(LayoutError, match=r"nowhere/blocks.*DYN_KVBM_DISK_CACHE_DIR"):
        DiskFile(tmp_path / "nowhere" / "blocks", MIB)


def test_without_fallocate_zeros_are_written_only_when_allowed(
    mount: Mount, caplog: pytest.LogCaptureFixture
) -> None:
    where = mount("ramfs")
    with pytest.raises(LayoutError, match="DYN_KVBM_DISK_ZEROFILL_FALLBACK=true"):
        DiskFile(where / "blocks", MIB)
    assert not files(where)
    file = DiskFile(where / "blocks", MIB, zerofill_fallback=True)
    file.close()
    assert (where / "blocks").read_bytes() == bytes(MIB)
    assert "filled with zeros" in caplog.text


def test_a_file_system_without_o_direct_is_used_through_the_page_cache(
    mount: Mount, caplog: pytest.LogCaptureFixture
) -> None:
    rank = DiskRank(mount("ramfs"), WHOLE, zerofill_fallback=True)
    assert caplog.text.count("no O_DIRECT") == 1
    rank.fill_pool(seed=1)
    expected = rank.pool()
    assert rank.disk.save(on_disk(EVERYTHING, EVERYTHING)).all()
    rank.fill_pool(seed=0)
    assert rank.disk.load(on_disk(EVERYTHING, EVERYTHING)).all()
    assert rank.pool() == expected
    rank.close()


def test_the_room_of_a_small_disk_is_checked_before_it_is_filled(mount: Mount) -> None:
    where = mount("tmpfs", "-o", "size=1m")
    with pytest.raises(LayoutError, match="1048576 bytes that are free"):
        DiskFile(where / "blocks", 2 * MIB)
    with pytest.raises(LayoutError, match=r"index.*No space left"):
        DiskRank(where, WHOLE, slots=128)  # its file takes all there is
    assert files(where) == ["rank-0.blocks"]


def test_files_that_an_engine_of_another_model_left_make_room(mount: Mount) -> None:
    where = mount("tmpfs", "-o", "size=2m")
    left = Home.claim(where, Scope("default", "one-model"), "its life", "A_SETTING")
    DiskFile(left.path / "blocks", MIB).close()
    ours = Home.claim(where, Scope("default", "another"), "our life", "A_SETTING")
    with pytest.raises(LayoutError, match="bytes that are free"):
        DiskFile(ours.path / "blocks", MIB + MIB // 2)  # someone lives there
    left.close()
    DiskFile(ours.path / "blocks", MIB + MIB // 2).close()
    assert not left.path.exists()


def test_a_write_that_hits_a_limit_gives_the_disk_up_in_words(tmp_path: Path) -> None:
    rank = DiskRank(tmp_path, WHOLE)
    with (
        largest_file(8192),
        pytest.raises(DiskLost, match=r"File too large \(write of slot 5\)"),
    ):
        rank.disk.save(on_disk([5], [5]))
    rank.close()


# -- block devices that fail -------------------------------------------------------------------


def test_a_disk_with_errors_is_given_up_and_what_is_written_stays_readable(
    mount: Mount, on_loop: OnLoop
) -> None:
    below = mount("tmpfs", "-o", "size=24m")
    rank = DiskRank(on_loop(below, 128 * MIB), (MIB,))
    rank.fill_pool(seed=1)
    expected = [rank.block(number) for number in range(4)]
    assert rank.disk.save(on_disk([0, 1, 2, 3], [0, 1, 2, 3])).all()

    def fill() -> None:
        for slot in range(4, POOL):  # the device cannot hold all that is written
            rank.disk.save(on_disk([slot], [slot]))

    with pytest.raises(DiskLost, match="write of slot"):
        fill()
    with pytest.raises(DiskLost, match="write of slot"):
        rank.disk.load(on_disk([0], [0]))
    again = rank.reopened()
    assert again.disk.load(on_disk([0, 1, 2, 3], [10, 11, 12, 13])).all()
    assert [again.block(number) for number in range(10, 14)] == expected
    again.close()


def test_nobody_waits_for_a_transfer_once_its_disk_is_given_up_and_its_memory_is_left_alone(
    tmp_path: Path, on_loop: OnLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[object] = []
    monkeypatch.setattr(disk_lane, "_given_up", kept)
    below = on_loop(tmp_path, 192 * MIB)
    rank = DiskRank(on_loop(below, 128 * MIB), (MIB,))
    everything = on_disk(EVERYTHING, EVERYTHING)
    assert rank.disk.save(everything).all()
    with closing(rank), frozen(below):
        watch = threading.Timer(2.0, rank.disk.give_up, ["the disk has not answered"])
        watch.start()
        with pytest.raises(DiskLost, match="not answered"):
            rank.disk.save(everything)
        with pytest.raises(DiskLost, match="not answered"):
            rank.disk.load(everything)
        began = time.monotonic()
        rank.close()
        assert time.monotonic() - began < 20.0
        watch.join()
    assert kept, "the kernel may still have been at it"
