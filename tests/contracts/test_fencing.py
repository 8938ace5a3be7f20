"""Two leaders of one name: only the one that the directory lists is heard, and that changes once.

Leaders are real processes, over both directories.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path
from typing import Any

import pytest

from kvbm_schemas.block import BlockHash, Tier, pack
from kvbm_schemas.codec import Decoder, encode
from kvbm_schemas.events import Beat, BlockEvent, Stored
from kvbm_schemas.records import DirectoryRecord, NodeRecord
from kvbm_schemas.requests import Acquire, LeaseAnswer, Leased, Locate, Placements
from kvbm_schemas.subjects import REGISTRY_NODE
from kvbm_service.adapters.bus import Delivery
from kvbm_service.adapters.directory import Change
from kvbm_service.errors import NoAnswer
from kvbm_service.network import Network, over_nats
from kvbm_service.registry_service import RegistryService
from kvbm_service.settings import Settings
from tests.chaos.wall_clock import WallClock
from tests.contracts.child import Child
from tests.contracts.lone_leader import SCOPE
from tests.contracts.meeting_place import DIRECTORIES, open_meeting_place

NODE = "node"
LEASE_SECONDS = 4.0
PATIENCE_SECONDS = 60.0
WATCHED_SECONDS = 1.25 * LEASE_SECONDS
"""How long nothing must happen."""

_answers: Decoder[LeaseAnswer] = Decoder(LeaseAnswer)  # type: ignore[arg-type]
_events: Decoder[BlockEvent] = Decoder(BlockEvent)  # type: ignore[arg-type]
_placements = Decoder(Placements)
_records: Decoder[DirectoryRecord] = Decoder(DirectoryRecord)  # type: ignore[arg-type]


def block(name: str) -> str:
    return hashlib.md5(name.encode()).hexdigest()


class Arena:
    """One bus, one directory, one registry, and leaders of one name."""

    def __init__(self, settings: dict[str, Any], network: Network, folder: Path) -> None:
        self.settings = settings
        self.leaders: list[Child] = []
        self.listed: list[NodeRecord | None] = []
        """What the directory said of the name, in turn."""
        self.epochs_heard: set[int] = set()
        self._network = network
        self._folder = folder

    def leader(self, instance: str, environment: Mapping[str, str] | None = None) -> Child:
        """Start one."""
        options = {"node": NODE, "instance": instance, "settings": self.settings}
        log = self._folder / f"{instance}.log"
        child = Child("tests.contracts.lone_leader", options, log, environment)
        self.leaders.append(child)
        return child

    async def watch(self, ending: AsyncExitStack) -> None:
        """See and hear everything."""
        watch = await self._network.directory.watch(self._on_change, f"{'.'.join(SCOPE)}.")
        ending.push_async_callback(watch.close)
        await self._network.bus.subscribe(SCOPE.of(NODE, "events"), self._on_event)

    def _on_change(self, change: Change) -> None:
        record = None if change.value is None else _records.decode(change.value)
        assert record is None or isinstance(record, NodeRecord)
        self.listed.append(record)

    async def _on_event(self, delivery: Delivery) -> None:
        self.epochs_heard.add(_events.decode(delivery.payload).epoch)

    @property
    def instance(self) -> str:
        """Whose the name is."""
        record = self.listed[-1] if self.listed else None
        return record.instance if record else ""

    @property
    def epoch(self) -> int:
        """Of the life that is listed."""
        record = self.listed[-1]
        assert record is not None
        return record.epoch

    async def known(self, *names: str) -> set[str]:
        """Which of these blocks the registry has somewhere."""
        locate = Locate(hashes=pack(BlockHash(bytes.fromhex(block(name))) for name in names))
        subject = SCOPE.of(REGISTRY_NODE, "locate")
        placements = _placements.decode(
            await self._network.bus.request(subject, encode(locate), PATIENCE_SECONDS)
        )
        found = zip(names, placements.holders, strict=True)
        return {name for name, holders in found if holders}

    async def hear_late(self, epoch: int, name: str) -> None:
        """What a leader said in this life, and a network has kept until now."""
        hashes = bytes.fromhex(block(name))
        for event in (
            Stored(epoch=epoch, seq=1, tier=Tier.HOST, hashes=hashes),
            Stored(epoch=epoch, seq=1_000, tier=Tier.HOST, hashes=hashes),
            Beat(epoch=epoch, seq=1_000),
        ):
            await self._network.bus.publish(SCOPE.of(NODE, "events"), encode(event))

    async def lease(self, name: str) -> LeaseAnswer | None:
        """What is answered to who wants to read a block; None: nothing."""
        acquire = Acquire(hashes=bytes.fromhex(block(name)))
        subject = SCOPE.of(NODE, "lease")
        try:
            return _answers.decode(await self._network.bus.request(subject, encode(acquire), 1.0))
        except NoAnswer:
            return None

    async def until(self, is_so: Callable[[], Any], what: str) -> None:
        """Wait for something that has to come about."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            so = is_so()
            if await so if asyncio.iscoroutine(so) else so:
                return
            said = [leader.said[-2000:] for leader in self.leaders]
            assert time.monotonic() < deadline, (what, self.listed, said)
            await asyncio.sleep(0.02)

    async def store(self, leader: Child, *names: str) -> None:
        """Have blocks in a leader's tier."""
        names_held = await asyncio.to_thread(
            leader.ask, do="store", names=[block(name) for name in names]
        )
        assert {block(name) for name in names} <= set(names_held)

    async def settled(self, leader: Child, instance: str, *names: str) -> None:
        """The name is this leader's, which has just stored these blocks; the registry knows."""
        await self.until(lambda: self.instance == instance, f"{instance} is listed")
        await self.store(leader, *names)

        async def seen() -> bool:
            return await self.known(*names) == set(names)

        await self.until(seen, f"the registry follows {instance}")


