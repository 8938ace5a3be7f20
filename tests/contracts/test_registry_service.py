"""The registry service, in memory and on a real nats-server."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import pytest

from kvbm_schemas.block import Tier, pack
from kvbm_schemas.codec import Decoder, Wire, encode
from kvbm_schemas.events import Beat, BlockEvent, Removed, Stored
from kvbm_schemas.message import Message
from kvbm_schemas.records import NodeRecord, RankRecord, SlabRecord
from kvbm_schemas.requests import (
    Holder,
    Locate,
    Located,
    Lookup,
    Placements,
    Segment,
    SnapshotChunk,
)
from kvbm_schemas.subjects import REGISTRY_NODE, Scope
from kvbm_service.adapters.bus import Bus, Delivery
from kvbm_service.adapters.directory import Directory, Membership
from kvbm_service.adapters.memory_bus import Hub, MemoryBus
from kvbm_service.adapters.memory_directory import MemoryDirectory, Records
from kvbm_service.adapters.nats_bus import NatsBus
from kvbm_service.adapters.nats_directory import NatsDirectory
from kvbm_service.adapters.nats_server import EmbeddedNats
from kvbm_service.registry_service import RegistryService
from tests.contracts.leases import LASTING_SECONDS

SCOPE = Scope("prod", "layout1")
CHAIN = [hashlib.md5(bytes([number])).digest() for number in range(8)]
ASK_SECONDS = 5.0
PATIENCE_SECONDS = 30.0

M = TypeVar("M", bound=Message)
Eventually = Callable[..., Awaitable[None]]


class World:
    """A bus and a directory that everyone gets an own connection to."""

    def __init__(self, server: EmbeddedNats | None) -> None:
        self._server = server
        self._hub, self._records = Hub(), Records(LASTING_SECONDS)
        self._closing = contextlib.AsyncExitStack()
        self._serving: dict[RegistryService, asyncio.Task[None]] = {}

    async def connect(self) -> tuple[Bus, Directory]:
        bus: MemoryBus | NatsBus
        directory: MemoryDirectory | NatsDirectory
        if self._server is None:
            bus, directory = MemoryBus(self._hub), MemoryDirectory(self._records)
        else:
            bus = await NatsBus.connect(self._server.url)
            directory = NatsDirectory(bus, lease_seconds=LASTING_SECONDS)
        self._closing.push_async_callback(bus.close)
        self._closing.push_async_callback(directory.close)
        return bus, directory

    async def serve(self) -> RegistryService:
        """Start a registry, and wait until it answers."""
        service = RegistryService(*await self.connect())
        self._serving[service] = asyncio.create_task(service.run())
        async with asyncio.timeout(PATIENCE_SECONDS):
            await service.ready.wait()
        return service

    async def stop(self, service: RegistryService) -> None:
        task = self._serving.pop(service)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    async def close(self) -> None:
        for service in list(self._serving):
            await self.stop(service)
        await self._closing.aclose()


@pytest.fixture(params=["memory", "nats"])
async def world(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[World]:
    with contextlib.ExitStack() as stack:
        server = None
        if request.param == "nats":
            server = stack.enter_context(EmbeddedNats(store_dir=tmp_path / "nats"))
        world = World(server)
        yield world
        await world.close()


class Leader:
    """A node that publishes events, and answers with its blocks when asked."""

    def __init__(self, bus: Bus, directory: Directory, name: str, scope: Scope) -> None:
        self.bus, self.name, self.scope = bus, name, scope
        self.epoch, self.seq, self.asked = 1, 0, 0
        self.held: list[bytes] = []
        self._directory = directory
        self._membership: Membership | None = None

    async def join(self) -> None:
        await self.bus.subscribe(self.scope.of(self.name, "snapshot"), self._answer)
        record = NodeRecord(node=self.name, epoch=self.epoch, world_size=1, block_bytes=1)
        self._membership = await self._directory.join(self._key, encode(record))

    async def leave(self) -> None:
        assert self._membership is not None
        await self._membership.leave()

    async def restart(self) -> None:
        """Begin a new life, as the same member, with nothing."""
        assert self._membership is not None
        self.epoch, self.seq, self.held = self.epoch + 1, 0, []
        record = NodeRecord(node=self.name, epoch=self.epoch, world_size=1, block_bytes=1)
        await self._membership.update(encode(record))

    async def store(self, blocks: list[bytes], *, lost: bool = False) -> None:
        self.held += blocks
        await self._publish(Stored, blocks, lost)

    async def remove(self, blocks: list[bytes], *, lost: bool = False) -> None:
        self.held = [block for block in self.held if block not in blocks]
        await self._publish(Removed, blocks, lost)

    async def beat(self) -> None:
        await self.send(Beat(epoch=self.epoch, seq=self.seq))

    async def send(self, event: BlockEvent) -> None:
        await self.bus.publish(self.scope.of(self.name, "events"), encode(event))

    @property
    def _key(self) -> str:
        return ".".join((*self.scope, self.name))

    async def _publish(
        self, kind: type[Stored] | type[Removed], blocks: list[bytes], lost: bool
    ) -> None:
        self.seq += 1
        if not lost:
            await self.send(
                kind(epoch=self.epoch, seq=self.seq, tier=Tier.HOST, hashes=pack(blocks))
            )

    async def _answer(self, delivery: Delivery) -> None:
        self.asked += 1
        total = max(1, -(-len(self.held) // 3))
        for index in range(total):
            chunk = SnapshotChunk(
                epoch=self.epoch,
                seq=self.seq,
                index=index,
                total=total,
                tier=Tier.HOST,
                hashes=pack(self.held[3 * index : 3 * index + 3]),
            )
            await self.bus.publish(delivery.reply, encode(chunk))


class Asker:
    """Someone who asks the registry."""

    def __init__(self, bus: Bus, scope: Scope = SCOPE) -> None:
        self.bus, self._scope = bus, scope

    async def ask(self, what: str, question: Message, answer: type[M]) -> M:
        subject = self._scope.of(REGISTRY_NODE, what)
        payload = await self.bus.request(subject, encode(question), ASK_SECONDS)
        return Decoder(answer).decode(payload)

    async def lookup(self, asker: str = "") -> tuple[Segment, ...]:
        lookup = Lookup(hashes=pack(CHAIN), asker=asker)
        return (await self.ask("lookup", lookup, Located)).segments

    async def sees(self, *expected: Segment, asker: str = "") -> None:
        """Ask until the answer is this."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while (answer := await self.lookup(asker)) != expected:
            assert time.monotonic() < deadline, f"still {answer}"
            await asyncio.sleep(0.01)


