"""A leader's event loop that fails by a bug of ours: nobody waits for what it was doing."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator

import pytest

from kvbm_schemas.block import BlockHash
from kvbm_schemas.records import RankRecord, SlabRecord
from kvbm_schemas.subjects import Scope
from kvbm_service.adapters.nats_server import EmbeddedNats
from kvbm_service.leader_service import LeaderService
from kvbm_service.network import over_nats
from kvbm_service.settings import Settings
from tests.connectors.cluster import SilentRegistry
from tests.patience import until

SCOPE = Scope("failures", "0123456789abcdef")
CHAIN = [BlockHash(bytes([number]) * 16) for number in range(1, 4)]
DEADLINE_SECONDS = 60.0
"""Of a lookup: nobody should wait that long when the question is lost."""


@pytest.fixture
def leader(nats: EmbeddedNats) -> Iterator[LeaderService]:
    settings = Settings(nats_url=nats.url, lookup_deadline_seconds=DEADLINE_SECONDS)
    connect = over_nats(settings, "leader", "node")
    leader = LeaderService(settings, SCOPE, "node", 1, connect, instance="this")
    slab = SlabRecord(base=0, headers=0, slots=8, slot_bytes=64, header_bytes=32)
    leader.attach(
        RankRecord(
            node="node", rank=0, world_size=1, agent="agent", agent_metadata=b"", slab=slab,
            device_blocks=8, instance="this",
        )
    )  # fmt: skip
    leader.start()
    until(lambda: leader.on_core(lambda core: core.peers.online, False), "it is online")
    yield leader
    leader.close()


def fail(leader: LeaderService) -> None:
    """Let the loop meet a bug."""

    async def bug() -> None:
        raise RuntimeError("a bug of ours")

    def meet_it() -> None:
        tasks = leader._bus_side._tasks
        assert isinstance(tasks, asyncio.TaskGroup)
        tasks.create_task(bug())

    leader._loop.call(meet_it)


def test_questions_of_a_failing_loop_count_as_unanswered_at_once_and_it_starts_again(
    leader: LeaderService, nats: EmbeddedNats, caplog: pytest.LogCaptureFixture
) -> None:
    with SilentRegistry(nats.url) as registry, caplog.at_level(logging.ERROR, "kvbm_service"):
        leader.arrive("a request", CHAIN)
        until(lambda: registry.asked, "the registry is asked")
        assert leader.match("a request", 0) is None
        began = time.monotonic()
        fail(leader)
        until(lambda: leader.match("a request", 0) == 0, "the request is computed")
        assert time.monotonic() - began < DEADLINE_SECONDS / 4
        leader.finish("a request")
        until(lambda: "kvbm-leader failed" in caplog.text)

        registry.asked.clear()
        until(lambda: leader.on_core(lambda core: core.peers.online, False), "it is back")
        leader.arrive("another one", CHAIN)
        until(lambda: registry.asked, "the registry is asked again")
        registry.answer()
        until(lambda: leader.match("another one", 0) == 0)
