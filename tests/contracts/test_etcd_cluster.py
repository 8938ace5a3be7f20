"""A cluster that meets on etcd: `kvbm registry` and a node, in processes of their own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from kvbm_schemas.block import pack
from kvbm_schemas.codec import Decoder, encode
from kvbm_schemas.requests import Locate, Placements
from kvbm_schemas.subjects import REGISTRY_NODE
from kvbm_service.adapters.etcd_server import EmbeddedEtcd
from kvbm_service.adapters.nats_bus import NatsBus
from kvbm_service.adapters.nats_server import EmbeddedNats
from kvbm_service.errors import BusError
from tests.contracts.etcd_node import CHAIN, NODE, SCOPE

MEMBERSHIP_SECONDS = 5.0
PATIENCE_SECONDS = 60.0
SLACK_SECONDS = 20.0
"""For a machine that has much else to do."""
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}

_placements = Decoder(Placements)


class Questions:
    """What the registry says, as anybody would ask it."""

    def __init__(self, bus: NatsBus) -> None:
        self._bus = bus

    async def holders(self) -> set[str] | None:
        """Who has the blocks; None if no registry answers."""
        question = encode(Locate(hashes=pack(CHAIN)))
        try:
            answer = await self._bus.request(SCOPE.of(REGISTRY_NODE, "locate"), question, 1.0)
        except BusError:
            return None
        return {holder.node for each in _placements.decode(answer).holders for holder in each}

    async def until(self, holders: set[str]) -> float:
        """Wait for this answer; how long that took."""
        started = time.monotonic()
        async with asyncio.timeout(PATIENCE_SECONDS):
            while await self.holders() != holders:  # noqa: ASYNC110  nobody tells us
                await asyncio.sleep(0.05)
        return time.monotonic() - started


@pytest.fixture
async def ask(nats_server: EmbeddedNats) -> AsyncIterator[Questions]:
    bus = await NatsBus.connect(nats_server.url)
    yield Questions(bus)
    await bus.close()


Node = Callable[[], "subprocess.Popen[bytes]"]


@pytest.fixture
def node(nats_server: EmbeddedNats, etcd: EmbeddedEtcd) -> Iterator[Node]:
    """Starts the node; whatever still runs at the end is killed."""
    settings = {
        "nats_url": nats_server.url,
        "directory_url": etcd.url,
        "membership_seconds": MEMBERSHIP_SECONDS,
    }
    with contextlib.ExitStack() as stack:

        def start() -> subprocess.Popen[bytes]:
            program = Path(__file__).with_name("etcd_node.py")
            process = subprocess.Popen(
                [sys.executable, program, json.dumps(settings)],
                stdout=subprocess.PIPE,
                env=ENVIRONMENT,
            )
            stack.callback(process.communicate)
            stack.callback(process.kill)
            assert process.stdout is not None
            assert process.stdout.readline() == b"running\n"
            return process

        yield start


@pytest.fixture
def registry(nats_server: EmbeddedNats, etcd: EmbeddedEtcd) -> Iterator[None]:
    settings = {
        "KVBM_NATS_URL": nats_server.url,
        "KVBM_DIRECTORY_URL": etcd.url,
        "KVBM_MEMBERSHIP_SECONDS": str(MEMBERSHIP_SECONDS),
    }
    command = [sys.executable, "-m", "kvbm_service.cli", "registry"]
    process = subprocess.Popen(command, env={**ENVIRONMENT, **settings}, stderr=subprocess.DEVNULL)
    yield
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE_SECONDS) == 0


async def test_a_registry_learns_of_a_node_on_etcd_and_forgets_it_when_it_is_killed(
    registry: None, node: Node, ask: Questions
) -> None:
    process = node()
    await ask.until({NODE})
    process.kill()
    seconds = await ask.until(set())
    assert seconds < 2 * MEMBERSHIP_SECONDS + SLACK_SECONDS
    node()
    await ask.until({NODE})


async def test_nobody_is_forgotten_while_etcd_restarts(
    registry: None, node: Node, ask: Questions, etcd: EmbeddedEtcd
) -> None:
    node()
    await ask.until({NODE})
    etcd.kill()
    await asyncio.to_thread(etcd.start)
    deadline = time.monotonic() + 1.25 * MEMBERSHIP_SECONDS
    while time.monotonic() < deadline:
        assert await ask.holders() in ({NODE}, None)
        await asyncio.sleep(0.1)


async def test_a_node_is_known_again_when_etcd_comes_back_without_its_state(
    registry: None, node: Node, ask: Questions, etcd: EmbeddedEtcd, tmp_path: Path
) -> None:
    node()
    await ask.until({NODE})
    etcd.kill()
    await ask.until(set())
    (tmp_path / "etcd").rename(tmp_path / "lost")
    await asyncio.to_thread(etcd.start)
    await ask.until({NODE})
