"""A node with a million blocks tells registries what it holds, in slices that its engine hardly
notices. How long an engine waits is measured elsewhere: see docs/performance.md.
"""

from __future__ import annotations

import asyncio
import secrets
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import TypeVar

import pytest

from kvbm_schemas.block import HASH_BYTES, BlockHash, Tier, count
from kvbm_schemas.codec import Decoder, encode
from kvbm_schemas.records import RankRecord, SlabRecord
from kvbm_schemas.requests import (
    Acquire,
    LeaseAnswer,
    Leased,
    Release,
    Resync,
    SnapshotChunk,
)
from kvbm_schemas.step import Moved, StepResults, Survivors
from kvbm_schemas.subjects import Scope
from kvbm_service.adapters.nats_bus import NatsBus
from kvbm_service.adapters.nats_server import EmbeddedNats
from kvbm_service.core.columns import pack_u32, pack_u64
from kvbm_service.core.leader import Leader
from kvbm_service.errors import NoAnswer
from kvbm_service.leader_service import LeaderService
from kvbm_service.network import over_nats
from kvbm_service.settings import Settings
from tests.limits.registry_process import RegistryProcess

SCOPE = Scope("default", "0123456789abcdef")
NODE = "node"
HOST_BLOCKS = 600_000
DISK_BLOCKS = 400_000
STEP_BLOCKS = 16
"""Blocks that the engine stores in each step."""
SNAPSHOTS = 5
SLICES = 10
"""No hold of the engine's lock takes more than one part in so many of what a snapshot computes."""
LEASES = 5
"""So many are given to others, one after the other, while one snapshot is under way."""
RESYNC_SECONDS = 30.0
"""Within this a registry knows all blocks of a node that it knew nothing of (seen: about 2)."""

PATIENCE_SECONDS = 60.0

T = TypeVar("T")

_answers: Decoder[LeaseAnswer] = Decoder(LeaseAnswer)  # type: ignore[arg-type]
_chunks = Decoder(SnapshotChunk)


def _names(blocks: int) -> bytes:
    return secrets.token_bytes(blocks * HASH_BYTES)


def _survivors(tier: Tier, hashes: bytes) -> Survivors:
    blocks = len(hashes) // HASH_BYTES
    return Survivors(
        tier=tier,
        hashes=hashes,
        fills=pack_u64(range(1, blocks + 1)),
        slots=pack_u32(range(blocks)),
    )


class Engine:
    """The thread that steps an engine."""

    def __init__(self, leader: LeaderService) -> None:
        self._leader = leader
        self._steps = 0
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="engine")
        self._thread.start()

    def stop(self) -> None:
        self._ending.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ending.wait(0.002):  # the forward pass
            self._step()

    def _step(self) -> None:
        """A new request comes, nothing of it is here, all of it is saved."""
        leader = self._leader
        chain = [BlockHash(secrets.token_bytes(HASH_BYTES)) for _ in range(STEP_BLOCKS)]
        request = f"request {self._steps}"
        self._steps += 1
        leader.arrive(request, chain)
        leader.match(request, 0)
        leader.store(request, None, chain, range(STEP_BLOCKS))
        orders = leader.take_commands()
        moved = tuple(Moved(op=order.op) for order in (*orders.saves, *orders.spills))
        leader.report([StepResults(rank=0, moved=moved)])
        leader.finish(request)


class TimedLeader(LeaderService):
    """Notes what each call of the bus side computes while the engine's thread has to wait.

    Computing time, not time: whatever else this machine does is no part of it.
    """

    holds: tuple[float, ...] = ()

    def on_core(self, tell: Callable[[Leader], T], without: T) -> T:
        def timed(core: Leader) -> T:
            began = time.thread_time()
            answer = tell(core)
            self.holds += (time.thread_time() - began,)
            return answer

        return super().on_core(timed, without)


