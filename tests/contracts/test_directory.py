"""One suite for every directory, and what only a real server and real processes can show."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import nats.js.errors
import pytest

from kvbm_service.adapters.directory import Change
from kvbm_service.adapters.leased_records import LeasedRecords
from kvbm_service.adapters.memory_directory import MemoryDirectory, Records
from kvbm_service.adapters.nats_bus import NatsBus
from kvbm_service.adapters.nats_directory import NatsDirectory
from kvbm_service.adapters.nats_server import EmbeddedNats
from kvbm_service.errors import DirectoryError, NameTaken, SettingError
from tests.contracts.leases import (
    ENDING_SECONDS,
    LASTING_SECONDS,
    leases_end,
    until_renewed,
)

if TYPE_CHECKING:
    from conftest import DirectoryWorld

KEY = "prod.abc.node1"

Eventually = Callable[..., Awaitable[None]]


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


async def _keys(directory: LeasedRecords) -> list[str]:
    """What is there; nothing while the directory is not back yet."""
    try:
        return [entry.key for entry in await directory.entries()]
    except DirectoryError:
        return []


async def test_a_record_that_was_joined_is_found(directories: DirectoryWorld) -> None:
    one, other = await directories.open(), await directories.open()
    await one.join(KEY, b"hello")
    (entry,) = await other.entries()
    assert (entry.key, entry.value) == (KEY, b"hello")
    assert 0 <= entry.age_seconds < LASTING_SECONDS


async def test_entries_are_those_with_the_prefix(directories: DirectoryWorld) -> None:
    directory = await directories.open()
    for key in ("a.b.n1", "a.b.n1.0", "a.b.n12", "a.bb.n1", "z.b.n1"):
        await directory.join(key, b"x")

    async def found(prefix: str) -> list[str]:
        return sorted(entry.key for entry in await directory.entries(prefix))

    assert await found("a.b.") == ["a.b.n1", "a.b.n1.0", "a.b.n12"]
    assert await found("a.b") == ["a.b.n1", "a.b.n1.0", "a.b.n12", "a.bb.n1"]
    assert await found("a.b.n1") == ["a.b.n1", "a.b.n1.0", "a.b.n12"]
    assert await found("a.b.n1.") == ["a.b.n1.0"]
    assert await found("nothing.") == []


async def test_an_empty_directory_has_no_entries_and_can_be_watched(
    directories: DirectoryWorld, eventually: Eventually
) -> None:
    one, other = await directories.open(), await directories.open()
    assert await one.entries() == []
    eyes = Eyes()
    watch = await one.watch(eyes)
    await other.join(KEY, b"x")
    await eventually(lambda: eyes.alive == {KEY: b"x"})
    await watch.close()


@leases_end
async def test_a_record_outlives_its_first_lease_while_its_owner_beats(
    directories: DirectoryWorld,
) -> None:
    one, other = await directories.open(), await directories.open()
    membership = await one.join(KEY, b"x")
    for _ in range(8):
        await asyncio.sleep(ENDING_SECONDS / 6)
        assert [entry.key for entry in await other.entries()] == [KEY]
        assert membership.alive


async def test_a_name_can_be_had_once(directories: DirectoryWorld) -> None:
    one, other = await directories.open(), await directories.open()
    first = await one.join(KEY, b"first")
    for directory in (one, other):
        with pytest.raises(NameTaken, match=KEY):
            await directory.join(KEY, b"second")
    assert [entry.value for entry in await other.entries()] == [b"first"]
    assert first.alive


async def test_a_name_that_was_left_can_be_had_at_once(directories: DirectoryWorld) -> None:
    one, other = await directories.open(), await directories.open()
    membership = await one.join(KEY, b"first")
    await membership.leave()
    assert not membership.alive
    assert await other.entries() == []
    await other.join(KEY, b"second")
    assert [entry.value for entry in await one.entries()] == [b"second"]


async def test_a_dead_nodes_name_is_free_also_where_the_stores_clock_stands_still() -> None:
    records = Records(ENDING_SECONDS, clock=lambda: 0.0)
    one, other = MemoryDirectory(records), MemoryDirectory(records)
    await one.join(KEY, b"first")
    deadline = time.monotonic() + 1.25 * ENDING_SECONDS
    while time.monotonic() < deadline:  # it lives: nobody gets its name, however long they ask
        with pytest.raises(NameTaken):
            await other.join(KEY, b"second")
        await asyncio.sleep(0.05)
    one.cut()
    died = time.monotonic()
    async with asyncio.timeout(10 * ENDING_SECONDS):
        while True:
            with contextlib.suppress(NameTaken):
                await other.join(KEY, b"second")
                break
            await asyncio.sleep(0.05)
    assert time.monotonic() - died > ENDING_SECONDS / 2, "it may have been renewed just before"
    assert [entry.value for entry in await other.entries()] == [b"second"]
    await other.close()
    one.heal()
    await one.close()


@leases_end
async def test_the_name_of_a_dead_node_is_free_when_its_lease_ends(
    directories: DirectoryWorld, eventually: Eventually
) -> None:
    one, other = await directories.open(), await directories.open()
    await one.join(KEY, b"first")
    await directories.crash(one)
    with pytest.raises(NameTaken):
        await other.join(KEY, b"second")
    joined = False
    async with asyncio.timeout(30):
        while not joined:
            with contextlib.suppress(NameTaken):
                await other.join(KEY, b"second")
                joined = True
            await asyncio.sleep(0.05)


async def test_a_watch_reports_what_is_there_and_what_comes_and_goes(
    directories: DirectoryWorld, eventually: Eventually
) -> None:
    one, other = await directories.open(), await directories.open()
    first = await one.join("a.b.n1", b"1")
    eyes = Eyes()
    watch = await other.watch(eyes, "a.b.")
    assert eyes.alive == {"a.b.n1": b"1"}
    await one.join("a.b.n2", b"2")
    await one.join("a.c.n3", b"3")
    await first.update(b"1 changed")
    await eventually(lambda: eyes.alive == {"a.b.n1": b"1 changed", "a.b.n2": b"2"})
    await first.leave()
    await eventually(lambda: eyes.alive == {"a.b.n2": b"2"})
    await watch.close()


async def test_a_clean_leave_is_seen_long_before_the_lease_ends(
    directories: DirectoryWorld, eventually: Eventually
) -> None:
    one, other = await directories.open(), await directories.open()
    membership = await one.join(KEY, b"x")
    eyes = Eyes()
    watch = await other.watch(eyes)
    loop = asyncio.get_running_loop()
    started = loop.time()
    await membership.leave()
    await eventually(lambda: not eyes.alive)
    assert loop.time() - started < LASTING_SECONDS / 2
    await watch.close()


async def test_renewals_are_not_reported_as_changes(
    directories: DirectoryWorld, eventually: Eventually
) -> None:
    one, other = await directories.open(), await directories.open()
    membership = await one.join(KEY, b"x")
    eyes = Eyes()
    watch = await other.watch(eyes)
    await until_renewed(other)
    await membership.update(b"x")
    await membership.update(b"y")
    await eventually(lambda: eyes.alive == {KEY: b"y"})
    assert [change.value for change in eyes.changes] == [b"x", b"y"]
    await watch.close()


@leases_end
async def test_a_node_that_stops_beating_is_reported_gone_within_two_leases(
    directories: DirectoryWorld, eventually: Eventually
) -> None:
    one, other = await directories.open(), await directories.open()
    await one.join(KEY, b"x")
    eyes = Eyes()
    watch = await other.watch(eyes)
    await directories.crash(one)
    await eventually(lambda: not eyes.alive)
    assert eyes.changes[-1].value is None
    await watch.close()


@leases_end
async def test_the_dead_are_reported_gone_even_if_the_directory_has_died_as_well(
    directories: DirectoryWorld, eventually: Eventually
) -> None:
    one, other = await directories.open(), await directories.open()
    await one.join(KEY, b"x")
    eyes = Eyes()
    watch = await other.watch(eyes)
    await directories.lose()
    assert eyes.alive
    await eventually(lambda: not eyes.alive)
    await directories.recover()
    await eventually(lambda: eyes.alive == {KEY: b"x"})
    await watch.close()


@leases_end
async def test_a_member_knows_when_it_is_no_longer_alive_and_heals(
    directories: DirectoryWorld, eventually: Eventually
) -> None:
    directory = await directories.open()
    membership = await directory.join(KEY, b"x")
    await directories.lose()
    assert membership.alive
    with pytest.raises(DirectoryError):
        await membership.update(b"new")
    await eventually(lambda: not membership.alive)
    await directories.recover()
    await eventually(lambda: membership.alive)
    assert [entry.value for entry in await directory.entries()] == [b"new"]


async def test_a_short_absence_of_the_directory_buries_nobody(
    directories: DirectoryWorld, eventually: Eventually
) -> None:
    one, other = await directories.open(), await directories.open()
    membership = await one.join(KEY, b"x")
    eyes = Eyes()
    watch = await other.watch(eyes)
    await directories.lose()
    await directories.recover()
    await until_renewed(other)
    await membership.update(b"y")
    await eventually(lambda: eyes.alive == {KEY: b"y"})
    assert [change.value for change in eyes.changes] == [b"x", b"y"]
    assert membership.alive
    await watch.close()


async def test_a_wiped_directory_gets_its_records_back_from_their_owners(
    directories: DirectoryWorld, eventually: Eventually
) -> None:
    one, other = await directories.open(), await directories.open()
    kept = await one.join("a.b.kept", b"x")
    await other.join("a.b.lost", b"y")
    watcher = await directories.open()
    eyes = Eyes()
    watch = await watcher.watch(eyes)
    await directories.crash(other)
    await directories.lose()
    await directories.recover(wiped=True)
    async with asyncio.timeout(30):
        while await _keys(watcher) != ["a.b.kept"]:  # noqa: ASYNC110  nobody tells us
            await asyncio.sleep(0.05)
    await eventually(lambda: kept.alive)
    assert "a.b.kept" in eyes.alive
    assert "a.b.kept" not in [change.key for change in eyes.changes if change.value is None]
    await watch.close()


async def test_one_who_lost_its_name_to_another_knows_and_does_not_take_it_back(
    directories: DirectoryWorld, eventually: Eventually
) -> None:
    one = await directories.open()
    first = await one.join(KEY, b"first")
    second = None
    # `one` renews soon after: whoever is quicker has the name. Go on until it was the other.
    async with asyncio.timeout(60):
        while second is None:
            await directories.lose()
            await directories.recover(wiped=True)
            other = await directories.open()
            with contextlib.suppress(DirectoryError):
                second = await other.join(KEY, b"second")
    await eventually(lambda: not first.alive)
    with pytest.raises(NameTaken):
        await first.update(b"first again")
    await first.leave()
    assert second.alive
    assert [entry.value for entry in await other.entries()] == [b"second"]


async def test_an_unreachable_directory_is_an_error_of_its_own(
    directories: DirectoryWorld,
) -> None:
    directory = await directories.open()
    await directories.lose()
    for attempt in (directory.join(KEY, b"x"), directory.entries(), directory.watch(print)):
        with pytest.raises(DirectoryError):
            await attempt
    await directories.recover()


async def test_leaving_an_unreachable_directory_is_no_error(directories: DirectoryWorld) -> None:
    directory = await directories.open()
    membership = await directory.join(KEY, b"x")
    await directories.lose()
    await membership.leave()
    assert not membership.alive
    await directories.recover()


async def test_a_closed_watch_reports_nothing_more(
    directories: DirectoryWorld, eventually: Eventually
) -> None:
    directory = await directories.open()
    closed, end = Eyes(), Eyes()
    await (await directory.watch(closed)).close()
    watch = await directory.watch(end)
    await directory.join(KEY, b"x")
    await eventually(lambda: end.alive)
    assert closed.changes == []
    await watch.close()


async def test_a_failing_watcher_is_logged_and_goes_on(
    directories: DirectoryWorld, eventually: Eventually, caplog: pytest.LogCaptureFixture
) -> None:
    directory = await directories.open()
    seen = []

    def fragile(change: Change) -> None:
        seen.append(change.key)
        raise ValueError("cannot take this")

    watch = await directory.watch(fragile)
    await directory.join("a.b.n1", b"x")
    await directory.join("a.b.n2", b"x")
    await eventually(lambda: seen == ["a.b.n1", "a.b.n2"])
    assert "cannot take this" in caplog.text
    await watch.close()


# NATS only

MEMBER = """
import asyncio, sys
from kvbm_service.adapters.nats_bus import NatsBus
from kvbm_service.adapters.nats_directory import NatsDirectory

