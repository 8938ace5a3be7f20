"""How fast bytes move: device ↔ host tier, another process's host tier → device or own host tier,
and another process's device → device.

The device pool is ordinary memory here, laid out as an engine's: one region per layer.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kvbm_schemas.block import Tier
from kvbm_schemas.subjects import Scope
from kvbm_service.adapters.copies import CpuCopies
from kvbm_service.adapters.homes import Home
from kvbm_service.adapters.host_tier import HostTier, parts
from kvbm_service.adapters.mover import Blocks, Hop, Region, RemoteSlab
from kvbm_service.adapters.nixl_mover import NixlMover
from kvbm_service.adapters.nixl_reader import new_agent
from kvbm_service.adapters.slab import Slab
from kvbm_service.bench.row import Row

BATCH = 64
"""Blocks in one transfer."""
ROUNDS = 15
PROGRESS_SECONDS = 0.002
TENSOR_ALIGNMENT = 64
"""Bytes, as torch does it. A copy to a less aligned place takes twice as long."""
SECONDS = 10.0
"""A timeout that no pull here needs."""
MEMORY = Path("/dev/shm")


class Shape(NamedTuple):
    """`layers` pieces of `piece_bytes` make a block."""

    layers: int
    piece_bytes: int

    @property
    def batch_bytes(self) -> int:
        return BATCH * self.layers * self.piece_bytes


MODEL = Shape(layers=28, piece_bytes=64 << 10)
"""Blocks of 16 tokens of a model with 28 layers, 8 KV heads of 128, in 16 bit."""


def rows() -> list[Row]:
    """All of this file's figures, in GB/s."""
    return [
        *copies(MODEL),
        remote_pull("remote_pull", MODEL),
        remote_pull("remote_pull_device", MODEL, Tier.DEVICE),
        remote_pull("remote_pull_64k", Shape(1, 64 << 10)),
        remote_pull("remote_pull_1m", Shape(1, 1 << 20)),
        *surviving(MODEL),
        fetch(MODEL),
    ]


def copies(shape: Shape) -> list[Row]:
    """Saving and loading a batch, against one memcpy of as many bytes between the same two."""
    with rank(shape) as tier:
        pool, base = tier.regions[0].address, tier.slab.base
        saves, loads, to_slab, to_pool = [], [], [], []
        for number in range(ROUNDS):
            blocks = _blocks(seed=number)
            to_slab.append(_seconds(lambda: ctypes.memmove(base, pool, shape.batch_bytes)))
            saves.append(_seconds(lambda: tier.save(blocks)))  # noqa: B023
            to_pool.append(_seconds(lambda: ctypes.memmove(pool, base, shape.batch_bytes)))
            loads.append(_seconds(lambda: tier.load(blocks)))  # noqa: B023
    return [
        _row("copy_g1_g2", shape, saves, "one memcpy of the same bytes", to_slab),
        _row("copy_g2_g1", shape, loads, "one memcpy of the same bytes", to_pool),
    ]


def remote_pull(name: str, shape: Shape, tier: Tier = Tier.HOST) -> Row:
    """Pulling a batch from another process, against NIXL alone with the same descriptors."""
    with rank(shape) as memory, _owner(shape) as owner:
        mover, peer = NixlMover(memory), owner.peer
        mover.connect(peer)
        bare = BareNixl(memory.regions, peer, tier)
        pulls, transfers = [], []
        for number in range(-2, ROUNDS):
            blocks = _blocks(seed=abs(number))
            pulled = _seconds(lambda: _pull(mover, peer, blocks, tier))  # noqa: B023
            indices = bare.indices(blocks)
            transferred = _seconds(lambda: bare.transfer(*indices))  # noqa: B023
            if number >= 0:  # the first ones still connect
                pulls.append(pulled)
                transfers.append(transferred)
        mover.close()
    return _row(name, shape, pulls, "NIXL alone, same descriptors", transfers)


