"""Directory records: who takes part, kept alive by a lease."""

from __future__ import annotations

from typing import Annotated

import msgspec

from kvbm_schemas.block import Tier
from kvbm_schemas.message import MAX_U63, Epoch, Message, Token

Address = Annotated[int, msgspec.Meta(ge=0, le=MAX_U63)]
"""An address in the process of the rank that published it."""

Blocks = Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]
Bytes = Annotated[int, msgspec.Meta(ge=0, le=MAX_U63)]


class TierStatus(msgspec.Struct, frozen=True):
    """How full a tier is, in blocks."""

    tier: Tier
    capacity: Blocks
    used: Blocks
    pinned: Blocks


class NodeRecord(Message, frozen=True):
    """A leader: its life (`epoch`), how many ranks it has, and its tiers."""

    node: Token
    epoch: Epoch
    world_size: Annotated[int, msgspec.Meta(ge=1, le=4096)]
    block_bytes: Bytes
    """Bytes of one block over all ranks."""
    tiers: Annotated[tuple[TierStatus, ...], msgspec.Meta(max_length=8)] = ()
    engine: Annotated[str, msgspec.Meta(max_length=64)] = ""
    instance: Annotated[str, msgspec.Meta(max_length=64)] = ""
    """Tells two processes that claim the same name apart."""
    url: Annotated[str, msgspec.Meta(max_length=256)] = ""
    """Where the engine serves OpenAI's interface. Empty: nothing is routed to it."""
    role: Annotated[str, msgspec.Meta(max_length=16)] = "both"
    """What the engine is for: `both`, `prefill` or `decode`."""
    block_tokens: Blocks = 0
    """Tokens per block; 0: not said."""
    names: Annotated[str, msgspec.Meta(max_length=128)] = ""
    """How the engine names blocks (`kvbm_service.route.vllm_names`). Empty: not known."""
    model: Annotated[str, msgspec.Meta(max_length=256)] = ""
    """What the engine calls the model that it serves."""


class SlabRecord(msgspec.Struct, frozen=True):
    """Where a rank's host slab lies in its own address space, for NIXL reads.

    The slab is a table of `slots` headers of `header_bytes` each at `headers`, padded to a
    multiple of 128 headers, and `slots` blocks of `slot_bytes` each at `base`.
    """

    base: Address
    headers: Address
    slots: Blocks
    slot_bytes: Bytes
    header_bytes: Bytes
    parts: Annotated[tuple[Bytes, ...], msgspec.Meta(max_length=1 << 16)] = ()
    """Lengths in bytes of the pieces a block consists of, in order; they fill the slot."""
    layout: Annotated[str, msgspec.Meta(max_length=64)] = ""
    """A digest of how the engine arranges a block's bytes; blocks fit only where it is equal."""


class DeviceRecord(msgspec.Struct, frozen=True):
    """Where a rank's device pool lies in its own address space, for NIXL reads of lent blocks.

    The pool's headers are a table like a slab's, one for each of the `blocks`, in ordinary memory.
    The pieces of a block are as long as `slab.parts`.
    """

    headers: Address
    blocks: Blocks
    device: Annotated[int, msgspec.Meta(ge=0, lt=1 << 16)] | None
    """The number of the CUDA device; None: the pool is ordinary memory."""
    regions: Annotated[tuple[tuple[Address, Bytes], ...], msgspec.Meta(max_length=1 << 16)]
    """For each piece of a block: where block 0 has it, and how far on the next block does."""


class RankRecord(Message, frozen=True):
    """A worker: its NIXL agent and its slab."""

    node: Token
    rank: Annotated[int, msgspec.Meta(ge=0, lt=4096)]
    world_size: Annotated[int, msgspec.Meta(ge=1, le=4096)]
    agent: Annotated[str, msgspec.Meta(max_length=256)]
    agent_metadata: Annotated[bytes, msgspec.Meta(max_length=1 << 18)]
    slab: SlabRecord
    device_blocks: Blocks = 0
    """Blocks in the engine's own device pool on this rank."""
    instance: Annotated[str, msgspec.Meta(max_length=64)] = ""
    """The engine's life that this rank belongs to; its leader says the same of itself."""
    disk_slots: Blocks = 0
    """Blocks that fit into this rank's disk tier."""
    device: DeviceRecord | None = None
    """Its device pool, if others may read from that what is lent to them."""


DirectoryRecord = NodeRecord | RankRecord
