"""A node's cursor: how far its events are known, and what to do with what comes next.

A leader's life is an epoch. It begins with no blocks at seq 0, and each event takes it from
one state to the next; a snapshot is the state right after event seq. So a position
(epoch, seq) stands for exactly one state of the node, and those of a life have an order. The
cursor is the position of what has been applied; within a life it never goes back.

Which life counts, the directory alone says, and its last word does: what comes from any other
life is dropped. A leader that has lost its name to another is heard by nobody, whatever its
epoch, and one whose clock went back between two lives is followed all the same.

It is LIVE when nothing is known to be missing, and SYNCING while a snapshot is asked for.
Read the table from the top; the first line that fits is taken. `at` is the input's position.

    input    where                     state    what is done                        then
    event    another epoch             any      drop (stale)                        same
    beat     at > cursor               LIVE     ASK                                 SYNCING
    beat     otherwise                 any      nothing                             same
    event    at <= cursor              any      drop (seen)                         same
    event    next after cursor         LIVE     APPLY                               LIVE
    event    next after cursor         SYNCING  APPLY, and buffered ones that       LIVE if none is
                                                follow without a gap                left, else same
    event    beyond                    LIVE     buffer, ASK                         SYNCING
    event    beyond                    SYNCING  buffer; too many: forget the        SYNCING
                                                others, ASK
    chunk    another epoch             any      drop (stale)                        same
    chunk    at < cursor               any      drop (late)                         same
    chunk    at = cursor               LIVE     drop (late)                         same
    chunk    at < one being assembled  any      drop (late)                         same
    chunk    makes it too large        any      forget the snapshot                 same
    chunk    others still missing      any      keep; patience starts anew          same
    chunk    last one missing          any      REPLACE, cursor to `at`, APPLY      LIVE if none is
                                                buffered ones that follow           left, else ASK
    started  another epoch             any      FORGET, cursor to (epoch, 0), ASK   SYNCING
    started  otherwise                 any      nothing                             same
    tick     patience is over          SYNCING  ASK                                 SYNCING

What a beat said need not be remembered: the next one says it again.

Chunks of one snapshot may come in any order and twice. Those of different positions, or cut
into different numbers, never mix. Those of two answers at the same position are kept apart by
whoever asks: a new question makes an earlier one's further answers void, and each ASK forgets
the chunks that have come so far.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

from kvbm_schemas.block import count
from kvbm_schemas.events import Beat, BlockEvent, Cleared, Removed, Stored
from kvbm_schemas.requests import SnapshotChunk
from kvbm_service.core.registry_counts import RegistryCounts

MAX_BUFFERED_EVENTS = 4_096
MAX_BUFFERED_BLOCKS = 1 << 18
"""Block names in all buffered events of one node together (4 MiB)."""
RESYNC_SECONDS = 1.0
"""How long an answer may take before a snapshot is asked for again; doubles each time …"""
MAX_RESYNC_SECONDS = 8.0
"""… up to this."""


class State(enum.Enum):
    """Whether anything is known to be missing."""

    LIVE = "live"
    SYNCING = "syncing"


class Position(NamedTuple):
    """A state that the node was in: right after event `seq` of `epoch`."""

    epoch: int
    seq: int


class Apply(NamedTuple):
    """Do to the node's blocks what this event says."""

    event: Stored | Removed | Cleared


class Forget(NamedTuple):
    """The node has no blocks any more."""


class Replace(NamedTuple):
    """The node has these blocks and no others."""

    chunks: tuple[SnapshotChunk, ...]


class Ask(NamedTuple):
    """Ask the node for a snapshot."""


Step = Apply | Forget | Replace | Ask
Steps = tuple[Step, ...]


class _Assembly:
    """The chunks of one snapshot that have come so far."""

    def __init__(self, first: SnapshotChunk) -> None:
        self.at = Position(first.epoch, first.seq)
        self.total = first.total
        self.blocks = 0
        self._chunks: dict[int, SnapshotChunk] = {}

    def takes(self, chunk: SnapshotChunk) -> bool:
        return self.at == (chunk.epoch, chunk.seq) and self.total == chunk.total

    def add(self, chunk: SnapshotChunk) -> None:
        if chunk.index not in self._chunks:
            self._chunks[chunk.index] = chunk
            self.blocks += count(chunk.hashes)

    def whole(self) -> tuple[SnapshotChunk, ...] | None:
        return tuple(self._chunks.values()) if len(self._chunks) == self.total else None