def surviving(shape: Shape) -> list[Row]:
    """Pulling a batch from a slab that outlives its process, against one that does not.

    Nothing where the machine has no room for the former.
    """
    with rank(shape) as tier, _owner(shape) as private, _owner(shape, MEMORY) as lasting:
        if not lasting.survives:
            return []
        mover = NixlMover(tier)
        samples: dict[str, list[float]] = {}
        for number in range(-2, ROUNDS):
            blocks = _blocks(seed=abs(number))
            for owner in (private, lasting):
                mover.connect(owner.peer)
                seconds = _seconds(lambda: _pull(mover, owner.peer, blocks))  # noqa: B023
                samples.setdefault(owner.peer.agent, []).append(seconds)
        mover.close()
    ours, least = samples[lasting.peer.agent][2:], samples[private.peer.agent][2:]
    return [_row("remote_pull_surviving", shape, ours, "the same from private memory", least)]


def fetch(shape: Shape) -> Row:
    """Bringing a batch from another process into our slab, against pulling it to the device."""
    with rank(shape) as tier, _owner(shape) as owner:
        mover = NixlMover(tier)
        mover.connect(owner.peer)
        fetches, pulls = [], []
        for number in range(-2, ROUNDS):
            blocks = _blocks(seed=abs(number))
            hop = Hop(blocks.hashes, blocks.fills, blocks.slots, blocks.device, fill=2)
            fetched = _seconds(lambda: mover.fetch(owner.peer.agent, hop, SECONDS))  # noqa: B023
            pulled = _seconds(lambda: _pull(mover, owner.peer, blocks))  # noqa: B023
            if number >= 0:
                fetches.append(fetched)
                pulls.append(pulled)
        mover.close()
    return _row("remote_fetch", shape, fetches, "the same to the device", pulls)


