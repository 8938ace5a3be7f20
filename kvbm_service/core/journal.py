"""A leader's own events, numbered: the log that registries follow by (epoch, seq)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from kvbm_schemas.block import BlockHash, Tier, pack
from kvbm_schemas.events import Beat, BlockEvent, Cleared, Removed, Stored
from kvbm_schemas.message import MAX_BATCH_BLOCKS

MAX_UNSENT_EVENTS = 4096
"""Events waiting to be published. Beyond, the oldest are dropped; their numbers stay used,
so whoever listens notices the gap and asks for a snapshot."""


class Follower(Protocol):
    """Hears of each event when it happens."""

    def note(self, event: BlockEvent) -> None: ...

    def give_up(self) -> None: ...


class Journal:
    """Numbers events, and keeps those that were not published yet."""

    def __init__(self) -> None:
        self.follower: Follower | None = None
        """A copy of the node's blocks that is being taken (snapshot.py)."""
        self.epoch = 0
        self.seq = 0
        self.dropped = 0
        self._unsent: list[BlockEvent] = []

    def begin(self, epoch: int, *, empty: bool) -> None:
        """Start a life. What is held already counts as its event 1, which nobody heard."""
        assert epoch > self.epoch
        self.epoch = epoch
        self.seq = 0 if empty else 1
        self._unsent.clear()

    def stored(self, blocks: Sequence[BlockHash], tier: Tier = Tier.HOST) -> None:
        """These blocks became readable."""
        for part in _batches(blocks):
            self._add(Stored(epoch=self.epoch, seq=self._next(), tier=tier, hashes=pack(part)))

    def removed(self, blocks: Sequence[BlockHash], tier: Tier = Tier.HOST) -> None:
        """These blocks are no longer readable."""
        for part in _batches(blocks):
            self._add(Removed(epoch=self.epoch, seq=self._next(), tier=tier, hashes=pack(part)))

    def cleared(self) -> None:
        """No block is left."""
        self._add(Cleared(epoch=self.epoch, seq=self._next()))

    def beat(self) -> Beat:
        """How far this journal has come."""
        return Beat(epoch=self.epoch, seq=self.seq)

    def take(self) -> list[BlockEvent]:
        """The events since the last call, oldest first."""
        events, self._unsent = self._unsent, []
        return events

    def _next(self) -> int:
        self.seq += 1
        return self.seq

    def _add(self, event: BlockEvent) -> None:
        if self.follower is not None:
            self.follower.note(event)
        self._unsent.append(event)
        if len(self._unsent) > MAX_UNSENT_EVENTS:
            del self._unsent[0]
            self.dropped += 1


def _batches(blocks: Sequence[BlockHash]) -> list[Sequence[BlockHash]]:
    return [blocks[at : at + MAX_BATCH_BLOCKS] for at in range(0, len(blocks), MAX_BATCH_BLOCKS)]