async def main():
    url, key, lease = sys.argv[1:]
    bus = await NatsBus.connect(url)
    await NatsDirectory(bus, lease_seconds=float(lease)).join(key, b"from another process")
    print("joined", flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


@contextlib.contextmanager
def member_process(url: str, key: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process that has joined as `key`."""
    process = subprocess.Popen(
        [sys.executable, "-c", MEMBER, url, key, str(ENDING_SECONDS)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"joined\n"
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
async def directory(
    nats_server: EmbeddedNats, lease_seconds: float
) -> AsyncIterator[NatsDirectory]:
    bus = await NatsBus.connect(nats_server.url)
    directory = NatsDirectory(bus, lease_seconds=lease_seconds)
    yield directory
    await directory.close()
    await bus.close()


@leases_end
async def test_a_killed_process_is_reported_gone(
    nats_server: EmbeddedNats, directory: LeasedRecords, eventually: Eventually
) -> None:
    with member_process(nats_server.url, KEY) as process:
        eyes = Eyes()
        watch = await directory.watch(eyes)
        assert eyes.alive == {KEY: b"from another process"}
        process.send_signal(signal.SIGKILL)
        await eventually(lambda: not eyes.alive)
        await watch.close()


@leases_end
async def test_a_process_that_was_stopped_for_long_is_gone_and_then_back(
    nats_server: EmbeddedNats, directory: LeasedRecords, eventually: Eventually
) -> None:
    with member_process(nats_server.url, KEY) as process:
        eyes = Eyes()
        watch = await directory.watch(eyes)
        process.send_signal(signal.SIGSTOP)
        await eventually(lambda: not eyes.alive)
        process.send_signal(signal.SIGCONT)
        await eventually(lambda: eyes.alive)
        await watch.close()


@leases_end
async def test_a_killed_process_is_reported_gone_though_nats_was_killed_with_it(
    nats_server: EmbeddedNats, directory: LeasedRecords, eventually: Eventually
) -> None:
    with member_process(nats_server.url, KEY) as process:
        eyes = Eyes()
        watch = await directory.watch(eyes)
        process.send_signal(signal.SIGKILL)
        nats_server.kill()
        await eventually(lambda: not eyes.alive)
        await watch.close()


async def test_a_bucket_that_someone_removes_is_made_again(
    nats_server: EmbeddedNats, directory: LeasedRecords, eventually: Eventually
) -> None:
    membership = await directory.join(KEY, b"x")
    bus = await NatsBus.connect(nats_server.url)
    await bus.client.jetstream().delete_key_value("kvbm_nodes")
    made_again = False
    async with asyncio.timeout(30):
        while not made_again:
            with contextlib.suppress(nats.js.errors.NotFoundError):
                await bus.client.jetstream().key_value("kvbm_nodes")
                made_again = True
            await asyncio.sleep(0.05)
    await eventually(lambda: membership.alive)
    assert [entry.key for entry in await directory.entries()] == [KEY]
    await bus.close()


async def test_a_watch_goes_on_when_someone_removes_the_bucket(
    nats_server: EmbeddedNats, directory: LeasedRecords, eventually: Eventually
) -> None:
    eyes = Eyes()
    watch = await directory.watch(eyes)
    bus = await NatsBus.connect(nats_server.url)
    await bus.client.jetstream().delete_key_value("kvbm_nodes")
    other = NatsDirectory(bus, lease_seconds=LASTING_SECONDS)
    await other.join(KEY, b"x")
    await eventually(lambda: eyes.alive == {KEY: b"x"})
    await watch.close()
    await other.close()
    await bus.close()


async def test_a_watch_resumes_as_soon_as_nats_is_back_however_long_the_lease(
    nats_server: EmbeddedNats, eventually: Eventually
) -> None:
    bus = await NatsBus.connect(nats_server.url)
    directory = NatsDirectory(bus, lease_seconds=120.0)
    eyes = Eyes()
    watch = await directory.watch(eyes)
    nats_server.kill()
    await eventually(lambda: not bus.connected)
    await asyncio.to_thread(nats_server.start)
    await eventually(lambda: bus.connected)
    await directory.join(KEY, b"x")
    await eventually(lambda: eyes.alive == {KEY: b"x"})
    await watch.close()
    await directory.close()
    await bus.close()


async def test_a_record_that_someone_deletes_is_gone_and_made_again(
    nats_server: EmbeddedNats, directory: LeasedRecords, eventually: Eventually
) -> None:
    await directory.join(KEY, b"x")
    eyes = Eyes()
    watch = await directory.watch(eyes)
    bus = await NatsBus.connect(nats_server.url)
    bucket = await bus.client.jetstream().key_value("kvbm_nodes")
    await bucket.delete(KEY)
    await eventually(lambda: [each.value for each in eyes.changes] == [b"x", None, b"x"])
    await watch.close()
    await bus.close()


async def test_nodes_with_different_leases_are_told_so(
    nats_server: EmbeddedNats, directory: LeasedRecords
) -> None:
    await directory.entries()
    bus = await NatsBus.connect(nats_server.url)
    with pytest.raises(DirectoryError, match=r"lease of 6 s.* 3 s"):
        await NatsDirectory(bus, lease_seconds=3.0).entries()
    await bus.close()


async def test_a_server_without_jetstream_is_told_so(tmp_path: Path) -> None:
    with EmbeddedNats(jetstream=False) as server:
        bus = await NatsBus.connect(server.url)
        with pytest.raises(DirectoryError, match="no JetStream"):
            await NatsDirectory(bus).entries()
        await bus.close()


async def test_impossible_settings_are_refused(nats_server: EmbeddedNats) -> None:
    bus = await NatsBus.connect(nats_server.url)
    with pytest.raises(SettingError, match="lease_seconds"):
        NatsDirectory(bus, lease_seconds=0.1)
    with pytest.raises(SettingError, match="bucket"):
        NatsDirectory(bus, bucket="a.b")
    await bus.close()
