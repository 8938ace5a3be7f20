"""What the directory on etcd does when etcd forgets, stops, is cut off, or is several servers."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import pytest

from kvbm_service.adapters.directory import Change
from kvbm_service.adapters.embedded_server import HOST
from kvbm_service.adapters.etcd_directory import (
    HEARTBEATS_PER_LEASE,
    PREFIX,
    EtcdDirectory,
    _Members,
)
from kvbm_service.adapters.etcd_login import parse_login
from kvbm_service.adapters.etcd_rpc import aio, rpc
from kvbm_service.adapters.etcd_server import EmbeddedEtcd
from kvbm_service.adapters.etcd_servers import EtcdServers
from kvbm_service.adapters.etcd_session import MAX_HEARTBEATS_MISSED
from kvbm_service.adapters.leased_records import Conflict, Sighting
from kvbm_service.errors import DirectoryError, NameTaken, SettingError
from tests.contracts.leases import (
    ENDING_SECONDS,
    LASTING_SECONDS,
    leases_end,
    until_renewed,
)
from tests.contracts.relay import Relay, relay_to

KEY = "prod.abc.node1"
SLOW = {"heartbeat-interval": "100", "election-timeout": "1000"}
"""etcd's own defaults, with which no lease is shorter than 2 s."""
SLOWER = {"heartbeat-interval": "600", "election-timeout": "6000"}
"""... or than 9 s."""

Eventually = Callable[..., Awaitable[None]]
Open = Callable[..., EtcdDirectory]
T = TypeVar("T")


class Eyes:
    """A watcher that remembers what it saw, and what it believes is alive."""

    def __init__(self) -> None:
        self.changes: list[Change] = []
        self.alive: dict[str, bytes] = {}

    def __call__(self, change: Change) -> None:
        self.changes.append(change)
        if change.value is None:
            del self.alive[change.key]
        else:
            self.alive[change.key] = change.value

    @property
    def buried(self) -> list[str]:
        """Whose death was reported, as often as it was."""
        return [change.key for change in self.changes if change.value is None]


@pytest.fixture
async def opened(etcd: EmbeddedEtcd, lease_seconds: float) -> AsyncIterator[Open]:
    """Opens directories, on `etcd` if not said otherwise, and closes them."""
    directories = []

    def open_one(url: str = "", lease_seconds: float = lease_seconds) -> EtcdDirectory:
        directories.append(EtcdDirectory(parse_login(url or etcd.url), lease_seconds))
        return directories[-1]

    yield open_one
    for directory in directories:
        await directory.close()


@pytest.fixture
async def stores(etcd: EmbeddedEtcd) -> AsyncIterator[tuple[_Members, _Members]]:
    """Two record stores, with nothing around them that would repair what goes wrong."""
    servers = [EtcdServers(parse_login(etcd.url), answer_seconds=10.0) for _ in range(2)]
    yield _Members(servers[0], 10.0), _Members(servers[1], 10.0)
    for each in servers:
        await each.close()


@pytest.fixture
async def relay(etcd: EmbeddedEtcd) -> AsyncIterator[Relay]:
    async with relay_to(etcd.port) as relay:
        yield relay


def through(relay: Relay) -> str:
    return f"etcd://{HOST}:{relay.port}"


async def ends(sightings: AsyncGenerator[Sighting, None]) -> None:
    """Wait for the error that ends them; whatever comes before would leave a gap."""
    async for sighting in sightings:
        raise AssertionError(sighting)


async def until_it_fails(question: Callable[[], Awaitable[object]]) -> None:
    """Ask until the answer is an error."""
    async with asyncio.timeout(30):
        while True:
            await question()
            await asyncio.sleep(0.05)


async def until_it_works(question: Callable[[], Awaitable[T]]) -> T:
    """Ask until there is an answer."""
    async with asyncio.timeout(30):
        while True:
            with contextlib.suppress(DirectoryError):
                return await question()
            await asyncio.sleep(0.05)


async def until_none(found: Callable[[], Awaitable[Sequence[object]]]) -> None:
    """Ask until nothing is found."""
    async with asyncio.timeout(30):
        while await found():  # noqa: ASYNC110  nobody tells us
            await asyncio.sleep(0.05)


async def compact(server: EmbeddedEtcd) -> None:
    """Have etcd forget every revision but the present one."""
    async with aio.insecure_channel(f"{HOST}:{server.port}") as channel:
        stub = rpc.KVStub(channel)
        now = (await stub.Range(rpc.RangeRequest(key=b"any"))).header.revision
        await stub.Compact(rpc.CompactionRequest(revision=now))


# -- revisions and leases ------------------------------------------------------------------------


