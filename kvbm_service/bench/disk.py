"""How fast blocks move between host, device and disk, and how fast a restart finds them.

Files are made where temporary files go (TMPDIR). Everything is read and written in random
order: neighbours in a request are not neighbours on the disk.
"""

from __future__ import annotations

import mmap
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from nixl._api import nixl_agent, nixl_agent_config

from kvbm_service.adapters.copies import CpuCopies
from kvbm_service.adapters.disk_file import DiskFile
from kvbm_service.adapters.disk_index import DiskIndex
from kvbm_service.adapters.disk_tier import DiskTier
from kvbm_service.adapters.host_tier import HostTier, parts
from kvbm_service.adapters.mover import Blocks, Hop, Indices, Region
from kvbm_service.adapters.slab import Slab
from kvbm_service.bench.row import Row

IN_FLIGHT = 4
"""Batches at a time, and threads of the plain yardstick."""
BATCH_BLOCKS = 16
WARM_UP = 2
"""The first writes to newly reserved space are slower than all later ones."""
ROUNDS = 11
PIECE_BYTES = 64 << 10
RESTART_BLOCKS = 1_000_000
RESTART_GOAL_SECONDS = 1.0

Seconds = dict[str, list[float]]


class Shape(NamedTuple):
    """`blocks` of `layers` pieces each are moved at a time."""

    name: str
    layers: int
    blocks: int

    @property
    def block_bytes(self) -> int:
        return self.layers * PIECE_BYTES


SHAPES = (Shape("64k", 1, 512), Shape("1m", 16, 128), Shape("4m", 64, 32))


def rows(shapes: tuple[Shape, ...] = SHAPES) -> list[Row]:
    """All of this file's figures: GB/s, and seconds for the restart."""
    found = []
    for shape in shapes:
        with tempfile.TemporaryDirectory(prefix="kvbm-bench-") as home:
            found += moves(shape, Path(home))
    with tempfile.TemporaryDirectory(prefix="kvbm-bench-") as home:
        return [*found, restart(Path(home))]


def moves(shape: Shape, home: Path) -> list[Row]:
    """Host → disk, disk → host and disk → device, beside reads and writes that prove nothing."""
    samples: Seconds = {}
    with (
        _host(shape) as host,
        _tier(shape, home, host) as tier,
        _bare(shape, home) as bare,
        _Threads(shape, home) as threads,
    ):
        draw = np.random.default_rng(1)
        for number in range(-WARM_UP, ROUNDS):
            disk = draw.permutation(shape.blocks).astype(np.uint32)
            steps = _steps(shape, host, tier, bare, threads, disk, fill=number + WARM_UP + 1)
            for name, step in steps.items():
                began = time.perf_counter()
                step()
                if number >= 0:
                    samples.setdefault(name, []).append(time.perf_counter() - began)
    return _rows(shape, samples)


def _steps(
    shape: Shape,
    host: HostTier,
    tier: DiskTier,
    bare: _BareNixl,
    threads: _Threads,
    disk: Indices,
    fill: int,
) -> dict[str, Callable[[], None]]:
    """One round, in this order: what is measured beside its yardsticks."""
    slots = np.arange(shape.blocks, dtype=np.uint32)
    hashes = np.stack([slots.astype(np.uint64) + np.uint64(1)] * 2, axis=1)
    fills = np.full(shape.blocks, fill, np.uint64)
    in_host = Blocks(hashes, fills, slots, slots)
    host.save(in_host)

    def spill() -> None:
        assert tier.spill(Hop(hashes, fills, slots, disk, fill)).all()

    def fetch() -> None:
        assert tier.fetch(Hop(hashes, fills, disk, slots, fill)).all()

    def load() -> None:
        assert tier.load(Blocks(hashes, fills, disk, slots)).all()

    return {
        "nixl_write": lambda: bare.move("WRITE", disk),
        "spill": spill,
        "threads_write": lambda: threads.move(os.pwritev, disk),
        "nixl_read": lambda: bare.move("READ", disk),
        "fetch": fetch,
        "load": load,
        "threads_read": lambda: threads.move(os.preadv, disk),
    }


def _rows(shape: Shape, samples: Seconds) -> list[Row]:
    speeds = {
        name: shape.blocks * shape.block_bytes / 1e9 / statistics.median(seconds)
        for name, seconds in samples.items()
    }
    found = []
    for name, way in (("spill", "write"), ("fetch", "read"), ("load", "read")):
        for yardstick, words in (
            ("nixl", "NIXL alone, as many in flight"),
            ("threads", f"{IN_FLIGHT} threads of p{way}v"),
        ):
            least = speeds[f"{yardstick}_{way}"]
            found.append(
                Row(
                    f"disk_{name}_{shape.name}", speeds[name], "GB/s", words, least,
                    speeds[name] / least,
                )
            )  # fmt: skip
    return found