@contextmanager
def rank(shape: Shape, file: Path | None = None) -> Iterator[HostTier]:
    """One rank's memory: a device pool and a slab, each of two batches of blocks."""
    count = 2 * BATCH
    region_bytes = count * shape.piece_bytes
    pool = np.zeros(shape.layers * region_bytes + TENSOR_ALIGNMENT, np.uint8)
    pool[:] = 1  # pages that were never written are not there
    start = -(-pool.ctypes.data // TENSOR_ALIGNMENT) * TENSOR_ALIGNMENT
    regions = [
        Region(start + at * region_bytes, shape.piece_bytes, shape.piece_bytes, count)
        for at in range(shape.layers)
    ]
    slab = Slab(count, parts(regions), file)
    yield HostTier(slab, regions, CpuCopies())
    slab.close()


class _Owner(NamedTuple):
    """What another process's rank says of itself."""

    peer: RemoteSlab
    survives: bool


@contextmanager
def _owner(shape: Shape, memory: Path | None = None) -> Iterator[_Owner]:
    """A process that owns a slab in which every slot holds the block that we will ask for."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_own, args=(shape, memory, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        yield _Owner(*ours.recv())
    finally:
        ours.close()
        process.join()


def _own(shape: Shape, memory: Path | None, parent: Connection) -> None:
    if memory is None:
        _serve(shape, None, parent)
        return
    with tempfile.TemporaryDirectory(prefix="kvbm-bench-", dir=memory) as root:
        home = Home.claim(Path(root), Scope("bench", "bench"), "owner", "KVBM_HOST_CACHE_DIR")
        _serve(shape, home.path / "slab", parent)
        home.close()


def _serve(shape: Shape, file: Path | None, parent: Connection) -> None:
    with rank(shape, file) as tier:
        tier.save(_all_blocks())
        mover = NixlMover(tier)
        mover.lend(_all_blocks())
        where = tier.slab.record()
        peer = RemoteSlab(
            mover.agent,
            mover.agent_metadata,
            where.base,
            where.headers,
            where.slots,
            where.slot_bytes,
            where.parts,
            mover.pool,
        )
        parent.send((peer, tier.slab.survives))
        while not parent.poll(PROGRESS_SECONDS):  # readable when the parent closes its end
            mover.progress()
        mover.close()


class BareNixl:
    """What NIXL does when nobody asks whether the bytes are right."""

    def __init__(self, regions: list[Region], peer: RemoteSlab, tier: Tier = Tier.HOST) -> None:
        self._agent = new_agent("bare")
        whole = [(r.address, r.stride * r.blocks, 0, "") for r in regions]
        self._agent.register_memory(whole, "DRAM")
        ours = [(r.address, r.length, 0, r.stride, r.blocks) for r in regions]
        self._ours = self._prepare("NIXL_INIT_AGENT", ours)
        self._firsts = np.arange(len(regions)) * regions[0].blocks
        self._agent.add_remote_agent(peer.agent_metadata)
        self._theirs = self._prepare(peer.agent, _slab(peer) if tier is Tier.HOST else _pool(peer))

    def indices(self, blocks: Blocks) -> tuple[Any, Any]:
        """Of our and their descriptors."""
        ours = (blocks.device.astype(np.int64)[:, None] + self._firsts).ravel()
        theirs = (blocks.slots.astype(np.int64)[:, None] + self._firsts).ravel()
        return ours.astype(np.int32), theirs.astype(np.int32)

    def transfer(self, ours: Any, theirs: Any) -> None:
        handle = self._agent.make_prepped_xfer("READ", self._ours, ours, self._theirs, theirs)
        state = self._agent.transfer(handle)
        while state == "PROC":
            state = self._agent.check_xfer_state(handle)
        assert state == "DONE"
        handle.release()

    def _prepare(self, agent: str, rows: Sequence[tuple[int, ...]]) -> Any:
        return self._agent.prep_xfer_dlist(agent, np.array(rows, np.uint64), "DRAM")


def _slab(peer: RemoteSlab) -> list[tuple[int, ...]]:
    length = peer.parts[0]
    return [
        (peer.base + part * length, length, 0, peer.slot_bytes, peer.slots)
        for part in range(len(peer.parts))
    ]


def _pool(peer: RemoteSlab) -> list[tuple[int, ...]]:
    assert peer.pool is not None
    return [
        (address, peer.parts[0], 0, stride, peer.pool.blocks)
        for address, stride in peer.pool.regions
    ]


def _pull(mover: NixlMover, peer: RemoteSlab, blocks: Blocks, tier: Tier = Tier.HOST) -> None:
    assert mover.pull(peer.agent, blocks, SECONDS, tier).all()


def _blocks(seed: int) -> Blocks:
    """A batch in random order: neighbours in a request are not neighbours in memory."""
    draw = np.random.default_rng(seed)
    slots = draw.permutation(2 * BATCH)[:BATCH].astype(np.uint32)
    return _named(slots, draw.permutation(2 * BATCH)[:BATCH].astype(np.uint32))


def one_block(number: int) -> Blocks:
    """A transfer of one block, from the slot of this number to the device block of this number."""
    return _named(np.array([number], np.uint32), np.array([number], np.uint32))


def _all_blocks() -> Blocks:
    everything = np.arange(2 * BATCH, dtype=np.uint32)
    return _named(everything, everything)


def _named(slots: Any, device: Any) -> Blocks:
    hashes = np.stack([slots.astype(np.uint64) + np.uint64(1)] * 2, axis=1)
    return Blocks(hashes, np.ones(len(slots), np.uint64), slots, device)


def _seconds(act: Callable[[], object]) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def _row(name: str, shape: Shape, samples: list[float], yardstick: str, least: list[float]) -> Row:
    speed, limit = (
        shape.batch_bytes / 1e9 / statistics.median(seconds) for seconds in (samples, least)
    )
    return Row(name, speed, "GB/s", yardstick, limit, speed / limit)