async def test_a_revision_is_never_given_twice_even_by_an_etcd_that_lost_everything(
    etcd: EmbeddedEtcd, stores: tuple[_Members, _Members], tmp_path: Path
) -> None:
    one, other = stores
    old = await one.write(KEY, b"old", "one", expected=0)
    etcd.kill()
    shutil.rmtree(tmp_path / "etcd")
    await asyncio.to_thread(etcd.start)
    new = await other.write(KEY, b"new", "other", expected=0)
    assert new & 0xFFFF == old & 0xFFFF, "etcd itself gave the same one again"
    assert new != old
    with pytest.raises(Conflict):
        await one.write(KEY, b"mine!", "one", expected=old)
    with pytest.raises(Conflict):
        await one.remove(KEY, expected=old)
    stored = await one.read(KEY)
    assert stored is not None
    assert (stored.value, stored.revision) == (b"new", new)
    assert stored.owner != "one"


async def test_a_write_whose_confirmation_was_lost_is_known_as_ones_own(
    stores: tuple[_Members, _Members],
) -> None:
    one, other = stores
    await one.write(KEY, b"x", "one", expected=0)
    with pytest.raises(Conflict):
        await one.write(KEY, b"y", "one", expected=0)
    for store, is_owner in ((one, True), (other, False)):
        stored = await store.read(KEY)
        assert stored is not None
        assert (stored.owner == "one") == is_owner


async def test_a_lease_that_somebody_revokes_is_begun_anew(
    etcd: EmbeddedEtcd, opened: Open, eventually: Eventually
) -> None:
    membership = await opened().join(KEY, b"x")
    eyes = Eyes()
    watch = await opened().watch(eyes)
    async with aio.insecure_channel(f"{HOST}:{etcd.port}") as channel:
        stub = rpc.LeaseStub(channel)
        for lease in (await stub.LeaseLeases(rpc.LeaseLeasesRequest())).leases:
            await stub.LeaseRevoke(rpc.LeaseRevokeRequest(ID=lease.ID))
    await eventually(lambda: eyes.buried == [KEY])
    await eventually(lambda: eyes.alive == {KEY: b"x"})
    assert membership.alive
    await watch.close()


@leases_end
async def test_nothing_is_left_in_etcd_of_who_died(
    etcd: EmbeddedEtcd, opened: Open, eventually: Eventually
) -> None:
    directory = opened()
    await directory.join(KEY, b"x")
    await directory.servers.close()
    async with aio.insecure_channel(f"{HOST}:{etcd.port}") as channel:
        kv, lease = rpc.KVStub(channel), rpc.LeaseStub(channel)

        async def keys() -> Sequence[object]:
            return (await kv.Range(rpc.RangeRequest(key=PREFIX.encode(), range_end=b"l"))).kvs

        async def leases() -> Sequence[object]:
            return (await lease.LeaseLeases(rpc.LeaseLeasesRequest())).leases

        assert await keys()
        assert await leases()
        await until_none(keys)
        await until_none(leases)


async def test_a_lease_shorter_than_etcd_allows_ends_in_time_all_the_same(
    tmp_path: Path, eventually: Eventually
) -> None:
    with EmbeddedEtcd(options=SLOWER) as server:
        one, other = (EtcdDirectory(parse_login(server.url), 0.5) for _ in range(2))
        await one.join(KEY, b"x")
        eyes = Eyes()
        watch = await other.watch(eyes)
        started = time.monotonic()
        await one.servers.close()
        await eventually(lambda: not eyes.alive)
        assert time.monotonic() - started < 6.0, "an observer does not wait for etcd"
        joined = False
        async with asyncio.timeout(30):
            while not joined:  # etcd has it for 9 s
                with contextlib.suppress(NameTaken):
                    await other.join(KEY, b"x")
                    joined = True
                await asyncio.sleep(0.05)
        await watch.close()
        await one.close()
        await other.close()


async def test_ages_are_told_by_etcds_own_clock(opened: Open, eventually: Eventually) -> None:
    one, other = opened(lease_seconds=12.0), opened(lease_seconds=12.0)
    started = time.monotonic()
    await one.join(KEY, b"x")
    await one.servers.close()
    ages = []
    while time.monotonic() - started < 3.0:
        (entry,) = await other.entries()
        ages.append(entry.age_seconds)
        assert entry.age_seconds <= time.monotonic() - started, "at least so old"
        await asyncio.sleep(0.1)
    assert ages == sorted(ages)
    assert ages[-1] >= 1.0


