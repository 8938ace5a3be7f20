"""A simulated tier of one rank: slots with a label each, which may outlive the process.

A block's bytes are its name; a slot that is being written, or never was, holds `TORN`. A label
says what its slot holds: a header in host memory, an entry in the disk's index. It is taken
away before the slot is written and set after, so at any moment it can be believed, also by a
later life; of a disk's, the checksum must match, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from kvbm_schemas.block import BlockHash, Tier, pack
from kvbm_schemas.step import Survivors
from kvbm_service.core.columns import pack_u32, pack_u64

TORN = b""
DECAYED = b"decayed"


class Label(NamedTuple):
    """What a slot holds."""

    name: BlockHash
    fill: int


class Slots:
    """One rank's share of one tier."""

    def __init__(self, count: int) -> None:
        self.contents = [TORN] * count
        self.labels: list[Label | None] = [None] * count
        self.checksums = [TORN] * count
        self.forgotten = False
        """Whether no later life may find what is here."""

    def write(self, slot: int, content: bytes) -> None:
        """Put bytes into a slot that has no label."""
        self.contents[slot] = self.checksums[slot] = content

    def holds(self, slot: int, label: Label) -> bool:
        """Whether the slot holds what it is believed to hold, undamaged."""
        return self.labels[slot] == label and self.contents[slot] == self.checksums[slot]

    def decay(self, slot: int) -> None:
        """A bit flips on the disk."""
        if self.labels[slot] is not None:
            self.contents[slot] = DECAYED

    def survivors(self, tier: Tier) -> Survivors:
        """What is here, oldest first: of each block, what was written last."""
        labelled = [(slot, label) for slot, label in enumerate(self.labels) if label is not None]
        labelled.sort(key=lambda one: one[1].fill)
        newest = {label.name: (slot, label) for slot, label in labelled}
        found = [one for one in labelled if newest[one[1].name] == one]
        return Survivors(
            tier=tier,
            hashes=pack([label.name for _, label in found]),
            fills=pack_u64(label.fill for _, label in found),
            slots=pack_u32(slot for slot, _ in found),
        )

    @property
    def last_fill(self) -> int:
        """The greatest stamp here."""
        return max((label.fill for label in self.labels if label is not None), default=0)


def labels(hashes: Sequence[BlockHash], fills: Sequence[int]) -> list[Label]:
    """What these slots are believed to hold."""
    return [Label(name, fill) for name, fill in zip(hashes, fills, strict=True)]
