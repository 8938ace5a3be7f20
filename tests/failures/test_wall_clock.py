"""A wall clock that jumps by a day, forwards or back: nothing here is decided by it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from kvbm_schemas.subjects import Scope
from kvbm_service.adapters.homes import Home, make_room
from kvbm_service.adapters.nats_server import EmbeddedNats
from tests.chaos.wall_clock import WallClock
from tests.failures.cluster import START_SECONDS, Cluster
from tests.patience import until

DAY = 86_400
MEMBERSHIP_SECONDS = 5.0
LEASE_SECONDS = 5.0
LOOKUP_SECONDS = 10.0
"""So long that a slow machine's answers count."""


@pytest.fixture
def clock(tmp_path: Path) -> Iterator[WallClock]:
    clock = WallClock(tmp_path / "clock")
    if not clock.works:
        pytest.skip("no C compiler here, which a clock that can be shifted needs")
    yield clock
    clock.shift(0)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_nodes_and_a_registry_share_blocks_whatever_their_clocks_say(
    nats: EmbeddedNats, clock: WallClock, tmp_path: Path
) -> None:
    with ExitStack() as ending:
        cluster = Cluster(
            ending,
            tmp_path,
            clock.environment,
            nats_url=nats.url,
            membership_seconds=MEMBERSHIP_SECONDS,
            lease_seconds=LEASE_SECONDS,
            lookup_deadline_seconds=LOOKUP_SECONDS,
        )
        cluster.start_registry(
            {"KVBM_NATS_URL": nats.url, "KVBM_MEMBERSHIP_SECONDS": str(MEMBERSHIP_SECONDS)}
        )
        owner, reader = cluster.start_node("owner"), cluster.start_node("reader")
        cluster.wait_until_shared(reader, owner, START_SECONDS)
        for days in (1, -1):
            clock.shift(days * DAY)
            since = time.monotonic()
            while time.monotonic() < since + 1.5 * MEMBERSHIP_SECONDS:
                assert cluster.reads(reader, owner), f"{days} day(s) away"
            for node in (owner, reader):
                until(lambda node=node: not node.look().leases, "a lease ends")  # type: ignore[misc]

        owner.process.kill()  # its next life begins a day before this one did
        owner = cluster.start_node("owner")
        cluster.wait_until_shared(reader, owner, START_SECONDS)


@pytest.mark.parametrize("days", [1, -1])
def test_homes_left_under_another_clock_make_room_as_well(tmp_path: Path, days: int) -> None:
    home = Home.claim(tmp_path, Scope("tests", "f00d"), "a life", "A_SETTING")
    home.close()
    then = time.time() + days * DAY
    os.utime(home.path / "owner", (then, then))
    assert make_room(tmp_path, lambda: not home.path.exists())