def restart(home: Path) -> Row:
    """From opening an index that is full to knowing what is in it."""
    path = home / "restart.index"
    draw = np.random.default_rng(2)
    slots = draw.permutation(RESTART_BLOCKS).astype(np.uint32)
    hashes = draw.integers(1, 1 << 63, (RESTART_BLOCKS, 2), dtype=np.uint64)
    index = DiskIndex(path, RESTART_BLOCKS, PIECE_BYTES, "bench")
    index.enter(slots, hashes, np.arange(1, RESTART_BLOCKS + 1, dtype=np.uint64), hashes[:, 0])
    index.close()
    samples = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        index = DiskIndex(path, RESTART_BLOCKS, PIECE_BYTES, "bench")
        found = index.contents()
        samples.append(time.perf_counter() - began)
        index.close()
        assert (found.slots == slots).all()
    value = statistics.median(samples)
    return Row(
        "disk_restart_per_million", value, "s", "goal", RESTART_GOAL_SECONDS,
        value / RESTART_GOAL_SECONDS,
    )  # fmt: skip


@contextmanager
def _host(shape: Shape) -> Iterator[HostTier]:
    """A device pool in ordinary memory, and a slab, of as many blocks as are moved."""
    region_bytes = shape.blocks * PIECE_BYTES
    pool = _memory(shape.layers * region_bytes)
    start = pool.ctypes.data
    regions = [
        Region(start + at * region_bytes, PIECE_BYTES, PIECE_BYTES, shape.blocks)
        for at in range(shape.layers)
    ]
    slab = Slab(shape.blocks, parts(regions))
    yield HostTier(slab, regions, CpuCopies())
    slab.close()


@contextmanager
def _tier(shape: Shape, home: Path, host: HostTier) -> Iterator[DiskTier]:
    tier = DiskTier.open(
        home, 0, shape.blocks, host, shape.name, batch_blocks=BATCH_BLOCKS, batches=IN_FLIGHT
    )
    yield tier
    tier.close()


class _Yardstick:
    """A file of its own, and memory to move its blocks from and to."""

    def __init__(self, shape: Shape, path: Path) -> None:
        self.file = DiskFile(path, shape.blocks * shape.block_bytes)
        self.block_bytes = shape.block_bytes
        self.memory = _memory(self.file.nbytes)


def _memory(nbytes: int) -> npt.NDArray[np.uint8]:
    """Random bytes in huge pages, which are read and written faster."""
    mapping = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    mapping.madvise(mmap.MADV_HUGEPAGE)
    octets = np.frombuffer(mapping, np.uint8)
    octets[:] = np.random.default_rng(0).integers(0, 256, nbytes, np.uint8)
    return octets


class _BareNixl(_Yardstick):
    """NIXL's POSIX backend with as much in flight, when nobody asks what the bytes are."""

    def __init__(self, shape: Shape, path: Path) -> None:
        super().__init__(shape, path)
        self._agent = nixl_agent("bare", nixl_agent_config(enable_prog_thread=False, backends=[]))
        self._agent.create_backend("POSIX", {"use_aio": "true"})
        address, fd = self.memory.ctypes.data, self.file.fd
        size, count = shape.block_bytes, shape.blocks
        self._agent.register_memory([(address, self.file.nbytes, 0, "")], "DRAM")
        self._agent.register_memory([(0, self.file.nbytes, fd, "")], "FILE")
        self._ours = self._prepare("NIXL_INIT_AGENT", (address, size, 0, size, count), "DRAM")
        self._theirs = self._prepare(self._agent.name, (0, size, fd, size, count), "FILE")

    def move(self, operation: str, slots: Indices) -> None:
        parts = np.array_split(slots.astype(np.int32), -(-len(slots) // BATCH_BLOCKS))
        ours = np.array_split(np.arange(len(slots), dtype=np.int32), len(parts))
        under_way: list[Any] = []
        for mine, theirs in zip(ours, parts, strict=True):
            if len(under_way) == IN_FLIGHT:
                self._wait(under_way.pop(0))
            handle = self._agent.make_prepped_xfer(
                operation, self._ours, mine, self._theirs, theirs
            )
            self._agent.transfer(handle)
            under_way.append(handle)
        for handle in under_way:
            self._wait(handle)

    def _wait(self, handle: Any) -> None:
        while self._agent.check_xfer_state(handle) == "PROC":
            time.sleep(0.000_05)
        assert self._agent.check_xfer_state(handle) == "DONE"
        handle.release()

    def _prepare(self, agent: str, row: tuple[int, ...], kind: str) -> Any:
        return self._agent.prep_xfer_dlist(agent, np.array([row], np.uint64), kind)


@contextmanager
def _bare(shape: Shape, home: Path) -> Iterator[_BareNixl]:
    bare = _BareNixl(shape, home / "bare.blocks")
    yield bare
    bare.file.close()


class _Threads(_Yardstick):
    """Threads that read or write one block after the other."""

    def __init__(self, shape: Shape, home: Path) -> None:
        super().__init__(shape, home / "threads.blocks")
        self._pool = ThreadPoolExecutor(IN_FLIGHT)

    def __enter__(self) -> _Threads:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown()
        self.file.close()

    def move(self, call: Callable[..., int], slots: Indices) -> None:
        size = self.block_bytes
        views: list[Any] = np.split(self.memory, len(slots))

        def some(first: int) -> None:
            for at in range(first, len(slots), IN_FLIGHT):
                assert call(self.file.fd, [views[at]], int(slots[at]) * size) == size

        list(self._pool.map(some, range(IN_FLIGHT)))
