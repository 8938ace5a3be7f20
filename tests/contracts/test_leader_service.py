"""The leader's shell on a real NATS server: how it meets its ranks, and has them fetch blocks."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable

import pytest

from kvbm_schemas.block import BlockHash, Tier, pack
from kvbm_schemas.codec import Decoder, encode
from kvbm_schemas.records import RankRecord, SlabRecord
from kvbm_schemas.requests import Acquire, LeaseAnswer, Leased, Refused
from kvbm_schemas.step import Fetch, Moved, StepResults, Survivors
from kvbm_schemas.subjects import Scope
from kvbm_service.adapters.directory import Membership
from kvbm_service.adapters.nats_server import EmbeddedNats
from kvbm_service.core.columns import pack_u32, pack_u64, unpack_u32
from kvbm_service.errors import LayoutError, NoAnswer
from kvbm_service.leader_service import LeaderService
from kvbm_service.network import Network, over_nats
from kvbm_service.settings import Settings
from kvbm_service.worker_bus import CarryOut, WorkerBus
from tests.patience import eventually, until

SCOPE = Scope("default", "0123456789abcdef")
NODE = "node"
DEADLINE_SECONDS = 30.0
_answers: Decoder[LeaseAnswer] = Decoder(LeaseAnswer)  # type: ignore[arg-type]


CHAIN = [BlockHash(bytes([number]) * 16) for number in range(1, 4)]


def rank_record(
    rank: int = 0, world_size: int = 1, instance: str = "this", slots: int = 8, disk_slots: int = 0
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
        disk_slots=disk_slots,
    )


def found(tier: Tier, blocks: int) -> Survivors:
    """A rank has so many blocks of the chain, of an earlier life."""
    return Survivors(
        tier=tier,
        hashes=pack(CHAIN[:blocks]),
        fills=pack_u64(range(1, blocks + 1)),
        slots=pack_u32(range(blocks)),
    )


class Meeting:
    """A directory in which ranks can be put, and leaders of one node."""

    def __init__(self, url: str, network: Network) -> None:
        self._url = url
        self._network = network
        self._leaders: list[LeaderService] = []
        self._ranks: list[asyncio.Task[None]] = []

    async def put(self, record: RankRecord) -> Membership:
        """List a rank."""
        key = ".".join([*SCOPE, record.node, str(record.rank)])
        return await self._network.directory.join(key, encode(record))

    def leader(
        self,
        world_size: int = 1,
        timeout_seconds: float = 1800.0,
        staging_seconds: float = DEADLINE_SECONDS,
    ) -> LeaderService:
        """A leader of this life."""
        settings = Settings(
            nats_url=self._url,
            leader_worker_init_timeout_seconds=timeout_seconds,
            staging_deadline_seconds=staging_seconds,
        )
        leader = LeaderService(
            settings, SCOPE, NODE, world_size, over_nats(settings, "leader"), instance="this"
        )
        self._leaders.append(leader)
        leader.start()
        return leader

    async def rank(
        self,
        record: RankRecord,
        carry_out: CarryOut,
        expect_readers: Callable[[float], object] = lambda seconds: None,
    ) -> None:
        """A rank that listens, and is listed."""
        connect = over_nats(Settings(nats_url=self._url), f"rank {record.rank}")
        worker = WorkerBus(record, SCOPE, connect, carry_out, expect_readers)
        self._ranks.append(asyncio.create_task(worker.run()))
        key = ".".join([*SCOPE, record.node, str(record.rank)])
        deadline = time.monotonic() + DEADLINE_SECONDS
        while not await self._network.directory.entries(key):
            assert time.monotonic() < deadline, "the rank is not listed"
            await asyncio.sleep(0.01)

    async def ask_for_lease(self, blocks: int) -> LeaseAnswer:
        """What the node answers to another one, once it takes part."""
        subject, payload = SCOPE.of(NODE, "lease"), encode(Acquire(hashes=pack(CHAIN[:blocks])))
        deadline = time.monotonic() + DEADLINE_SECONDS
        while True:
            try:
                reply = await self._network.bus.request(subject, payload, DEADLINE_SECONDS)
                return _answers.decode(reply)
            except NoAnswer:
                assert time.monotonic() < deadline, "the node does not answer"
                await asyncio.sleep(0.01)

    async def close(self) -> None:
        """End everyone."""
        for leader in self._leaders:
            leader.close()
        for rank in self._ranks:
            rank.cancel()
        await asyncio.gather(*self._ranks, return_exceptions=True)


@pytest.fixture
async def meeting() -> AsyncIterator[Meeting]:
    with EmbeddedNats() as server:
        network = await over_nats(Settings(nats_url=server.url), "test")()
        meeting = Meeting(server.url, network)
        yield meeting
        await meeting.close()
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
    assert leader.on_core(lambda core: core.tiers.host.capacity, 0) == 8


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


# -- what an earlier life has left -------------------------------------------------------------


def held(leader: LeaderService) -> dict[Tier, set[BlockHash]]:
    """What the node's own snapshot says."""
    _, tiers = leader.on_core(lambda core: core.snapshot(), (None, []))
    return {tier: set(blocks) for tier, blocks in tiers}


