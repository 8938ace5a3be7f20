"""A leader under any sequence of inputs, against a model that remembers what was said and done."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any, ClassVar, NamedTuple

import hypothesis.strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from kvbm_schemas import step
from kvbm_schemas.block import BlockHash, Tier, pack, unpack
from kvbm_schemas.events import BlockEvent, Cleared, Removed, Stored
from kvbm_schemas.requests import LeaseAnswer, Leased, Refused
from kvbm_service.core.columns import pack_u32, unpack_u32
from kvbm_service.core.effects import (
    Answer,
    AskOwner,
    AskRegistry,
    Effect,
    GiveBack,
    Publish,
    TellRanks,
)
from kvbm_service.core.lending import LEASABLE_SHARE
from kvbm_service.core.spills import SpillLimits
from tests.core.builders import LEASE_SECONDS, LOOKUP_SECONDS, Rig, chain, leased, located
from tests.properties.rank_model import Doing, Label, Order, RankModel, Spot, survivors

HOST_SLOTS = 4
DISK_SLOTS = 9
WORLD_SIZE = 2
HELD_BLOCKS = 5
STAGING_SECONDS = 0.1
LAST_FILL = 40
"""The greatest stamp of the life before."""
REQUESTS = ("r0", "r1", "r2")


def chain_of(family: str, length: int) -> list[BlockHash]:
    """The head of one of a few endless prompts."""
    return chain("abcdefgh" if family == "a" else "abxyzwuv")[:length]


chains = st.builds(chain_of, st.sampled_from("ab"), st.integers(1, 8))
rarely = st.sampled_from([False, False, False, True])
names = st.lists(st.sampled_from("abcdxy"), unique=True, max_size=4)


class Question(NamedTuple):
    """What was asked of a registry or an owner, and when."""

    asked: AskRegistry | AskOwner
    when: float


class LeaderMachine(RuleBasedStateMachine):
    """Model: the copies told of, the leases given to us, the device blocks we had to hold, and
    what is in which slot."""

    disk_slots: ClassVar[int] = 0
    limits: ClassVar[dict[str, Any]] = {}

    def __init__(self) -> None:
        super().__init__()
        self.rig = Rig(
            HOST_SLOTS, WORLD_SIZE, held_blocks=HELD_BLOCKS, disk=self.disk_slots,
            staging_seconds=STAGING_SECONDS, spill=SpillLimits(batch_blocks=2, batches=2),
            prefetch_share=0.5, filter_entries=1_000, **self.limits,
        )  # fmt: skip
        self.leader = self.rig.leader
        self.rig.meet("b")
        self.rig.meet("c")
        self.now = 0.0
        self.told: set[tuple[BlockHash, Tier]] = set()
        self.last_seq = 0
        self.owed: set[str] = set()
        """Leases that were given to us and not given back."""
        self.questions: list[Question] = []
        self.by_bus: dict[int, step.Fetch] = {}
        """Fetches of which some rank has not answered on the bus."""
        self.unheard: set[int] = set()
        """Those of them that have to wait for a step."""
        self.asking: dict[str, list[BlockHash]] = {}
        """Who waits for our disk, and what for."""
        self.asked_at: dict[str, float] = {}
        self.chains: dict[str, list[BlockHash]] = {}
        self.waiting_since: dict[str, float] = {}
        self.ranks = RankModel(WORLD_SIZE, first_op=LAST_FILL + 2)
        self.held: Counter[int] = Counter()
        self.tokens: list[str] = []
        self.numbers = 0
        self.disk_works = self.disk_slots > 0

    def number(self) -> int:
        self.numbers += 1
        return self.numbers

    @property
    def tiers(self) -> tuple[Tier, ...]:
        return (Tier.HOST, Tier.DISK) if self.disk_works else (Tier.HOST,)

    @initialize(data=st.data())
    def a_life_begins(self, data: st.DataObject) -> None:
        """Each rank has found something; what all have alike is taken over."""
        for tier in self.tiers:
            labels = {
                Spot(tier, slot): Label(chain(name)[0], LAST_FILL - slot)
                for slot, name in enumerate(data.draw(names))
            }
            lacking: set[Spot] = set()
            found = []
            for rank in range(WORLD_SIZE):
                missing = data.draw(st.sets(st.sampled_from(sorted(labels)))) if labels else set()
                lacking |= missing
                own = {spot: label for spot, label in labels.items() if spot not in missing}
                own[Spot(tier, len(labels))] = Label(chain("mn"[rank])[0], LAST_FILL + 1)
                found.append(survivors(tier, own))
            common = {spot: label for spot, label in labels.items() if spot not in lacking}
            assert self.leader.adopt(found) == len(common)
            self.ranks.holds.update(common)
        self.take_effects()

    # -- what comes out --------------------------------------------------------------------

    def take_effects(self) -> None:
        for effect in self.leader.take_effects():
            self.carry_out(effect)
        saving = {
            block
            for doing in self.ranks.doing.values()
            if isinstance(doing.command, step.Save)
            for block in doing.device
        }
        for device_block in self.leader.take_freed_blocks():
            assert self.held[device_block] > 0
            assert device_block not in saving
            self.held[device_block] -= 1

    def carry_out(self, effect: Effect) -> None:
        match effect:
            case Publish(event):
                self.check_event(event)
            case GiveBack(_, lease):
                self.owed.remove(lease)  # once, and only what was given
            case AskRegistry() | AskOwner():
                self.questions.append(Question(effect, self.now))
            case TellRanks(fetch, seconds):
                assert seconds > 0
                self.by_bus[fetch.op] = fetch
                self.ranks.told(fetch)
            case Answer(token, answer):
                del self.asked_at[token]
                self.check_lease(token, self.asking.pop(token), answer)

    def check_event(self, event: BlockEvent) -> None:
        assert event.seq == self.last_seq + 1
        self.last_seq = event.seq
        match event:
            case Stored(tier=tier, hashes=hashes):
                blocks = unpack(hashes)
                assert all(self.ranks.held(block, tier) for block in blocks)
                assert self.told.isdisjoint((block, tier) for block in blocks)
                self.told.update((block, tier) for block in blocks)
            case Removed(tier=tier, hashes=hashes):
                gone = {(block, tier) for block in unpack(hashes)}
                assert gone <= self.told
                self.told -= gone
            case Cleared():
                self.told.clear()

    def check_lease(self, token: str, wanted: list[BlockHash], answer: LeaseAnswer) -> None:
        if isinstance(answer, Leased):
            assert answer.lease == token
            head = pack(wanted[: len(unpack_u32(answer.slots))])
            spots = self.ranks.proven(Tier.HOST, answer.slots, head, answer.fills)
            self.ranks.leased[token] = self.now + LEASE_SECONDS, spots
            self.tokens.append(token)

    # -- the engine ------------------------------------------------------------------------

    @rule(request=st.sampled_from(REQUESTS), wanted=chains)
    def arrive(self, request: str, wanted: list[BlockHash]) -> None:
        self.waiting_since.pop(request, None)
        self.chains[request] = wanted
        self.leader.arrive(request, wanted, self.now)

    @rule(request=st.sampled_from(REQUESTS))
    def finish(self, request: str) -> None:
        self.leader.finish(request)
        self.chains.pop(request, None)
        self.waiting_since.pop(request, None)

    @rule(request=st.sampled_from(REQUESTS), data=st.data(), take=st.booleans())
    def match_and_load(self, request: str, data: st.DataObject, take: bool) -> None:
        wanted = self.chains.get(request, [])
        computed = data.draw(st.integers(0, len(wanted)) | st.just(0))
        found = self.leader.match(request, computed, self.now)
        if found is None:
            since = self.waiting_since.setdefault(request, self.now)
            assert self.now - since < 2 * LOOKUP_SECONDS + STAGING_SECONDS
            return
        self.waiting_since.pop(request, None)
        assert 0 <= found <= len(wanted) - computed
        assert self.leader.match(request, computed, self.now) == found
        if not take:
            return
        size = data.draw(st.just(found) | st.integers(0, found))
        device_blocks = [100 + self.number() for _ in range(size)]
        self.leader.load(request, computed, device_blocks, self.now)
        if size:
            self.expect_load(device_blocks, wanted[computed : computed + size])

    def expect_load(self, device_blocks: list[int], wanted: list[BlockHash]) -> None:
        """The command names each block once, with its name."""
        (load,) = self.take_commands().loads
        reads: list[step.LocalRead | step.RemoteRead] = [*load.remote]
        reads += [read for read in (load.local, load.disk) if read is not None]
        gets = {
            block: name
            for read in reads
            for block, name in zip(unpack_u32(read.blocks), unpack(read.hashes), strict=True)
        }
        assert gets == dict(zip(device_blocks, wanted, strict=True))
        assert sum(len(unpack(read.hashes)) for read in reads) == len(gets)
        assert all(0 < read.seconds <= LEASE_SECONDS for read in load.remote)

    @rule(wanted=chains, request=st.sampled_from(["", *REQUESTS]))
    def store(self, wanted: list[BlockHash], request: str = "") -> None:
        device_blocks = [1000 + self.number() for _ in wanted]
        dealt_with, held = self.leader.store(wanted, device_blocks, request=request)
        assert 0 <= dealt_with <= len(wanted)
        assert set(held) <= set(device_blocks)
        self.held.update(held)
        assert self.held.total() <= HELD_BLOCKS
        if self.leader.tiers.has(self.save_to) and not request:
            pool = self.leader.tiers.pool(self.save_to)
            assert all(block in pool for block in wanted[:dealt_with])

    @property
    def save_to(self) -> Tier:
        return Tier.DISK if self.limits.get("disk_only") else Tier.HOST

    @rule()
    def a_step_begins(self) -> None:
        self.take_commands()

    def take_commands(self) -> step.StepCommands:
        commands = self.leader.take_commands(self.now)
        self.take_effects()
        for save in commands.saves:
            assert save.tier is self.save_to
            assert all(self.held[block] for block in unpack_u32(save.blocks))
        for fetch in commands.fetches:
            if fetch.op not in self.unheard:
                self.ranks.told(fetch)
        self.unheard.difference_update(fetch.op for fetch in commands.fetches)
        orders: list[Order] = [*commands.saves, *commands.spills, *commands.remote_fetches]
        for order in (*orders, *commands.loads):
            self.ranks.told(order)
        return commands

    @rule(really=rarely)
    def reset(self, really: bool) -> None:
        if really:
            self.leader.reset()
            assert self.take_commands().forget

    @rule(wanted=chains)
    def save_at_once(self, wanted: list[BlockHash]) -> None:
        """All goes well from end to end."""
        self.store(wanted)
        self.take_commands()
        self.finish_all(step.Save)

    @rule()
    def all_goes_well(self) -> None:
        """What is under way gets done."""
        self.take_commands()
        self.finish_all(step.Save | step.Spill | step.Fetch | step.RemoteFetch | step.Load)

    def finish_all(self, kind: Any) -> None:
        for op, doing in list(self.ranks.doing.items()):
            if isinstance(doing.command, kind) and op not in self.unheard:
                for rank in sorted(doing.waiting):
                    self.report(op, rank, ())

    @rule(request=st.sampled_from(REQUESTS), data=st.data(), wanted=chains)
    def read_at_once(self, request: str, data: st.DataObject, wanted: list[BlockHash]) -> None:
        """A request goes all the way, as far as the others' answers let it."""
        self.arrive(request, wanted)
        for _ in range(2):
            self.answer_all(request, data)
            self.match_and_load(request, data, take=True)

    @rule(
        request=st.sampled_from(REQUESTS), data=st.data(), wanted=chains,
        seconds=st.sampled_from([0.0, 0.0, LEASE_SECONDS]),
    )  # fmt: skip
    def wait(
        self, request: str, data: st.DataObject, wanted: list[BlockHash], seconds: float
    ) -> None:
        """A request comes and has to wait, so that its blocks are brought up."""
        self.arrive(request, wanted)
        self.answer_all(request, data)
        self.take_commands()
        self.time_passes(seconds)
        self.answer_all(request, data)

    def answer_all(self, request: str, data: st.DataObject) -> None:
        self.take_effects()
        for question in reversed(self.questions.copy()):
            if question.asked.request == request:
                self.questions.remove(question)
                self.answer_question(question, "good", data)

    # -- the ranks -------------------------------------------------------------------------

    @precondition(lambda self: self.reporting)
    @rule(data=st.data(), good=st.booleans())
    def rank_is_through(self, data: st.DataObject, good: bool) -> None:
        op = data.draw(st.sampled_from(self.reporting))
        doing = self.ranks.doing[op]
        rank = data.draw(st.sampled_from(sorted(doing.waiting)))
        numbers = self.numbers_of(doing)
        self.report(op, rank, () if good else data.draw(st.sets(st.sampled_from(numbers))))

    @property
    def reporting(self) -> list[int]:
        """Ops that ranks may come to the end of."""
        return [op for op in self.ranks.doing if op not in self.unheard]

    def numbers_of(self, doing: Doing) -> list[int]:
        """What may fail: device blocks of a load, positions of a move."""
        return list(doing.device) if isinstance(doing.command, step.Load) else doing.positions

    def report(self, op: int, rank: int, failed: Iterable[int]) -> None:
        """A rank tells of its end, by the way that it was told."""
        command = self.ranks.doing[op].command
        self.ranks.reported(op, rank, failed)
        column = pack_u32(sorted(failed))
        if isinstance(command, step.Load):
            result = step.LoadResult(op=op, request=command.request, failed_blocks=column)
            self.leader.report(step.StepResults(rank=rank, loads=(result,)), self.now)
        elif op in self.by_bus:
            self.leader.moved(step.Moved(op=op, failed=column), rank, self.now)
            if op not in self.ranks.doing:
                del self.by_bus[op]
        else:
            moved = step.Moved(op=op, failed=column)
            self.leader.report(step.StepResults(rank=rank, moved=(moved, moved)), self.now)
        self.take_effects()

    @precondition(lambda self: self.by_bus)
    @rule(data=st.data())
    def some_rank_is_not_heard(self, data: st.DataObject) -> None:
        op = data.draw(st.sampled_from(sorted(self.by_bus)))
        self.leader.unheard(self.by_bus.pop(op))
        self.unheard.add(op)

    @precondition(lambda self: self.disk_works)
    @rule(rank=st.integers(0, WORLD_SIZE - 1), really=rarely, quite=rarely)
    def disk_is_lost(self, rank: int, really: bool, quite: bool) -> None:
        if really and quite:
            self.leader.report(step.StepResults(rank=rank, disk_lost="I/O error"), self.now)
            self.disk_works = False
            self.ranks.lost.add(Tier.DISK)

    # -- the bus ---------------------------------------------------------------------------

    @precondition(lambda self: self.questions)
    @rule(data=st.data(), kind=st.sampled_from(["good", "bad", "none"]))
    def answer(self, data: st.DataObject, kind: str) -> None:
        question = self.questions.pop(data.draw(st.integers(0, len(self.questions) - 1)))
        self.answer_question(question, kind, data)

    def answer_question(self, answered: Question, kind: str, data: st.DataObject) -> None:
        question = answered.asked
        asked = len(unpack(question.hashes))
        if isinstance(question, AskRegistry):
            first = data.draw(st.integers(1, asked))
            tier = data.draw(st.sampled_from([Tier.HOST, Tier.DISK]))
            places = located(("b", first), ("c", data.draw(st.integers(0, 3))), tier=tier)
            self.leader.located(
                question.request, question.attempt, places if kind == "good" else None, self.now
            )
            return
        assert question.seconds > 0
        grant = leased(
            question.node,
            data.draw(st.just(asked) | st.integers(0, asked + 1)),
            WORLD_SIZE,
            life=1 + data.draw(rarely),
            number=self.number() % 100,
            seconds=data.draw(st.sampled_from([LEASE_SECONDS, 1.0])),
        )
        answers = {"good": grant, "bad": Refused(reason="no"), "none": None}
        if kind == "good":
            if grant.lease in self.owed:
                return
            self.owed.add(grant.lease)
        self.leader.answered(
            question.request, question.attempt, question.node, question.start,
            answers[kind], answered.when, self.now,
        )  # fmt: skip

    @rule(wanted=chains, forged=rarely)
    def acquire(self, wanted: list[BlockHash], forged: bool) -> None:
        wanted = wanted + wanted[::-1] if forged else wanted
        token = f"token-number-{self.number():08}"
        pinned = self.leader.tiers.host.pinned
        answer = self.leader.acquire(pack(wanted), token, self.now)
        if answer is None:
            self.asking[token] = wanted
            self.asked_at[token] = self.now
        else:
            self.check_lease(token, wanted, answer)
            most = max(pinned, int(HOST_SLOTS * LEASABLE_SHARE))
            assert self.leader.tiers.host.pinned <= most

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        token = data.draw(st.sampled_from(self.tokens))
        self.ranks.leased.pop(token, None)
        self.leader.release(token)

    @rule(offline=rarely)
    def bus_comes_or_goes(self, offline: bool) -> None:
        self.leader.peers.online = not offline

    @rule(node=st.sampled_from("bc"), gone=rarely)
    def peer_comes_or_goes(self, node: str, gone: bool) -> None:
        self.leader.peers.leader_changed(node, None)
        if not gone:
            self.rig.meet(node)

    @rule(seconds=st.sampled_from([0.005, LOOKUP_SECONDS, STAGING_SECONDS, 1.0, LEASE_SECONDS]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.leader.tick(self.now)
        self.ranks.expire(self.now)
        self.take_effects()
        assert not any(since + STAGING_SECONDS <= self.now for since in self.asked_at.values())

    # -- always ----------------------------------------------------------------------------

    @invariant()
    def it_agrees_with_what_was_said(self) -> None:
        self.leader.check_integrity()
        self.take_effects()
        beat, tiers = self.leader.snapshot()
        assert beat.seq == self.last_seq
        assert [tier for tier, _ in tiers] == list(self.tiers)
        copies = [(block, tier) for tier, blocks in tiers for block in blocks]
        assert set(copies) == self.told
        assert len(copies) == len(self.told)
        assert 0 <= self.leader.prefetch._brought <= HOST_SLOTS // 2
        assert self.leader.busy or self.ranks.doing.keys() <= self.by_bus.keys()

    @invariant()
    def what_it_has_is_there(self) -> None:
        for tier, pool in self.leader.tiers._pools:
            for block in pool.blocks():
                slot = pool.slot(block)
                assert slot is not None
                label = Label(block, pool._fills[slot])
                assert self.ranks.holds.get(Spot(tier, slot)) == label
                assert (Spot(tier, slot), label) not in self.ranks.unreadable

    def teardown(self) -> None:
        """Whatever has happened: when everyone is done, nothing is left."""
        for request in list(self.chains):
            self.finish(request)
        for question, _ in self.questions:
            if isinstance(question, AskOwner):
                self.leader.answered(
                    question.request, question.attempt, question.node, question.start,
                    None, self.now, self.now,
                )  # fmt: skip
        for _ in range(2 + HOST_SLOTS + self.disk_slots):  # blocks wait for their turn to spill
            self.all_goes_well()
        assert not self.leader.busy
        self.time_passes(LEASE_SECONDS)
        self.it_agrees_with_what_was_said()
        assert not self.leader.holds_device_blocks
        assert not self.held.total()
        assert not self.owed
        assert not self.asking
        assert not self.ranks.doing
        assert not len(self.leader.orders.moves)
        assert self.leader.prefetch._brought == 0
        assert not self.leader.prefetch._asked
        for _, pool in self.leader.tiers._pools:
            assert pool.pinned == 0
            assert pool.used == len(pool)
        assert len(self.leader.lending.leases) == 0


class HostAndDisk(LeaderMachine):
    """What is in demand goes on to the disk."""

    disk_slots = DISK_SLOTS


class Unfiltered(LeaderMachine):
    """Everything goes on to the disk."""

    disk_slots = DISK_SLOTS
    limits: ClassVar[dict[str, Any]] = {"min_frequency": 0}


class DiskOnly(LeaderMachine):
    """The host tier only serves others."""

    disk_slots = DISK_SLOTS
    limits: ClassVar[dict[str, Any]] = {"disk_only": True}


TestHostOnly = LeaderMachine.TestCase
TestHostAndDisk = HostAndDisk.TestCase
TestUnfiltered = Unfiltered.TestCase
TestDiskOnly = DiskOnly.TestCase
