"""A registry that is sent ten times the events it can take, and one that takes none for a while."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator

import pytest

from kvbm_schemas.codec import encode
from kvbm_schemas.requests import Lookup
from kvbm_schemas.subjects import REGISTRY_NODE
from kvbm_service.adapters.mailbox import MAX_WAITING_BYTES, MAX_WAITING_MESSAGES
from kvbm_service.adapters.nats_server import EmbeddedNats
from tests.limits.registry_process import RegistryProcess
from tests.limits.source import SCOPE, Source

HEAL_SECONDS = 15.0
"""Within this after the trouble a registry's view is the truth (seen: 0.1 to 2)."""
LOOKUP_SECONDS = 5.0
"""No lookup is left without an answer for longer, in a flood (seen: 0.1 to 0.6)."""
GROWTH_BYTES = 2 * MAX_WAITING_BYTES
"""A flooded registry's memory grows by what may wait, and as much for what Python adds."""


@pytest.fixture
async def source(nats_server: EmbeddedNats, registry: RegistryProcess) -> AsyncIterator[Source]:
    """Events of four blocks: the smaller, the more of them can be sent."""
    source = await Source.join(nats_server.url, group_blocks=4)
    await registry.until(lambda status: status["nodes"] == 1, HEAL_SECONDS)
    await source.publish(100, per_second=10_000)
    await source.seconds_until_known(HEAL_SECONDS)
    yield source
    await source.close()


async def _ask_for_ever(source: Source, seconds: list[float]) -> None:
    lookup = encode(Lookup(hashes=bytes(64)))
    while True:
        began = time.monotonic()
        await source.bus.request(SCOPE.of(REGISTRY_NODE, "lookup"), lookup, LOOKUP_SECONDS)
        seconds.append(time.monotonic() - began)
        await asyncio.sleep(0.02)


async def test_a_flooded_registry_sheds_in_bounded_memory_answers_and_heals(
    source: Source, registry: RegistryProcess
) -> None:
    before = await registry.status()
    lookups: list[float] = []
    asking = asyncio.create_task(_ask_for_ever(source, lookups))
    await source.publish(10 * MAX_WAITING_MESSAGES)
    await source.seconds_until_known(HEAL_SECONDS)
    assert not asking.done(), "every lookup was answered"
    asking.cancel()
    after = await registry.status()
    assert after["troubles"]["dropped"] > 0, "it could not take all"
    assert after["counts"]["resyncs"] > before["counts"]["resyncs"], "it noticed"
    # Compiling at the start may have taken more than the flood does.
    most = max(before["peak_bytes"], before["rss_bytes"] + GROWTH_BYTES)
    assert after["peak_bytes"] <= most
    assert "arrive faster than they are handled" in registry.log
    assert registry.log.count("arrive faster") < 10, "said once for each time it falls behind"


async def test_a_registry_that_stood_still_for_a_moment_catches_up_without_a_snapshot(
    source: Source, registry: RegistryProcess
) -> None:
    before = await registry.status()
    registry.send(signal.SIGSTOP)
    await source.publish(5_000)
    registry.send(signal.SIGCONT)
    await source.seconds_until_known(HEAL_SECONDS)
    after = await registry.status()
    assert after["counts"]["snapshots"] == before["counts"]["snapshots"]
    assert after["counts"]["applied"] == before["counts"]["applied"] + 5_000


@pytest.mark.slow
async def test_a_registry_cut_off_as_a_slow_consumer_reconnects_and_heals(
    nats_server: EmbeddedNats, registry: RegistryProcess
) -> None:
    """The server keeps 64 MiB for a client that does not read, then it lets go of it."""
    source = await Source.join(nats_server.url, group_blocks=512)
    try:
        await registry.until(lambda status: status["nodes"] == 1, HEAL_SECONDS)
        registry.send(signal.SIGSTOP)
        await source.publish(16_000)
        deadline = time.monotonic() + HEAL_SECONDS
        while "Slow Consumer" not in nats_server.log_path.read_text():
            assert time.monotonic() < deadline, "the server does not mind"
            await asyncio.sleep(0.05)
        registry.send(signal.SIGCONT)
        await source.seconds_until_known(HEAL_SECONDS)
        after = await registry.status()
        assert after["troubles"]["outages"] == 1
        assert after["counts"]["resyncs"] > 1
    finally:
        registry.send(signal.SIGCONT)
        await source.close()