async def test_blocks_that_all_ranks_have_found_again_are_taken_over(meeting: Meeting) -> None:
    leader = meeting.leader(world_size=2)
    record = [rank_record(rank, 2, disk_slots=8) for rank in range(2)]
    leader.attach(record[0], [found(Tier.HOST, 3), found(Tier.DISK, 2)])
    leader.attach(record[1], [found(Tier.HOST, 1), found(Tier.DISK, 3)])
    assert held(leader) == {Tier.HOST: set(CHAIN[:1]), Tier.DISK: set(CHAIN[:2])}


async def test_ranks_may_be_known_before_they_say_what_they_have_found(meeting: Meeting) -> None:
    """They are listed in the directory; the engine's own channel brings the rest."""
    leader = meeting.leader(world_size=2)
    records = [rank_record(rank, 2, disk_slots=8) for rank in range(2)]
    for record in records:
        await meeting.put(record)
    until(lambda: leader.ready, "the leader has met its ranks")
    leader.attach(records[0], [found(Tier.HOST, 2), found(Tier.DISK, 3)])
    assert held(leader) == {Tier.HOST: set(), Tier.DISK: set()}
    leader.attach(records[1], [found(Tier.HOST, 2), found(Tier.DISK, 2)])
    assert held(leader) == {Tier.HOST: set(CHAIN[:2]), Tier.DISK: set(CHAIN[:2])}


# -- blocks on disk, for another node ----------------------------------------------------------


async def test_ranks_fetch_what_another_node_wants_without_the_engines_step(
    meeting: Meeting,
) -> None:
    leader = meeting.leader(world_size=2)
    told: list[tuple[int, Fetch]] = []
    for rank in range(2):
        record = rank_record(rank, 2, disk_slots=8)

        def fetch(command: Fetch, tell: Callable[[Moved], None], rank: int = rank) -> bool:
            told.append((rank, command))
            tell(Moved(op=command.op))
            return True

        await meeting.rank(record, fetch)
        leader.attach(record, [found(Tier.HOST, 0), found(Tier.DISK, 3)])
    answer = await meeting.ask_for_lease(3)
    assert isinstance(answer, Leased)
    assert len(unpack_u32(answer.slots)) == 3
    assert sorted(rank for rank, _ in told) == [0, 1]
    assert told[0][1] == told[1][1]
    assert not leader.busy


async def test_ranks_hear_of_readers_before_these_have_their_lease_and_not_each_time(
    meeting: Meeting,
) -> None:
    leader = meeting.leader(world_size=2)
    told: list[float] = []
    for rank in range(2):
        record = rank_record(rank, 2)
        await meeting.rank(record, lambda _order, _tell: False, told.append)
        leader.attach(record, [found(Tier.HOST, 3)])
    assert isinstance(await meeting.ask_for_lease(3), Leased)
    await eventually(lambda: len(told) == 2)
    assert min(told) > leader.settings.lease_seconds + leader.settings.transfer_timeout_seconds
    assert isinstance(await meeting.ask_for_lease(3), Leased)
    await asyncio.sleep(0.2)
    assert len(told) == 2, "they know already"


async def test_a_rank_that_says_nothing_is_told_again_with_the_engines_step(
    meeting: Meeting,
) -> None:
    leader = meeting.leader(staging_seconds=0.2)
    record = rank_record(disk_slots=8)
    deaf: list[Fetch] = []

    def leave(fetch: Fetch, _tell: Callable[[Moved], None]) -> bool:
        deaf.append(fetch)
        return False

    await meeting.rank(record, leave)
    leader.attach(record, [found(Tier.HOST, 0), found(Tier.DISK, 3)])
    answer = await meeting.ask_for_lease(3)
    assert isinstance(answer, Refused), "whoever asked is not kept waiting"

    until(lambda: leader.busy, "the engine is to take a step")
    assert len(deaf) == 1
    assert leader.take_commands().fetches == tuple(deaf)
    results = StepResults(rank=0, moved=(Moved(op=deaf[0].op),))
    leader.report([results])
    assert held(leader)[Tier.HOST] == set(CHAIN)
    assert isinstance(await meeting.ask_for_lease(3), Leased)
