"""Processes that save blocks into a slab in lasting memory until they are killed.

Run as a module: forks one at each line of stdin, and answers with its process id when it has
begun to save. Forking makes a victim in milliseconds.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import NoReturn, Self

import numpy as np

from kvbm_schemas.subjects import Scope
from kvbm_service.adapters.copies import CpuCopies
from kvbm_service.adapters.homes import Home
from kvbm_service.adapters.host_tier import HostTier
from kvbm_service.adapters.mover import Blocks, Region
from kvbm_service.adapters.slab import Slab

SCOPE = Scope("tests", "victims")
SLOTS = 32
PARTS = (3000, 2500)
"""Not aligned to anything."""
NAMES = 40
"""Different blocks, fewer than would keep one from coming twice."""
POOL = 4
SETTING = "KVBM_HOST_CACHE_DIR"


def home(root: Path, instance: str) -> Home:
    return Home.claim(root, SCOPE, instance, SETTING)


def slab(home: Home) -> Slab:
    return Slab(SLOTS, PARTS, home.path / "host-0.slab", "victims")


def octets(name: int) -> np.ndarray:
    """The bytes of the block with this name."""
    return np.random.default_rng(name).integers(0, 256, sum(PARTS), np.uint8)


class Victims:
    """Makes processes, one at a time, and kills them."""

    def __init__(self, root: Path) -> None:
        self._forge = subprocess.Popen(
            [sys.executable, "-m", __name__, str(root)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            text=True,
        )
        self._alive: set[int] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for pid in list(self._alive):
            self.kill(pid)
        self._forge.communicate()

    def begin(self) -> int:
        """One that has claimed a home and begun to save; its process id."""
        assert self._forge.stdin is not None
        assert self._forge.stdout is not None
        self._forge.stdin.write("\n")
        self._forge.stdin.flush()
        pid = int(self._forge.stdout.readline())
        self._alive.add(pid)
        return pid

    def kill(self, pid: int) -> None:
        """kill -9, and wait for the end."""
        process = os.pidfd_open(pid)
        os.kill(pid, signal.SIGKILL)
        select.select([process], [], [])
        os.close(process)
        self._alive.remove(pid)


def _live(root: Path, copies: CpuCopies) -> NoReturn:
    blocks = slab(home(root, str(os.getpid())))
    fill = max(blocks.contents().fills.tolist(), default=0)
    pool = np.zeros((POOL, sum(PARTS)), np.uint8)
    stride, address = sum(PARTS), pool.ctypes.data
    regions = [Region(address, stride, PARTS[0], POOL)]
    regions.append(Region(address + PARTS[0], stride, PARTS[1], POOL))
    tier = HostTier(blocks, regions, copies)
    draw = np.random.default_rng(os.getpid())
    known = [octets(name) for name in range(NAMES)]
    device = np.arange(POOL, dtype=np.uint32)
    begun = False
    while True:
        fill += 1
        names = draw.integers(0, NAMES, POOL)
        pool[:] = [known[name] for name in names]
        slots = draw.permutation(SLOTS)[:POOL].astype(np.uint32)
        hashes = np.stack([names + 1, names + 1], axis=1).astype(np.uint64)
        tier.save(Blocks(hashes, np.full(POOL, fill, np.uint64), slots, device))
        if not begun:
            print(os.getpid(), flush=True)
            begun = True


def main() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them here
    copies = CpuCopies()
    for _ in sys.stdin:
        if os.fork() == 0:
            _live(Path(sys.argv[1]), copies)


if __name__ == "__main__":
    main()
