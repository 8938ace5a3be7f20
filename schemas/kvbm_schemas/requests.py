"""Questions and their answers: registry lookups, leases, snapshots."""

from __future__ import annotations

from typing import Annotated

import msgspec

from kvbm_schemas.block import HASH_BYTES, Tier
from kvbm_schemas.message import (
    MAX_BATCH_BLOCKS,
    BlockHashes,
    Epoch,
    FillStamps,
    Message,
    Seq,
    SlotIndices,
    Token,
    check_packed,
)

Count = Annotated[int, msgspec.Meta(ge=0, le=MAX_BATCH_BLOCKS)]
Seconds = Annotated[float, msgspec.Meta(gt=0, le=86_400)]
LeaseToken = Annotated[str, msgspec.Meta(min_length=16, max_length=64)]
"""Unguessable: whoever holds it may release the lease."""


class Lookup(Message, frozen=True):
    """Ask the registry who, other than `asker`, holds the longest prefix of this chain."""

    hashes: BlockHashes
    asker: str = ""

    def __post_init__(self) -> None:
        check_packed(self.hashes, HASH_BYTES, "hashes")


class Segment(msgspec.Struct, frozen=True):
    """`count` consecutive blocks of the chain from index `start`, all in one tier of one node."""

    node: Token
    tier: Tier
    start: Count
    count: Count


class Located(Message, frozen=True):
    """The chain's longest known prefix, as consecutive segments. Empty: nobody has its head."""

    segments: Annotated[tuple[Segment, ...], msgspec.Meta(max_length=1024)] = ()


class Locate(Message, frozen=True):
    """Ask the registry for every holder of every one of these blocks."""

    hashes: BlockHashes

    def __post_init__(self) -> None:
        check_packed(self.hashes, HASH_BYTES, "hashes")


class Holder(msgspec.Struct, frozen=True):
    """One copy of a block."""

    node: Token
    tier: Tier


class Placements(Message, frozen=True):
    """The holders of each block asked for, in the order asked."""

    holders: Annotated[tuple[tuple[Holder, ...], ...], msgspec.Meta(max_length=MAX_BATCH_BLOCKS)]


class Acquire(Message, frozen=True):
    """Ask the owner's leader to pin this chain's blocks in its host tier, for our ranks to read."""

    hashes: BlockHashes
    handed_over: Annotated[str, msgspec.Meta(max_length=64)] = ""
    """The lease, granted ahead, under which these blocks were handed over; empty: none was."""

    def __post_init__(self) -> None:
        check_packed(self.hashes, HASH_BYTES, "hashes")


class Leased(Message, frozen=True):
    """The first `len(slots)` blocks asked for are pinned, for `seconds` from when this was sent.

    `fills` are the slots' fill stamps: a reader believes what it read only if the slot's
    header still shows the block's name and this stamp after the read (docs/adr/0003).
    `agents` are the NIXL agents of the owner's ranks, in rank order. In the tier G1, `slots` are
    numbers of blocks on the owner's device.
    """

    lease: LeaseToken
    seconds: Seconds
    epoch: Epoch
    slots: SlotIndices
    fills: FillStamps
    agents: Annotated[tuple[str, ...], msgspec.Meta(max_length=4096)]
    tier: Tier = Tier.HOST

    def __post_init__(self) -> None:
        check_packed(self.slots, 4, "slots")
        check_packed(self.fills, 8, "fills")
        if len(self.slots) * 2 != len(self.fills):
            raise ValueError("`slots` and `fills` differ in length")


class Refused(Message, frozen=True):
    """The request was understood, and the answer is no."""

    reason: Annotated[str, msgspec.Meta(max_length=256)]


class Release(Message, frozen=True):
    """The reader is done with this lease."""

    lease: LeaseToken


class Renew(Message, frozen=True):
    """The reader still needs this lease, which was granted ahead."""

    lease: LeaseToken


class Resync(Message, frozen=True):
    """Ask a leader for a snapshot of its blocks."""


class SnapshotChunk(Message, frozen=True):
    """Part `index` of `total` of what the node held right after event (epoch, seq)."""

    epoch: Epoch
    seq: Seq
    index: Count
    total: Annotated[int, msgspec.Meta(ge=1, le=MAX_BATCH_BLOCKS)]
    tier: Tier
    hashes: BlockHashes

    def __post_init__(self) -> None:
        check_packed(self.hashes, HASH_BYTES, "hashes")
        if self.index >= self.total:
            raise ValueError("`index` must be less than `total`")


LeaseAnswer = Leased | Refused
