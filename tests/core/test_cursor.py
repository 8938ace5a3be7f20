"""A node's cursor, row by row of the table in cursor.py."""

from __future__ import annotations

import pytest

from kvbm_schemas.block import Tier
from kvbm_schemas.events import Beat, Cleared, Removed, Stored
from kvbm_schemas.requests import SnapshotChunk
from kvbm_service.core import cursor as cursor_module
from kvbm_service.core.cursor import (
    MAX_RESYNC_SECONDS,
    RESYNC_SECONDS,
    Apply,
    Ask,
    Cursor,
    Forget,
    Replace,
    State,
)
from kvbm_service.core.registry_counts import RegistryCounts

EPOCH = 7


def stored(seq: int, epoch: int = EPOCH, blocks: int = 1) -> Stored:
    return Stored(epoch=epoch, seq=seq, tier=Tier.HOST, hashes=bytes([seq % 256]) * 16 * blocks)


def beat(seq: int, epoch: int = EPOCH) -> Beat:
    return Beat(epoch=epoch, seq=seq)


def chunk(
    seq: int, index: int = 0, total: int = 1, epoch: int = EPOCH, blocks: int = 1
) -> SnapshotChunk:
    return SnapshotChunk(
        epoch=epoch,
        seq=seq,
        index=index,
        total=total,
        tier=Tier.HOST,
        hashes=bytes([index]) * 16 * blocks,
    )


@pytest.fixture
def counts() -> RegistryCounts:
    return RegistryCounts()


@pytest.fixture
def fresh(counts: RegistryCounts) -> Cursor:
    """A cursor whose node was just found in the directory."""
    cursor = Cursor(counts, max_blocks=100)
    assert cursor.started(EPOCH, now=0.0) == (Forget(), Ask())
    return cursor


@pytest.fixture
def live(fresh: Cursor) -> Cursor:
    """A cursor that has come to (EPOCH, 3) by a snapshot."""
    assert fresh.chunk(chunk(3), now=0.0) == (Replace((chunk(3),)),)
    assert (fresh.at, fresh.state) == ((EPOCH, 3), State.LIVE)
    return fresh


def test_the_next_event_is_applied(live: Cursor) -> None:
    assert live.event(stored(4), now=1.0) == (Apply(stored(4)),)
    assert (live.at, live.state) == ((EPOCH, 4), State.LIVE)


def test_a_removal_and_a_clearing_are_events_like_any_other(live: Cursor) -> None:
    removed = Removed(epoch=EPOCH, seq=4, tier=Tier.HOST, hashes=bytes(16))
    cleared = Cleared(epoch=EPOCH, seq=5)
    assert live.event(removed, now=1.0) == (Apply(removed),)
    assert live.event(cleared, now=1.0) == (Apply(cleared),)


def test_an_event_seen_before_is_dropped(live: Cursor, counts: RegistryCounts) -> None:
    live.event(stored(4), now=1.0)
    assert live.event(stored(4), now=1.0) == ()
    assert live.event(stored(2), now=1.0) == ()
    assert live.at == (EPOCH, 4)
    assert counts.seen == 2


def test_a_gap_asks_for_a_snapshot_once_and_keeps_what_lies_behind_it(live: Cursor) -> None:
    assert live.event(stored(5), now=1.0) == (Ask(),)
    assert live.event(stored(6), now=1.0) == ()
    assert (live.at, live.state) == ((EPOCH, 3), State.SYNCING)
    assert live.chunk(chunk(5), now=1.1) == (Replace((chunk(5),)), Apply(stored(6)))
    assert (live.at, live.state) == ((EPOCH, 6), State.LIVE)


def test_a_late_event_that_fills_the_gap_heals_it_without_a_snapshot(live: Cursor) -> None:
    live.event(stored(5), now=1.0)
    live.event(stored(6), now=1.0)
    assert live.event(stored(4), now=1.0) == tuple(Apply(stored(seq)) for seq in (4, 5, 6))
    assert (live.at, live.state) == ((EPOCH, 6), State.LIVE)


def test_a_late_event_that_fills_half_a_gap_asks_nothing_new(live: Cursor) -> None:
    live.event(stored(6), now=1.0)
    assert live.event(stored(4), now=1.0) == (Apply(stored(4)),)
    assert (live.at, live.state) == ((EPOCH, 4), State.SYNCING)


def test_an_event_kept_twice_counts_once(live: Cursor, counts: RegistryCounts) -> None:
    live.event(stored(5), now=1.0)
    assert live.event(stored(5), now=1.0) == ()
    assert (counts.buffered, counts.seen) == (1, 1)
    live.check_integrity()


