"""Block events: what a leader tells everyone about its own blocks.

The sender is the node in the subject, never a field: a server that lets each node publish
only under its own name thereby makes forging impossible. Order is (epoch, seq).
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from kvbm_schemas.block import HASH_BYTES, Tier
from kvbm_schemas.message import BlockHashes, Epoch, Message, Seq, Token, check_packed


class Stored(Message, frozen=True):
    """These blocks are now readable in `tier`: every rank has confirmed their bytes."""

    epoch: Epoch
    seq: Seq
    tier: Tier
    hashes: BlockHashes

    def __post_init__(self) -> None:
        check_packed(self.hashes, HASH_BYTES, "hashes")


class Removed(Message, frozen=True):
    """These blocks are no longer in `tier`."""

    epoch: Epoch
    seq: Seq
    tier: Tier
    hashes: BlockHashes

    def __post_init__(self) -> None:
        check_packed(self.hashes, HASH_BYTES, "hashes")


class Cleared(Message, frozen=True):
    """No block of this node is left in any tier."""

    epoch: Epoch
    seq: Seq


class Beat(Message, frozen=True):
    """`seq` was the last event so far: lets a listener notice that it missed the end."""

    epoch: Epoch
    seq: Seq


class Source(msgspec.Struct, frozen=True):
    """Where some of a load's blocks came from: a tier of the loading node itself, or of another."""

    node: Token
    tier: Tier
    blocks: int
    bytes: int


class Loaded(Message, frozen=True):
    """A load into an engine has ended. For whoever watches: nobody's state depends on it."""

    request: Annotated[str, msgspec.Meta(max_length=256)]
    sources: Annotated[tuple[Source, ...], msgspec.Meta(max_length=64)]
    failed: int = 0
    """Blocks that did not arrive and are computed instead."""
    seconds: float = 0.0


BlockEvent = Stored | Removed | Cleared | Beat
