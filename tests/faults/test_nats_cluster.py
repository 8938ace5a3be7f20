"""A cluster of three NATS servers, of which one is lost, then two, then none any more."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator

import pytest

from kvbm_service.adapters.nats_bus import CONNECT_SECONDS, NatsBus
from kvbm_service.adapters.nats_directory import DEFAULT_BUCKET, REPLICAS
from tests.faults.site import (
    HEAL_SECONDS,
    MEMBERSHIP_SECONDS,
    SLACK_SECONDS,
    START_SECONDS,
    Site,
    running,
)
from tests.world.nats import NatsOnHost
from tests.world.skipping import world_or_skip

BLOCKS = 6
SERVERS = ("n1", "n2", "n3")
FAIL_OVER_SECONDS = len(SERVERS) * CONNECT_SECONDS + HEAL_SECONDS
"""Until everyone has found a server that lives, and the directory a new leader."""


@pytest.fixture(scope="module")
def lasting_site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """As in the other files, but NATS is on three hosts."""
    with (
        world_or_skip(*SERVERS, "registry", "a", "b", "witness", seed=5) as world,
        running(world, tmp_path_factory.mktemp("site"), SERVERS) as site,
    ):
        yield site


def keepers(site: Site, server: NatsOnHost) -> list[str]:
    """The servers that keep the directory, as `server` says: the one that leads first."""

    async def ask() -> list[str]:
        bus = await NatsBus.connect(server.url)
        try:
            said = await bus.request(f"$JS.API.STREAM.INFO.KV_{DEFAULT_BUCKET}", b"", 5.0)
        finally:
            await bus.close()
        cluster = json.loads(said)["cluster"]
        return [cluster["leader"], *(each["name"] for each in cluster.get("replicas", ()))]

    return site.world["witness"].run(asyncio.run, ask())


def test_three_servers_keep_the_directory(site: Site) -> None:
    site.wait(
        "each server keeps a copy",
        lambda: len(keepers(site, site.servers[0])) == REPLICAS,
        START_SECONDS,
    )


def test_everything_goes_on_when_one_server_is_lost(site: Site) -> None:
    leader, *_ = keepers(site, site.servers[0])
    lost = next(server for server in site.servers if server.host.name == leader)
    of_a = site.computed_by(site.a, BLOCKS)
    lost.kill()
    answer = site.b.ask(of_a)
    site.check(answer)
    site.wait_until_shared(FAIL_OVER_SECONDS + SLACK_SECONDS)
    site.wait(
        "the registry equals the truth", site.registry_is_right, FAIL_OVER_SECONDS + SLACK_SECONDS
    )
    site.wait(
        "both nodes are members",
        lambda: {"a", "b"} <= set(site.witness.nodes()),
        FAIL_OVER_SECONDS + SLACK_SECONDS,
    )
    lost.start()
    site.heal()


def test_nodes_go_on_by_themselves_when_two_servers_are_lost(site: Site) -> None:
    of_a, of_b, later = (site.computed_by(node, BLOCKS) for node in (site.a, site.b, site.a))
    lost = site.servers[1:]
    for server in lost:
        server.kill()
    ended = time.monotonic() + 2 * MEMBERSHIP_SECONDS
    own, others = site.b.ask(of_b), site.b.ask(of_a)
    site.check(own, others, site.b.ask(site.new_chain()))
    assert own.host == BLOCKS
    site.wait(
        "the others' leases have ended",
        lambda: time.monotonic() > ended and not any(_is_read(site) for _ in range(3)),
        2 * MEMBERSHIP_SECONDS + FAIL_OVER_SECONDS + SLACK_SECONDS,
    )
    answer = site.b.ask(later)
    site.check(answer, site.a.ask(of_a))
    assert answer.remote == 0
    for server in lost:
        server.start()
    site.heal()


def _is_read(site: Site) -> bool:
    """Whether b reads what a has just computed."""
    question = site.new_chain(2)
    site.check(site.a.ask(question))
    answer = site.b.ask(question)
    site.check(answer)
    return answer.remote > 0
