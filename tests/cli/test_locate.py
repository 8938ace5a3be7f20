"""`kvbm locate` and `kvbm registry`: who holds a block."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator

import pytest

from kvbm_schemas.block import BlockHash, Tier, pack
from kvbm_schemas.codec import encode
from kvbm_schemas.records import NodeRecord
from kvbm_schemas.requests import SnapshotChunk
from kvbm_schemas.subjects import Scope
from kvbm_service.adapters.bus import Delivery
from kvbm_service.adapters.nats_bus import NatsBus
from kvbm_service.adapters.nats_directory import NatsDirectory
from kvbm_service.adapters.nats_server import EmbeddedNats

BOTH, ONLY_A, NOBODYS = (BlockHash(bytes([n]) * 16) for n in (1, 2, 3))
F00D = Scope("default", "f00d")
BEEF = Scope("other", "beef")


async def lead(bus: NatsBus, scope: Scope, name: str, held: list[BlockHash]) -> None:
    """Answer as a leader that holds these blocks in its host tier."""
    chunk = SnapshotChunk(epoch=1, seq=0, index=0, total=1, tier=Tier.HOST, hashes=pack(held))

    async def answer(question: Delivery) -> None:
        await bus.publish(question.reply, encode(chunk))

    await bus.subscribe(scope.of(name, "snapshot"), answer)


@pytest.fixture
async def cluster() -> AsyncIterator[str]:
    """The URL of a server with two nodes in different scopes, and no registry yet."""
    held = {(F00D, "node-a"): [BOTH, ONLY_A], (BEEF, "node-b"): [BOTH]}
    with EmbeddedNats() as server:
        bus = await NatsBus.connect(server.url)
        directory = NatsDirectory(bus, lease_seconds=10)
        for (scope, name), blocks in held.items():
            await lead(bus, scope, name, blocks)
            record = NodeRecord(node=name, epoch=1, world_size=1, block_bytes=1)
            await directory.join(f"{scope.namespace}.{scope.fingerprint}.{name}", encode(record))
        yield server.url
        await directory.close()
        await bus.close()


async def test_holders_are_found_in_every_scope_and_nobody_is_an_answer(
    kvbm, start, cluster: str
) -> None:
    registry = start("registry", "--nats-url", cluster)
    await asyncio.to_thread(registry.wait_for, "registry answers")
    hashes = [BOTH.hex(), ONLY_A.hex() + "ff" * 16, "0x" + NOBODYS.hex().upper()]

    async def located() -> list[dict[str, object]]:
        done = await asyncio.to_thread(kvbm, "locate", "--json", "--nats-url", cluster, *hashes)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    async with asyncio.timeout(30):
        found = await located()
        while not (found[0]["holders"] and found[1]["holders"]):
            found = await located()  # the snapshots are still under way
    a = {"namespace": "default", "fingerprint": "f00d", "node": "node-a", "tier": "G2"}
    b = {"namespace": "other", "fingerprint": "beef", "node": "node-b", "tier": "G2"}
    assert found == [
        {"hash": BOTH.hex(), "holders": [a, b]},
        {"hash": ONLY_A.hex(), "holders": [a]},
        {"hash": NOBODYS.hex(), "holders": []},
    ]

    done = await asyncio.to_thread(kvbm, "locate", "--nats-url", cluster, *hashes)
    text = done.stdout.decode()
    assert f"{BOTH.hex()}\n  G2  node-a  (namespace default · layout f00d)\n" in text
    assert f"{NOBODYS.hex()}\n  nobody\n" in text

    for only in (["--namespace", "other"], ["--fingerprint", "beef"]):
        done = await asyncio.to_thread(
            kvbm, "locate", "--json", "--nats-url", cluster, *only, BOTH.hex()
        )
        assert json.loads(done.stdout) == [{"hash": BOTH.hex(), "holders": [b]}]
    assert await asyncio.to_thread(registry.stop, signal.SIGTERM) == 0
    assert not any("Traceback" in line for line in registry.seen)


async def test_without_a_registry_it_says_how_to_start_one(kvbm, cluster: str) -> None:
    done = await asyncio.to_thread(kvbm, "locate", "--nats-url", cluster, BOTH.hex())
    assert done.returncode == 1
    assert done.stdout == b""
    assert done.stderr.count(b"\n") == 1
    assert b"no registry answers" in done.stderr
    assert b"kvbm registry" in done.stderr


def test_where_there_are_no_nodes_nobody_holds_anything(kvbm, nats: EmbeddedNats) -> None:
    done = kvbm("locate", "--nats-url", nats.url, BOTH.hex())
    assert done.returncode == 0
    assert done.stdout.decode() == f"{BOTH.hex()}\n  nobody\n"


def test_a_registry_waits_for_nats_to_appear_and_says_so(start) -> None:
    with EmbeddedNats() as server:
        server.stop()
        registry = start("registry", "--nats-url", server.url)
        registry.wait_for("no connection to NATS")
        server.start()
        registry.wait_for("registry answers")
        assert registry.stop(signal.SIGINT) == 0


def test_a_registry_that_nats_refuses_ends_in_one_line(kvbm) -> None:
    with EmbeddedNats(user="someone", password="secret") as server:
        done = kvbm("registry", "--nats-url", server.url)
    assert done.returncode == 1
    assert b"refuses us" in done.stderr
    assert b"Traceback" not in done.stderr
