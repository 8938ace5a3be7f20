"""The leader's shell on a real NATS server: how it meets its ranks."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Callable

import pytest

from kvbm_schemas.codec import encode
from kvbm_schemas.records import RankRecord, SlabRecord
from kvbm_schemas.subjects import Scope
from kvbm_service.adapters.directory import Membership
from kvbm_service.adapters.nats_server import EmbeddedNats
from kvbm_service.errors import LayoutError
from kvbm_service.leader_service import LeaderService
from kvbm_service.network import Network, over_nats
from kvbm_service.settings import Settings

SCOPE = Scope("default", "0123456789abcdef")
NODE = "node"
DEADLINE_SECONDS = 30.0


def rank_record(
    rank: int = 0, world_size: int = 1, instance: str = "this", slots: int = 8
) -> RankRecord:
    """What a rank says of itself."""
    slab = SlabRecord(base=0, headers=0, slots=slots, slot_bytes=64, header_bytes=32)
    return RankRecord(
        node=NODE,
        rank=rank,
        world_size=world_size,
        agent=f"{instance}/{rank}",
        agent_metadata=b"",
        slab=slab,
        device_blocks=8,
        instance=instance,
    )


def until(is_so: Callable[[], object], what: str) -> None:
    """Wait for something that has to come about."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not is_so():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


class Meeting:
    """A directory in which ranks can be put, and leaders of one node."""

    def __init__(self, url: str, network: Network) -> None:
        self._url = url
        self._network = network
        self._leaders: list[LeaderService] = []

    async def put(self, record: RankRecord) -> Membership:
        """List a rank."""
        key = ".".join([*SCOPE, record.node, str(record.rank)])
        return await self._network.directory.join(key, encode(record))

    def leader(self, world_size: int = 1, timeout_seconds: float = 1800.0) -> LeaderService:
        """A leader of this life."""
        settings = Settings(
            nats_url=self._url, leader_worker_init_timeout_seconds=timeout_seconds
        )
        leader = LeaderService(
            settings, SCOPE, NODE, world_size, over_nats(settings, "leader"), instance="this"
        )
        self._leaders.append(leader)
        leader.start()
        return leader

    def close(self) -> None:
        """End every leader."""
        for leader in self._leaders:
            leader.close()


@pytest.fixture
async def meeting() -> AsyncIterator[Meeting]:
    with EmbeddedNats() as server:
        network = await over_nats(Settings(nats_url=server.url), "test")()
        meeting = Meeting(server.url, network)
        yield meeting
        meeting.close()
        await network.bus.close()


async def test_a_leader_meets_its_ranks_in_the_directory(meeting: Meeting) -> None:
    leader = meeting.leader(world_size=2)
    await meeting.put(rank_record(0, 2))
    assert not leader.ready
    await meeting.put(rank_record(1, 2))
    until(lambda: leader.ready, "the leader has met both ranks")


async def test_a_rank_of_an_earlier_life_is_not_taken_for_one_of_this(
    meeting: Meeting, caplog: pytest.LogCaptureFixture
) -> None:
    await meeting.put(rank_record(0, 2, instance="earlier", slots=100))
    await meeting.put(rank_record(1, 2))
    with caplog.at_level(logging.ERROR, "kvbm_service"):
        leader = meeting.leader(world_size=2, timeout_seconds=1.0)
        until(lambda: "rank 0 of 2 did not report" in caplog.text, "only rank 1 has reported")
    leader.attach(rank_record(0, 2))
    assert leader.ready
    assert leader.on_core(lambda core: core.pool.capacity, 0) == 8


async def test_a_leader_says_which_ranks_are_missing_when_their_time_is_up(
    meeting: Meeting, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR, "kvbm_service"):
        leader = meeting.leader(world_size=3, timeout_seconds=0.5)
        leader.attach(rank_record(1, 3))
        until(lambda: "rank 0, 2 of 3 did not report" in caplog.text, "it names them")
    assert "DYN_KVBM_LEADER_WORKER_INIT_TIMEOUT_SECS" in caplog.text
    assert leader.match("any", 0) == 0, "the engine is served without a cache"


async def test_a_rank_of_an_engine_of_another_size_is_refused(meeting: Meeting) -> None:
    leader = meeting.leader(world_size=2)
    with pytest.raises(LayoutError, match="same parallel sizes"):
        leader.attach(rank_record(0, 4))
