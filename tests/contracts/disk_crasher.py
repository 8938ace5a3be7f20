"""Engines that are killed while they write to disk, one life after the other.

    python -m tests.contracts.disk_crasher HOME KILLS

Every life opens the disk tier in HOME, loads all blocks that it lists and compares every byte
with what the block's name says it must be; then it writes as fast as it can until kill -9.
Lives are forked from one process that has imported and compiled everything, so that a
hundred of them fit into a test. The last one may finish. One line per life, as JSON.
"""

from __future__ import annotations

import ctypes
import logging
import os
import random
import select
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from kvbm_service.adapters import disk_lane
from kvbm_service.adapters.checksums import compile_loops
from kvbm_service.adapters.disk_index import compile_write_loop
from kvbm_service.adapters.mover import Blocks, Hop
from tests.contracts.disk_rank import POOL, DiskRank, cpu_copies

PARTS = (8192, 4096, 4096)
SLOTS = 256
NAMES = 400
"""Some blocks are written again before they are evicted, some come back."""
PATIENCE_SECONDS = 20.0

Column = np.ndarray[Any, np.dtype[np.uint64]]


class Life(msgspec.Struct, frozen=True):
    """What one life found when it began. `reported` is False if it was killed before."""

    reported: bool = False
    listed: int = 0
    right: int = 0
    wrong: int = 0
    refused: int = 0
    """Listed, and then not loaded: their checksums had something against it."""
    newest: int = 0
    ended: str = ""


def main(home: Path, kills: int) -> None:
    logging.disable()
    disk_lane.LEAST_BATCH_BYTES = 1
    draw = random.Random(time.time_ns())
    cpu_copies()  # compiled here, inherited by every life
    compile_loops()
    compile_write_loop()
    for number in range(kills + 1):
        life = _live_and_die(home, draw, last=number == kills)
        print(msgspec.json.encode(life).decode(), flush=True)


def _live_and_die(home: Path, draw: random.Random, *, last: bool) -> Life:
    """Fork one life, kill it at a random moment (the last one: let it report), bury it."""
    readable, writable = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(readable)
        _alone(lambda: _live(home, writable))
    os.close(writable)
    with os.fdopen(readable, "rb") as pipe:
        if last or draw.random() < 0.7:
            select.select([pipe], [], [], PATIENCE_SECONDS)
        time.sleep(draw.uniform(0.0, 0.06))
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        said = pipe.read()
    life = msgspec.json.decode(said, type=Life) if said else Life()
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    return msgspec.structs.replace(life, ended="" if killed else f"status {status}: {said!r}")


def _alone(live: Callable[[], None]) -> None:
    """Run a life to its end; none outlives the process that forked it."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    try:
        live()
    finally:
        os._exit(1)  # only a kill ends a life well


def _live(home: Path, report: int) -> None:
    rank = DiskRank(home, PARTS, slots=SLOTS, batch_blocks=4)
    life = _check(rank)
    os.write(report, msgspec.json.encode(life))
    draw = np.random.default_rng(time.time_ns())
    fill = life.newest
    while True:
        fill += 1
        count = int(draw.integers(1, POOL + 1))
        names = draw.permutation(NAMES)[:count].astype(np.uint64)
        slots = draw.permutation(SLOTS)[:count].astype(np.uint32)
        device = draw.permutation(POOL)[:count].astype(np.uint32)
        ones, hashes = np.ones(count, np.uint64), _hashes(names)
        for name, block in zip(names.tolist(), device.tolist(), strict=True):
            rank.write_block(block, _octets(name))
        if fill % 2:
            fills = ones * np.uint64(fill)
            assert rank.disk.save(Blocks(hashes, fills, slots, device)).all()
        else:
            rank.host.save(Blocks(hashes, ones, device, device))
            assert rank.disk.spill(Hop(hashes, ones, device, slots, fill)).all()


def _check(rank: DiskRank) -> Life:
    contents = rank.disk.contents()
    right = wrong = 0
    for at in range(0, len(contents.slots), POOL):
        some = slice(at, at + POOL)
        hashes = contents.hashes[some]
        device = np.arange(len(hashes), dtype=np.uint32)
        arrived = rank.disk.load(Blocks(hashes, contents.fills[some], contents.slots[some], device))
        for block in np.flatnonzero(arrived).tolist():
            if rank.block(block) == _octets(int(hashes[block, 0])):
                right += 1
            else:
                wrong += 1
    listed = len(contents.slots)
    return Life(
        True, listed, right, wrong, listed - right - wrong, int(contents.fills.max(initial=0))
    )


def _hashes(names: Column) -> Column:
    return np.stack([names, names ^ np.uint64(0xABCD)], axis=1)


def _octets(name: int) -> bytes:
    """What a block of this name holds: no two have a word in common."""
    words = np.arange(sum(PARTS) // 8, dtype=np.uint64)
    return (words * np.uint64(NAMES) + np.uint64(name)).tobytes()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
