"""A node whose ranks are processes that can be killed, stopped and replaced while its leader lives.

There is no model: a block's bytes on a rank follow from the block's name and the rank. The
engine is the test itself, which takes steps.
"""

from __future__ import annotations

import hashlib
import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kvbm_schemas.block import BlockHash
from kvbm_schemas.codec import Decoder, encode
from kvbm_schemas.records import RankRecord
from kvbm_schemas.step import LoadResult, StepCommands, StepResults, Survivors
from kvbm_service.core.columns import unpack_u32
from kvbm_service.leader_service import LeaderService
from kvbm_service.network import over_nats
from kvbm_service.settings import Settings
from tests.contracts.child import Child
from tests.contracts.lone_leader import SCOPE

PATIENCE_SECONDS = 90.0
INSTANCE = "this life"
_records = Decoder(RankRecord)
_survivors = Decoder(Survivors)
_results = Decoder(StepResults)


def name(text: str) -> BlockHash:
    """A block's name."""
    return BlockHash(hashlib.md5(text.encode()).digest())


def until(is_so: Callable[[], Any], what: str) -> None:
    """Wait for something that has to come about."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not is_so():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


class Member:
    """One rank's process."""

    def __init__(self, child: Child) -> None:
        self.child = child
        said = child.ask(do="introduce")
        self.record: RankRecord = _records.decode(bytes.fromhex(said["record"]))
        self.survivors = [_survivors.decode(bytes.fromhex(one)) for one in said["survivors"]]

    def submit(self, commands: StepCommands) -> None:
        self.child.ask(do="submit", commands=encode(commands).hex())

    def collect(self) -> StepResults | None:
        said = self.child.ask(do="collect")
        return _results.decode(bytes.fromhex(said)) if said else None


class Crew:
    """A leader in this process, and ranks in processes of their own."""

    def __init__(self, node: str, world_size: int, settings: dict[str, Any], folder: Path) -> None:
        self.node = node
        self._settings = settings
        self._folder = folder
        self._children: list[Child] = []
        self._numbers = itertools.count(1)
        chosen = Settings(**settings)
        connect = over_nats(chosen, node)
        self.leader = LeaderService(chosen, SCOPE, node, world_size, connect, instance=INSTANCE)
        self.ranks = self._start(range(world_size), world_size)
        self.out: set[int] = set()
        """Ranks that get no commands and are not asked."""
        self.lost: list[LoadResult] = []
        self.freed: list[int] = []
        """Device blocks that the leader has given back."""

    def _start(self, numbers: Sequence[int], world_size: int) -> list[Member]:
        children = [self._launch(number, world_size) for number in numbers]
        return [Member(child) for child in children]

    def _launch(self, number: int, world_size: int) -> Child:
        options = {
            "node": self.node,
            "number": number,
            "world_size": world_size,
            "instance": INSTANCE,
            "settings": self._settings,
        }
        log = self._folder / f"{self.node}.{number}.{len(self._children)}.log"
        child = Child("tests.contracts.crew_rank", options, log)
        self._children.append(child)
        return child

    def attach(self, *numbers: int) -> None:
        """Tell the leader of ranks, as an engine's handshake does."""
        for number in numbers or range(len(self.ranks)):
            member = self.ranks[number]
            self.leader.attach(member.record, member.survivors)

    def replace(self, number: int, attach: bool = True) -> Member:
        """Start another process for a rank. By whom the leader hears of it: the engine, or not."""
        (member,) = self._start([number], len(self.ranks))
        self.ranks[number] = member
        self.out.discard(number)
        if attach:
            self.attach(number)
        return member

    # -- the engine ------------------------------------------------------------------------

    def step(self) -> StepCommands:
        """Take a step: hand out what is to be done, and hear what was."""
        commands = self.leader.take_commands()
        for member in self._present:
            member.submit(commands)
        self.hear()
        return commands

    def hear(self) -> bool:
        """Hear what ranks have done; whether a load was lost and device blocks were given back."""
        results = [result for member in self._present if (result := member.collect())]
        self.freed += self.leader.report(results)
        self.lost += self.leader.take_lost_loads()
        return bool(self.lost and self.freed)

    @property
    def _present(self) -> list[Member]:
        return [member for number, member in enumerate(self.ranks) if number not in self.out]

    def settle(self) -> None:
        """Take steps until nothing is under way."""

        def settled() -> bool:
            self.step()
            return not self.leader.busy

        until(settled, "all is done")

    def save(self, *texts: str) -> None:
        """Compute these blocks, and have them in the tiers."""
        self.begin_save(*texts)
        self.settle()
        self.freed.clear()

    def begin_save(self, *texts: str) -> list[int]:
        """Compute these blocks and offer them. Returns the device blocks that are held."""
        for number, member in enumerate(self.ranks):
            for block, text in enumerate(texts):
                if number not in self.out:
                    member.child.ask(do="write", block=block, value=value_of(text, number))
        chain = [name(text) for text in texts]
        _, held = self.leader.store("a request", None, chain, list(range(len(chain))))
        return held

    def load(self, *texts: str) -> list[bool]:
        """Load the chain of these blocks as far as possible; which of them came, rightly."""
        request, chain = f"request {next(self._numbers)}", [name(text) for text in texts]
        self.leader.arrive(request, chain)
        found: list[int | None] = [None]

        def matched() -> bool:
            found[0] = self.leader.match(request, 0)
            return found[0] is not None

        until(matched, "an answer")
        count = found[0] or 0
        for member in self.ranks:
            for block in range(len(chain)):
                member.child.ask(do="write", block=block, value=0)
        self.leader.load(request, 0, list(range(count)))
        self.settle()
        self.leader.finish(request)
        return [
            all(
                member.child.ask(do="read", block=block) == value_of(text, number)
                for number, member in enumerate(self.ranks)
            )
            for block, text in enumerate(texts)
        ]

    def wait_until_whole(self) -> None:
        """Take steps until the node promises again."""

        def whole() -> bool:
            self.step()
            return self.leader.on_core(lambda core: core.crew.whole, False)

        until(whole, "all ranks are there and at rest")

    def close(self) -> None:
        """End everyone."""
        self.leader.close()
        for child in self._children:
            child.close()


def value_of(text: str, rank: int) -> int:
    """What each byte of a block is on a rank."""
    return 1 + (name(text)[0] + 100 * rank) % 250


def failed_blocks(result: LoadResult) -> list[int]:
    return sorted(unpack_u32(result.failed_blocks))
