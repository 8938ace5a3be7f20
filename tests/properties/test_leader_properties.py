"""A leader under any sequence of inputs, against dictionaries that remember what was said."""

from __future__ import annotations

from collections import Counter

import hypothesis.strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvbm_schemas import step
from kvbm_schemas.block import BlockHash, pack, unpack
from kvbm_schemas.events import Cleared, Removed, Stored
from kvbm_schemas.requests import Leased, Refused
from kvbm_service.core.columns import pack_u32, unpack_u32
from kvbm_service.core.effects import AskOwner, AskRegistry, GiveBack, Publish
from kvbm_service.core.lending import LEASABLE_SHARE
from tests.core.builders import LEASE_SECONDS, LOOKUP_SECONDS, Rig, chain, leased, located

SLOTS = 6
WORLD_SIZE = 2
HELD_BLOCKS = 5
REQUESTS = ("r0", "r1", "r2")

def chain_of(family: str, length: int) -> list[BlockHash]:
    """The head of one of a few endless prompts."""
    return chain("abcdef" if family == "a" else "abxyzw")[:length]


chains = st.builds(chain_of, st.sampled_from("ab"), st.integers(1, 6))


rarely = st.sampled_from([False, False, False, True])


class LeaderMachine(RuleBasedStateMachine):
    """Model: the blocks told of, the leases we were given, the device blocks we had to hold."""

    def __init__(self) -> None:
        super().__init__()
        self.rig = Rig(SLOTS, WORLD_SIZE, held_blocks=HELD_BLOCKS)
        self.leader = self.rig.leader
        self.rig.meet("b")
        self.rig.meet("c")
        self.now = 0.0
        self.told: set[BlockHash] = set()
        self.last_seq = 0
        self.owed: set[str] = set()
        """Leases that were given to us and not given back."""
        self.questions: list[AskRegistry | AskOwner] = []
        self.chains: dict[str, list[BlockHash]] = {}
        self.waiting_since: dict[str, float] = {}
        self.saves: list[tuple[step.Save, set[int]]] = []
        """Each with the ranks that have not reported."""
        self.failed: set[int] = set()
        self.proven: set[BlockHash] = set()
        """Blocks that all ranks have confirmed, at least once."""
        self.loads: list[tuple[step.Load, set[int], dict[int, BlockHash]]] = []
        self.held: Counter[int] = Counter()
        self.tokens: list[str] = []
        self.numbers = 0

    def number(self) -> int:
        self.numbers += 1
        return self.numbers

    def take_effects(self) -> None:
        for effect in self.leader.take_effects():
            match effect:
                case Publish(event):
                    assert event.seq == self.last_seq + 1
                    self.last_seq = event.seq
                    match event:
                        case Stored():
                            assert self.told.isdisjoint(unpack(event.hashes))
                            assert self.proven.issuperset(unpack(event.hashes))
                            self.told.update(unpack(event.hashes))
                        case Removed():
                            assert self.told.issuperset(unpack(event.hashes))
                            self.told.difference_update(unpack(event.hashes))
                        case Cleared():
                            self.told.clear()
                case GiveBack(_, lease):
                    self.owed.remove(lease)  # once, and only what was given
                case AskRegistry() | AskOwner():
                    self.questions.append(effect)
        saving = {block for save, _ in self.saves for block in unpack_u32(save.blocks)}
        for device_block in self.leader.take_freed_blocks():
            assert self.held[device_block] > 0
            assert device_block not in saving
            self.held[device_block] -= 1

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
            assert self.now - since < 2 * LOOKUP_SECONDS
            return
        self.waiting_since.pop(request, None)
        assert 0 <= found <= len(wanted) - computed
        assert self.leader.match(request, computed, self.now) == found
        if not take:
            return
        size = data.draw(st.integers(0, found))
        device_blocks = [100 + self.number() for _ in range(size)]
        self.leader.load(request, computed, device_blocks, self.now)
        if size:
            self.expect_load(device_blocks, wanted[computed : computed + size])

    def expect_load(self, device_blocks: list[int], names: list[BlockHash]) -> None:
        """The command names each block once, with its name; own ones are readable."""
        commands = self.take_commands()
        (load,) = commands.loads
        reads: list[step.LocalRead | step.RemoteRead] = [*load.remote]
        reads += [read for read in (load.local, load.disk) if read is not None]
        gets = {
            block: name
            for read in reads
            for block, name in zip(unpack_u32(read.blocks), unpack(read.hashes), strict=True)
        }
        assert gets == dict(zip(device_blocks, names, strict=True))
        assert sum(len(unpack(read.hashes)) for read in reads) == len(gets)
        assert all(0 < read.seconds <= LEASE_SECONDS for read in load.remote)
        own = {} if load.local is None else dict.fromkeys(unpack(load.local.hashes))
        assert set(own) <= self.told
        self.loads.append((load, set(range(WORLD_SIZE)), gets))

    @rule(wanted=chains)
    def store(self, wanted: list[BlockHash]) -> None:
        device_blocks = [1000 + self.number() for _ in wanted]
        dealt_with, held = self.leader.store(wanted, device_blocks)
        assert 0 <= dealt_with <= len(wanted)
        assert set(held) <= set(device_blocks)
        self.held.update(held)
        assert self.held.total() <= HELD_BLOCKS
        assert all(block in self.leader.tiers.host for block in wanted[:dealt_with])

    @rule()
    def a_step_begins(self) -> None:
        self.take_commands()

    def take_commands(self) -> step.StepCommands:
        commands = self.leader.take_commands(0.0)
        for save in commands.saves:
            assert all(self.held[block] for block in unpack_u32(save.blocks))
            self.saves.append((save, set(range(WORLD_SIZE))))
        return commands

    @rule(really=rarely)
    def reset(self, really: bool) -> None:
        if really:
            self.leader.reset()

    @rule(wanted=chains)
    def save_at_once(self, wanted: list[BlockHash]) -> None:
        """All goes well from end to end."""
        self.store(wanted)
        self.take_commands()
        while self.saves:
            self.confirm(0, next(iter(self.saves[0][1])), good=True)

    @rule(request=st.sampled_from(REQUESTS), data=st.data(), wanted=chains)
    def read_at_once(self, request: str, data: st.DataObject, wanted: list[BlockHash]) -> None:
        """A request goes all the way, as far as the others' answers let it."""
        self.arrive(request, wanted)
        for _ in range(2):
            self.take_effects()
            for question in reversed(self.questions.copy()):
                if question.request == request:
                    self.questions.remove(question)
                    self.answer_question(question, "good", data)
            self.match_and_load(request, data, take=True)

    # -- the ranks -------------------------------------------------------------------------

    @precondition(lambda self: self.saves)
    @rule(data=st.data(), good=st.booleans())
    def rank_has_saved(self, data: st.DataObject, good: bool) -> None:
        index = data.draw(st.integers(0, len(self.saves) - 1))
        self.confirm(index, data.draw(st.sampled_from(sorted(self.saves[index][1]))), good)

    def confirm(self, index: int, rank: int, good: bool) -> None:
        save, ranks = self.saves[index]
        ranks.remove(rank)
        if not good:
            self.failed.add(save.op)
        if not ranks:
            del self.saves[index]
            if save.op not in self.failed:
                self.proven.update(unpack(save.hashes))
        self.rig.saved(save.op, rank, good)
        self.take_effects()

    @precondition(lambda self: self.loads)
    @rule(data=st.data(), good=st.booleans())
    def rank_has_loaded(self, data: st.DataObject, good: bool) -> None:
        index = data.draw(st.integers(0, len(self.loads) - 1))
        load, ranks, gets = self.loads[index]
        rank = data.draw(st.sampled_from(sorted(ranks)))
        failed = () if good else tuple(data.draw(st.sets(st.sampled_from(sorted(gets)))))
        ranks.remove(rank)
        if not ranks:
            del self.loads[index]
        result = step.LoadResult(op=load.op, request=load.request, failed_blocks=pack_u32(failed))
        self.leader.report(step.StepResults(rank=rank, loads=(result,)), self.now)

    # -- the bus ---------------------------------------------------------------------------

    @precondition(lambda self: self.questions)
    @rule(data=st.data(), kind=st.sampled_from(["good", "bad", "none"]))
    def answer(self, data: st.DataObject, kind: str) -> None:
        question = self.questions.pop(data.draw(st.integers(0, len(self.questions) - 1)))
        self.answer_question(question, kind, data)

    def answer_question(
        self, question: AskRegistry | AskOwner, kind: str, data: st.DataObject
    ) -> None:
        asked = len(unpack(question.hashes))
        if isinstance(question, AskRegistry):
            first = data.draw(st.integers(1, asked))
            places = located(("b", first), ("c", data.draw(st.integers(0, 3))))
            self.leader.located(
                question.request, question.attempt, places if kind == "good" else None, self.now
            )
            return
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
            answers[kind], self.now, self.now,
        )  # fmt: skip

    @rule(wanted=chains)
    def acquire(self, wanted: list[BlockHash]) -> None:
        token = f"token-number-{self.number():08}"
        pinned = self.leader.tiers.host.pinned
        answer = self.leader.acquire(pack(wanted), token, self.now)
        if isinstance(answer, Leased):
            self.tokens.append(token)
            assert self.told.issuperset(wanted[: len(unpack_u32(answer.slots))])
            assert self.leader.tiers.host.pinned <= max(pinned, int(SLOTS * LEASABLE_SHARE))

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.leader.release(data.draw(st.sampled_from(self.tokens)))

    @rule(offline=rarely)
    def bus_comes_or_goes(self, offline: bool) -> None:
        self.leader.online = not offline

    @rule(node=st.sampled_from("bc"), gone=rarely)
    def peer_comes_or_goes(self, node: str, gone: bool) -> None:
        self.leader.peers.leader_changed(node, None)
        if not gone:
            self.rig.meet(node)

    @rule(seconds=st.sampled_from([0.005, LOOKUP_SECONDS, 1.0, LEASE_SECONDS]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.leader.tick(self.now)

    # -- always ----------------------------------------------------------------------------

    @invariant()
    def it_agrees_with_what_was_said(self) -> None:
        self.leader.check_integrity()
        self.take_effects()
        beat, ((_, blocks),) = self.leader.snapshot()
        assert beat.seq == self.last_seq
        assert set(blocks) == self.told
        assert len(blocks) == len(self.told)

    def teardown(self) -> None:
        """Whatever has happened: when everyone is done, nothing is left."""
        for request in list(self.chains):
            self.finish(request)
        self.take_commands()
        while self.saves:
            self.confirm(0, next(iter(self.saves[0][1])), good=True)
        for load, ranks, _ in self.loads:
            for rank in ranks:
                self.rig.loaded(load, rank, now=self.now)
        self.leader.tick(self.now + LEASE_SECONDS)
        self.it_agrees_with_what_was_said()
        assert not self.leader.busy
        assert not self.leader.holds_device_blocks
        assert not self.held.total()
        assert not self.owed
        assert self.leader.tiers.host.pinned == 0
        assert self.leader.tiers.host.used == len(self.told)
        assert len(self.leader.lending.leases) == 0


TestLeader = LeaderMachine.TestCase
