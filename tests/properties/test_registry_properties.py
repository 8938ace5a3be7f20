"""The index and the registry against dumb dictionaries, checked after each step."""

from __future__ import annotations

import hashlib
from collections import defaultdict

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvbm_schemas.block import BlockHash, Tier, pack, unpack
from kvbm_schemas.events import Beat, BlockEvent, Cleared, Removed, Stored
from kvbm_schemas.requests import SnapshotChunk
from kvbm_schemas.subjects import Scope
from kvbm_service.core.block_index import TIERS, BlockIndex
from kvbm_service.core.cursor import MAX_RESYNC_SECONDS, State
from kvbm_service.core.registry import AskSnapshot, Registry

SCOPE = Scope("test", "layout")
NAMES = [hashlib.md5(bytes([number])).digest() for number in range(24)]
BATCHES = st.lists(st.sampled_from(NAMES), max_size=12).map(pack)
CHAINS = st.permutations(NAMES).flatmap(
    lambda chain: st.integers(0, len(chain)).map(lambda length: pack(chain[:length]))
)
TIER = st.sampled_from(TIERS)

Copies = dict[BlockHash, set[tuple[str, Tier]]]


def assert_covers(
    answer: list[tuple[str, Tier, int, int]], chain: bytes, copies: Copies, asker: str
) -> None:
    """The answer is the greedy cover that a reader of the rule would work out by hand."""
    readable = [
        {(node, tier) for node, tier in copies[name] if node != asker} for name in unpack(chain)
    ]
    at = 0
    for node, tier, start, blocks in answer:
        runs = {}
        for holder in readable[at]:
            end = at
            while end < len(readable) and holder in readable[end]:
                end += 1
            runs[holder] = end - at
        longest = [holder for holder, run in runs.items() if run == max(runs.values())]
        best = min(TIERS.index(tier) for _, tier in longest)
        assert start == at
        assert blocks == max(runs.values())
        assert (node, tier) in longest
        assert TIERS.index(tier) == best
        at += blocks
    assert at == len(readable) or not readable[at], "nobody has the next block"


class IndexAgainstDictionary(RuleBasedStateMachine):
    """Stores, removals, dropped nodes and sweeps, in any order."""

    @initialize()
    def begin(self) -> None:
        self.index = BlockIndex(seed=1)
        self.copies: Copies = defaultdict(set)
        self.numbers: dict[str, int] = {}
        for name in "abc":
            self._add(name)

    def _add(self, name: str) -> None:
        number = self.index.add_node()
        assert number is not None
        assert number not in self.numbers.values()
        self.numbers[name] = number

    @rule(node=st.sampled_from("abc"), tier=TIER, batch=BATCHES)
    def store(self, node: str, tier: Tier, batch: bytes) -> None:
        self.index.store(self.numbers[node], tier, batch)
        for name in unpack(batch):
            self.copies[name].add((node, tier))

    @rule(node=st.sampled_from("abc"), tier=TIER, batch=BATCHES)
    def remove(self, node: str, tier: Tier, batch: bytes) -> None:
        self.index.remove(self.numbers[node], tier, batch)
        for name in unpack(batch):
            self.copies[name].discard((node, tier))

    @rule(node=st.sampled_from("abc"))
    def replace_node(self, node: str) -> None:
        self.index.drop_node(self.numbers[node])
        for holders in self.copies.values():
            holders -= {(node, tier) for tier in TIERS}
        self._add(node)

    @rule()
    def sweep(self) -> None:
        self.index.sweep()

    @rule(chain=CHAINS, asker=st.sampled_from(["", "a", "b", "c"]))
    def lookup(self, chain: bytes, asker: str) -> None:
        nodes = {number: name for name, number in self.numbers.items()}
        runs = self.index.lookup(chain, self.numbers.get(asker))
        answer = [(nodes[run.node], run.tier, run.start, run.blocks) for run in runs]
        assert_covers(answer, chain, self.copies, asker)

    @invariant()
    def agrees(self) -> None:
        self.index.check_integrity()
        nodes = {number: name for name, number in self.numbers.items()}
        located = self.index.locate(pack(NAMES))
        for name, holders in zip(NAMES, located, strict=True):
            expected = self.copies[BlockHash(name)]
            assert {(nodes[number], tier) for number, tier in holders} == expected
        assert self.index.all_copies == sum(map(len, self.copies.values()))


