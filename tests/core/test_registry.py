"""The registry's rules: members, scopes, limits, answers."""

from __future__ import annotations

import hashlib

import pytest

from kvbm_schemas.block import Tier, pack
from kvbm_schemas.events import Beat, Cleared, Removed, Stored
from kvbm_schemas.requests import Holder, Segment, SnapshotChunk
from kvbm_schemas.subjects import Scope
from kvbm_service.core.cursor import MAX_RESYNC_SECONDS, State
from kvbm_service.core.registry import AskSnapshot, Limits, Registry

SCOPE = Scope("prod", "layout1")
OTHER = Scope("prod", "layout2")
CHAIN = [hashlib.md5(bytes([number])).digest() for number in range(8)]


def stored(seq: int, blocks: list[bytes], tier: Tier = Tier.HOST, epoch: int = 1) -> Stored:
    return Stored(epoch=epoch, seq=seq, tier=tier, hashes=pack(blocks))


def snapshot(seq: int, blocks: list[bytes], epoch: int = 1) -> SnapshotChunk:
    return SnapshotChunk(
        epoch=epoch, seq=seq, index=0, total=1, tier=Tier.HOST, hashes=pack(blocks)
    )


@pytest.fixture
def registry() -> Registry:
    """A registry that knows two members of one scope."""
    registry = Registry(seed=1)
    assert registry.joined(SCOPE, "a", 1, now=0.0) == (AskSnapshot(SCOPE, "a"),)
    assert registry.joined(SCOPE, "b", 1, now=0.0) == (AskSnapshot(SCOPE, "b"),)
    return registry


def length(registry: Registry, scope: Scope = SCOPE, asker: str = "") -> int:
    return sum(part.count for part in registry.lookup(scope, pack(CHAIN), asker))


def test_a_members_events_are_looked_up(registry: Registry) -> None:
    registry.event(SCOPE, "a", stored(1, CHAIN[:3]), now=0.0)
    registry.event(SCOPE, "b", stored(1, CHAIN[2:5], Tier.DISK), now=0.0)
    assert registry.lookup(SCOPE, pack(CHAIN)) == (
        Segment(node="a", tier=Tier.HOST, start=0, count=3),
        Segment(node="b", tier=Tier.DISK, start=3, count=2),
    )
    assert registry.locate(SCOPE, pack(CHAIN[2:4])) == (
        (Holder(node="a", tier=Tier.HOST), Holder(node="b", tier=Tier.DISK)),
        (Holder(node="b", tier=Tier.DISK),),
    )
    registry.check_integrity()


def test_removed_and_cleared_blocks_are_not_found(registry: Registry) -> None:
    registry.event(SCOPE, "a", stored(1, CHAIN), now=0.0)
    removed = Removed(epoch=1, seq=2, tier=Tier.HOST, hashes=CHAIN[4])
    registry.event(SCOPE, "a", removed, now=0.0)
    assert length(registry) == 4
    registry.event(SCOPE, "a", Cleared(epoch=1, seq=3), now=0.0)
    assert length(registry) == 0
    registry.event(SCOPE, "a", stored(4, CHAIN[:2]), now=0.0)
    assert length(registry) == 2
    registry.check_integrity()


def test_the_asker_does_not_hear_of_its_own_blocks(registry: Registry) -> None:
    registry.event(SCOPE, "a", stored(1, CHAIN), now=0.0)
    assert length(registry, asker="a") == 0
    assert length(registry, asker="b") == 8
    assert length(registry, asker="unknown") == 8


def test_scopes_do_not_see_each_others_blocks(registry: Registry) -> None:
    registry.joined(OTHER, "a", 1, now=0.0)
    registry.event(OTHER, "a", stored(1, CHAIN), now=0.0)
    assert length(registry, SCOPE) == 0
    assert length(registry, OTHER) == 8
    assert length(registry, Scope("nobody", "here")) == 0
    assert registry.locate(Scope("nobody", "here"), pack(CHAIN[:2])) == ((), ())


def test_who_is_no_member_changes_nothing(registry: Registry) -> None:
    assert registry.event(SCOPE, "stranger", stored(1, CHAIN), now=0.0) == ()
    assert registry.event(OTHER, "a", stored(1, CHAIN), now=0.0) == ()
    assert registry.chunk(SCOPE, "stranger", snapshot(1, CHAIN), now=0.0) == ()
    assert registry.counts.unknown_sender == 3
    assert (length(registry), registry.scopes) == (0, 1)


def test_a_node_that_leaves_loses_its_blocks_at_once(registry: Registry) -> None:
    registry.event(SCOPE, "a", stored(1, CHAIN), now=0.0)
    registry.left(SCOPE, "a", now=1.0)
    assert length(registry) == 0
    registry.event(SCOPE, "a", stored(2, CHAIN), now=1.0)
    assert length(registry) == 0
    registry.left(SCOPE, "a", now=1.0)
    registry.check_integrity()


def test_a_scope_without_members_is_forgotten(registry: Registry) -> None:
    registry.left(SCOPE, "a", now=1.0)
    registry.left(SCOPE, "b", now=1.0)
    assert registry.scopes == 0


def test_a_node_that_comes_back_is_asked_anew(registry: Registry) -> None:
    registry.event(SCOPE, "a", stored(1, CHAIN), now=0.0)
    registry.left(SCOPE, "a", now=1.0)
    assert registry.joined(SCOPE, "a", 1, now=2.0) == (AskSnapshot(SCOPE, "a"),)
    registry.chunk(SCOPE, "a", snapshot(1, CHAIN), now=2.0)
    assert length(registry) == 8


