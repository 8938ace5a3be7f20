"""Real leaders, a real registry and a real nats-server, for engines that are played."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from kvbm_schemas.block import BlockHash
from kvbm_schemas.records import RankRecord, SlabRecord
from kvbm_schemas.step import Moved, StepResults
from kvbm_schemas.subjects import COMMAND_INBOX, Scope
from kvbm_service.adapters.nats_bus import NatsBus
from kvbm_service.adapters.nats_directory import NatsDirectory
from kvbm_service.adapters.nats_server import EmbeddedNats
from kvbm_service.leader_service import Front, LeaderService
from kvbm_service.network import Network, over_nats
from kvbm_service.registry_service import RegistryService
from kvbm_service.route.vllm_names import Adapter, Keys, Naming, block_names
from kvbm_service.settings import Settings
from kvbm_service.worker_bus import WorkerBus
from tests.patience import eventually
from tests.route.fake_engine import FakeEngine

SCOPE = Scope("default", "0123456789abcdef")
BLOCK = 16
LEASE_SECONDS = 2.0
NAMING = Naming(Keys.TAGGED, "sha256", "vllm-none-hash")


def chain_of(text: str, salt: str = "", adapter: Adapter | None = None) -> list[BlockHash]:
    """The names of a prompt's blocks as the engines have them, whose tokens are bytes."""
    return block_names(NAMING, BLOCK, list(text.encode()), adapter, salt)


class Node:
    """An engine's leader, and its one rank."""

    def __init__(self, engine: FakeEngine, settings: Settings, front: Front) -> None:
        self.name = engine.name
        self._record = RankRecord(
            node=self.name,
            rank=0,
            world_size=1,
            agent=f"agent of {self.name}",
            agent_metadata=b"x",
            slab=SlabRecord(base=0, headers=0, slots=64, slot_bytes=64, header_bytes=32),
            device_blocks=64,
            instance="this life",
        )
        self.leader = LeaderService(
            settings,
            SCOPE,
            self.name,
            1,
            over_nats(settings, self.name, self.name),
            instance="this life",
            block_tokens=BLOCK,
            front=front,
        )
        self.leader.attach(self._record)
        self.leader.start()
        connect = over_nats(settings, self.name, self.name)
        worker = WorkerBus(
            self._record, SCOPE, connect, lambda order, tell: False, lambda seconds: None
        )
        self._worker = asyncio.create_task(worker.run())

    def save(self, chain: Sequence[BlockHash]) -> None:
        """Have the rank save these blocks to its host tier."""
        self.leader.store(f"of {chain[-1].hex()}", None, list(chain), list(range(len(chain))))
        saves = self.leader.take_commands().saves
        moved = tuple(Moved(op=one.op) for one in saves)
        self.leader.report([StepResults(rank=0, moved=moved)])

    async def leave(self) -> None:
        """The node leaves membership; its engine may go on."""
        await asyncio.to_thread(self.leader.close)
        self._worker.cancel()
        await asyncio.wait([self._worker])


class Cluster:
    """Where engines meet."""

    def __init__(self, server: EmbeddedNats) -> None:
        self.server = server
        self.settings = Settings(
            nats_url=server.url,
            membership_seconds=LEASE_SECONDS,
            cpu_cache_override_num_blocks=64,
            host_cache_dir="",
        )
        self.registry: RegistryService
        self._serving: asyncio.Task[None]
        self._networks: list[Network] = []
        self._nodes: list[Node] = []

    async def network(self) -> Network:
        """A connection as `kvbm route` makes it."""
        bus = await NatsBus.connect(self.server.url, inbox=COMMAND_INBOX)
        directory = NatsDirectory(bus, lease_seconds=LEASE_SECONDS, leaders_only=True)
        self._networks.append(Network(bus, directory))
        return self._networks[-1]

    async def begin(self) -> None:
        """Start a registry."""
        self.registry = RegistryService(*await self.network())
        self._serving = asyncio.create_task(self.registry.run())
        await self.registry.ready.wait()

    async def join(
        self, engine: FakeEngine, role: str = "both", names: str = str(NAMING), url: str = ""
    ) -> Node:
        """Start the leader of an engine."""
        front = Front(url=url or engine.url, role=role, names=names, model="tiny")
        self._nodes.append(Node(engine, self.settings, front))
        return self._nodes[-1]

    async def until_known(self, copies: int) -> None:
        """Wait until the registry knows of so many copies of blocks."""
        await eventually(lambda: self.registry.status().copies == copies)

    async def close_registry(self) -> None:
        """There is no registry any more."""
        self._serving.cancel()
        await asyncio.wait([self._serving])

    async def close(self) -> None:
        """End everything."""
        for node in self._nodes:
            await node.leave()
        await self.close_registry()
        for network in self._networks:
            await network.close()


@asynccontextmanager
async def clustered() -> AsyncIterator[Cluster]:
    """All of it, up."""
    with EmbeddedNats() as server:
        cluster = Cluster(server)
        await cluster.begin()
        try:
            yield cluster
        finally:
            await cluster.close()