def test_a_second_gap_behind_the_snapshot_is_asked_for_at_once(live: Cursor) -> None:
    live.event(stored(5), now=1.0)
    live.event(stored(9), now=1.0)
    steps = live.chunk(chunk(6), now=1.1)
    assert steps == (Replace((chunk(6),)), Ask())
    assert (live.at, live.state) == ((EPOCH, 6), State.SYNCING)
    live.check_integrity()


def test_a_beat_tells_of_a_missed_last_event(live: Cursor) -> None:
    assert live.event(beat(3), now=1.0) == ()
    assert live.state is State.LIVE
    assert live.event(beat(4), now=1.0) == (Ask(),)
    assert live.event(beat(4), now=1.1) == ()
    assert (live.at, live.state) == ((EPOCH, 3), State.SYNCING)


def test_an_empty_node_is_live_once_it_says_so(fresh: Cursor) -> None:
    assert fresh.chunk(chunk(0, blocks=0), now=0.1) == (Replace((chunk(0, blocks=0),)),)
    assert (fresh.at, fresh.state) == ((EPOCH, 0), State.LIVE)


def test_a_life_seen_from_its_first_event_needs_no_snapshot(fresh: Cursor) -> None:
    assert fresh.event(stored(1), now=0.1) == (Apply(stored(1)),)
    assert fresh.state is State.LIVE
    assert fresh.chunk(chunk(0), now=0.2) == ()
    assert fresh.chunk(chunk(1), now=0.2) == ()
    assert fresh.at == (EPOCH, 1)


def test_a_late_snapshot_is_dropped(live: Cursor, counts: RegistryCounts) -> None:
    live.event(stored(4), now=1.0)
    live.event(stored(6), now=1.0)
    assert live.chunk(chunk(3), now=1.1) == ()
    assert (live.at, live.state) == ((EPOCH, 4), State.SYNCING)
    assert counts.late_snapshots == 1


def test_a_snapshot_overtaken_by_events_while_it_came_is_dropped(live: Cursor) -> None:
    live.event(stored(6), now=1.0)
    live.chunk(chunk(5, index=0, total=2), now=1.1)
    live.event(stored(4), now=1.2)
    live.event(stored(5), now=1.2)
    assert live.at == (EPOCH, 6)
    assert live.chunk(chunk(5, index=1, total=2), now=1.3) == ()
    assert (live.at, live.state) == ((EPOCH, 6), State.LIVE)


def test_a_snapshot_ahead_of_a_live_cursor_is_welcome(live: Cursor) -> None:
    assert live.chunk(chunk(8), now=1.0) == (Replace((chunk(8),)),)
    assert live.at == (EPOCH, 8)
    assert live.event(stored(7), now=1.0) == ()


def test_chunks_make_a_snapshot_in_any_order_and_twice(fresh: Cursor) -> None:
    parts = [chunk(9, index=index, total=3) for index in range(3)]
    assert fresh.chunk(parts[2], now=0.1) == ()
    assert fresh.chunk(parts[0], now=0.1) == ()
    assert fresh.chunk(parts[2], now=0.1) == ()
    (replace,) = fresh.chunk(parts[1], now=0.1)
    assert isinstance(replace, Replace)
    assert sorted(part.index for part in replace.chunks) == [0, 1, 2]


def test_chunks_of_different_snapshots_never_mix(fresh: Cursor) -> None:
    assert fresh.chunk(chunk(9, index=0, total=2), now=0.1) == ()
    assert fresh.chunk(chunk(10, index=1, total=2), now=0.1) == ()  # begins another
    assert fresh.chunk(chunk(9, index=1, total=2), now=0.1) == ()  # is older than that
    assert fresh.chunk(chunk(10, index=0, total=3), now=0.1) == ()  # is cut differently
    assert fresh.chunk(chunk(10, index=1, total=3), now=0.1) == ()
    (replace,) = fresh.chunk(chunk(10, index=2, total=3), now=0.1)
    assert isinstance(replace, Replace)
    assert {part.total for part in replace.chunks} == {3}
    assert fresh.at == (EPOCH, 10)


def test_a_snapshot_larger_than_a_node_may_be_is_dropped(
    fresh: Cursor, counts: RegistryCounts
) -> None:
    assert fresh.chunk(chunk(9, index=0, total=2, blocks=60), now=0.1) == ()
    assert fresh.chunk(chunk(9, index=1, total=2, blocks=60), now=0.1) == ()
    assert counts.oversized_snapshots == 1
    assert fresh.at == (EPOCH, 0)