class Node:
    """A leader with a million blocks, and someone else on the bus who has questions."""

    def __init__(self, leader: TimedLeader, bus: NatsBus, names: dict[Tier, bytes]) -> None:
        self.leader, self.bus, self.names = leader, bus, names

    async def takes_part(self) -> None:
        """Wait until it answers."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                await self._lease()
                return
            except NoAnswer:
                assert time.monotonic() < deadline, "the node does not answer"
                await asyncio.sleep(0.01)

    async def ask_for_leases(self, given: list[int]) -> None:
        """Ask for one lease after the other, and count those given, until cancelled."""
        while True:
            await self._lease()
            given[-1] += 1

    async def _lease(self) -> None:
        acquire = Acquire(hashes=self.names[Tier.HOST][-4 * HASH_BYTES :])
        reply = await self.bus.request(SCOPE.of(NODE, "lease"), encode(acquire), PATIENCE_SECONDS)
        answer = _answers.decode(reply)
        if isinstance(answer, Leased):
            await self.bus.publish(SCOPE.of(NODE, "release"), encode(Release(lease=answer.lease)))

    async def snapshot(self) -> list[SnapshotChunk]:
        """All chunks of one snapshot."""
        subject, chunks = SCOPE.of(NODE, "snapshot"), list[SnapshotChunk]()
        async for payload in self.bus.request_many(subject, encode(Resync()), PATIENCE_SECONDS):
            chunks.append(_chunks.decode(payload))
            if len(chunks) == chunks[0].total:
                break
        return chunks


@pytest.fixture
async def node(nats_server: EmbeddedNats) -> AsyncIterator[Node]:
    names = {Tier.HOST: _names(HOST_BLOCKS), Tier.DISK: _names(DISK_BLOCKS)}
    settings = Settings(nats_url=nats_server.url)
    connect = over_nats(settings, "leader")
    leader = TimedLeader(settings, SCOPE, NODE, 1, connect, instance="this")
    slab = SlabRecord(base=0, headers=0, slots=HOST_BLOCKS, slot_bytes=64, header_bytes=32)
    record = RankRecord(
        node=NODE, rank=0, world_size=1, agent="this/0", agent_metadata=b"", slab=slab,
        device_blocks=4096, instance="this", disk_slots=DISK_BLOCKS,
    )  # fmt: skip
    leader.attach(record, [_survivors(tier, names[tier]) for tier in names])
    leader.start()
    bus = await NatsBus.connect(nats_server.url)
    node = Node(leader, bus, names)
    await node.takes_part()
    yield node
    await bus.close()
    await asyncio.to_thread(leader.close)


async def test_a_registry_learns_a_million_blocks_within_seconds(
    node: Node, registry: RegistryProcess
) -> None:
    status = await registry.until(
        lambda status: status["copies"] == HOST_BLOCKS + DISK_BLOCKS, RESYNC_SECONDS
    )
    assert status["syncing"] == 0
    assert status["counts"]["snapshots"] == 1


async def test_a_snapshot_of_a_million_blocks_stalls_neither_engine_nor_loop(node: Node) -> None:
    """What stalls at random is this machine; what we did would show in every snapshot."""
    engine = Engine(node.leader)
    shares, given = list[float](), list[int]()
    try:
        for _ in range(SNAPSHOTS):
            given.append(0)
            node.leader.holds = ()
            asking = asyncio.create_task(node.ask_for_leases(given))
            chunks = await node.snapshot()
            asking.cancel()
            holds = node.leader.holds
            shares.append(max(holds) / sum(holds))
            assert sum(count(chunk.hashes) for chunk in chunks) > 0.99 * HOST_BLOCKS
            assert len({(chunk.epoch, chunk.seq) for chunk in chunks}) == 1
    finally:
        await asyncio.to_thread(engine.stop)
    assert min(shares) < 1 / SLICES, f"the engine waits long at each snapshot: {shares}"
    assert max(given) >= LEASES, f"leases wait for the whole of each snapshot: {given}"
