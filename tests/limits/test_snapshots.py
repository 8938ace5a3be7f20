"""Those who ask a leader for a snapshot at the same time, and how many they may be."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import AsyncIterator

import pytest

from kvbm_schemas.block import BlockHash, Tier, pack
from kvbm_schemas.codec import Decoder
from kvbm_schemas.records import RankRecord, SlabRecord
from kvbm_schemas.requests import SnapshotChunk
from kvbm_schemas.step import Survivors
from kvbm_schemas.subjects import Scope
from kvbm_service.adapters.memory_bus import Hub, MemoryBus
from kvbm_service.adapters.memory_directory import MemoryDirectory, Records
from kvbm_service.core.columns import pack_u32, pack_u64
from kvbm_service.leader_service import LeaderService
from kvbm_service.network import Network
from kvbm_service.settings import Settings
from kvbm_service.snapshots import MAX_ASKERS, REST_SECONDS, Snapshots

BLOCKS = [BlockHash(bytes([number]) * 16) for number in range(4)]
_chunks = Decoder(SnapshotChunk)


async def _connect() -> Network:
    return Network(MemoryBus(Hub()), MemoryDirectory(Records(1.0)))


def _leader() -> LeaderService:
    """A leader with a few blocks, alone on its bus."""
    leader = LeaderService(Settings(), Scope("default", "layout"), "node", 1, _connect)
    slab = SlabRecord(base=0, headers=0, slots=8, slot_bytes=64, header_bytes=32)
    record = RankRecord(node="node", rank=0, world_size=1, agent="0", agent_metadata=b"", slab=slab)
    survivors = Survivors(
        tier=Tier.HOST, hashes=pack(BLOCKS), fills=pack_u64(range(1, 5)), slots=pack_u32(range(4))
    )
    leader.attach(record, [survivors])
    return leader


class Post:
    """What was sent, by address."""

    def __init__(self) -> None:
        self.sent: dict[str, list[bytes]] = defaultdict(list)

    async def send(self, reply: str, payload: bytes) -> None:
        self.sent[reply].append(payload)

    async def until_there(self, *replies: str) -> None:
        deadline = time.monotonic() + 10.0
        while not all(self.sent.get(reply) for reply in replies):
            assert time.monotonic() < deadline, f"nothing came to {set(replies) - set(self.sent)}"
            await asyncio.sleep(0.01)


@pytest.fixture
async def post() -> Post:
    return Post()


@pytest.fixture
async def snapshots(post: Post) -> AsyncIterator[Snapshots]:
    leader = _leader()
    leader.start()
    snapshots = Snapshots(leader, post.send)
    running = asyncio.create_task(snapshots.run())
    yield snapshots
    running.cancel()
    await asyncio.to_thread(leader.close)


async def test_all_who_have_asked_get_the_same_copy(snapshots: Snapshots, post: Post) -> None:
    askers = [f"_INBOX.{asker}.1" for asker in range(MAX_ASKERS)]
    for reply in askers:
        snapshots.ask(reply)
    await post.until_there(*askers)
    first, *others = [post.sent[reply] for reply in askers]
    assert all(payload is first[0] for (payload,) in others), "each payload is made once"
    assert _chunks.decode(first[0]).hashes == pack(BLOCKS)


async def test_a_later_question_of_the_same_asker_voids_the_one_before(
    snapshots: Snapshots, post: Post
) -> None:
    for number in range(3):
        snapshots.ask(f"_INBOX.one.{number}")
    await post.until_there("_INBOX.one.2")
    assert list(post.sent) == ["_INBOX.one.2"]


async def test_whoever_asks_beyond_the_limit_is_turned_away_and_may_ask_again(
    snapshots: Snapshots, post: Post, caplog: pytest.LogCaptureFixture
) -> None:
    late = ["_INBOX.late.1", "_INBOX.later.1"]
    with caplog.at_level(logging.WARNING, "kvbm_service"):
        for asker in range(MAX_ASKERS):
            snapshots.ask(f"_INBOX.{asker}.1")
        for reply in late:
            snapshots.ask(reply)
    assert snapshots.turned_away == 2
    assert len(caplog.records) == 1, "said once"
    await post.until_there(f"_INBOX.{MAX_ASKERS - 1}.1")
    assert not post.sent.keys() & set(late)
    for reply in late:
        snapshots.ask(reply)
    await post.until_there(*late)


async def test_whoever_asks_without_end_is_answered_with_rests_in_between(
    snapshots: Snapshots, post: Post
) -> None:
    loop = asyncio.get_running_loop()
    began, asked = loop.time(), 0
    while loop.time() - began < 3 * REST_SECONDS:
        snapshots.ask("_INBOX.one.1")
        asked += 1
        await asyncio.sleep(0.001)
    assert asked > 10
    assert 1 <= len(post.sent["_INBOX.one.1"]) <= 1 + (loop.time() - began) / REST_SECONDS