@pytest.mark.parametrize("epoch", [EPOCH + 1, EPOCH - 1], ids=["newer", "older"])
def test_a_life_that_the_directory_lists_takes_the_place_of_the_one_before(
    live: Cursor, epoch: int
) -> None:
    """An older epoch, too: a clock may go back between two lives."""
    live.event(stored(9), now=1.0)  # of the old life: must not be applied in the new one
    live.chunk(chunk(8, index=0, total=2), now=1.0)
    assert live.started(epoch, now=1.0) == (Forget(), Ask())
    assert (live.at, live.state) == ((epoch, 0), State.SYNCING)
    part = chunk(8, epoch=epoch)
    assert live.chunk(part, now=1.0) == (Replace((part,)),)
    assert (live.at, live.state) == ((epoch, 8), State.LIVE)


@pytest.mark.parametrize("epoch", [EPOCH + 1, EPOCH - 1], ids=["newer", "older"])
def test_what_comes_from_a_life_that_the_directory_does_not_list_is_dropped(
    live: Cursor, counts: RegistryCounts, epoch: int
) -> None:
    assert live.event(stored(4, epoch=epoch), now=1.0) == ()
    assert live.event(beat(9, epoch=epoch), now=1.0) == ()
    assert live.chunk(chunk(9, epoch=epoch), now=1.0) == ()
    assert (live.at, live.state) == ((EPOCH, 3), State.LIVE)
    assert counts.stale == 3


def test_a_life_is_begun_once(live: Cursor) -> None:
    assert live.started(EPOCH, now=1.0) == ()
    assert (live.at, live.state) == ((EPOCH, 3), State.LIVE)


def test_too_many_buffered_events_are_forgotten_and_asked_for_again(
    live: Cursor, counts: RegistryCounts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cursor_module, "MAX_BUFFERED_EVENTS", 3)
    assert live.event(stored(5), now=1.0) == (Ask(),)
    assert [live.event(stored(seq), now=1.0) for seq in (6, 7)] == [(), ()]
    assert live.event(stored(8), now=1.0) == (Ask(),)
    assert counts.overflows == 1
    live.check_integrity()
    assert live.chunk(chunk(4), now=1.1) == (Replace((chunk(4),)), Ask())  # 5, 6, 7 are gone
    assert live.chunk(chunk(7), now=1.2) == (Replace((chunk(7),)), Apply(stored(8)))


def test_too_many_buffered_blocks_are_forgotten_too(
    live: Cursor, counts: RegistryCounts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cursor_module, "MAX_BUFFERED_BLOCKS", 10)
    live.event(stored(5, blocks=6), now=1.0)
    assert live.event(stored(6, blocks=6), now=1.0) == (Ask(),)
    assert counts.overflows == 1
    live.check_integrity()


def test_an_unanswered_question_is_repeated_ever_more_rarely(fresh: Cursor) -> None:
    now, waits = 0.0, []
    for _ in range(8):
        asked = now
        while not fresh.tick(now):
            now += RESYNC_SECONDS / 4
        waits.append(now - asked)
    assert waits == [1.0, 2.0, 4.0] + 5 * [MAX_RESYNC_SECONDS]


def test_patience_starts_anew_with_each_chunk(fresh: Cursor) -> None:
    late = 0.9 * RESYNC_SECONDS
    fresh.chunk(chunk(9, index=0, total=3), now=late)
    assert fresh.tick(now=late + 0.9 * RESYNC_SECONDS) == ()
    assert fresh.tick(now=late + 10 * RESYNC_SECONDS) == (Ask(),)


def test_a_node_that_answered_is_soon_asked_again(live: Cursor) -> None:
    live.event(stored(5), now=1.0)
    assert live.tick(now=10.0) == live.tick(now=20.0) == live.tick(now=30.0) == (Ask(),)
    live.event(stored(9), now=30.0)
    assert live.chunk(chunk(5), now=31.0) == (Replace((chunk(5),)), Ask())
    assert live.tick(now=31.0 + RESYNC_SECONDS) == (Ask(),)


def test_half_a_snapshot_is_forgotten_when_asking_again(fresh: Cursor) -> None:
    fresh.chunk(chunk(9, index=0, total=2), now=0.1)
    assert fresh.tick(now=100.0) == (Ask(),)
    assert fresh.chunk(chunk(9, index=1, total=2), now=100.1) == ()
    assert fresh.at == (EPOCH, 0)


def test_half_a_snapshot_is_forgotten_with_the_events_behind_it(
    live: Cursor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cursor_module, "MAX_BUFFERED_EVENTS", 1)
    live.event(stored(5), now=1.0)
    live.chunk(chunk(9, index=0, total=2), now=1.1)
    assert live.event(stored(6), now=1.2) == (Ask(),)
    assert live.chunk(chunk(9, index=1, total=2), now=1.3) == ()
    assert live.at == (EPOCH, 3)


def test_time_alone_asks_nothing_of_a_live_node(live: Cursor) -> None:
    assert live.tick(now=1e9) == ()
