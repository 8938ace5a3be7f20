"""Who says too much, or too much at once, is limited, and cannot starve the others."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import nats
import pytest

from kvbm_schemas.block import BlockHash, pack
from kvbm_schemas.codec import Decoder, encode
from kvbm_schemas.requests import Located, Lookup
from kvbm_schemas.subjects import REGISTRY_NODE, every
from kvbm_service.adapters.bus import Delivery, Troubles
from kvbm_service.adapters.mailbox import MAX_SHARE_OF_ONE, MAX_WAITING_MESSAGES, Mailbox
from kvbm_service.adapters.nats_login import TlsFiles
from tests.patience import eventually
from tests.security.cluster import CHAINS, NODES, SCOPE, Cluster, save
from tests.security.shipped import PASSWORDS, Shipped

FLOODER = Path(__file__).with_name("flooder.py")
FLOOD_SECONDS = 2.0
ANSWER_SECONDS = 5.0
"""No lookup is left without an answer for longer, in a flood (seen: 0.01 to 1.4)."""
HEAL_SECONDS = 30.0
"""What the server holds back for a slow registry (max_pending) is read after the flood."""


async def test_a_flood_on_one_subject_costs_the_others_nothing_but_their_turn() -> None:
    heard: list[str] = []
    turns = 0

    async def hear(delivery: Delivery) -> None:
        heard.append(delivery.subject)

    async def somebody_else() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    troubles = Troubles()
    mailbox = Mailbox(every("events"), hear, troubles)
    loud, quiet = SCOPE.of("loud", "events"), SCOPE.of("quiet", "events")
    for _ in range(2 * MAX_WAITING_MESSAGES):
        mailbox.put(Delivery(loud, b""))
    for _ in range(100):
        mailbox.put(Delivery(quiet, b""))
    other = asyncio.create_task(somebody_else())
    share = int(MAX_WAITING_MESSAGES * MAX_SHARE_OF_ONE)
    await eventually(lambda: len(heard) == share + 100)
    other.cancel()
    await mailbox.close()
    assert heard[:200].count(quiet) == 100
    assert troubles.dropped == 2 * MAX_WAITING_MESSAGES - share
    assert turns > 2


@asynccontextmanager
async def flood(shipped: Shipped, node: str) -> AsyncIterator[None]:
    """`node` publishes events under its own name, as many as it can, while the block lasts."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, FLOODER, str(shipped.server.port), node, PASSWORDS[node]),
        *(shipped.ca, SCOPE.of(node, "events")),
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        assert await process.stdout.readline() == b"flooding\n"
        yield
        assert process.returncode is None, "it was cut off"
    finally:
        process.kill()
        await process.wait()


async def test_others_are_answered_and_heard_while_one_node_floods(cluster: Cluster) -> None:
    asker = await cluster.bus("node-1")
    lookup = encode(Lookup(hashes=pack(CHAINS["node-2"])))
    more = [BlockHash(bytes([99, number]) * 8) for number in range(8)]
    answered = 0
    async with flood(cluster.shipped, "node-2"):
        ends_at = time.monotonic() + FLOOD_SECONDS
        while time.monotonic() < ends_at:
            subject = SCOPE.of(REGISTRY_NODE, "lookup")
            Decoder(Located).decode(await asker.request(subject, lookup, ANSWER_SECONDS))
            answered += 1
            await asyncio.sleep(0.01)
        save(cluster.leaders["node-1"], more)
    located = encode(Lookup(hashes=pack(more)))
    ends_at = time.monotonic() + HEAL_SECONDS
    found = 0
    while found < len(more):
        assert time.monotonic() < ends_at, "an event beside the flood was lost"
        answer = await asker.request(subject, located, ANSWER_SECONDS)
        found = sum(part.count for part in Decoder(Located).decode(answer).segments)
    assert answered > 0
    assert cluster.registry.status().nodes == len(NODES)


@pytest.mark.parametrize("node", ["node-2"])
async def test_a_message_that_is_too_large_is_not_passed_on(cluster: Cluster, node: str) -> None:
    shipped = cluster.shipped
    ended = asyncio.Event()

    async def end() -> None:
        ended.set()

    client = await nats.connect(
        shipped.url(node),
        tls=TlsFiles(ca=shipped.ca).context(),
        allow_reconnect=False,
        disconnected_cb=end,
    )
    assert client.max_payload == 1 << 20
    client._max_payload = 1 << 30  # a client that does not care
    await client.publish(SCOPE.of(node, "events"), bytes((1 << 20) + 1))
    async with asyncio.timeout(30.0):
        await ended.wait()
    await client.close()
    assert "maximum payload exceeded" in shipped.server.logged().lower()


async def test_nobody_subscribes_without_end(cluster: Cluster) -> None:
    shipped = cluster.shipped
    client = await nats.connect(
        shipped.url("observer"), tls=TlsFiles(ca=shipped.ca).context(), allow_reconnect=False
    )
    for number in range(200):
        await client.subscribe(f"kvbm.a.b.c.{number}")
    await eventually(lambda: not client.is_connected)
    assert "maximum subscriptions exceeded" in shipped.server.logged()
    await client.close()