@leases_end
async def test_a_record_under_no_lease_is_nobodys(
    etcd: EmbeddedEtcd, opened: Open, eventually: Eventually
) -> None:
    async with aio.insecure_channel(f"{HOST}:{etcd.port}") as channel:
        put = rpc.PutRequest(key=f"{PREFIX}{KEY}".encode(), value=b"by hand")
        await rpc.KVStub(channel).Put(put)
    directory = opened()
    assert await directory.entries() == []
    eyes = Eyes()
    watch = await directory.watch(eyes)
    assert eyes.alive == {KEY: b"by hand"}
    await eventually(lambda: not eyes.alive)
    await watch.close()


async def test_more_records_than_fit_on_a_page_are_all_found(
    stores: tuple[_Members, _Members], opened: Open
) -> None:
    keys = [f"prod.abc.node{number:04}" for number in range(600)]
    await asyncio.gather(*(stores[0].write(key, key.encode(), "one", 0) for key in keys))
    directory = opened(lease_seconds=10.0)
    assert sorted(entry.key for entry in await directory.entries()) == keys
    eyes = Eyes()
    watch = await directory.watch(eyes, "prod.abc.")
    assert eyes.alive == {key: key.encode() for key in keys}
    await watch.close()


# -- watches -------------------------------------------------------------------------------------


async def test_a_watch_is_right_after_etcd_has_forgotten_what_it_missed(
    etcd: EmbeddedEtcd, relay: Relay, opened: Open, eventually: Eventually
) -> None:
    directory = opened()
    stays = await directory.join("prod.abc.stays", b"1")
    leaves = await directory.join("prod.abc.leaves", b"1")
    eyes = Eyes()
    watch = await opened(through(relay)).watch(eyes)
    assert len(eyes.alive) == 2
    await relay.cut()
    await stays.update(b"2")
    await leaves.leave()
    await directory.join("prod.abc.comes", b"1")
    await compact(etcd)
    await relay.heal()
    expected = {"prod.abc.stays": b"2", "prod.abc.comes": b"1"}
    await eventually(lambda: eyes.alive == expected)
    assert eyes.buried == ["prod.abc.leaves"]
    await watch.close()


async def test_a_watch_that_etcd_cannot_begin_any_more_ends_in_an_error(
    etcd: EmbeddedEtcd, stores: tuple[_Members, _Members]
) -> None:
    revision = 0
    for number in range(3):
        revision = await stores[0].write(KEY, b"%d" % number, "one", revision)
    await compact(etcd)
    with pytest.raises(DirectoryError, match="forgotten"):
        await ends(stores[0]._changes("", 1))


async def test_a_watch_from_the_future_ends_in_an_error(
    stores: tuple[_Members, _Members],
) -> None:
    with pytest.raises(DirectoryError, match="behind what was read"):
        await ends(stores[0]._changes("", 1_000_000))


@leases_end
async def test_a_watch_notices_that_its_server_was_unplugged(
    relay: Relay, opened: Open, eventually: Eventually
) -> None:
    one, other = opened(), opened(through(relay))
    membership = await one.join(KEY, b"1")
    eyes = Eyes()
    watch = await other.watch(eyes)
    relay.swallow()
    await membership.update(b"2")
    with pytest.raises(DirectoryError, match="not in time"):
        await other.entries()
    await eventually(lambda: not eyes.alive)
    await relay.heal()
    await eventually(lambda: eyes.alive == {KEY: b"2"})
    await watch.close()


async def test_a_silent_watch_lasts(relay: Relay, stores: tuple[_Members, _Members]) -> None:
    """Nothing happens for many heartbeats, and what happens then comes on the same watch."""
    servers = EtcdServers(parse_login(through(relay)), answer_seconds=10.0)
    store = _Members(servers, LASTING_SECONDS)
    heartbeat = LASTING_SECONDS / HEARTBEATS_PER_LEASE
    seen: list[Sighting | None] = []
    async with contextlib.aclosing(store.follow("")) as sightings:
        seen.append(await anext(sightings))
        next_one = asyncio.ensure_future(anext(sightings))
        await asyncio.sleep(heartbeat * (MAX_HEARTBEATS_MISSED + 0.5))
        await stores[0].write(KEY, b"x", "one", 0)
        sighting = await next_one
    assert seen == [None]
    assert sighting is not None
    assert (sighting.key, sighting.value) == (KEY, b"x")
    await servers.close()


async def test_an_etcd_that_stands_still_for_less_than_a_lease_buries_nobody(
    etcd: EmbeddedEtcd, opened: Open, eventually: Eventually
) -> None:
    one, other = opened(), opened()
    membership = await one.join(KEY, b"x")
    eyes = Eyes()
    watch = await other.watch(eyes)
    assert etcd.pid is not None
    os.kill(etcd.pid, signal.SIGSTOP)
    await asyncio.sleep(1.0)
    os.kill(etcd.pid, signal.SIGCONT)
    await until_renewed(other)
    await membership.update(b"y")
    await eventually(lambda: eyes.alive == {KEY: b"y"})
    assert eyes.buried == []
    assert membership.alive
    await watch.close()