TestIndexAgainstDictionary = IndexAgainstDictionary.TestCase
TestIndexAgainstDictionary.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None
)


class _Leader:
    """A node that keeps every state it was ever in."""

    def __init__(self, epoch: int) -> None:
        self.epoch, self.seq = epoch, 0
        self.held: set[tuple[bytes, Tier]] = set()
        self.history = {0: frozenset(self.held)}
        self.events: list[BlockEvent] = []

    def publish(self, kind: str, tier: Tier, batch: bytes) -> None:
        self.seq += 1
        copies = {(bytes(name), tier) for name in unpack(batch)}
        if kind == "stored":
            self.held |= copies
            event: BlockEvent = Stored(epoch=self.epoch, seq=self.seq, tier=tier, hashes=batch)
        elif kind == "removed":
            self.held -= copies
            event = Removed(epoch=self.epoch, seq=self.seq, tier=tier, hashes=batch)
        else:
            self.held.clear()
            event = Cleared(epoch=self.epoch, seq=self.seq)
        self.history[self.seq] = frozenset(self.held)
        self.events.append(event)

    def snapshot(self, size: int) -> list[SnapshotChunk]:
        pieces: list[tuple[Tier, list[bytes]]] = []
        for tier in TIERS:
            names = sorted(name for name, where in self.held if where is tier)
            pieces += [(tier, names[at : at + size]) for at in range(0, len(names), size)]
        pieces = pieces or [(Tier.HOST, [])]
        return [
            SnapshotChunk(
                epoch=self.epoch,
                seq=self.seq,
                index=index,
                total=len(pieces),
                tier=tier,
                hashes=pack(names),
            )
            for index, (tier, names) in enumerate(pieces)
        ]


