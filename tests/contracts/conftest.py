"""What the bus and directory contracts run on: in-memory adapters, real nats-server and etcd."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Protocol

import pytest

from kvbm_service.adapters.bus import Bus
from kvbm_service.adapters.etcd_directory import EtcdDirectory
from kvbm_service.adapters.etcd_login import parse_login
from kvbm_service.adapters.etcd_server import EmbeddedEtcd
from kvbm_service.adapters.leased_records import LeasedRecords
from kvbm_service.adapters.memory_bus import Hub, MemoryBus
from kvbm_service.adapters.memory_directory import MemoryDirectory, Records
from kvbm_service.adapters.nats_bus import NatsBus
from kvbm_service.adapters.nats_directory import NatsDirectory
from kvbm_service.adapters.nats_server import EmbeddedNats
from tests.contracts.file_systems import mount, on_loop
from tests.contracts.leases import LASTING_SECONDS
from tests.patience import eventually

__all__ = ["mount", "on_loop"]


@pytest.fixture(name="eventually")
def _eventually() -> Callable[..., object]:
    return eventually


@pytest.fixture
def lease_seconds() -> float:
    """How long a lease lasts; `leases_end` makes it shorter."""
    return LASTING_SECONDS


@pytest.fixture
def nats_server(tmp_path: Path) -> Iterator[EmbeddedNats]:
    with EmbeddedNats(store_dir=tmp_path / "nats") as server:
        yield server


@pytest.fixture
def etcd(tmp_path: Path) -> Iterator[EmbeddedEtcd]:
    with EmbeddedEtcd(store_dir=tmp_path / "etcd") as server:
        yield server


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port that nobody listens on, and that nobody else gets meanwhile."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


@pytest.fixture
def free_ports() -> Callable[[int], list[int]]:
    """So many ports that nobody has just now."""

    def find(count: int) -> list[int]:
        with contextlib.ExitStack() as stack:
            probes = [stack.enter_context(socket.socket()) for _ in range(count)]
            for probe in probes:
                probe.bind(("127.0.0.1", 0))
            return [probe.getsockname()[1] for probe in probes]

    return find


class BusWorld(Protocol):
    """Buses that hear each other, and outages that befall all of them."""

    async def open(self) -> Bus: ...

    async def lose(self) -> None: ...

    async def recover(self) -> None: ...


class MemoryBusWorld:
    def __init__(self) -> None:
        self._hub = Hub()
        self.buses: list[MemoryBus] = []

    async def open(self) -> MemoryBus:
        self.buses.append(MemoryBus(self._hub))
        return self.buses[-1]

    async def lose(self) -> None:
        for bus in self.buses:
            bus.cut()

    async def recover(self) -> None:
        for bus in self.buses:
            bus.heal()


class NatsBusWorld:
    def __init__(self, server: EmbeddedNats) -> None:
        self._server = server
        self.buses: list[NatsBus] = []

    async def open(self) -> NatsBus:
        self.buses.append(await NatsBus.connect(self._server.url))
        return self.buses[-1]

    async def lose(self) -> None:
        self._server.kill()
        await eventually(lambda: not any(bus.connected for bus in self.buses))

    async def recover(self) -> None:
        await asyncio.to_thread(self._server.start)
        await eventually(lambda: all(bus.connected for bus in self.buses))


@pytest.fixture(params=["memory", "nats"])
async def buses(request: pytest.FixtureRequest) -> AsyncIterator[BusWorld]:
    world: MemoryBusWorld | NatsBusWorld
    if request.param == "memory":
        world = MemoryBusWorld()
    else:
        world = NatsBusWorld(request.getfixturevalue("nats_server"))
    yield world
    for bus in world.buses:
        await bus.close()


class DirectoryWorld(Protocol):
    """Directories that see each other, each as if in a process of its own."""

    async def open(self) -> LeasedRecords: ...

    async def crash(self, directory: LeasedRecords) -> None:
        """The process that uses `directory` ends, without a word."""
        ...

    async def lose(self) -> None:
        """Nobody can reach the directory."""
        ...

    async def recover(self, *, wiped: bool = False) -> None: ...


class MemoryDirectoryWorld:
    def __init__(self, lease_seconds: float) -> None:
        self._records = Records(lease_seconds)
        self._directories: list[MemoryDirectory] = []

    async def open(self) -> MemoryDirectory:
        self._directories.append(MemoryDirectory(self._records))
        return self._directories[-1]

    async def crash(self, directory: LeasedRecords) -> None:
        assert isinstance(directory, MemoryDirectory)
        self._directories.remove(directory)
        directory.cut()

    async def lose(self) -> None:
        for directory in self._directories:
            directory.cut()

    async def recover(self, *, wiped: bool = False) -> None:
        if wiped:
            self._records.wipe()
        for directory in self._directories:
            directory.heal()

    async def close(self) -> None:
        for directory in self._directories:
            await directory.close()


class NatsDirectoryWorld:
    def __init__(self, server: EmbeddedNats, store_dir: Path, lease_seconds: float) -> None:
        self._server = server
        self._store_dir = store_dir
        self._lease_seconds = lease_seconds
        self._opened: dict[NatsDirectory, NatsBus] = {}

    async def open(self) -> NatsDirectory:
        bus = await NatsBus.connect(self._server.url)
        directory = NatsDirectory(bus, lease_seconds=self._lease_seconds)
        self._opened[directory] = bus
        return directory

    async def crash(self, directory: LeasedRecords) -> None:
        assert isinstance(directory, NatsDirectory)
        await self._opened[directory].close()

    async def lose(self) -> None:
        self._server.kill()
        await eventually(lambda: not any(bus.connected for bus in self._opened.values()))

    async def recover(self, *, wiped: bool = False) -> None:
        if wiped:
            shutil.rmtree(self._store_dir)
        await asyncio.to_thread(self._server.start)

    async def close(self) -> None:
        for directory, bus in self._opened.items():
            await directory.close()
            await bus.close()


class EtcdDirectoryWorld:
    def __init__(self, server: EmbeddedEtcd, store_dir: Path, lease_seconds: float) -> None:
        self._server = server
        self._store_dir = store_dir
        self._lease_seconds = lease_seconds
        self._opened: list[EtcdDirectory] = []

    async def open(self) -> EtcdDirectory:
        self._opened.append(EtcdDirectory(parse_login(self._server.url), self._lease_seconds))
        return self._opened[-1]

    async def crash(self, directory: LeasedRecords) -> None:
        assert isinstance(directory, EtcdDirectory)
        await directory.servers.close()

    async def lose(self) -> None:
        self._server.kill()

    async def recover(self, *, wiped: bool = False) -> None:
        if wiped:
            shutil.rmtree(self._store_dir)
        await asyncio.to_thread(self._server.start)

    async def close(self) -> None:
        for directory in self._opened:
            await directory.close()


@pytest.fixture(params=["memory", "nats", "etcd"])
async def directories(
    request: pytest.FixtureRequest, tmp_path: Path, lease_seconds: float
) -> AsyncIterator[DirectoryWorld]:
    world: MemoryDirectoryWorld | NatsDirectoryWorld | EtcdDirectoryWorld
    if request.param == "memory":
        world = MemoryDirectoryWorld(lease_seconds)
    elif request.param == "nats":
        server = request.getfixturevalue("nats_server")
        world = NatsDirectoryWorld(server, tmp_path / "nats", lease_seconds)
    else:
        world = EtcdDirectoryWorld(
            request.getfixturevalue("etcd"), tmp_path / "etcd", lease_seconds
        )
    yield world
    await world.close()
