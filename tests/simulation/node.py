"""A simulated node: the real `Leader`, its ranks, its engine, and what a shell does around them.

A node lives once: after a crash, another one with the same name takes its place.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from kvbm_schemas import step
from kvbm_schemas.block import Tier, pack
from kvbm_schemas.message import Message
from kvbm_schemas.records import NodeRecord
from kvbm_schemas.requests import (
    Acquire,
    LeaseAnswer,
    Leased,
    Located,
    Lookup,
    Refused,
    Release,
    Renew,
    Resync,
    SnapshotChunk,
)
from kvbm_schemas.step import Moved
from kvbm_service.core.columns import unpack_u32
from kvbm_service.core.effects import (
    Announce,
    Answer,
    AskOwner,
    AskRegistry,
    Effect,
    GiveBack,
    KeepUp,
    Publish,
    TellRanks,
)
from kvbm_service.core.journal import Journal
from kvbm_service.core.snapshot import Snapshot
from tests.simulation.directory import Entry, Watcher
from tests.simulation.engine import Engine
from tests.simulation.network import Answer as Reply
from tests.simulation.rank import Rank
from tests.simulation.timeline import Process

if TYPE_CHECKING:
    from tests.simulation.world import World

TICK_SECONDS = 0.05
BEAT_SECONDS = 0.15
SLICE_SLOTS = 3
LONGEST_SLICE = 0.02
"""Between two slices of a snapshot."""
CHUNK_BLOCKS = 3
LOOKS_PER_INSPECTION = 6
STAGING_SECONDS = 0.12
LOOKUP_SECONDS = 0.03


class Node:
    """One life of a node."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.process = Process()
        self.online = True
        instance = world.new_instance(name)
        self.ranks = [
            Rank(world, name, number, instance, world.memory(name, number))
            for number in range(world.weather.world_size)
        ]
        self.leader = world.make_leader(tuple(rank.record() for rank in self.ranks), instance)
        self.leader.journal = world.witness(name, self.leader.journal)
        self.leader.tiers._journal = self.leader.journal
        self.engine = Engine(world, self)
        self.ready = False
        """Whether the engine may begin."""
        self.was_reset = False
        """Whether no later life may find anything."""
        earlier = world.nodes.get(name)
        self.nothing_is_left = earlier is not None and earlier.was_reset
        self.former: list[Rank] = []
        """Ranks that were stopped when another took their place."""
        self.borrowed: dict[str, tuple[str, Tier, set[int]]] = {}
        """Leases on other nodes' slots that were not given back."""
        self._watcher = Watcher(world.directory, world.timeline, self._peer_changed)
        self._tokens = 0
        self._looks = 0
        self._asking: dict[str, tuple[bytes, Reply]] = {}
        """Who waits for our disk, and what for."""
        self._askers: list[Reply] = []
        """Who waits for the snapshot that is being taken."""
        self._member = False
        self._lives = 0
        self._every(BEAT_SECONDS, self._beat)
        self._every(TICK_SECONDS, self._tick)
        delay = world.chance.choice((0.0, world.chance.random() * 0.2))
        world.timeline.after(delay, self.process, self._adopt)

    def _adopt(self) -> None:
        """Take over what the ranks found, before or after the node has begun to take part."""
        if self.leader.crew.lives:
            self.ready = True
            return  # a rank was lost before it was asked
        for tiers in zip(*(rank.survivors for rank in self.ranks), strict=True):
            adopted = self.leader.adopt(tiers)
            self.world.adopted[tiers[0].tier] += adopted
        self.world.oracles.adopted_is_there(self)
        self.ready = True
        self.pump()

    @property
    def journal(self) -> Journal:
        """The leader's log."""
        return self.leader.journal

    def crash(self) -> None:
        """Die at once, with everything."""
        self.process.alive = False
        for rank in [*self.ranks, *self.former]:
            rank.process.alive = False

    # -- ranks that go and come ------------------------------------------------------------

    def rank_lost(self, number: int) -> None:
        """The engine says that a rank's process is no more."""
        self.leader.rank_lost(number, self._now)
        self.pump()

    def rank_unseen(self, number: int, unseen: bool) -> None:
        """A rank is not in the directory, or is again."""
        self.leader.ranks_away([number] if unseen else [])
        self.pump()

    def replace_rank(self, number: int) -> None:
        """Another process takes a rank's place."""
        before = self.ranks[number]
        stopped = before.process.alive
        if stopped:
            self.former.append(before)
        tiers = self.world.memory(self.name, number, fresh=stopped)
        rank = self.ranks[number] = Rank(self.world, self.name, number, before.instance, tiers)
        self.world.network.places[rank.name] = rank
        self.leader.rank_took_place(rank.record(), rank.survivors, self._now)
        self.pump()
        self.engine.rank_replaced(rank)

    def inspect(self) -> None:
        """Look at all tables now and again; always would take most of the time."""
        self._looks += 1
        if self._looks % LOOKS_PER_INSPECTION == 0:
            self.leader.check_integrity()

    # -- what the shell does ---------------------------------------------------------------

    def take_commands(self) -> step.StepCommands:
        """The step's commands, after a look at what they would overwrite."""
        commands = self.leader.take_commands(self._now)
        self.was_reset = self.was_reset or self.engine.was_reset
        self.world.oracles.commands_are_right(self, commands)
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
                if lease not in self.world.tokens:
                    self.borrowed.pop(lease)
                self.world.oracles.reads_are_leased(self)
                network.send(self, node, Release(lease=lease))
            case KeepUp(node, lease):
                network.send(self, node, Renew(lease=lease))
            case AskRegistry(request, attempt, hashes):
                self._ask_registry(request, attempt, Lookup(hashes=hashes, asker=self.name))
            case AskOwner():
                self._ask_owner(effect)
            case TellRanks():
                self._tell_ranks(effect)
            case Answer(lease, granted):
                self._grant(lease, granted)

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
            if isinstance(answer, Leased):
                slots = set(unpack_u32(answer.slots))
                self.borrowed[answer.lease] = question.node, answer.tier, slots
            self.leader.answered(
                question.request, question.attempt, question.node, question.start,
                known, asked_at, self._now,
            )  # fmt: skip
            self.pump()

        patience = question.seconds + 3 * LOOKUP_SECONDS
        acquire = Acquire(hashes=question.hashes, handed_over=question.handed_over)
        self.world.network.ask(self, question.node, acquire, patience, answered)

    def _tell_ranks(self, order: TellRanks) -> None:
        heard: list[bool] = []
        if isinstance(order.order, step.Fetch):
            self.world.oracles.fetch_is_right(self, order.order)

        def answered(rank: Rank, answer: Message | None) -> None:
            heard.append(isinstance(answer, Moved) and answer.op == order.order.op)
            if isinstance(answer, Moved):
                self.world.oracles.moved(self, answer)
                self.leader.moved(answer, rank.number, self._now)
            if len(heard) == len(self.ranks) and not all(heard):
                self.world.unheard += 1
                self.leader.unheard(order.order)
            self.pump()

        for rank in self.ranks:
            self.world.network.ask(
                self, rank.name, order.order, order.seconds, partial(answered, rank)
            )

    def receive(self, sender: str, message: Message, answer: Reply) -> None:
        """Something came over the bus."""
        match message:
            case Acquire(hashes=hashes, handed_over=handed_over):
                self._tokens += 1
                token = f"{self.name}-{self.journal.epoch}-{self._tokens:016}"
                self._asking[token] = hashes, answer
                granted = self.leader.acquire(hashes, token, self._now, handed_over)
                if granted is not None:
                    self._grant(token, granted)
            case Release(lease=lease):
                self.leader.release(lease)
            case Renew(lease=lease):
                self.leader.renew(lease, self._now)
            case Resync():
                self._askers.append(answer)
                if len(self._askers) == 1:
                    self.world.timeline.play(self.process, self._take_snapshot())
        self.inspect()
        self.pump()

    def _grant(self, lease: str, granted: LeaseAnswer) -> None:
        hashes, answer = self._asking.pop(lease)
        self.world.oracles.lease_is_true(self, hashes, granted)
        answer(granted)

    def _take_snapshot(self) -> Iterator[float]:
        """Look through the slots bit by bit, then answer all who have asked."""
        copy = Snapshot(self.leader.tiers, self.journal, SLICE_SLOTS, CHUNK_BLOCKS)
        while copy.look():
            yield self.world.chance.random() * LONGEST_SLICE
        assert copy.at is not None
        total, askers, self._askers = copy.total, self._askers, []
        for index, (tier, blocks) in enumerate(copy.chunks()):
            chunk = SnapshotChunk(
                epoch=copy.at.epoch, seq=copy.at.seq, index=index, total=total,
                tier=tier, hashes=pack(blocks),
            )  # fmt: skip
            for answer in askers:
                answer(chunk)

    # -- from time to time -----------------------------------------------------------------

    def _beat(self) -> None:
        directory = self.world.directory
        if self._sees_directory:
            epoch = self.journal.epoch
            whole = self.leader.crew.whole and self.leader.crew.lives == self._lives
            if self._member and not whole:
                directory.leave(self.name, epoch)
                self._member = False
            if self._member and not directory.renew(self.name, epoch):
                self._member = False
            if not self._member and self.leader.crew.whole:
                self._join()
        if self._member:
            self._publish(self.journal.beat())

    def _join(self) -> None:
        directory = self.world.directory
        if self.name in directory.live():
            return  # an earlier life's record; it will end
        self._lives = self.leader.crew.lives
        chance = self.world.chance.random() < self.world.weather.clock_jumps
        epoch = directory.next_epoch(clock_went_back=chance and self.journal.epoch == 0)
        self.journal.begin(epoch, empty=self.leader.tiers.empty)
        record = NodeRecord(node=self.name, epoch=epoch, world_size=len(self.ranks), block_bytes=1)
        self._member = directory.join(record, tuple(rank.record() for rank in self.ranks))

    def _tick(self) -> None:
        self._watcher.look(self._sees_directory)
        self.leader.peers.online = self.online
        leases = len(self.leader.lending.leases)
        self.leader.tick(self._now)
        self.world.expired_leases += leases - len(self.leader.lending.leases)
        self.inspect()
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