def held(node: str, start: int, count: int) -> Segment:
    return Segment(node=node, tier=Tier.HOST, start=start, count=count)


async def leader(world: World, name: str, scope: Scope = SCOPE) -> Leader:
    one = Leader(*await world.connect(), name, scope)
    await one.join()
    return one


async def asker(world: World, scope: Scope = SCOPE) -> Asker:
    bus, _ = await world.connect()
    return Asker(bus, scope)


async def live(service: RegistryService, nodes: int, eventually: Eventually) -> None:
    """Wait until the registry knows this many nodes, and nothing of them is missing."""
    await eventually(
        lambda: (service.status().nodes, service.status().syncing) == (nodes, 0),
        PATIENCE_SECONDS,
    )


async def test_what_leaders_publish_is_looked_up(world: World, eventually: Eventually) -> None:
    service, a, b = await world.serve(), await leader(world, "a"), await leader(world, "b")
    await live(service, 2, eventually)
    await a.store(CHAIN[:3])
    await b.store(CHAIN[2:5])
    me = await asker(world)
    await me.sees(held("a", 0, 3), held("b", 3, 2))
    await me.sees(asker="a")
    assert await me.ask("locate", Locate(hashes=pack(CHAIN[1:3])), Placements) == Placements(
        holders=(
            (Holder(node="a", tier=Tier.HOST),),
            (Holder(node="a", tier=Tier.HOST), Holder(node="b", tier=Tier.HOST)),
        )
    )
    await a.remove(CHAIN[1:2])
    await me.sees(held("a", 0, 1))


async def test_a_registry_that_starts_late_learns_everything(world: World) -> None:
    a = await leader(world, "a")
    await a.store(CHAIN)
    await world.serve()
    await (await asker(world)).sees(held("a", 0, 8))