class RegistryAgainstTruth(RuleBasedStateMachine):
    """One node on a network that loses, repeats and reorders, restarts, leaves and comes back.

    Between two of its lives its clock may go back.
    """

    @initialize()
    def begin(self) -> None:
        self.registry = Registry(seed=1)
        self.now = 0.0
        self.lives: dict[int, _Leader] = {}
        self.member = False
        self.asked = False
        self.under_way: list[BlockEvent | SnapshotChunk] = []
        self.furthest = (0, 0)
        self.restart(clock_went_back=False)

    def _note(self, effects: tuple[AskSnapshot, ...]) -> None:
        assert set(effects) <= {AskSnapshot(SCOPE, "a")}
        self.asked |= bool(effects)

    def _deliver(self, message: BlockEvent | SnapshotChunk) -> None:
        if isinstance(message, SnapshotChunk):
            self._note(self.registry.chunk(SCOPE, "a", message, self.now))
        else:
            self._note(self.registry.event(SCOPE, "a", message, self.now))

    @rule()
    def join(self) -> None:
        if not self.member or self.furthest[0] != self.leader.epoch:
            self.furthest = (0, 0)
        self.member = True
        self._note(self.registry.joined(SCOPE, "a", self.leader.epoch, self.now))

    @rule()
    def leave(self) -> None:
        self.member = False
        self.registry.left(SCOPE, "a", self.now)

    @rule(clock_went_back=st.booleans())
    def restart(self, clock_went_back: bool) -> None:
        known = self.lives or [1_000]
        epoch = min(known) - 1 if clock_went_back else max(known) + 1
        self.leader = self.lives[epoch] = _Leader(epoch)

    @rule(
        kind=st.sampled_from(["stored", "stored", "removed", "cleared"]),
        tier=TIER,
        batch=BATCHES,
        fate=st.sampled_from(["arrives", "arrives", "arrives twice", "is late", "is lost"]),
    )
    def publish(self, kind: str, tier: Tier, batch: bytes, fate: str) -> None:
        self.leader.publish(kind, tier, batch)
        event = self.leader.events[-1]
        if fate == "is late":
            self.under_way.append(event)
        elif fate != "is lost":
            self._deliver(event)
        if fate == "arrives twice":
            self._deliver(event)

    @rule()
    def beat(self) -> None:
        self._deliver(Beat(epoch=self.leader.epoch, seq=self.leader.seq))

    @precondition(lambda self: self.asked)
    @rule(size=st.integers(1, 8))
    def answer(self, size: int) -> None:
        self.asked = False
        self.under_way += self.leader.snapshot(size)

    @precondition(lambda self: self.under_way)
    @rule(data=st.data(), again=st.booleans())
    def arrive(self, data: st.DataObject, again: bool) -> None:
        at = data.draw(st.integers(0, len(self.under_way) - 1))
        self._deliver(self.under_way[at] if again else self.under_way.pop(at))

    @rule(seconds=st.sampled_from([0.1, 1.0, MAX_RESYNC_SECONDS]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self._note(self.registry.tick(self.now))

    @rule()
    def heal(self) -> None:
        """After the network has healed, the view is the truth."""
        self.join()
        self.beat()
        self.under_way.clear()
        for _ in range(3):
            self.now += MAX_RESYNC_SECONDS
            self._note(self.registry.tick(self.now))
            if self.asked:
                self.asked = False
                for chunk in self.leader.snapshot(4):
                    self._deliver(chunk)
            self.beat()
        (view,) = self.registry.nodes()
        assert view.at == (self.leader.epoch, self.leader.seq)
        assert view.state is State.LIVE
        assert self._seen() == self.leader.held

    def _seen(self) -> set[tuple[bytes, Tier]]:
        located = self.registry.locate(SCOPE, pack(NAMES))
        return {
            (name, holder.tier)
            for name, holders in zip(NAMES, located, strict=True)
            for holder in holders
        }

    @invariant()
    def shows_a_state_that_the_node_was_in(self) -> None:
        self.registry.check_integrity()
        if not self.member:
            assert list(self.registry.nodes()) == []
            assert self._seen() == set()
            return
        (view,) = self.registry.nodes()
        assert view.at >= self.furthest, "the cursor never goes back"
        self.furthest = view.at
        assert self._seen() == self.lives[view.at.epoch].history[view.at.seq]

    @rule(chain=CHAINS)
    def lookup(self, chain: bytes) -> None:
        copies: Copies = defaultdict(set)
        for name, tier in self._seen():
            copies[BlockHash(name)].add(("a", tier))
        segments = self.registry.lookup(SCOPE, chain)
        answer = [(part.node, part.tier, part.start, part.count) for part in segments]
        assert_covers(answer, chain, copies, asker="")
        assert self.registry.lookup(SCOPE, chain, asker="a") == ()


TestRegistryAgainstTruth = RegistryAgainstTruth.TestCase
TestRegistryAgainstTruth.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


@settings(max_examples=20, deadline=None)
@given(
    batches=st.lists(
        st.tuples(st.integers(0, 3), TIER, st.integers(0, 5_000), st.integers(0, 3_000)),
        max_size=8,
    ),
    seed=st.integers(0, 2**64 - 1),
)
def test_a_large_index_agrees_with_a_dictionary_through_growth_and_shrinking(
    batches: list[tuple[int, Tier, int, int]], seed: int
) -> None:
    universe = [hashlib.md5(number.to_bytes(4, "big")).digest() for number in range(8_000)]
    index, copies = BlockIndex(seed), defaultdict[bytes, set[tuple[int, Tier]]](set)
    numbers = [index.add_node() for _ in range(2)]
    for choice, tier, start, length in batches:
        number = numbers[choice % 2]
        assert number is not None
        batch = universe[start : start + length]
        if choice < 2:
            index.store(number, tier, pack(batch))
            for name in batch:
                copies[name].add((number, tier))
        else:
            index.remove(number, tier, pack(batch))
            for name in batch:
                copies[name].discard((number, tier))
    index.check_integrity()
    for name, holders in zip(universe, index.locate(pack(universe)), strict=True):
        assert set(holders) == copies[name]
