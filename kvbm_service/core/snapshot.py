"""A copy of what a node holds, taken in slices between the engine's calls.

The slots of all tiers are looked through, a slice at a time. What changes meanwhile is noted,
and counts in the end: of a block that an event spoke of, its last event says whether it is
there; any other block is as it was when its slice was looked at. So the copy is what the node
held right after the last event that was noted, though nobody ever had to wait for all of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from kvbm_schemas.block import BlockHash, Tier, count, unpack
from kvbm_schemas.events import Beat, BlockEvent, Cleared, Removed, Stored
from kvbm_service.core.journal import Journal
from kvbm_service.core.tiers import Tiers

SLICE_SLOTS = 8_192
"""Slots looked through at once, which takes about half a millisecond."""

CHUNK_BLOCKS = 8_192
"""Blocks in one chunk: packing and sending it takes about half a millisecond, too."""

MAX_CHANGED_BLOCKS = 1 << 18
"""Blocks that may change while a copy is taken. With more it is given up."""


class Snapshot:
    """One copy. `look` until it is whole; then it has a position (`at`), and `chunks`.

    `look` is for whoever may touch the tiers; what is whole is no longer connected with them.
    """

    def __init__(
        self,
        tiers: Tiers,
        journal: Journal,
        slice_slots: int = SLICE_SLOTS,
        chunk_blocks: int = CHUNK_BLOCKS,
    ) -> None:
        """Begin a copy. One that is under way already is given up."""
        if journal.follower is not None:
            journal.follower.give_up()
        journal.follower = self
        self.at: Beat | None = None
        """The last event that the copy includes. None: it is not whole yet."""
        self.given_up = False
        """Whether it will never be whole: too much has changed, or another was begun."""
        self._tiers = tiers
        self._journal = journal
        self._slice_slots = slice_slots
        self._chunk_blocks = chunk_blocks
        self._found: dict[Tier, list[BlockHash]] = {tier: [] for tier in tiers.present}
        self._changed: dict[Tier, dict[BlockHash, bool]] = {tier: {} for tier in tiers.present}
        """Whether blocks are there, of those that an event spoke of."""
        self._slices = self._all_slices()

    def look(self) -> bool:
        """Look through the next slice. False if there is nothing left to do."""
        if self.at is not None or self.given_up:
            return False
        for tier, start in islice(self._slices, 1):
            if self._tiers.has(tier):
                self._found[tier] += self._tiers.pool(tier).names(start, start + self._slice_slots)
            return True
        self.at = self._journal.beat()
        self._journal.follower = None
        return False

    def _all_slices(self) -> Iterator[tuple[Tier, int]]:
        for tier in self._found:
            if self._tiers.has(tier):
                for start in range(0, self._tiers.pool(tier).capacity, self._slice_slots):
                    yield tier, start

    def note(self, event: BlockEvent) -> None:
        """The node's blocks have changed; the journal says so."""
        if isinstance(event, Stored | Removed):
            self._note(event)
        elif isinstance(event, Cleared):
            for tier in self._found:
                self._forget(tier)

    def _note(self, event: Stored | Removed) -> None:
        if not self._tiers.has(event.tier):
            self._forget(event.tier)
            return
        room = MAX_CHANGED_BLOCKS - sum(map(len, self._changed.values()))
        if count(event.hashes) > room:
            self.give_up()
            return
        stored = isinstance(event, Stored)
        self._changed[event.tier].update(dict.fromkeys(unpack(event.hashes), stored))

    def _forget(self, tier: Tier) -> None:
        self._found[tier] = []
        self._changed[tier] = {}

    def give_up(self) -> None:
        """It will not be whole."""
        self.given_up = True
        self._journal.follower = None
        for tier in self._found:
            self._forget(tier)

    # -- when it is whole ------------------------------------------------------------

    @property
    def total(self) -> int:
        """How many chunks there are, before the first is taken."""
        assert self.at is not None, "not whole yet"
        return sum(
            max(1, self._portions(len(found)) + self._portions(len(self._added(tier))))
            for tier, found in self._found.items()
        )

    def chunks(self) -> Iterator[tuple[Tier, list[BlockHash]]]:
        """What was held, in portions, to be taken once; an empty tier is one portion, too."""
        assert self.at is not None, "not whole yet"
        for tier, found in self._found.items():
            added, changed = self._added(tier), self._changed[tier]
            if not found and not added:
                yield tier, []
            while found:  # from its end, so that it is freed bit by bit
                portion = found[-self._chunk_blocks :]
                del found[-self._chunk_blocks :]
                yield tier, [block for block in portion if block not in changed]
            for start in range(0, len(added), self._chunk_blocks):
                yield tier, added[start : start + self._chunk_blocks]

    def _added(self, tier: Tier) -> list[BlockHash]:
        """The blocks that are there by what an event said."""
        return [block for block, there in self._changed[tier].items() if there]

    def _portions(self, blocks: int) -> int:
        return -(-blocks // self._chunk_blocks)
