"""What a block is called, and where it can lie.

A block is a fixed number of tokens' KV for all layers of one rank. Its name is 16 bytes
that already chain everything the bytes depend on (tokens before it, LoRA, multimodal
inputs, cache salt), so equal names mean equal bytes, within one namespace.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from typing import NewType

HASH_BYTES = 16

BlockHash = NewType("BlockHash", bytes)
"""A block's name: exactly `HASH_BYTES` bytes."""


class Tier(enum.StrEnum):
    """Where a block lies on its node, fastest first."""

    DEVICE = "G1"
    HOST = "G2"
    DISK = "G3"


def pack(hashes: Iterable[bytes]) -> bytes:
    """Join block names into the column that messages carry."""
    return b"".join(hashes)


def unpack(packed: bytes) -> list[BlockHash]:
    """Split a packed column into block names.

    `packed` must be a multiple of `HASH_BYTES` long: the messages that carry one have
    checked that while they were decoded.
    """
    return [BlockHash(packed[at : at + HASH_BYTES]) for at in range(0, len(packed), HASH_BYTES)]


def count(packed: bytes) -> int:
    """How many block names a packed column holds."""
    return len(packed) // HASH_BYTES
