"""A copy of what a node holds, taken while that changes."""

from __future__ import annotations

from collections.abc import Callable

import hypothesis.strategies as st
import pytest
from hypothesis import given

from kvbm_schemas.block import BlockHash, Tier
from kvbm_service.core import snapshot
from kvbm_service.core.journal import Journal
from kvbm_service.core.snapshot import Snapshot
from kvbm_service.core.tiers import Tiers
from tests.core.builders import chain

HOST_SLOTS, DISK_SLOTS = 6, 9
Copies = set[tuple[Tier, BlockHash]]


class Node:
    """Two tiers, whose blocks come and go."""

    def __init__(self) -> None:
        self.journal = Journal()
        self.tiers = Tiers(HOST_SLOTS, DISK_SLOTS, self.journal)
        self.journal.begin(1, empty=True)

    def store(self, names: str, tier: Tier = Tier.HOST) -> None:
        """Have these blocks, even if others have to go."""
        if self.tiers.has(tier):
            self.tiers.settle(tier, self.tiers.reserve(tier, chain(names), 1).slots, set())

    def copy(self, slice_slots: int = 2, chunk_blocks: int = 2) -> Snapshot:
        return Snapshot(self.tiers, self.journal, slice_slots, chunk_blocks)

    @property
    def held(self) -> Copies:
        return {(tier, block) for tier, blocks in self.tiers.snapshot() for block in blocks}


def contents(copy: Snapshot) -> Copies:
    """What a whole copy's chunks hold, each block once."""
    total, chunks = copy.total, list(copy.chunks())
    assert len(chunks) == total
    copies = [(tier, block) for tier, blocks in chunks for block in blocks]
    assert len(set(copies)) == len(copies)
    return set(copies)


def complete(copy: Snapshot) -> None:
    while copy.look():
        pass


def test_a_copy_of_nothing_is_one_empty_chunk_for_each_tier() -> None:
    copy = Node().copy()
    complete(copy)
    assert list(copy.chunks()) == [(Tier.HOST, []), (Tier.DISK, [])]


def test_a_copy_holds_every_readable_block_in_chunks_of_bounded_size() -> None:
    node = Node()
    node.store("abcde")
    node.store("abcdefgh", Tier.DISK)
    node.tiers.reserve(Tier.DISK, chain("z"), 1)
    copy = node.copy()
    complete(copy)
    assert copy.at == node.journal.beat()
    assert contents(copy) == node.held
    complete(again := node.copy())
    assert max(len(blocks) for _, blocks in again.chunks()) == 2


def test_what_changes_while_a_copy_is_taken_is_in_it_once() -> None:
    node = Node()
    node.store("abcdef")
    copy = node.copy()
    copy.look()
    node.store("ghi")
    copy.look()
    node.tiers.drop(Tier.HOST, chain("d"))
    complete(copy)
    assert copy.at == node.journal.beat()
    held = node.held
    node.store("uvw")
    assert contents(copy) == held, "what comes later is not in it"


def test_a_tier_given_up_while_a_copy_is_taken_is_empty_in_it() -> None:
    node = Node()
    node.store("abc")
    node.store("defghi", Tier.DISK)
    copy = node.copy()
    for _ in range(4):
        copy.look()
    node.tiers.give_up_disk()
    complete(copy)
    assert contents(copy) == node.held == {(Tier.HOST, block) for block in chain("abc")}


def test_a_copy_is_given_up_when_more_changes_than_it_may_note(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(snapshot, "MAX_CHANGED_BLOCKS", 4)
    node = Node()
    copy = node.copy()
    node.store("abcd")
    assert not copy.given_up
    node.store("e")
    assert copy.given_up
    assert not copy.look()
    assert copy.at is None
    assert node.journal.follower is None
    complete(again := node.copy())
    assert contents(again) == node.held


def test_a_new_copy_takes_the_place_of_one_that_nobody_took_to_its_end() -> None:
    node = Node()
    left, copy = node.copy(), node.copy()
    assert left.given_up
    node.store("ab")
    complete(left)
    complete(copy)
    assert left.at is None
    assert contents(copy) == node.held


CHANGES: dict[str, Callable[[Node], object]] = {
    "drop": lambda node: node.tiers.drop(Tier.HOST, chain("aceg")),
    "fill": lambda node: node.tiers.reserve(Tier.HOST, chain("bdfh"), 2),
    "clear": lambda node: node.tiers.clear(),
    "lose the disk": lambda node: node.tiers.give_up_disk(),
    "begin again": lambda node: node.journal.begin(node.journal.epoch + 1, empty=node.tiers.empty),
}
TO_HOST = st.text("abcdefghijkl", min_size=1, max_size=4)
TO_DISK = st.text("ABCDEFGHIJKL", min_size=1, max_size=4)
SLICE = st.just("look")


@given(
    st.lists(st.one_of(TO_HOST, TO_DISK, SLICE, st.sampled_from(sorted(CHANGES))), max_size=40),
    st.integers(1, 7),
)
def test_a_copy_is_what_was_held_at_its_position(steps: list[str], slice_slots: int) -> None:
    node = Node()
    copy = node.copy(slice_slots)
    held: Copies | None = None
    for step in [*steps, *["look"] * (HOST_SLOTS + DISK_SLOTS + 1)]:
        if step in CHANGES:
            CHANGES[step](node)
        elif step != "look":
            node.store(step.lower(), Tier.DISK if step.isupper() else Tier.HOST)
        elif not copy.look() and held is None:
            assert copy.at == node.journal.beat()
            held = node.held
    assert contents(copy) == held