@pytest.fixture(params=DIRECTORIES)
async def arena(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Arena]:
    async with AsyncExitStack() as ending:
        servers = ending.enter_context(ExitStack())
        settings = open_meeting_place(request.param, tmp_path, servers)
        settings["membership_seconds"] = LEASE_SECONDS
        network = await over_nats(Settings(**settings), "test")()
        ending.push_async_callback(network.close)
        registry = RegistryService(network.bus, network.directory)
        running = asyncio.create_task(registry.run())
        ending.callback(running.cancel)
        await asyncio.wait_for(registry.ready.wait(), PATIENCE_SECONDS)
        arena = Arena(settings, network, tmp_path)
        await arena.watch(ending)
        yield arena
        for leader in arena.leaders:
            leader.close()


async def test_a_second_leader_of_a_live_name_goes_on_by_itself_until_the_first_has_gone(
    arena: Arena,
) -> None:
    first = arena.leader("first")
    await arena.settled(first, "first", "a")
    before = arena.epoch
    second = arena.leader("second")
    await arena.until(lambda: "already called" in second.said, "it says that the name is taken")
    assert "KVBM_NODE_NAME" in second.said
    assert f"its lease ends within {LEASE_SECONDS:g} s" in second.said
    await arena.store(second, "b")  # its own tiers work
    assert await arena.known("a", "b") == {"a"}
    assert isinstance(await arena.lease("a"), Leased), "only the first is asked"
    assert second.said.count("already called") == 1, "said once"
    assert arena.instance == "first"

    first.kill()
    await arena.until(lambda: arena.instance == "second", "the second has the name")
    assert arena.epoch > before
    await arena.settled(second, "second", "b", "c")
    assert await arena.known("a", "b", "c") == {"b", "c"}


@pytest.mark.parametrize("days_behind", [0, 1], ids=["in time", "clock went back"])
async def test_a_leader_that_slept_through_its_lease_is_heard_by_nobody_until_it_has_the_name_again(
    arena: Arena, tmp_path: Path, days_behind: int
) -> None:
    """Its heir has a smaller epoch than the sleeper if its clock is behind."""
    clock = WallClock(tmp_path / "clock")
    clock.shift(-days_behind * 86_400)
    if days_behind and not clock.works:
        pytest.skip("no C compiler here, which a clock that can be shifted needs")
    sleeper = arena.leader("sleeper")
    await arena.settled(sleeper, "sleeper", "a")
    slept = arena.epoch
    sleeper.tell(do="store", names=[block("late")])
    sleeper.stop()
    heir = arena.leader("heir", clock.environment if days_behind else {})
    await arena.settled(heir, "heir", "b")
    inherited = arena.epoch
    assert (inherited < slept) if days_behind else (inherited > slept)

    arena.epochs_heard.clear()
    changes = len(arena.listed)
    sleeper.go_on()
    sleeper.hear()
    await arena.hear_late(slept, "late")
    deadline = time.monotonic() + WATCHED_SECONDS
    while time.monotonic() < deadline:
        await arena.store(sleeper, "a", "x")
        assert await arena.known("a", "late", "x", "b") == {"b"}
        answer = await arena.lease("b")
        assert isinstance(answer, Leased), "the heir answers, and nobody before it"
        assert answer.epoch == inherited
        assert not isinstance(await arena.lease("a"), Leased)
        await asyncio.sleep(0.1)
    assert {record.instance for record in arena.listed[changes:] if record} <= {"heir"}
    assert None not in arena.listed[changes:], "the heir's record was there all the time"
    assert arena.epochs_heard <= {inherited, slept}, "it said nothing under another number"
    assert "goes on by itself" in sleeper.said

    await asyncio.to_thread(heir.ask, do="leave")
    await arena.until(lambda: arena.instance == "sleeper", "it has the name again")
    assert arena.epoch > inherited
    assert arena.epoch > slept
    await arena.settled(sleeper, "sleeper", "a", "x", "late")
    assert await arena.known("b") == set()