async def test_a_registry_that_was_stopped_is_replaced_by_a_new_one(world: World) -> None:
    service, a, me = await world.serve(), await leader(world, "a"), await asker(world)
    await a.store(CHAIN)
    await me.sees(held("a", 0, 8))
    await world.stop(service)
    await world.serve()
    await me.sees(held("a", 0, 8))


async def test_registries_share_the_questions(world: World, eventually: Eventually) -> None:
    services = [await world.serve(), await world.serve()]
    a, me = await leader(world, "a"), await asker(world)
    for service in services:
        await live(service, 1, eventually)
    await a.store(CHAIN)
    await me.sees(held("a", 0, 8))
    before = [service.status().counts.lookups for service in services]
    for _ in range(40):
        await me.lookup()
    shares = [service.status().counts.lookups for service in services]
    assert sum(shares) - sum(before) == 40
    assert all(after > earlier for after, earlier in zip(shares, before, strict=True))


async def test_a_lost_event_is_healed_by_the_next_one(world: World, eventually: Eventually) -> None:
    service, a, me = await world.serve(), await leader(world, "a"), await asker(world)
    await live(service, 1, eventually)
    await a.store(CHAIN[:2], lost=True)
    await a.store(CHAIN[2:6])
    await me.sees(held("a", 0, 6))


async def test_a_lost_last_event_is_healed_by_a_beat(world: World, eventually: Eventually) -> None:
    service, a, me = await world.serve(), await leader(world, "a"), await asker(world)
    await live(service, 1, eventually)
    await a.store(CHAIN)
    await a.remove(CHAIN[4:], lost=True)
    await a.beat()
    await me.sees(held("a", 0, 4))


async def test_a_node_that_leaves_loses_its_blocks(world: World) -> None:
    service, a, me = await world.serve(), await leader(world, "a"), await asker(world)
    await a.store(CHAIN)
    await me.sees(held("a", 0, 8))
    await a.leave()
    await me.sees()
    assert (service.status().nodes, service.status().scopes) == (0, 0)


async def test_a_node_that_restarts_loses_its_old_blocks(world: World) -> None:
    await world.serve()
    a, me = await leader(world, "a"), await asker(world)
    await a.store(CHAIN)
    await me.sees(held("a", 0, 8))
    await a.restart()
    await a.store(CHAIN[:1])
    await me.sees(held("a", 0, 1))


async def test_scopes_are_kept_apart(world: World) -> None:
    await world.serve()
    a, b = await leader(world, "a"), await leader(world, "a", Scope("prod", "layout2"))
    await a.store(CHAIN[:2])
    await b.store(CHAIN)
    await (await asker(world)).sees(held("a", 0, 2))
    await (await asker(world, b.scope)).sees(held("a", 0, 8))
    await (await asker(world, Scope("nobody", "here"))).sees()


async def test_who_is_not_in_the_directory_is_not_believed(
    world: World, eventually: Eventually
) -> None:
    service, me = await world.serve(), await asker(world)
    stranger = Leader(*await world.connect(), "stranger", SCOPE)
    await stranger.store(CHAIN)
    await eventually(lambda: service.status().counts.unknown_sender == 1)
    assert await me.lookup() == ()


async def test_malformed_messages_change_nothing_are_counted_and_logged_once(
    world: World, eventually: Eventually, caplog: pytest.LogCaptureFixture
) -> None:
    service, a, me = await world.serve(), await leader(world, "a"), await asker(world)
    await a.store(CHAIN)
    await me.sees(held("a", 0, 8))
    garbage = [
        b"",
        b"\xc1",
        b"{",
        b'{"type":"stored"}',
        os.urandom(100),
        encode(Lookup(hashes=b"")),
    ]
    with caplog.at_level(logging.WARNING):
        for what in ("a.events", f"{REGISTRY_NODE}.lookup", f"{REGISTRY_NODE}.locate"):
            node, kind = what.split(".")
            payloads = garbage[:-1] if kind == "lookup" else garbage
            for payload in payloads[: 5 if kind == "locate" else None]:
                await me.bus.publish(SCOPE.of(node, kind), payload, reply="_INBOX.nowhere")
        await eventually(lambda: service.status().counts.malformed >= 16)
    assert service.status().counts.malformed == 16
    complaints = [each for each in caplog.records if "malformed" in each.message]
    assert len(complaints) == 3
    await me.sees(held("a", 0, 8))


