"""What tests of limits run on: a real nats-server, and registries in processes of their own."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from kvbm_service.adapters.nats_server import EmbeddedNats
from tests.limits.registry_process import RegistryProcess


@pytest.fixture
def nats_server(tmp_path: Path) -> Iterator[EmbeddedNats]:
    with EmbeddedNats(store_dir=tmp_path / "nats") as server:
        yield server


@pytest.fixture
async def registry(nats_server: EmbeddedNats, tmp_path: Path) -> AsyncIterator[RegistryProcess]:
    registry = RegistryProcess(nats_server.url, tmp_path / "registry.log")
    await registry.start()
    yield registry
    await registry.close()
