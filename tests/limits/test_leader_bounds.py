"""A leader's own queues, at their bounds, on a real NATS server."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from kvbm_schemas.block import BlockHash, pack
from kvbm_schemas.codec import Decoder, Malformed, encode
from kvbm_schemas.events import Stored
from kvbm_schemas.records import RankRecord, SlabRecord
from kvbm_schemas.requests import Locate, Placements
from kvbm_schemas.step import Moved, StepResults
from kvbm_schemas.subjects import REGISTRY_NODE, Scope
from kvbm_service import leader_bus, leader_service
from kvbm_service.adapters.bus import Delivery
from kvbm_service.adapters.nats_bus import NatsBus
from kvbm_service.adapters.nats_server import EmbeddedNats
from kvbm_service.core import leader as leader_core
from kvbm_service.leader_service import LeaderService
from kvbm_service.network import over_nats
from kvbm_service.settings import Settings
from tests.limits.registry_process import RegistryProcess
from tests.patience import eventually

SCOPE = Scope("default", "0123456789abcdef")
NODE = "node"
HEAL_SECONDS = 15.0
_placements = Decoder(Placements)
_stored = Decoder(Stored)


def block(number: int) -> BlockHash:
    return BlockHash(number.to_bytes(16, "big"))


Make = Callable[..., LeaderService]


@pytest.fixture
async def make_leader(nats_server: EmbeddedNats) -> AsyncIterator[Make]:
    leaders: list[LeaderService] = []

    def make(events: bool = False, **settings: Any) -> LeaderService:
        chosen = Settings(nats_url=nats_server.url, **settings)
        connect = over_nats(chosen, "leader")
        leader = LeaderService(
            chosen, SCOPE, NODE, 1, connect, instance="this", engine_wants_events=events
        )
        slab = SlabRecord(base=0, headers=0, slots=64, slot_bytes=64, header_bytes=32)
        record = RankRecord(
            node=NODE, rank=0, world_size=1, agent="this/0", agent_metadata=b"", slab=slab,
            device_blocks=64, instance="this",
        )  # fmt: skip
        leader.attach(record)
        leader.start()
        leaders.append(leader)
        return leader

    yield make
    for leader in leaders:
        await asyncio.to_thread(leader.close)


def save(leader: LeaderService, number: int) -> None:
    """One step of the engine, in which one block is saved."""
    leader.store("request", None, [block(number)], [0])
    (order,) = leader.take_commands().saves
    leader.report([StepResults(rank=0, moved=(Moved(op=order.op),))])


async def test_events_beyond_a_full_queue_are_dropped_their_numbers_are_used_and_it_is_healed(
    nats_server: EmbeddedNats,
    registry: RegistryProcess,
    make_leader: Make,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(leader_bus, "MAX_OUTGOING", 3)
    leader = make_leader()
    await registry.until(lambda status: status["counts"]["snapshots"] == 1, HEAL_SECONDS)
    bus, heard = await NatsBus.connect(nats_server.url), list[int]()

    async def hear(delivery: Delivery) -> None:
        with contextlib.suppress(Malformed):  # a beat
            heard.append(_stored.decode(delivery.payload).seq)

    await bus.subscribe(SCOPE.of(NODE, "events"), hear)
    held_up = threading.Event()
    leader._loop.call(held_up.wait)  # the loop is away
    for number in range(10):
        save(leader, number)
    assert leader.on_core(lambda core: core.journal.seq, 0) == 10
    held_up.set()
    await asyncio.to_thread(save, leader, 10)
    await eventually(lambda: heard)
    locate = encode(Locate(hashes=pack(block(number) for number in range(11))))
    deadline = time.monotonic() + HEAL_SECONDS
    while True:
        reply = await bus.request(SCOPE.of(REGISTRY_NODE, "locate"), locate, HEAL_SECONDS)
        if all(_placements.decode(reply).holders):
            break
        assert time.monotonic() < deadline, "not healed"
        await asyncio.sleep(0.05)
    await bus.close()
    assert len(heard) < 11, "some were dropped"
    assert heard == sorted(heard)
    status = await registry.status()
    assert status["counts"]["snapshots"] >= 2, "the gap was seen"


async def test_beyond_so_many_questions_a_request_is_computed_at_once(
    registry: RegistryProcess, make_leader: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leader_bus, "MAX_QUESTIONS", 0)
    leader = make_leader(lookup_deadline_seconds=60.0)
    await eventually(lambda: leader.on_core(lambda core: core.peers.online, False))
    leader.arrive("request", [block(1)])
    began = time.monotonic()
    await eventually(lambda: leader.match("request", 0) == 0)
    assert time.monotonic() - began < 30.0, "it does not wait for its deadline"


async def test_the_engines_own_events_are_the_newest_when_it_does_not_take_them(
    make_leader: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leader_service, "MAX_ENGINE_EVENTS", 3)
    leader = make_leader(events=True)
    for number in range(5):
        save(leader, number)
    events = [event for event in leader.take_engine_events() if isinstance(event, Stored)]
    assert [event.hashes for event in events] == [block(number) for number in (2, 3, 4)]
    assert leader.take_engine_events() == []


async def test_a_leader_names_so_many_subjects_of_nonsense_and_counts_all(
    make_leader: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(leader_bus, "MAX_SUBJECTS_LOGGED", 3)
    leader = make_leader()
    with caplog.at_level(logging.WARNING, "kvbm_service"):
        for number in range(10):
            leader._bus_side._reject(f"subject.{number}", Malformed("nonsense"))
            leader._bus_side._reject("subject.0", Malformed("nonsense"))
    assert leader.rejected == 20
    assert caplog.text.count("nonsense") == 3


async def test_loads_given_up_are_told_of_the_newest_when_the_engine_takes_none(
    make_leader: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leader_core, "MAX_LOST_LOADS", 2)
    leader = make_leader()

    def lose(core: leader_core.Leader) -> list[str]:
        for number in range(5):
            core._tell_lost(number, f"r{number}", [number])
        return [lost.request for lost in core._lost_loads]

    assert leader.on_core(lose, []) == ["r3", "r4"]