async def test_malformed_records_are_ignored(world: World, eventually: Eventually) -> None:
    service, a = await world.serve(), await leader(world, "a")
    _, directory = await world.connect()
    other = NodeRecord(node="b", epoch=1, world_size=1, block_bytes=1)
    slab = SlabRecord(base=0, headers=0, slots=1, slot_bytes=1, header_bytes=32)
    rank = RankRecord(node="a", rank=0, world_size=1, agent="a", agent_metadata=b"", slab=slab)
    await directory.join("prod.layout1.c", b"\xc1")
    await directory.join("prod.layout1.d", encode(other))
    await directory.join("prod.layout1.e", encode(rank))
    await directory.join("prod.layout1", encode(other))
    await directory.join(f"prod.layout1.{REGISTRY_NODE}", encode(other))
    await eventually(lambda: service.status().counts.malformed == 5)
    await directory.join("prod.layout1.a.0", encode(rank))
    b = await leader(world, "b")
    await live(service, 2, eventually)
    assert (a.name, b.name) == ("a", "b")
    assert service.status().counts.malformed == 5


async def test_a_malformed_snapshot_changes_nothing_and_is_asked_for_again(
    world: World, eventually: Eventually
) -> None:
    service, a = await world.serve(), Leader(*await world.connect(), "a", SCOPE)
    answer, a.held = a._answer, CHAIN[:]
    refused = 0

    async def refuse_once(delivery: Delivery) -> None:
        nonlocal refused
        refused += 1
        if refused == 1:
            await a.bus.publish(delivery.reply, b"\xc1")
        else:
            await answer(delivery)

    a._answer = refuse_once  # type: ignore[method-assign]
    await a.join()
    await (await asker(world)).sees(held("a", 0, 8))
    assert service.status().counts.malformed == 1


async def test_leaders_that_write_json_are_understood(world: World, eventually: Eventually) -> None:
    service, a, me = await world.serve(), await leader(world, "a"), await asker(world)
    await live(service, 1, eventually)
    event = Stored(epoch=1, seq=1, tier=Tier.HOST, hashes=pack(CHAIN))
    await a.bus.publish(SCOPE.of("a", "events"), encode(event, Wire.JSON))
    await me.sees(held("a", 0, 8))


async def test_an_answer_too_large_for_a_message_is_not_sent(
    world: World, eventually: Eventually
) -> None:
    service, a, me = await world.serve(), await leader(world, "a" * 64), await asker(world)
    await live(service, 1, eventually)
    await a.store(CHAIN)
    await me.sees(held("a" * 64, 0, 8))
    many = Locate(hashes=pack(CHAIN) * 4_000)
    await me.bus.publish(SCOPE.of(REGISTRY_NODE, "locate"), encode(many), reply="_INBOX.nowhere")
    await eventually(lambda: service.status().counts.oversized_answers == 1)
    await me.sees(held("a" * 64, 0, 8))


async def test_more_nodes_than_are_asked_at_once_are_all_learned(world: World) -> None:
    bus, directory = await world.connect()
    leaders = [Leader(bus, directory, f"n{number}", SCOPE) for number in range(40)]
    for each in leaders:
        each.held = CHAIN[:1]
        await each.join()
    service = await world.serve()
    deadline = time.monotonic() + PATIENCE_SECONDS
    while service.status().copies < len(leaders):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)
    assert [each.asked for each in leaders] == [1] * len(leaders)


async def test_a_stopped_registry_leaves_no_task_behind(world: World) -> None:
    service, a = await world.serve(), await leader(world, "a")
    await a.store(CHAIN)
    await (await asker(world)).sees(held("a", 0, 8))
    before = asyncio.all_tasks()
    task = world._serving[service]
    await world.stop(service)
    assert task.cancelled()
    after = asyncio.all_tasks()
    assert after <= before
    patterns = ("*.events", "registry.lookup", "registry.locate")
    for pattern in patterns:
        assert any(each.get_name().endswith(pattern) for each in before - after)
        assert not any(each.get_name().endswith(pattern) for each in after)