@leases_end
async def test_an_etcd_that_stands_still_for_more_than_a_lease_has_everybody_back(
    etcd: EmbeddedEtcd, opened: Open, eventually: Eventually
) -> None:
    one, other = opened(), opened()
    membership = await one.join(KEY, b"x")
    eyes = Eyes()
    watch = await other.watch(eyes)
    assert etcd.pid is not None
    os.kill(etcd.pid, signal.SIGSTOP)
    await eventually(lambda: not membership.alive)
    await eventually(lambda: not eyes.alive)
    os.kill(etcd.pid, signal.SIGCONT)
    await eventually(lambda: membership.alive)
    await eventually(lambda: eyes.alive == {KEY: b"x"})
    assert [entry.key for entry in await other.entries()] == [KEY]
    await watch.close()


# -- several servers -----------------------------------------------------------------------------


class Cluster:
    """Three etcd servers that are one."""

    def __init__(self, folder: Path, ports: list[int]) -> None:
        clients, peers = ports[:3], ports[3:]
        self.members = [
            EmbeddedEtcd(
                clients[number],
                folder / str(number),
                {
                    "name": str(number),
                    "listen-peer-urls": f"http://{HOST}:{peers[number]}",
                    "initial-advertise-peer-urls": f"http://{HOST}:{peers[number]}",
                    "initial-cluster": ",".join(
                        f"{name}=http://{HOST}:{port}" for name, port in enumerate(peers)
                    ),
                    **SLOW,
                },
            )
            for number in range(3)
        ]

    @property
    def url(self) -> str:
        return ",".join(f"etcd://{HOST}:{member.port}" for member in self.members)

    def start(self, *numbers: int) -> None:
        """Each waits for a majority."""
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda number: self.members[number].start(), numbers))

    def close(self) -> None:
        for member in self.members:
            member.kill()
            member.close()


@pytest.fixture
def cluster(tmp_path: Path, free_ports: Callable[[int], list[int]]) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path, free_ports(6))
    try:
        cluster.start(0, 1, 2)
        yield cluster
    finally:
        cluster.close()


async def test_one_of_three_servers_may_die_and_nobody_is_buried(
    cluster: Cluster, eventually: Eventually
) -> None:
    one, other = (EtcdDirectory(parse_login(cluster.url), LASTING_SECONDS) for _ in range(2))
    membership = await one.join(KEY, b"x")
    eyes = Eyes()
    watch = await other.watch(eyes)
    cluster.members[0].kill()  # the first in the URL, so the one that both use
    await until_it_works(lambda: membership.update(b"y"))  # the others may have to elect a leader
    await eventually(lambda: eyes.alive == {KEY: b"y"})
    await until_renewed(other)
    assert membership.alive
    assert eyes.buried == []
    await watch.close()
    await one.close()
    await other.close()


async def test_a_server_without_the_others_is_not_believed(
    cluster: Cluster, eventually: Eventually
) -> None:
    one, other = (EtcdDirectory(parse_login(cluster.url), ENDING_SECONDS) for _ in range(2))
    membership = await one.join(KEY, b"x")
    eyes = Eyes()
    watch = await other.watch(eyes)
    cluster.members[0].kill()
    cluster.members[1].kill()
    with pytest.raises(DirectoryError):
        await until_it_fails(other.entries)
    await eventually(lambda: not membership.alive)
    await asyncio.to_thread(cluster.start, 0, 1)
    await eventually(lambda: membership.alive)
    await eventually(lambda: eyes.alive == {KEY: b"x"})
    async with asyncio.timeout(30):
        while not await until_it_works(other.entries):  # noqa: ASYNC110  nobody tells us
            await asyncio.sleep(0.05)
    await watch.close()
    await one.close()
    await other.close()


async def test_a_dead_server_in_the_url_costs_little(
    etcd: EmbeddedEtcd, opened: Open, closed_port: int
) -> None:
    directory = opened(f"etcd://{HOST}:{closed_port},{etcd.url}")
    await directory.join(KEY, b"x")
    assert [entry.key for entry in await directory.entries()] == [KEY]


async def test_impossible_settings_are_refused() -> None:
    with pytest.raises(SettingError, match="lease_seconds"):
        EtcdDirectory(parse_login("etcd://127.0.0.1"), lease_seconds=0.1)
