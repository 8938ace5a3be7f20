"""A simulated node: the real `Leader`, its ranks, its engine, and what a shell does around them.

A node lives once: after a crash, another one with the same name takes its place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvbm_schemas import step
from kvbm_schemas.block import BlockHash, Tier, pack
from kvbm_schemas.message import Message
from kvbm_schemas.records import NodeRecord
from kvbm_schemas.requests import (
    Acquire,
    Leased,
    Located,
    Lookup,
    Refused,
    Release,
    Resync,
    SnapshotChunk,
)
from kvbm_service.core.effects import Announce, AskOwner, AskRegistry, Effect, GiveBack, Publish
from kvbm_service.core.journal import Journal
from tests.simulation.directory import Entry, Watcher
from tests.simulation.engine import Engine
from tests.simulation.network import Answer
from tests.simulation.rank import Rank
from tests.simulation.timeline import Process

if TYPE_CHECKING:
    from tests.simulation.world import World

TICK_SECONDS = 0.05
BEAT_SECONDS = 0.15
CHUNK_BLOCKS = 3
LOOKUP_SECONDS = 0.03


class Node:
    """One life of a node."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.process = Process()
        self.online = True
        self.ranks = [
            Rank(world, name, number, Process()) for number in range(world.weather.world_size)
        ]
        self.leader = world.make_leader(tuple(rank.record() for rank in self.ranks))
        self.leader.journal = world.witness(name, self.leader.journal)
        self.engine = Engine(world, self)
        self._watcher = Watcher(world.directory, world.timeline, self._peer_changed)
        self._tokens = 0
        self._member = False
        self._every(BEAT_SECONDS, self._beat)
        self._every(TICK_SECONDS, self._tick)

    @property
    def journal(self) -> Journal:
        """The leader's log."""
        return self.leader.journal

    def crash(self) -> None:
        """Die at once, with everything."""
        self.process.alive = False
        for rank in self.ranks:
            rank.process.alive = False

    # -- what the shell does ---------------------------------------------------------------

    def take_commands(self) -> step.StepCommands:
        """The step's commands, after a look at what they would overwrite."""
        commands = self.leader.take_commands()
        self.world.oracles.slots_are_free(self, commands)
        self.pump()
        return commands

    def pump(self) -> None:
        """Carry out what the core wants done."""
        for effect in self.leader.take_effects():
            self._carry_out(effect)

    def _carry_out(self, effect: Effect) -> None:
        network = self.world.network
        match effect:
            case Publish(event):
                self.world.oracles.event_is_true(self, event)
                self._publish(event)
            case Announce(loaded):
                self.world.count_loaded(self.name, loaded)
            case GiveBack(node, lease):
                network.send(self, node, Release(lease=lease))
            case AskRegistry(request, attempt, hashes):
                self._ask_registry(request, attempt, Lookup(hashes=hashes, asker=self.name))
            case AskOwner():
                self._ask_owner(effect)

    def _publish(self, event: Message) -> None:
        for registry in self.world.registry_names:
            self.world.network.send(self, registry, event)

    def _ask_registry(self, request: str, attempt: int, lookup: Lookup) -> None:
        def answered(answer: Message | None) -> None:
            located = answer if isinstance(answer, Located) else None
            self.leader.located(request, attempt, located, self._now)
            self.pump()

        registry = self.world.chance.choice(self.world.registry_names)
        patience = 4 * LOOKUP_SECONDS
        self.world.network.ask(self, registry, lookup, patience, answered)

    def _ask_owner(self, question: AskOwner) -> None:
        asked_at = self._now

        def answered(answer: Message | None) -> None:
            known = answer if isinstance(answer, Leased | Refused) else None
            self.leader.answered(
                question.request, question.attempt, question.node, question.start,
                known, asked_at, self._now,
            )  # fmt: skip
            self.pump()

        patience = 4 * LOOKUP_SECONDS
        acquire = Acquire(hashes=question.hashes)
        self.world.network.ask(self, question.node, acquire, patience, answered)

    def receive(self, sender: str, message: Message, answer: Answer) -> None:
        """Something came over the bus."""
        match message:
            case Acquire(hashes=hashes):
                self._tokens += 1
                token = f"{self.name}-{self.journal.epoch}-{self._tokens:016}"
                answer(self.leader.acquire(hashes, token, self._now))
            case Release(lease=lease):
                self.leader.release(lease)
            case Resync():
                self._send_snapshot(answer)
        self.leader.check_integrity()
        self.pump()

    def _send_snapshot(self, answer: Answer) -> None:
        beat, blocks = self.leader.snapshot()
        total = max(1, -(-len(blocks) // CHUNK_BLOCKS))
        for index in range(total):
            part: list[BlockHash] = blocks[index * CHUNK_BLOCKS : (index + 1) * CHUNK_BLOCKS]
            chunk = SnapshotChunk(
                epoch=beat.epoch, seq=beat.seq, index=index, total=total,
                tier=Tier.HOST, hashes=pack(part),
            )  # fmt: skip
            answer(chunk)

    # -- from time to time -----------------------------------------------------------------

    def _beat(self) -> None:
        directory = self.world.directory
        if self._sees_directory:
            epoch = self.journal.epoch
            if self._member and not directory.renew(self.name, epoch):
                self._member = False
            if not self._member:
                self._join()
        if self._member:
            self._publish(self.journal.beat())

    def _join(self) -> None:
        directory = self.world.directory
        if self.name in directory.live():
            return  # an earlier life's record; it will end
        epoch = directory.next_epoch()
        self.journal.begin(epoch, empty=len(self.leader.pool) == 0)
        record = NodeRecord(
            node=self.name, epoch=epoch, world_size=len(self.ranks), block_bytes=1
        )
        self._member = directory.join(record, tuple(rank.record() for rank in self.ranks))

    def _tick(self) -> None:
        self._watcher.look(self._sees_directory)
        self.leader.online = self.online
        leases = len(self.leader.leases)
        self.leader.tick(self._now)
        self.world.expired_leases += leases - len(self.leader.leases)
        self.leader.check_integrity()
        self.pump()
        self.engine.wake()

    def _peer_changed(self, node: str, entry: Entry | None) -> None:
        if node == self.name:
            return
        peers = self.leader.peers
        peers.leader_changed(node, entry.record if entry else None)
        for number in range(self.world.weather.world_size):
            peers.rank_changed(node, number, entry.ranks[number] if entry else None)

    @property
    def _sees_directory(self) -> bool:
        return self.online and self.world.network.reachable(self.name, "directory")

    @property
    def _now(self) -> float:
        return self.world.timeline.now

    def _every(self, period: float, action: object) -> None:
        self.world.timeline.every(period, self.process, action)  # type: ignore[arg-type]

