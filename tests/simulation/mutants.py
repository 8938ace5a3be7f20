"""Bugs planted on purpose: each must be caught, or the simulation proves nothing.

A mutant is a way to break one class, and the weather in which that hurts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from kvbm_schemas.events import Beat
from kvbm_schemas.requests import Leased
from kvbm_service.core import (
    cursor,
    journal,
    leader,
    lease,
    lookups,
    moves,
    pool,
    reads,
    registry,
    snapshot,
)
from kvbm_service.core.columns import unpack_u32
from tests.simulation import rank
from tests.simulation.weather import Weather

Patch = pytest.MonkeyPatch
FAIR = Weather(nodes=3, host_slots=16, device_blocks=10, requests=60)
TIGHT = Weather(nodes=2, host_slots=6, device_blocks=10, requests=80, copy_seconds=0.01)
LOSSY = Weather(nodes=2, host_slots=6, requests=40, loss=0.2, longest_delay=0.02)
SLOW_READERS = Weather(
    nodes=3, host_slots=8, device_blocks=14, requests=150, lease_seconds=0.05,
    copy_seconds=0.005, copy_failure=0.2, naps=0.2,
)  # fmt: skip
RESTLESS = Weather(nodes=2, host_slots=6, requests=60, stops=3.0, longest_delay=0.02)


class Mutant(NamedTuple):
    """One bug."""

    name: str
    plant: Callable[[Patch], None]
    weather: Weather
    caught_by: str
    """A word or two of what the oracle says."""


def _commit_before_all_ranks(patch: Patch) -> None:
    right = moves.Moves.report

    def report(self: moves.Moves, op: int, rank: int, *how: Any) -> Any:
        for other in range(self._world_size):
            settled = right(self, op, other, *how)
        return settled

    patch.setattr(moves.Moves, "report", report)


def _believe_a_failed_save(patch: Patch) -> None:
    right = moves.Moves.report
    patch.setattr(
        moves.Moves, "report", lambda self, op, rank, failed, *how: right(self, op, rank, ())
    )


def _free_saved_blocks_early(patch: Patch) -> None:
    right = leader.Leader.store
    patch.setattr(
        leader.Leader, "store", lambda self, *what, **more: (right(self, *what, **more)[0], [])
    )
    patch.setattr(leader.Leader, "take_freed_blocks", lambda self: [])


def _leave_the_header_while_refilling(patch: Patch) -> None:
    patch.setattr(rank.Rank, "take_labels", lambda self, tier, slots: None)


def _read_without_looking_at_headers(patch: Patch) -> None:
    patch.setattr(rank.Rank, "proven", lambda self, owner, tier, slot, label: True)


def _lease_without_pinning(patch: Patch) -> None:
    right = leader.Leader.acquire

    def acquire(self: leader.Leader, hashes: bytes, token: str, *how: Any) -> Any:
        answer = right(self, hashes, token, *how)
        if isinstance(answer, Leased):
            self.tiers.host.unpin(list(unpack_u32(answer.slots)))
        return answer

    def release(self: lease.LeaseTable, token: str) -> list[int]:
        self._slots.pop(token, None)
        return []

    patch.setattr(leader.Leader, "acquire", acquire)
    patch.setattr(lease.LeaseTable, "release", release)
    patch.setattr(lease.LeaseTable, "expire", lambda self, now: [])


def _forget_to_give_leases_back(patch: Patch) -> None:
    def let_go(self: lookups.Lookups, plan: reads.Plan) -> None:
        for pinned in plan.pinned:
            self._tiers.unpin(pinned.tier, pinned.slots)

    patch.setattr(lookups.Lookups, "let_go", let_go)


def _keep_leases_for_ever(patch: Patch) -> None:
    patch.setattr(lease.LeaseTable, "expire", lambda self, now: [])


def _wait_without_a_deadline(patch: Patch) -> None:
    patch.setattr(lookups.Lookups, "_answer_by", lambda self, reader, now, *_: now + 3600.0)


def _count_nothing_that_is_dropped(patch: Patch) -> None:
    right = journal.Journal._add

    def add(self: journal.Journal, event: Any) -> None:
        if event.seq % 5 == 0 and not getattr(self, "skipped", False):
            self.skipped = True  # type: ignore[attr-defined]
            self.seq -= 1
        else:
            self.skipped = False  # type: ignore[attr-defined]
            right(self, event)

    patch.setattr(journal.Journal, "_add", add)


def _snapshot_with_blocks_on_their_way(patch: Patch) -> None:
    patch.setattr(
        pool.Pool, "names", lambda self, start, stop: list(filter(None, self._names[start:stop]))
    )


def _snapshot_without_what_changed_meanwhile(patch: Patch) -> None:
    patch.setattr(snapshot.Snapshot, "note", lambda self, event: None)


def _snapshot_as_of_its_beginning(patch: Patch) -> None:
    right = snapshot.Snapshot.look

    def look(self: snapshot.Snapshot) -> bool:
        began = self.__dict__.setdefault("began", self._journal.beat())
        more = right(self)
        if self.at is not None:
            self.at = began
        return more

    patch.setattr(snapshot.Snapshot, "look", look)


def _apply_over_a_gap(patch: Patch) -> None:
    right = cursor.Cursor.event

    def event(self: cursor.Cursor, event: Any, now: float) -> Any:
        if event.epoch == self.at.epoch and event.seq > self.at.seq and type(event) is not Beat:
            self.at = cursor.Position(event.epoch, event.seq - 1)
        return right(self, event, now)

    patch.setattr(cursor.Cursor, "event", event)


def _apply_a_late_snapshot(patch: Patch) -> None:
    right = cursor.Cursor.chunk

    def chunk(self: cursor.Cursor, chunk: Any, now: float) -> Any:
        before, late = self.at, (chunk.epoch, chunk.seq) < self.at
        if late:
            self.at = cursor.Position(chunk.epoch, chunk.seq - 1)
        steps = right(self, chunk, now)
        if late and not steps:
            self.at = before
        return steps

    patch.setattr(cursor.Cursor, "chunk", chunk)


def _follow_an_earlier_life(patch: Patch) -> None:
    right = cursor.Cursor.event

    def event(self: cursor.Cursor, event: Any, now: float) -> Any:
        if event.epoch < self.at.epoch and type(event) is not Beat:
            return (cursor.Apply(event),)
        return right(self, event, now)

    patch.setattr(cursor.Cursor, "event", event)


def _ask_for_a_snapshot_at_each_duplicate(patch: Patch) -> None:
    right = cursor.Cursor.event

    def event(self: cursor.Cursor, event: Any, now: float) -> Any:
        if event.epoch == self.at.epoch and event.seq <= self.at.seq and type(event) is not Beat:
            return (self._ask(now),)
        return right(self, event, now)

    patch.setattr(cursor.Cursor, "event", event)


def _ignore_beats(patch: Patch) -> None:
    right = cursor.Cursor.event
    patch.setattr(
        cursor.Cursor,
        "event",
        lambda self, event, now: () if type(event) is Beat else right(self, event, now),
    )


def _keep_the_blocks_of_the_dead(patch: Patch) -> None:
    patch.setattr(registry.Registry, "left", lambda self, scope, node, now: ())


MUTANTS = [
    Mutant("commit before all ranks confirmed", _commit_before_all_ranks,
           Weather(nodes=2, world_size=2, requests=40, copy_seconds=0.005),
           "is not there"),
    Mutant("believe a failed save", _believe_a_failed_save,
           Weather(nodes=1, requests=40, copy_failure=0.3), "is not there"),
    Mutant("free saved device blocks early", _free_saved_blocks_early, TIGHT, "other bytes"),
    Mutant("leave the header while refilling", _leave_the_header_while_refilling,
           SLOW_READERS, "wrong bytes"),
    Mutant("read without looking at headers", _read_without_looking_at_headers,
           SLOW_READERS, "wrong bytes"),
    Mutant("lease without pinning", _lease_without_pinning, TIGHT, "slots that are in use"),
    Mutant("forget to give leases back", _forget_to_give_leases_back, FAIR, "had to run out"),
    Mutant("keep leases for ever", _keep_leases_for_ever,
           Weather(nodes=2, host_slots=16, requests=60, loss=0.2), "still pins"),
    Mutant("wait without a deadline", _wait_without_a_deadline, LOSSY, "has waited"),
    Mutant("do not count what is dropped", _count_nothing_that_is_dropped, FAIR, "as it was not"),
    Mutant("put blocks on their way into a snapshot", _snapshot_with_blocks_on_their_way,
           LOSSY, "as it was not"),
    Mutant("leave out of a snapshot what changed meanwhile",
           _snapshot_without_what_changed_meanwhile, LOSSY, "as it was not"),
    Mutant("take a snapshot for as old as its first slice", _snapshot_as_of_its_beginning,
           LOSSY, "as it was not"),
    Mutant("apply over a gap", _apply_over_a_gap, LOSSY, "as it was not"),
    Mutant("apply a late snapshot", _apply_a_late_snapshot,
           Weather(nodes=2, host_slots=6, requests=80, loss=0.1, longest_delay=0.05), "went back"),
    Mutant("follow an earlier life", _follow_an_earlier_life, RESTLESS, "as it was not"),
    Mutant("ask for a snapshot at each duplicate", _ask_for_a_snapshot_at_each_duplicate,
           Weather(nodes=2, requests=40, duplication=0.3), "snapshots were asked for"),
    Mutant("ignore beats", _ignore_beats,
           Weather(nodes=2, requests=6, loss=0.4), "does not know"),
    Mutant("keep the blocks of the dead", _keep_the_blocks_of_the_dead,
           Weather(nodes=2, requests=40, crashes=2.0), "does not know"),
]  # fmt: skip
