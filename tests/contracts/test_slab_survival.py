"""What a slab in lasting memory keeps, and when it is not to be believed."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from kvbm_schemas.subjects import Scope
from kvbm_service.adapters import homes, slab_memory
from kvbm_service.adapters.homes import Home, turn
from kvbm_service.adapters.mover import Blocks
from kvbm_service.adapters.slab import Slab
from kvbm_service.errors import LayoutError
from tests.contracts import slab_victims
from tests.contracts.slab_victims import SETTING, Victims, octets

SCOPE = Scope("tests", "survival")
KILLS = 100
SLOTS, PARTS = 300, (64, 100)


@pytest.fixture
def memory() -> Iterator[Path]:
    """A directory on a file system in memory."""
    if not os.access("/dev/shm", os.W_OK):
        pytest.skip("this machine has no /dev/shm")
    with tempfile.TemporaryDirectory(prefix="kvbm-tests-", dir="/dev/shm") as folder:
        yield Path(folder)


@pytest.fixture
def file(memory: Path) -> Iterator[Path]:
    home = Home.claim(memory, SCOPE, "engine", SETTING)
    yield home.path / "host-0.slab"
    home.close()


def stamp(slab: Slab, slots: list[int], names: list[int], fills: list[int]) -> None:
    """Let `slots` hold blocks whose bytes are all equal to the name."""
    columns = np.array(slots, np.uint32), np.array(names, np.uint64), np.array(fills, np.uint64)
    slab.clear(columns[0])
    slab.blocks[slots] = np.array(names, np.uint8)[:, None]
    hashes = np.stack([columns[1], columns[1]], axis=1)
    slab.stamp(Blocks(hashes, columns[2], columns[0], columns[0]), np.zeros(len(slots), np.uint64))


def listed(slab: Slab) -> list[tuple[int, int, int]]:
    """What `contents` says: (slot, name, fill)."""
    found = slab.contents()
    assert (found.hashes[:, 0] == found.hashes[:, 1]).all()
    columns = found.slots, found.hashes[:, 0], found.fills
    return list(zip(*(column.tolist() for column in columns), strict=True))


# -- what stays --------------------------------------------------------------------------------


def test_a_slab_killed_at_any_moment_holds_whole_blocks_and_its_next_life_finds_them(
    memory: Path,
) -> None:
    survivors = 0
    with Victims(memory) as victims:
        for kill in range(KILLS):
            pid = victims.begin()
            time.sleep(kill % 10 * 0.001)
            victims.kill(pid)
            home = slab_victims.home(memory, f"inspector-{kill}")
            assert home.path.name == "0"
            slab = slab_victims.slab(home)
            for slot, name, _ in listed(slab):
                assert (slab.blocks[slot] == octets(name - 1)).all()
                survivors += 1
            slab.close()
            home.close()
    assert survivors > KILLS


def test_survivors_come_oldest_first_and_of_two_copies_the_newer_one(file: Path) -> None:
    slab = Slab(SLOTS, PARTS, file)
    assert slab.survives
    assert listed(slab) == []
    stamp(slab, [299, 4, 0, 17, 5], [1, 2, 3, 2, 9], [7, 5, 1, 6, 8])
    slab.clear(np.array([5], np.uint32))
    slab.close()
    again = Slab(SLOTS, PARTS, file)
    assert listed(again) == [(0, 3, 1), (17, 2, 6), (299, 1, 7)]
    assert (again.blocks[17] == 2).all()
    again.close()


def test_a_million_headers_are_listed_in_a_moment(file: Path) -> None:
    million = 1 << 20
    slab = Slab(million, (1,), file)
    draw = np.random.default_rng(1)
    slab.headers["hash"] = draw.integers(1, 1 << 63, (million, 2))
    slab.headers["fill"] = draw.integers(1, 1 << 20, million)
    began = time.process_time()
    assert len(slab.contents().slots) == million
    assert time.process_time() - began < 3.0  # a third of a second is usual
    slab.close()


# -- what is not believed ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("slots", "parts", "identity"),
    [(SLOTS - 1, PARTS, "x"), (SLOTS, (100, 64), "x"), (SLOTS, PARTS, "y")],
)
def test_a_slab_that_was_laid_out_otherwise_is_started_afresh(
    file: Path, slots: int, parts: tuple[int, ...], identity: str
) -> None:
    before = Slab(SLOTS, PARTS, file, "x")
    stamp(before, [0, 1], [1, 2], [1, 2])
    before.close()
    slab = Slab(slots, parts, file, identity)
    assert slab.survives
    assert listed(slab) == []
    assert not slab.blocks.any()
    slab.close()


@pytest.mark.parametrize("harm", ["cut off", "never finished", "foreign", "empty"])
def test_a_file_that_is_not_a_whole_slab_is_started_afresh(file: Path, harm: str) -> None:
    before = Slab(SLOTS, PARTS, file)
    stamp(before, [0], [1], [1])
    before.close()
    if harm == "cut off":
        os.truncate(file, file.stat().st_size - 1)
    elif harm == "never finished":
        with file.open("r+b") as opened:
            opened.write(bytes(64))
    else:
        file.write_bytes(b"" if harm == "empty" else b"something else" * 10_000)
    slab = Slab(SLOTS, PARTS, file)
    assert slab.survives
    assert listed(slab) == []
    slab.close()


def test_a_slab_whose_process_has_not_ended_is_left_to_it(
    memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slab_memory, "EXIT_SECONDS", 0.1)
    with Victims(memory) as victims:
        pid = victims.begin()
        os.kill(pid, signal.SIGSTOP)
        own = slab_victims.home(memory, "inspector")
        file = own.path.parent / "0" / "host-0.slab"
        slab = Slab(slab_victims.SLOTS, slab_victims.PARTS, file, "victims")
        assert listed(slab) == []
        os.kill(pid, signal.SIGCONT)
        time.sleep(0.05)  # it goes on saving, into memory that is its own
        victims.kill(pid)
    assert not slab.headers["fill"].any()
    assert not slab.blocks.any()
    slab.close()
    own.close()


# -- where nothing can last --------------------------------------------------------------------


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def test_a_directory_on_a_disk_is_refused_with_one_warning_and_the_tier_works(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if slab_memory._in_memory(tmp_path):
        pytest.skip("temporary files are in memory here")
    home = Home.claim(tmp_path, SCOPE, "engine", SETTING)
    slab = Slab(SLOTS, PARTS, home.path / "host-0.slab")
    stamp(slab, [0], [1], [1])
    assert not slab.survives
    (warning,) = warnings(caplog)
    assert "will not survive" in warning
    assert SETTING in warning
    assert not (home.path / "host-0.slab").exists()
    slab.close()


def test_a_file_system_that_is_too_small_means_one_warning_and_private_memory(
    file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=3, f_frsize=4096))
    slab = Slab(SLOTS, PARTS, file)
    assert not slab.survives
    (warning,) = warnings(caplog)
    assert "room for 12288 of" in warning
    assert SETTING in warning
    slab.close()


def test_a_file_system_that_fills_up_meanwhile_leaves_no_file_behind(
    file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    slab = Slab(SLOTS, PARTS, file)
    assert not slab.survives
    assert len(warnings(caplog)) == 1
    assert not file.exists()
    slab.close()


def test_a_directory_that_has_gone_means_private_memory(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.rmtree(file.parent)
    slab = Slab(SLOTS, PARTS, file)
    assert not slab.survives
    assert len(warnings(caplog)) == 1
    slab.close()


def test_a_new_slab_takes_the_room_of_homes_where_nobody_lives(
    memory: Path, file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    old = Home.claim(memory, Scope("tests", "another-model"), "engine", SETTING)
    Slab(SLOTS, PARTS, old.path / "host-0.slab").close()
    old.close()
    real = os.statvfs

    def full_while_it_is_there(path: Path) -> object:
        free = SimpleNamespace(f_bavail=0, f_frsize=4096)
        return free if old.path.exists() else real(path)

    monkeypatch.setattr(os, "statvfs", full_while_it_is_there)
    slab = Slab(SLOTS, PARTS, file)
    assert slab.survives
    assert not old.path.exists()
    (line,) = warnings(caplog)
    assert str(old.path) in line
    slab.close()


def test_ranks_that_start_together_take_their_room_one_after_the_other(file: Path) -> None:
    with ThreadPoolExecutor() as pool:
        with turn(file.parent):
            starting = pool.submit(Slab, SLOTS, PARTS, file)
            with pytest.raises(TimeoutError):
                starting.result(timeout=0.2)
        slab = starting.result()
    assert slab.survives
    slab.close()


def test_a_rank_that_never_gets_its_turn_goes_on_with_private_memory(
    file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(homes, "TURN_SECONDS", 0.05)
    with turn(file.parent):
        slab = Slab(SLOTS, PARTS, file)
    assert not slab.survives
    assert len(warnings(caplog)) == 1
    slab.close()


def test_memory_that_is_not_there_is_refused_also_for_a_slab_that_would_last(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(LayoutError, match="DYN_KVBM_CPU_CACHE_GB"):
        Slab(1 << 30, (1 << 20,), file)
    assert len(warnings(caplog)) == 1


def test_nobody_else_can_read_a_slab(file: Path) -> None:
    slab = Slab(SLOTS, PARTS, file)
    assert file.stat().st_mode & 0o777 == 0o600
    slab.close()


def test_a_slab_without_a_file_ends_with_its_process(memory: Path) -> None:
    slab = Slab(SLOTS, PARTS)
    assert not slab.survives
    assert listed(slab) == []
    slab.close()
