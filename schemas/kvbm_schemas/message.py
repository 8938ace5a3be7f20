"""What all messages have in common: tagged, frozen, bounded.

The law of these messages: fields are only ever appended, and with a default; none is
renamed, retyped, reordered or reused. `tests/wire` holds golden bytes of each.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from kvbm_schemas.block import HASH_BYTES

MAX_MESSAGE_BYTES = 1 << 20
"""Nothing larger is decoded; it is also NATS's own default limit."""

MAX_BATCH_BLOCKS = 32_768
"""Blocks in one message. A longer list is split by its sender."""

MAX_U63 = (1 << 63) - 1

Epoch = Annotated[int, msgspec.Meta(ge=0, le=MAX_U63)]
"""One life of a leader. A later life of the same node has a greater epoch."""

Seq = Annotated[int, msgspec.Meta(ge=0, le=MAX_U63)]
"""The number of an event within its epoch: 1, 2, 3, …"""

Token = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_-]{1,64}\Z")]
"""A name that is one token of a NATS subject. (`$` would let a line's end follow.)"""

BlockHashes = Annotated[bytes, msgspec.Meta(max_length=MAX_BATCH_BLOCKS * HASH_BYTES)]
"""Block names, packed: `HASH_BYTES` bytes each, in order."""

SlotIndices = Annotated[bytes, msgspec.Meta(max_length=MAX_BATCH_BLOCKS * 4)]
"""Slot numbers, packed: unsigned 32 bit, little endian."""

FillStamps = Annotated[bytes, msgspec.Meta(max_length=MAX_BATCH_BLOCKS * 8)]
"""Fill stamps of slots, packed: unsigned 64 bit, little endian."""


class Message(
    msgspec.Struct,
    frozen=True,
    tag=str.lower,
    tag_field="type",
    omit_defaults=True,
    kw_only=True,
):
    """Base of everything that crosses a process. The type is the validator."""


def check_packed(column: bytes, width: int, field: str) -> None:
    """Refuse a column that holds a broken item (called while decoding).

    Raises:
        ValueError: its length is not a multiple of `width` (msgspec reports it as a
            `ValidationError`).
    """
    if len(column) % width:
        raise ValueError(f"`{field}` holds a broken item: {len(column)} bytes of {width} each")
