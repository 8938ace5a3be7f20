"""A leader waits for all its ranks: how long, what it says, and whom it does not let in."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from kvbm_schemas.codec import encode
from kvbm_schemas.records import RankRecord, SlabRecord
from kvbm_service.adapters.directory import Membership
from kvbm_service.leader_service import LeaderService
from kvbm_service.network import Network, over_nats
from kvbm_service.settings import Settings
from tests.contracts.lone_leader import SCOPE
from tests.contracts.meeting_place import DIRECTORIES, open_meeting_place

NODE = "node"
WORLD_SIZE = 4
INSTANCE = "this life"
LEASE_SECONDS = 6.0
INIT_SECONDS = 1.0
PATIENCE_SECONDS = 60.0
SETTING = "DYN_KVBM_LEADER_WORKER_INIT_TIMEOUT_SECS"


def rank_record(rank: int, **changed: Any) -> RankRecord:
    slab = SlabRecord(base=0, headers=0, slots=8, slot_bytes=64, header_bytes=32, layout="rows")
    record = RankRecord(
        node=NODE,
        rank=rank,
        world_size=WORLD_SIZE,
        agent=f"{INSTANCE}/{rank}",
        agent_metadata=b"",
        slab=slab,
        device_blocks=8,
        instance=INSTANCE,
    )
    return replace(record, **changed)


class Barrier:
    """A directory, a leader that waits, and ranks that come."""

    def __init__(self, settings: dict[str, Any], network: Network) -> None:
        self._network = network
        chosen = Settings(**settings, leader_worker_init_timeout_seconds=INIT_SECONDS)
        connect = over_nats(chosen, "leader")
        self.leader = LeaderService(chosen, SCOPE, NODE, WORLD_SIZE, connect, instance=INSTANCE)

    async def come(self, record: RankRecord) -> Membership:
        """A rank lists itself."""
        return await self._network.directory.join(self._key(record.rank), encode(record))

    async def is_listed(self) -> bool:
        """Whether the node takes part."""
        entries = await self._network.directory.entries(self._key())
        return any(entry.key == self._key() for entry in entries)

    def _key(self, *rank: int) -> str:
        return ".".join([*SCOPE, NODE, *map(str, rank)])


async def until(is_so: Callable[[], Any], what: str) -> None:
    """Wait for something that has to come about."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        so = is_so()
        if await so if asyncio.iscoroutine(so) else so:
            return
        assert time.monotonic() < deadline, what
        await asyncio.sleep(0.02)


@pytest.fixture(params=DIRECTORIES)
async def barrier(
    request: pytest.FixtureRequest, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> AsyncIterator[Barrier]:
    caplog.set_level(logging.INFO, "kvbm_service")
    async with AsyncExitStack() as ending:
        servers = ending.enter_context(ExitStack())
        settings = open_meeting_place(request.param, tmp_path, servers)
        settings["membership_seconds"] = LEASE_SECONDS
        network = await over_nats(Settings(**settings), "test")()
        ending.push_async_callback(network.close)
        barrier = Barrier(settings, network)
        yield barrier
        await asyncio.to_thread(barrier.leader.close)


async def test_when_time_is_up_the_missing_rank_is_named_once_and_may_still_come(
    barrier: Barrier, caplog: pytest.LogCaptureFixture
) -> None:
    for rank in (0, 1, 3):
        await barrier.come(rank_record(rank))
    barrier.leader.start()
    await until(lambda: "did not report" in caplog.text, "the missing rank is named")
    (said,) = [one.getMessage() for one in caplog.records if "did not report" in one.getMessage()]
    assert said == (
        f"rank 2 of 4 did not report within {INIT_SECONDS:g} s: look at its log, or raise "
        f"{SETTING}; serving without a cache meanwhile"
    )
    assert barrier.leader.match("any", 0) == 0, "the engine is served"
    assert not await barrier.is_listed(), "nobody else is"

    await asyncio.sleep(2 * INIT_SECONDS)  # for as long again it is not said again
    await barrier.come(rank_record(2))
    await until(lambda: barrier.leader.ready, "a late rank completes it")
    await until(lambda: "all ranks of node node are there now" in caplog.text, "and that is said")
    await until(barrier.is_listed, "the node takes part")
    assert caplog.text.count("did not report") == 1


@pytest.mark.parametrize(
    ("changed", "because"),
    [
        ({"world_size": 8}, "rank 2 of 8 (this life/2) reported to a leader of 4"),
        ({"instance": "another"}, "belongs to the engine 'another', and this is 'this life'"),
    ],
    ids=["another world size", "another engine"],
)
async def test_a_rank_that_does_not_belong_here_is_left_out_and_named_with_the_reason(
    barrier: Barrier,
    caplog: pytest.LogCaptureFixture,
    changed: dict[str, Any],
    because: str,
) -> None:
    for rank in (0, 1, 3):
        await barrier.come(rank_record(rank))
    stranger = await barrier.come(rank_record(2, **changed))
    barrier.leader.start()
    await until(lambda: "did not report" in caplog.text, "the missing rank is named")
    (said,) = [one.getMessage() for one in caplog.records if "did not report" in one.getMessage()]
    assert "rank 2 of 4" in said
    assert because in said
    (left_out,) = [one.getMessage() for one in caplog.records if "left out" in one.getMessage()]
    assert because in left_out
    assert not barrier.leader.ready

    await stranger.leave()
    await barrier.come(rank_record(2))
    await until(lambda: barrier.leader.ready, "the right one takes its place")


async def test_a_rank_that_comes_back_with_other_memory_is_left_out_and_named(
    barrier: Barrier, caplog: pytest.LogCaptureFixture
) -> None:
    members = [await barrier.come(rank_record(rank)) for rank in range(WORLD_SIZE)]
    barrier.leader.start()
    await until(barrier.is_listed, "the node takes part")
    await members[1].leave()
    await until(lambda: not barrier.leader.visible, "a rank is missing")
    other = replace(rank_record(1).slab, layout="columns")
    stranger = await barrier.come(rank_record(1, agent="again/1", slab=other))
    await until(lambda: "left out" in caplog.text, "it is left out")
    assert "rank 1 of 4 (again/1) has come back with" in caplog.text
    assert "columns" in caplog.text
    assert barrier.leader.match("any", 0) == 0
    assert not await barrier.is_listed()

    await stranger.leave()
    await barrier.come(rank_record(1, agent="again/1"))
    # Nobody steps this engine, so nobody says that all are at rest; but who is meant is known.
    await until(
        lambda: barrier.leader.take_commands().fence > 0, "the one that fits takes its place"
    )


async def test_a_rank_that_leaves_the_directory_takes_the_node_with_it_and_brings_it_back(
    barrier: Barrier,
) -> None:
    members = [await barrier.come(rank_record(rank)) for rank in range(WORLD_SIZE)]
    barrier.leader.start()
    await until(barrier.is_listed, "the node takes part")
    before = barrier.leader.epoch
    await members[3].leave()

    async def is_gone() -> bool:
        return not await barrier.is_listed()

    await until(is_gone, "the node leaves, too")
    assert not barrier.leader.visible
    await barrier.come(rank_record(3))
    await until(barrier.is_listed, "it is back")
    assert barrier.leader.epoch > before
