"""A cluster under the shipped permissions: a registry, and two nodes that hold blocks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from kvbm_schemas.block import BlockHash
from kvbm_schemas.codec import encode
from kvbm_schemas.message import Message
from kvbm_schemas.records import RankRecord, SlabRecord
from kvbm_schemas.step import Fetch, Moved, StepResults
from kvbm_schemas.subjects import COMMAND_INBOX, REGISTRY_INBOX, Scope, node_inbox
from kvbm_service.adapters.nats_bus import NatsBus
from kvbm_service.adapters.nats_directory import NatsDirectory
from kvbm_service.leader_service import LeaderService
from kvbm_service.network import over_nats
from kvbm_service.registry_service import RegistryService
from kvbm_service.worker_bus import WorkerBus
from tests.patience import eventually
from tests.security.shipped import Shipped, shipped_nats

SCOPE = Scope("default", "0123456789abcdef")
NODES = ("node-1", "node-2")
CHAINS = {
    node: [BlockHash(bytes([10 * index + number]) * 16) for number in range(1, 5)]
    for index, node in enumerate(NODES, start=1)
}


class Cluster:
    """The shipped server, the services on it, and connections to try things with."""

    def __init__(self, shipped: Shipped, registry: RegistryService) -> None:
        self.shipped = shipped
        self.registry = registry
        self.leaders: dict[str, LeaderService] = {}
        self.fetched: list[Fetch] = []
        """What a rank was made to carry out."""
        self._buses: list[NatsBus] = []

    async def bus(self, user: str) -> NatsBus:
        """A connection with the credentials of `user`, and nothing of ours on it."""
        inbox = {
            "operator": COMMAND_INBOX,
            "observer": COMMAND_INBOX,
            "router": COMMAND_INBOX,
            "registry": REGISTRY_INBOX,
        }.get(user, node_inbox(SCOPE.namespace, user))
        self._buses.append(await self.shipped.bus(user, inbox))
        return self._buses[-1]

    def violations(self) -> list[str]:
        """What the server has refused so far."""
        return [line for line in self.shipped.server.logged().splitlines() if "Violation" in line]

    def state(self) -> object:
        """What nobody but its owner may change."""
        status = self.registry.status()
        cores = [
            leader.on_core(lambda core: (core.snapshot(), core.status()), None)
            for leader in self.leaders.values()
        ]
        return status.nodes, status.blocks, status.copies, cores, len(self.fetched)

    async def ask(self, user: str, subject: str, message: Message) -> bytes:
        """What `user` is answered."""
        return await (await self.bus(user)).request(subject, encode(message), 5.0)

    async def close(self) -> None:
        """End all connections."""
        for bus in self._buses:
            await bus.close()


async def make_bucket(shipped: Shipped) -> None:
    """What `kvbm ls` does with the operator's credentials."""
    bus = await shipped.bus("operator", COMMAND_INBOX)
    await NatsDirectory(bus).entries()
    await bus.close()


def rank_record(node: str) -> RankRecord:
    """What the rank of `node` says of itself."""
    return RankRecord(
        node=node,
        rank=0,
        world_size=1,
        agent=f"agent of {node}",
        agent_metadata=b"opens the slab of " + node.encode(),
        slab=SlabRecord(base=0, headers=0, slots=64, slot_bytes=64, header_bytes=32),
        device_blocks=64,
        instance=f"life of {node}",
    )


@asynccontextmanager
async def guarded_cluster(folder: Path) -> AsyncIterator[Cluster]:
    """All of it, up and settled."""
    with shipped_nats(folder) as shipped:
        await make_bucket(shipped)
        bus = await shipped.bus("registry", REGISTRY_INBOX)
        events = await shipped.bus("registry", REGISTRY_INBOX)
        directory = NatsDirectory(bus, leaders_only=True)
        cluster = Cluster(shipped, RegistryService(bus, directory, events=events))
        serving = [asyncio.create_task(cluster.registry.run())]
        try:
            for node in NODES:
                cluster.leaders[node] = _leader(shipped, node)
                serving.append(asyncio.create_task(_worker(cluster, node).run()))
            expected = sum(map(len, CHAINS.values()))
            await eventually(lambda: cluster.registry.status().copies == expected)
            yield cluster
        finally:
            for leader in cluster.leaders.values():
                await asyncio.to_thread(leader.close)
            await cluster.close()
            for task in serving:
                task.cancel()
            await asyncio.gather(*serving, return_exceptions=True)
            await directory.close()
            await events.close()
            await bus.close()


def _leader(shipped: Shipped, node: str) -> LeaderService:
    """A leader whose one rank has saved its chain."""
    settings = shipped.settings(node)
    record = rank_record(node)
    leader = LeaderService(
        settings, SCOPE, node, 1, over_nats(settings, node, node), instance=record.instance
    )
    leader.attach(record)
    save(leader, CHAINS[node])
    leader.start()
    return leader


def save(leader: LeaderService, chain: list[BlockHash]) -> None:
    """Have the leader's one rank save a chain to its host tier."""
    leader.store(f"request {chain[0].hex()}", None, chain, list(range(len(chain))))
    saves = leader.take_commands().saves
    leader.report([StepResults(rank=0, moved=tuple(Moved(op=one.op) for one in saves))])


def _worker(cluster: Cluster, node: str) -> WorkerBus:
    def fetch(order: Fetch, tell: Callable[[Moved], None]) -> bool:
        cluster.fetched.append(order)
        tell(Moved(op=order.op))
        return True

    connect = over_nats(cluster.shipped.settings(node), node, node)
    return WorkerBus(rank_record(node), SCOPE, connect, fetch, lambda seconds: None)