def test_a_record_that_is_told_again_asks_nothing(registry: Registry) -> None:
    assert registry.joined(SCOPE, "a", 1, now=1.0) == ()


def test_a_node_that_restarts_loses_its_blocks_and_is_asked(registry: Registry) -> None:
    registry.event(SCOPE, "a", stored(1, CHAIN), now=0.0)
    assert registry.joined(SCOPE, "a", 2, now=1.0) == (AskSnapshot(SCOPE, "a"),)
    assert length(registry) == 0
    registry.event(SCOPE, "a", stored(2, CHAIN), now=1.0)
    assert length(registry) == 0, "an event of the old life"


def test_a_node_whose_clock_went_back_is_followed_in_its_new_life(registry: Registry) -> None:
    registry.joined(SCOPE, "a", 9, now=0.0)
    assert registry.joined(SCOPE, "a", 3, now=1.0) == (AskSnapshot(SCOPE, "a"),)
    registry.event(SCOPE, "a", stored(1, CHAIN, epoch=9), now=1.0)
    assert length(registry) == 0, "an event of the old life"
    registry.event(SCOPE, "a", stored(1, CHAIN, epoch=3), now=1.0)
    assert length(registry) == 8


def test_a_leader_without_the_name_is_not_heard_whatever_its_epoch(registry: Registry) -> None:
    registry.event(SCOPE, "a", stored(1, CHAIN, epoch=99), now=0.0)
    assert length(registry) == 0
    registry.event(SCOPE, "a", stored(1, CHAIN), now=0.0)
    assert length(registry) == 8


def test_a_gap_is_healed_by_a_snapshot(registry: Registry) -> None:
    registry.event(SCOPE, "a", stored(1, CHAIN[:1]), now=0.0)
    effects = registry.event(SCOPE, "a", stored(3, CHAIN[2:3]), now=0.0)
    assert effects == (AskSnapshot(SCOPE, "a"),)
    assert length(registry) == 1, "still the state before the gap"
    registry.chunk(SCOPE, "a", snapshot(2, CHAIN[:2]), now=0.1)
    assert length(registry) == 3


def test_a_missed_last_event_is_healed_after_a_beat(registry: Registry) -> None:
    registry.event(SCOPE, "a", stored(1, CHAIN[:1]), now=0.0)
    effects = registry.event(SCOPE, "a", Beat(epoch=1, seq=2), now=0.0)
    assert effects == (AskSnapshot(SCOPE, "a"),)


def test_a_snapshot_takes_away_what_it_does_not_name(registry: Registry) -> None:
    registry.event(SCOPE, "a", stored(1, CHAIN), now=0.0)
    registry.event(SCOPE, "a", Beat(epoch=1, seq=5), now=0.0)
    registry.chunk(SCOPE, "a", snapshot(5, CHAIN[:2]), now=0.1)
    assert length(registry) == 2
    registry.check_integrity()


def test_nodes_that_do_not_answer_are_asked_again(registry: Registry) -> None:
    registry.event(SCOPE, "a", stored(1, CHAIN), now=0.0)  # heals a, b goes on waiting
    assert registry.tick(now=0.0) == ()
    assert registry.tick(now=MAX_RESYNC_SECONDS) == (AskSnapshot(SCOPE, "b"),)
    assert {view.node: view.state for view in registry.nodes()} == {
        "a": State.LIVE,
        "b": State.SYNCING,
    }


def test_nodes_beyond_the_limit_are_ignored() -> None:
    registry = Registry(seed=1, limits=Limits(nodes_per_scope=1))
    registry.joined(SCOPE, "a", 1, now=0.0)
    assert registry.joined(SCOPE, "b", 1, now=0.0) == ()
    registry.event(SCOPE, "b", stored(1, CHAIN), now=0.0)
    assert length(registry) == 0
    assert registry.counts.refused_nodes == 1
    registry.left(SCOPE, "a", now=0.0)
    assert registry.joined(SCOPE, "b", 1, now=0.0) != ()


def test_scopes_beyond_the_limit_are_ignored() -> None:
    registry = Registry(seed=1, limits=Limits(scopes=1))
    registry.joined(SCOPE, "a", 1, now=0.0)
    assert registry.joined(OTHER, "a", 1, now=0.0) == ()
    assert (registry.scopes, registry.counts.refused_scopes) == (1, 1)


def test_blocks_beyond_a_nodes_limit_are_ignored() -> None:
    registry = Registry(seed=1, limits=Limits(blocks_per_node=5))
    registry.joined(SCOPE, "a", 1, now=0.0)
    registry.event(SCOPE, "a", stored(1, CHAIN), now=0.0)
    assert length(registry) == 5
    assert (registry.copies, registry.refused_blocks) == (5, 3)
    registry.check_integrity()


def test_what_was_done_is_counted(registry: Registry) -> None:
    registry.event(SCOPE, "a", stored(1, CHAIN), now=0.0)
    registry.event(SCOPE, "a", stored(1, CHAIN), now=0.0)
    registry.event(SCOPE, "a", stored(3, CHAIN), now=0.0)
    registry.event(SCOPE, "a", stored(1, CHAIN, epoch=0), now=0.0)
    registry.lookup(SCOPE, pack(CHAIN))
    counts = registry.counts
    assert (counts.applied, counts.seen, counts.buffered, counts.stale) == (1, 1, 1, 1)
    assert (counts.resyncs, counts.lookups) == (3, 1)
    assert (registry.blocks, registry.copies) == (8, 8)
