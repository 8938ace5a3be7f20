"""What may wait on a bus or in a directory, at its bound."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from msgspec.structs import replace
from nats.aio.msg import Msg

from kvbm_schemas.codec import encode
from kvbm_schemas.records import RankRecord, SlabRecord
from kvbm_schemas.step import Fetch, Lend, Moved
from kvbm_schemas.subjects import Scope, rank_what
from kvbm_service import registry_service
from kvbm_service.adapters import (
    leased_records,
    mailbox,
    memory_directory,
    nats_bus,
    nats_directory,
    nats_login,
)
from kvbm_service.adapters.bus import Delivery, Troubles
from kvbm_service.adapters.directory import Change
from kvbm_service.adapters.leased_records import LeasedRecords
from kvbm_service.adapters.mailbox import Mailbox, Question
from kvbm_service.adapters.memory_bus import Hub, MemoryBus
from kvbm_service.adapters.memory_directory import MemoryDirectory, Records
from kvbm_service.adapters.nats_bus import NatsBus
from kvbm_service.adapters.nats_directory import NatsDirectory
from kvbm_service.adapters.nats_login import parse_login
from kvbm_service.adapters.nats_server import EmbeddedNats
from kvbm_service.errors import DirectoryError, NoAnswer, SettingError
from kvbm_service.network import Network
from kvbm_service.registry_service import RegistryService
from kvbm_service.worker_bus import MAX_UNANSWERED, WorkerBus
from tests.patience import eventually

LEASE_SECONDS = 1.5


# -- the bus -------------------------------------------------------------------------------


async def test_few_but_large_messages_are_dropped_as_well(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(mailbox, "MAX_WAITING_BYTES", 100)
    gate, heard, troubles = asyncio.Event(), list[int](), Troubles()

    async def slow(delivery: Delivery) -> None:
        await gate.wait()
        heard.append(len(delivery.payload))

    box = Mailbox("s", slow, troubles)
    for _ in range(5):
        box.put(Delivery("s", bytes(40)))
    gate.set()
    await eventually(lambda: len(heard) == 2)
    box.put(Delivery("s", bytes(100)))
    await eventually(lambda: heard == [40, 40, 100])
    await box.close()
    assert troubles.dropped == 3
    assert caplog.text.count("dropping some") == 1


@pytest.mark.parametrize(
    ("constant", "limit"), [("MAX_WAITING_ANSWERS", 2), ("MAX_WAITING_ANSWER_BYTES", 9)]
)
async def test_answers_that_nobody_reads_are_dropped_and_that_is_logged_once(
    constant: str, limit: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(mailbox, constant, limit)
    question = Question("_INBOX.1", "who")
    for _ in range(5):
        question.put(b"four")
    assert [await question.answer(1.0), await question.answer(1.0)] == [b"four", b"four"]
    with pytest.raises(NoAnswer):
        await question.answer(0.01)
    question.put(b"five")
    assert await question.answer(1.0) == b"five", "there is room again"
    assert caplog.text.count("dropping some") == 1


async def test_complaints_of_a_server_are_all_counted_and_so_many_are_logged(
    nats_server: EmbeddedNats, caplog: pytest.LogCaptureFixture
) -> None:
    bus = await NatsBus.connect(nats_server.url)
    with caplog.at_level(logging.WARNING, "kvbm_service"):
        for number in range(nats_bus.MAX_COMPLAINTS_LOGGED + 10):
            bus._complain(ValueError(f"complaint {number}"))
            bus._complain(ValueError("complaint 0"))
    await bus.close()
    assert caplog.text.count("complaint") == nats_bus.MAX_COMPLAINTS_LOGGED
    assert bus.troubles.errors == 2 * (nats_bus.MAX_COMPLAINTS_LOGGED + 10)


def test_a_credentials_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "huge"
    file.write_bytes(bytes(nats_login.MAX_CREDENTIALS_BYTES + 1))
    with pytest.raises(SettingError, match="KVBM_NATS_CREDENTIALS"):
        parse_login("nats://x", str(file))


# -- the directory -------------------------------------------------------------------------


@pytest.fixture
async def directory() -> AsyncIterator[MemoryDirectory]:
    directory = MemoryDirectory(Records(LEASE_SECONDS))
    yield directory
    await directory.close()


class Eyes:
    """What a watch has reported."""

    def __init__(self) -> None:
        self.alive: set[str] = set()

    def __call__(self, change: Change) -> None:
        if change.value is None:
            self.alive.discard(change.key)
        else:
            self.alive.add(change.key)


async def test_a_watch_knows_so_many_records_and_says_once_that_there_are_more(
    directory: LeasedRecords, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(leased_records, "MAX_RECORDS", 2)
    eyes = Eyes()
    await directory.watch(eyes)
    members = [await directory.join(f"a.b.n{number}", b"x") for number in range(4)]
    await eventually(lambda: "ignoring some" in caplog.text)
    assert eyes.alive == {"a.b.n0", "a.b.n1"}
    await members[0].leave()
    await eventually(lambda: len(eyes.alive) == 2 and "a.b.n0" not in eyes.alive)
    assert caplog.text.count("ignoring some") == 1


async def test_a_watch_that_falls_behind_reads_everything_again(
    directory: LeasedRecords, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_directory, "MAX_WAITING_SIGHTINGS", 2)
    eyes = Eyes()
    await directory.watch(eyes)
    keys = {f"a.b.n{number}" for number in range(20)}
    await asyncio.gather(*(directory.join(key, b"x") for key in keys))
    await eventually(lambda: eyes.alive == keys)


async def test_a_watch_on_nats_that_falls_behind_is_told_to_begin_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(nats_directory, "MAX_WAITING_SIGHTINGS", 2)
    reader = nats_directory._Reader(silence_seconds=1.0)
    for _ in range(3):
        await reader.take(Msg(_client=None))  # type: ignore[arg-type]
    with pytest.raises(DirectoryError, match="faster than they could be read"):
        await reader.next()


async def test_a_bucket_takes_so_many_records_and_refuses_more(
    nats_server: EmbeddedNats, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nats_directory, "MAX_BUCKET_RECORDS", 3)
    bus = await NatsBus.connect(nats_server.url)
    directory = NatsDirectory(bus, lease_seconds=LEASE_SECONDS)
    members = [await directory.join(f"a.b.n{number}", b"x") for number in range(3)]
    with pytest.raises(DirectoryError):
        await directory.join("a.b.n3", b"x")
    await members[0].update(b"y")
    assert all(member.alive for member in members)
    await directory.close()
    await bus.close()


# -- services ------------------------------------------------------------------------------


async def test_a_registry_names_so_many_senders_of_nonsense_and_counts_all(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(registry_service, "MAX_SENDERS_LOGGED", 3)
    hub = Hub()
    bus, other = MemoryBus(hub), MemoryBus(hub)
    service = RegistryService(bus, MemoryDirectory(Records(LEASE_SECONDS)))
    running = asyncio.create_task(service.run())
    await service.ready.wait()
    for number in range(10):
        await other.publish(f"kvbm.a.b.n{number}.events", b"nonsense")
        await other.publish(f"kvbm.a.b.n{number}.events", b"nonsense")
    await eventually(lambda: service.status().counts.malformed == 20)
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running
    assert caplog.text.count("malformed") == 3


VOID = 7
"""The number of an order that is never answered."""


async def test_a_rank_carries_out_so_many_fetches_of_the_bus_at_a_time() -> None:
    scope, hub = Scope("a", "b"), Hub()
    bus = MemoryBus(hub)
    slab = SlabRecord(base=0, headers=0, slots=1, slot_bytes=64, header_bytes=32)
    record = RankRecord(
        node="n", rank=0, world_size=1, agent="n/0", agent_metadata=b"", slab=slab, instance="i"
    )
    told: list[Callable[[Moved], None]] = []
    void: list[Fetch | Lend] = []

    async def connect() -> Network:
        return Network(MemoryBus(hub), MemoryDirectory(Records(LEASE_SECONDS)))

    def carry_out(order: Fetch | Lend, tell: Callable[[Moved], None]) -> bool:
        if order.op == VOID:
            void.append(order)
            return False
        told.append(tell)
        return True

    worker = WorkerBus(record, scope, connect, carry_out, pytest.fail)
    running = asyncio.create_task(worker.run())
    await eventually(lambda: hub.subscriptions)
    fetch = Fetch(op=1, hashes=b"", fills=b"", disk=b"", host=b"", instance="i")
    for _ in range(MAX_UNANSWERED):
        order = encode(replace(fetch, op=VOID))
        await bus.publish(scope.of("n", rank_what(0)), order, "_INBOX.x.1")
    await eventually(lambda: len(void) == MAX_UNANSWERED)
    for _ in range(MAX_UNANSWERED + 10):
        await bus.publish(scope.of("n", rank_what(0)), encode(fetch), "_INBOX.x.1")
    await eventually(lambda: len(told) == MAX_UNANSWERED)
    told[0](Moved(op=1))
    await asyncio.sleep(0)
    await bus.publish(scope.of("n", rank_what(0)), encode(fetch), "_INBOX.x.1")
    await eventually(lambda: len(told) == MAX_UNANSWERED + 1)
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running