class Cursor:
    """One node's cursor. Its steps are to be carried out at once, in order."""

    def __init__(self, counts: RegistryCounts, max_blocks: int) -> None:
        """Nothing is known of the node before it has `started`; a life has an epoch from 0."""
        self.at = Position(-1, 0)
        self.state = State.LIVE
        self._counts = counts
        self._max_blocks = max_blocks
        self._buffer: dict[int, Stored | Removed | Cleared] = {}
        self._buffered_blocks = 0
        self._assembly: _Assembly | None = None
        self._patience_seconds = RESYNC_SECONDS
        self._patient_until = 0.0

    def started(self, epoch: int, now: float) -> Steps:
        """The directory says that the node lives in `epoch`."""
        if epoch == self.at.epoch:
            return ()
        return (self._begin(epoch), self._ask(now))

    def event(self, event: BlockEvent, now: float) -> Steps:
        """The node has published `event`."""
        epoch, seq = self.at
        if event.epoch != epoch:
            self._counts.stale += 1
            return ()
        if isinstance(event, Beat):
            return (self._ask(now),) if event.seq > seq and self.state is State.LIVE else ()
        if event.seq <= seq:
            self._counts.seen += 1
            return ()
        if event.seq > seq + 1:
            return self._keep(event, now)
        self.at = Position(epoch, event.seq)
        self._counts.applied += 1
        if self.state is State.LIVE:
            return (Apply(event),)
        return (Apply(event), *self._replay())

    def chunk(self, chunk: SnapshotChunk, now: float) -> Steps:
        """The node has answered with this part of a snapshot."""
        at = Position(chunk.epoch, chunk.seq)
        if at.epoch != self.at.epoch:
            self._counts.stale += 1
            return ()
        assembly = self._assembly
        too_old = at < self.at or (at == self.at and self.state is State.LIVE)
        if too_old or (assembly is not None and at < assembly.at):
            self._counts.late_snapshots += 1
            return ()
        if assembly is None or not assembly.takes(chunk):
            assembly = self._assembly = _Assembly(chunk)
        assembly.add(chunk)
        if assembly.blocks > self._max_blocks:
            self._assembly = None
            self._counts.oversized_snapshots += 1
            return ()
        self._patient_until = now + self._patience_seconds
        chunks = assembly.whole()
        if chunks is None:
            return ()
        steps = (self._replace(at, chunks), *self._replay())
        return (*steps, self._ask(now)) if self._buffer else steps

    def tick(self, now: float) -> Steps:
        """Time has passed."""
        if self.state is State.LIVE or now < self._patient_until:
            return ()
        return (self._ask(now),)

    def _begin(self, epoch: int) -> Forget:
        self.at = Position(epoch, 0)
        self.state = State.LIVE
        self._patience_seconds = RESYNC_SECONDS
        self._empty_buffer()
        self._assembly = None
        return Forget()

    def _ask(self, now: float) -> Ask:
        self.state = State.SYNCING
        self._assembly = None
        self._patient_until = now + self._patience_seconds
        self._patience_seconds = min(2 * self._patience_seconds, MAX_RESYNC_SECONDS)
        self._counts.resyncs += 1
        return Ask()

    def _keep(self, event: Stored | Removed | Cleared, now: float) -> Steps:
        """Buffer an event that lies behind a gap."""
        if event.seq in self._buffer:
            self._counts.seen += 1
            return ()
        blocks = _blocks(event)
        full = (
            len(self._buffer) == MAX_BUFFERED_EVENTS
            or self._buffered_blocks + blocks > MAX_BUFFERED_BLOCKS
        )
        if full:
            self._empty_buffer()
            self._counts.overflows += 1
        self._buffer[event.seq] = event
        self._buffered_blocks += blocks
        self._counts.buffered += 1
        return (self._ask(now),) if full or self.state is State.LIVE else ()

    def _replace(self, at: Position, chunks: tuple[SnapshotChunk, ...]) -> Replace:
        self.at = at
        self._assembly = None
        self._patience_seconds = RESYNC_SECONDS  # it does answer
        self._counts.snapshots += 1
        for seq in [seq for seq in self._buffer if seq <= at.seq]:
            self._take(seq)
            self._counts.seen += 1
        return Replace(chunks)

    def _replay(self) -> Steps:
        """Apply the buffered events that follow the cursor. LIVE if that was all of them."""
        steps: list[Step] = []
        while self.at.seq + 1 in self._buffer:
            self.at = Position(self.at.epoch, self.at.seq + 1)
            steps.append(Apply(self._take(self.at.seq)))
            self._counts.applied += 1
        if not self._buffer:
            self.state = State.LIVE
            self._patience_seconds = RESYNC_SECONDS
        return tuple(steps)

    def _take(self, seq: int) -> Stored | Removed | Cleared:
        event = self._buffer.pop(seq)
        self._buffered_blocks -= _blocks(event)
        return event

    def _empty_buffer(self) -> None:
        self._buffer.clear()
        self._buffered_blocks = 0

    def check_integrity(self) -> None:
        """Assert that the cursor is sound."""
        assert self.state is State.SYNCING or not self._buffer, "nothing is missing when live"
        assert all(seq > self.at.seq + 1 for seq in self._buffer), "what could be applied, was"
        assert {event.epoch for event in self._buffer.values()} <= {self.at.epoch}, "one life"
        assert self._buffered_blocks == sum(map(_blocks, self._buffer.values()))
        assert self._buffered_blocks <= MAX_BUFFERED_BLOCKS
        assert len(self._buffer) <= MAX_BUFFERED_EVENTS
        assert RESYNC_SECONDS <= self._patience_seconds <= MAX_RESYNC_SECONDS


def _blocks(event: Stored | Removed | Cleared) -> int:
    return 0 if isinstance(event, Cleared) else count(event.hashes)
