"""A rank's process is killed or stopped, and another takes its place, while the leader lives on.

Ranks are real processes with real slabs, copies and NIXL agents. Engines that cannot replace a
rank (vLLM) end instead, and nothing of this happens to them.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Awaitable, Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import pytest

from kvbm_schemas.block import pack
from kvbm_schemas.codec import Decoder, encode
from kvbm_schemas.requests import Acquire, LeaseAnswer, Leased, Locate, Placements
from kvbm_schemas.step import StepResults
from kvbm_schemas.subjects import REGISTRY_NODE
from kvbm_service.errors import NoAnswer
from kvbm_service.network import over_nats
from kvbm_service.registry_service import RegistryService
from kvbm_service.settings import Settings
from tests.contracts.crew import PATIENCE_SECONDS, Crew, failed_blocks, name, until
from tests.contracts.lone_leader import SCOPE
from tests.contracts.meeting_place import DIRECTORIES, open_meeting_place

LEASE_SECONDS = 4.0
_answers: Decoder[LeaseAnswer] = Decoder(LeaseAnswer)  # type: ignore[arg-type]
_placements = Decoder(Placements)
T = TypeVar("T")

on_one_directory = pytest.mark.parametrize("site", DIRECTORIES[:1], indirect=True)
"""For what the engine tells, and what no directory has to."""


class Observer:
    """A registry, and someone who asks, on a thread of their own."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._settings = Settings(**settings)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="observer")
        self._thread.start()
        self._network = self._do(over_nats(self._settings, "observer")())
        self._registry = self._do(self._start())

    def _do(self, work: Awaitable[T]) -> T:
        async def wait() -> T:
            return await work

        return asyncio.run_coroutine_threadsafe(wait(), self._loop).result(PATIENCE_SECONDS)

    async def _start(self) -> asyncio.Task[None]:
        registry = RegistryService(self._network.bus, self._network.directory)
        running = asyncio.create_task(registry.run())
        await registry.ready.wait()
        return running

    async def _end(self) -> None:
        self._registry.cancel()
        await asyncio.wait([self._registry])
        await self._network.close()

    def lease(self, node: str, *texts: str) -> LeaseAnswer | None:
        """What a node answers to who wants to read this chain."""
        acquire = encode(Acquire(hashes=pack(map(name, texts))))
        subject = SCOPE.of(node, "lease")
        try:
            return _answers.decode(self._do(self._network.bus.request(subject, acquire, 1.0)))
        except NoAnswer:
            return None

    def known(self, *texts: str) -> int:
        """How many copies of these blocks the registry knows of."""
        locate = encode(Locate(hashes=pack(map(name, texts))))
        subject = SCOPE.of(REGISTRY_NODE, "locate")
        answer = self._do(self._network.bus.request(subject, locate, PATIENCE_SECONDS))
        return sum(map(len, _placements.decode(answer).holders))

    def close(self) -> None:
        self._do(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class Site:
    """Where nodes are started."""

    def __init__(self, settings: dict[str, Any], folder: Path, ending: ExitStack) -> None:
        self._settings = settings
        self._folder = folder
        self._ending = ending
        self.observer = Observer(settings)
        ending.callback(self.observer.close)

    def crew(self, node: str = "owner", world_size: int = 2, **changed: Any) -> Crew:
        """Start a node, of which the leader knows nothing yet."""
        crew = Crew(node, world_size, self._settings | changed, self._folder)
        self._ending.callback(crew.close)
        crew.leader.start()
        return crew


@pytest.fixture(params=DIRECTORIES)
def site(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Site]:
    with ExitStack() as ending:
        settings = open_meeting_place(request.param, tmp_path, ending)
        settings["membership_seconds"] = LEASE_SECONDS
        settings["cpu_cache_override_num_blocks"] = 16
        settings["host_cache_dir"] = ""
        settings["lookup_deadline_seconds"] = 2.0
        settings["transfer_timeout_seconds"] = 5.0
        yield Site(settings, tmp_path, ending)


def shared(site: Site, crew: Crew, *texts: str) -> None:
    """Wait until the registry knows that a node has these blocks."""
    until(lambda: site.observer.known(*texts) >= len(texts), f"{crew.node} is known to have them")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_rank_that_is_killed_is_missed_and_another_process_takes_its_place(site: Site) -> None:
    """Nobody but the directory tells of it: the lease of the dead one has to end."""
    crew = site.crew()
    until(lambda: crew.leader.ready, "both ranks are met in the directory")
    crew.save("a", "b", "c")
    shared(site, crew, "a", "b", "c")
    assert isinstance(site.observer.lease("owner", "a"), Leased)
    assert crew.load("a", "b", "c") == [True] * 3
    before = crew.leader.epoch

    crew.ranks[1].child.kill()
    crew.out.add(1)
    killed = time.monotonic()
    until(lambda: site.observer.known("a", "b", "c") == 0, "its blocks are gone")
    assert time.monotonic() - killed < 15 * LEASE_SECONDS
    assert not isinstance(site.observer.lease("owner", "a"), Leased)
    assert crew.leader.match("any", 0) == 0
    assert crew.begin_save("d") == [], "nothing is saved"

    crew.replace(1, attach=False)
    crew.wait_until_whole()
    assert crew.load("a", "b", "c")[0] is False, "its share of the blocks is lost"
    crew.save("a", "x")
    shared(site, crew, "a", "x")
    assert crew.load("a", "x") == [True, True]
    assert crew.leader.epoch > before
    answer = site.observer.lease("owner", "a", "x")
    assert isinstance(answer, Leased)
    assert answer.agents[1] == crew.ranks[1].record.agent
    assert answer.epoch == crew.leader.epoch


@on_one_directory
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_what_is_under_way_ends_when_the_engine_says_that_a_rank_has_died(site: Site) -> None:
    crew = site.crew()
    crew.attach()
    crew.save("a", "b")
    crew.leader.arrive("r", [name("a"), name("b")])
    until(lambda: crew.leader.match("r", 0) == 2, "both blocks can be loaded")
    crew.leader.load("r", 0, [4, 5])
    held = crew.begin_save("c")
    crew.ranks[0].child.stop()
    crew.out.add(0)
    crew.step()
    assert crew.freed == [], "rank 0 is stopped in the midst of it, for all that one knows"
    assert not crew.lost

    crew.ranks[0].child.kill()
    crew.leader.rank_died(0)
    until(crew.hear, "all of it ends")
    assert crew.freed == held
    assert [(lost.request, failed_blocks(lost)) for lost in crew.lost] == [("r", [4, 5])]
    crew.leader.finish("r")
    assert not crew.leader.busy

    crew.replace(0)
    crew.wait_until_whole()
    crew.save("c", "d")
    assert crew.load("c", "d") == [True, True]


@on_one_directory
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_what_the_new_process_finds_in_its_predecessors_memory_is_kept(
    site: Site, tmp_path: Path
) -> None:
    with TemporaryDirectory(dir="/dev/shm") as memory:
        crew = site.crew(host_cache_dir=memory)
        crew.attach()
        crew.save("a", "b", "c")
        shared(site, crew, "a", "b", "c")
        before = crew.leader.epoch
        crew.ranks[1].child.kill()
        crew.replace(1)
        assert crew.leader.match("any", 0) == 0
        crew.wait_until_whole()
        assert crew.load("a", "b", "c") == [True] * 3
        shared(site, crew, "a", "b", "c")
        until(lambda: crew.leader.epoch > before, "in a life of its own")
        crew.save("d")
        assert crew.load("a", "b", "c") == [True] * 3
        crew.close()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_rank_that_is_stopped_for_longer_than_its_lease_loses_nothing(site: Site) -> None:
    crew = site.crew()
    until(lambda: crew.leader.ready, "both ranks are met in the directory")
    crew.save("a", "b")
    shared(site, crew, "a", "b")
    before = crew.leader.epoch
    crew.ranks[0].child.stop()
    until(lambda: site.observer.known("a", "b") == 0, "the node is not listed")
    assert not isinstance(site.observer.lease("owner", "a"), Leased)
    crew.ranks[0].child.go_on()
    shared(site, crew, "a", "b")
    assert crew.leader.epoch > before
    assert crew.load("a", "b") == [True, True]
    assert isinstance(site.observer.lease("owner", "a"), Leased)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_process_that_wakes_up_when_another_has_its_place_is_not_let_in(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "kvbm_service")
    crew = site.crew()
    until(lambda: crew.leader.ready, "both ranks are met in the directory")
    crew.attach()
    crew.save("a")
    shared(site, crew, "a")
    sleeper = crew.ranks[0]
    held = crew.begin_save("b")
    commands = crew.leader.take_commands()
    sleeper.child.stop()
    crew.ranks[1].submit(commands)
    crew.replace(0)
    crew.wait_until_whole()
    assert crew.freed == held
    crew.save("c")
    shared(site, crew, "c")
    sleeper.child.go_on()
    crew.ranks[0].submit(commands)  # too late, and not meant for this one
    sleeper.submit(commands)
    results: list[StepResults] = []

    def is_done() -> bool:
        results.extend(result for result in [sleeper.collect()] if result)
        return bool(results)

    until(is_done, "it has done what it was told")
    crew.leader.report(results)
    crew.ranks[1].submit(commands)  # void
    crew.settle()
    assert crew.ranks[0].collect() is None
    assert crew.load("c") == [True]
    assert crew.load("b") == [False]
    assert "ignores what its predecessor was to do" in crew.ranks[0].child.said
    until(lambda: "cannot renew" in sleeper.child.said, "the directory does not know it any more")
    assert crew.leader.on_core(lambda core: core.crew.agents[0], "") == crew.ranks[0].record.agent


@on_one_directory
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_reader_on_another_node_follows_to_the_new_process(site: Site) -> None:
    owner, reader = site.crew("owner"), site.crew("reader")
    owner.attach()
    reader.attach()
    owner.save("a", "b")
    shared(site, owner, "a", "b")
    until(lambda: reader.load("a", "b") == [True, True], "the reader reads from the owner")
    owner.ranks[1].child.kill()
    owner.replace(1)
    owner.wait_until_whole()
    until(lambda: site.observer.known("a", "b") in (0, 2), "what is lost is forgotten")
    owner.save("x", "y")
    shared(site, owner, "x", "y")
    until(lambda: reader.load("x", "y") == [True, True], "the reader reads from the new process")
    assert isinstance(site.observer.lease("owner", "x"), Leased)
