"""`kvbm ls`: the nodes in the directory."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import pytest

from kvbm_schemas.block import Tier
from kvbm_schemas.codec import encode
from kvbm_schemas.message import Message
from kvbm_schemas.records import NodeRecord, RankRecord, SlabRecord, TierStatus
from kvbm_schemas.subjects import Scope
from kvbm_service.adapters.nats_bus import NatsBus
from kvbm_service.adapters.nats_directory import NatsDirectory
from kvbm_service.adapters.nats_server import EmbeddedNats

PROD = Scope("prod", "f00d")
TEST = Scope("test", "beef")


def node(name: str, world_size: int = 1) -> NodeRecord:
    tiers = (TierStatus(Tier.HOST, 7629, 1234, 3),)
    return NodeRecord(
        node=name,
        epoch=1_795_322_000_123,
        world_size=world_size,
        block_bytes=524_288,
        tiers=tiers,
        engine="vllm 0.32",
    )


def rank(name: str, number: int, world_size: int) -> RankRecord:
    return RankRecord(
        node=name,
        rank=number,
        world_size=world_size,
        agent="a",
        agent_metadata=b"x",
        slab=SlabRecord(base=0, headers=0, slots=1, slot_bytes=1, header_bytes=32),
    )


@pytest.fixture
async def cluster() -> AsyncIterator[str]:
    """The URL of a server whose directory lists three nodes and one piece of nonsense."""
    records: dict[str, Message] = {
        "prod.f00d.node-a": node("node-a", 2),
        "prod.f00d.node-a.1": rank("node-a", 1, 2),
        "prod.f00d.node-a.0": rank("node-a", 0, 2),
        "prod.f00d.node-b": node("node-b", 2),
        "prod.f00d.node-b.1": rank("node-b", 1, 2),
        "test.beef.a-node-with-a-rather-long-name": node("a-node-with-a-rather-long-name"),
    }
    with EmbeddedNats() as server:
        bus = await NatsBus.connect(server.url)
        directory = NatsDirectory(bus, lease_seconds=10)
        for key, record in records.items():
            await directory.join(key, encode(record))
        await directory.join("prod.f00d.node-c", b"nonsense")
        yield server.url
        await directory.close()
        await bus.close()


async def test_every_node_is_listed_with_its_ranks_and_tiers(kvbm, cluster: str) -> None:
    done = await asyncio.to_thread(kvbm, "ls", "--nats-url", cluster)
    assert done.returncode == 0
    lines = done.stdout.decode().splitlines()
    assert max(map(len, lines)) <= 80
    a, b = (next(line for line in lines if name in line) for name in ("node-a", "node-b"))
    assert a.split()[:8] == ["node-a", "1795322000123", "2/2", "G2", "1234", "7629", "4", "GB"]
    assert "1/2" in b
    assert "namespace prod · layout f00d" in lines
    assert "namespace test · layout beef" in lines
    assert done.stderr == b"1 record of the directory could not be read.\n"


async def test_json_lists_the_same_nodes_and_says_which_ranks_are_there(kvbm, cluster: str) -> None:
    done = await asyncio.to_thread(kvbm, "ls", "--json", "--nats-url", cluster)
    a, b, other = json.loads(done.stdout)
    assert (a["node"], a["ranks"], a["world_size"]) == ("node-a", [0, 1], 2)
    assert (b["node"], b["ranks"]) == ("node-b", [1])
    assert a["tiers"] == [{"tier": "G2", "capacity": 7629, "used": 1234, "pinned": 3}]
    assert 0 <= a["last_seen_seconds"] < 10
    assert (other["namespace"], other["fingerprint"]) == ("test", "beef")


async def test_one_namespace_can_be_picked(kvbm, cluster: str) -> None:
    done = await asyncio.to_thread(
        kvbm, "--namespace", "test", "ls", "--json", "--nats-url", cluster
    )
    assert [one["namespace"] for one in json.loads(done.stdout)] == ["test"]
    done = await asyncio.to_thread(kvbm, "ls", "--nats-url", cluster, "--namespace", "nowhere")
    assert done.stdout == b"No nodes in namespace nowhere.\n"


async def test_another_lease_than_the_clusters_is_refused_in_one_line(kvbm, cluster: str) -> None:
    done = await asyncio.to_thread(kvbm, "ls", "--nats-url", cluster, KVBM_MEMBERSHIP_SECONDS="20")
    assert done.returncode == 1
    assert b"20 s" in done.stderr
    assert done.stderr.count(b"\n") == 1
