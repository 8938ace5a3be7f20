"""A disk whose system calls hang: no request waits for it, and what comes late does no harm."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from kvbm_service import disk_watch
from kvbm_service.core.columns import unpack_u32
from tests.contracts.disk_rank import DiskRank, on_disk
from tests.contracts.file_systems import OnLoop, frozen
from tests.failures import disk_saver
from tests.failures.disk_worker import BLOCKS, DiskWorker, rank_in
from tests.patience import until

MIB = 1 << 20
DEADLINE_SECONDS = 0.5
"""After which this disk is given up; others get more."""


@pytest.fixture
def file_system(tmp_path: Path, on_loop: OnLoop) -> Path:
    """One that can be frozen, and thawed."""
    return on_loop(tmp_path, 64 * MIB)


@pytest.fixture
def worker(file_system: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[DiskWorker]:
    monkeypatch.setattr(disk_watch, "LOOK_SECONDS", DEADLINE_SECONDS / 10)
    monkeypatch.setattr(disk_watch, "ANSWER_LOOKS", 10)
    worker = DiskWorker(file_system)
    worker.rank.fill_pool(seed=1)
    op = worker.save(EVERYTHING, EVERYTHING)
    worker.until(lambda: op in worker.moved)
    assert not worker.moved[op].failed
    yield worker
    worker.close()


EVERYTHING = list(range(BLOCKS))
FILL = 1
"""What the first save stamps its slots with."""


def test_whoever_waits_for_a_disk_that_hangs_hears_within_its_deadline_that_it_is_lost(
    worker: DiskWorker, file_system: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with frozen(file_system):
        began = time.monotonic()
        save = worker.save(EVERYTHING, EVERYTHING)
        until(worker.hangs)
        waiting_save = worker.save([6], [6])
        worker.load("a request", EVERYTHING, FILL, [10, 11, 12, 13])
        worker.load("another one", [1], FILL, [14])
        fetch = worker.fetch([2], FILL, [5])
        asked = {save, waiting_save, fetch}
        worker.until(lambda: asked <= worker.moved.keys() and len(worker.loads) == 2)
        assert time.monotonic() - began < DEADLINE_SECONDS + 20.0
        assert list(unpack_u32(worker.loads["a request"].failed_blocks)) == [10, 11, 12, 13]
        assert list(unpack_u32(worker.moved[save].failed)) == EVERYTHING
        assert "the disk has not answered" in worker.disk_lost
        assert caplog.text.count("the disk tier is given up") == 1

        late = worker.save([7], [7])  # and from then on at once
        worker.load("a late one", [1], FILL, [14])
        worker.step()
        assert late in worker.moved
        assert "a late one" in worker.loads


@pytest.mark.parametrize("read", ["load", "fetch"])
def test_a_disk_that_comes_back_late_touches_nothing_of_the_engine(
    worker: DiskWorker, file_system: Path, read: str
) -> None:
    rank = worker.rank
    expected = {number: rank.block(number) for number in EVERYTHING}
    with frozen(file_system):
        asked = {worker.save(EVERYTHING, [20, 21, 22, 23])}
        until(worker.hangs)
        if read == "load":
            worker.load("a request", EVERYTHING, FILL, [10, 11, 12, 13])
        else:
            asked.add(worker.fetch([2], FILL, [5]))
        worker.until(lambda: asked <= worker.moved.keys() and (read == "fetch" or worker.loads))
        assert len(rank.disk.under_way()) == 2, "both calls hang"
        rank.fill_pool(seed=2)  # the engine uses its blocks for something else …
        rank.host.save(on_disk([5], [5]))  # … and the leader that slot
        before = rank.pool(), rank.in_slot(5), _header(rank, 5)
    until(lambda: not rank.disk.under_way(), "the calls come back")
    assert (rank.pool(), rank.in_slot(5), _header(rank, 5)) == before
    assert worker.service.collect() is None, "nobody is told a second time"

    worker.close()
    later = rank_in(rank.home)
    try:
        found = later.disk.contents()
        for slot, fill in zip(found.slots.tolist(), found.fills.tolist(), strict=True):
            assert fill == FILL, "what was saved afterwards is another block's bytes"
            assert later.disk.load(on_disk([slot], [40], fill=FILL)).all()
            assert later.block(40) == expected[slot]
    finally:
        later.close()


def _header(rank: DiskRank, slot: int) -> bytes:
    octets: bytes = rank.slab.read_headers(np.array([slot], np.uint32)).tobytes()
    return octets


def test_a_process_that_was_stopped_for_long_gives_up_no_disk(tmp_path: Path) -> None:
    with saving(tmp_path) as process:
        assert process.stdout is not None
        assert "saving\n" in process.stdout
        for _ in range(2):  # whatever it is doing at that moment
            process.send_signal(signal.SIGSTOP)
            time.sleep(1.2 * disk_saver.DEADLINE_SECONDS)
            process.send_signal(signal.SIGCONT)
            time.sleep(0.1)
        said, _ = process.communicate()
        assert said.endswith("lost: ''\n")


@contextmanager
def saving(home: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that does nothing but save to its disk."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.failures.disk_saver", str(home)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("known", [True, False], ids=["known", "not known yet"])
def test_a_worker_whose_disk_hangs_can_be_closed(
    worker: DiskWorker, file_system: Path, known: bool
) -> None:
    with frozen(file_system):
        save = worker.save(EVERYTHING, EVERYTHING)
        until(worker.hangs)
        if known:
            worker.until(lambda: save in worker.moved)
        began = time.monotonic()
        worker.close()
        assert time.monotonic() - began < 30.0
    until(lambda: not worker.rank.disk.under_way(), "the calls come back")
