"""The engine's step channel: commands down to every rank, results up from each.

These ride the engine's own connector metadata, so a step's copies are ordered with its
forward pass. Lists are columns: one entry per block, packed like on the wire.
"""

from __future__ import annotations

import zlib
from typing import Annotated

import msgspec

from kvbm_schemas.block import HASH_BYTES, Tier
from kvbm_schemas.message import (
    MAX_U63,
    BlockHashes,
    FillStamps,
    Message,
    SlotIndices,
    check_packed,
)
from kvbm_schemas.records import RankRecord

Op = Annotated[int, msgspec.Meta(ge=0, le=MAX_U63)]
"""A command's number. No two commands of a node have the same, its earlier lives included."""


MARK_BYTES = 4


def mark(agent: str) -> bytes:
    """By what a rank's process is told from others that have, or had, the same rank."""
    return zlib.crc32(agent.encode()).to_bytes(MARK_BYTES, "little")


NO_BLOCK = 2**32 - 1
"""In a row of device blocks (see `Save.blocks`): that group has no place for its part."""


class Save(Message, frozen=True):
    """Copy device blocks into slots of `tier`, and stamp each slot (G1 → G2, or G1 → G3)."""

    op: Op
    """Also the fill stamp that these slots get."""
    hashes: BlockHashes
    blocks: SlotIndices
    """Device block numbers. Where layers have block tables of their own by groups, a row of as many
    numbers for each block, one per group; what is loaded may lack some (`NO_BLOCK`)."""
    slots: SlotIndices
    tier: Tier = Tier.HOST


class Spill(Message, frozen=True):
    """Copy host slots into disk slots (G2 → G3)."""

    op: Op
    """Also the fill stamp that the disk slots get."""
    hashes: BlockHashes
    fills: FillStamps
    """Of the host slots."""
    host: SlotIndices
    disk: SlotIndices


class Fetch(Message, frozen=True):
    """Copy disk slots into host slots (G3 → G2)."""

    op: Op
    """Also the fill stamp that the host slots get."""
    hashes: BlockHashes
    fills: FillStamps
    """Of the disk slots."""
    disk: SlotIndices
    host: SlotIndices
    instance: Annotated[str, msgspec.Meta(max_length=64)] = ""
    """The engine's life that is meant, where the command does not ride its step channel."""

    def __post_init__(self) -> None:
        check_packed(self.hashes, HASH_BYTES, "hashes")
        check_packed(self.fills, 8, "fills")
        count = len(self.hashes) // HASH_BYTES
        if not 8 * count == len(self.fills) == 2 * len(self.disk) == 2 * len(self.host):
            raise ValueError("the columns differ in length")


class RemoteFetch(Message, frozen=True):
    """NIXL-READ another node's host slots into own host slots (remote G2 → G2)."""

    op: Op
    """Also the fill stamp that our slots get."""
    node: str
    agents: tuple[str, ...]
    """The owner's agents in rank order."""
    seconds: float
    """Time left to finish, counted from when the command is received."""
    hashes: BlockHashes
    fills: FillStamps
    slots: SlotIndices
    """The owner's."""
    host: SlotIndices
    """Ours."""


class Lend(Message, frozen=True):
    """Let other nodes read device blocks from now on: their headers say what is in them.

    The forward pass that fills them is over. Answered with a `Moved`: until every rank has,
    nobody may be told where the blocks are.
    """

    op: Op
    """Also the fill stamp that these blocks' headers get."""
    hashes: BlockHashes
    blocks: SlotIndices
    """Device block numbers. Nothing may write to them until an `Unlend` has been answered."""
    instance: Annotated[str, msgspec.Meta(max_length=64)] = ""
    """The engine's life that is meant, where the command does not ride its step channel."""

    def __post_init__(self) -> None:
        check_packed(self.hashes, HASH_BYTES, "hashes")
        check_packed(self.blocks, 4, "blocks")
        if len(self.hashes) // HASH_BYTES != len(self.blocks) // 4:
            raise ValueError("the columns differ in length")


class Unlend(Message, frozen=True):
    """Let nobody believe any more what he reads from these device blocks.

    Answered with a `Moved`. Once every rank has, the blocks may be used for something else.
    """

    op: Op
    blocks: SlotIndices

    def __post_init__(self) -> None:
        check_packed(self.blocks, 4, "blocks")


class Expect(Message, frozen=True):
    """Others may connect and read from now on: be there for them. Not answered."""

    seconds: Annotated[float, msgspec.Meta(ge=0.0, le=86_400.0)]
    """For how long. What was said before may last longer."""
    instance: Annotated[str, msgspec.Meta(max_length=64)] = ""
    """The engine's life that is meant."""


class LocalRead(Message, frozen=True):
    """Copy own slots of one tier into device blocks (G2 → G1, or G3 → G1)."""

    hashes: BlockHashes
    fills: FillStamps
    slots: SlotIndices
    blocks: SlotIndices


class RemoteRead(Message, frozen=True):
    """NIXL-READ what another node has straight into device blocks (remote G2 or G1 → G1)."""

    node: str
    agents: tuple[str, ...]
    """The owner's agents in rank order: each rank reads from the one of its own rank."""
    seconds: float
    """Time left to finish, counted from when the command is received."""
    hashes: BlockHashes
    fills: FillStamps
    slots: SlotIndices
    blocks: SlotIndices
    tier: Tier = Tier.HOST
    """The owner's. With `DEVICE`, `slots` are its device blocks, `fills` the ops of its `Lend`s."""


class Load(Message, frozen=True):
    """Fill device blocks of one request, from any number of places."""

    op: Op
    request: str
    local: LocalRead | None = None
    """From the own host tier."""
    remote: tuple[RemoteRead, ...] = ()
    disk: LocalRead | None = None
    """From the own disk tier."""


class StepCommands(Message, frozen=True):
    """What the leader wants done around one forward pass."""

    saves: tuple[Save, ...] = ()
    loads: tuple[Load, ...] = ()
    peers: tuple[RankRecord, ...] = ()
    """Ranks of other nodes that appeared: loads may read from them from now on."""
    gone: tuple[str, ...] = ()
    """Agents of ranks that disappeared. To be forgotten before `peers` are met."""
    spills: tuple[Spill, ...] = ()
    fetches: tuple[Fetch, ...] = ()
    remote_fetches: tuple[RemoteFetch, ...] = ()
    forget: bool = False
    """No block of this life may be found by a later one. To be done before all else."""
    meant: Annotated[bytes, msgspec.Meta(max_length=4096 * MARK_BYTES)] = b""
    """The `mark` of each rank's process, in rank order; whoever else gets this obeys nothing of
    it. Empty: anyone."""
    fence: Op = 0
    """Commands up to this number that come later are void. To be answered with a `Moved` of this
    op, once nothing older is under way, and nothing is lent any more that was lent by an older
    one. 0: nothing to answer."""
    lends: tuple[Lend, ...] = ()
    unlends: tuple[Unlend, ...] = ()


class Moved(Message, frozen=True):
    """One rank has come to the end of a save, spill, fetch, lend or unlend."""

    op: Op
    failed: SlotIndices = b""
    """Positions in the command's columns whose blocks are not in place."""
    reason: Annotated[str, msgspec.Meta(max_length=256)] = ""
    seconds: Annotated[float, msgspec.Meta(ge=0, le=MAX_U63)] = 0.0
    """From the command's turn to its end."""

    def __post_init__(self) -> None:
        check_packed(self.failed, 4, "failed")


class LoadResult(Message, frozen=True):
    """One rank has come to the end of a load; `failed_blocks` hold no valid bytes.

    A row is named by its first number that is not `NO_BLOCK`.
    """

    op: Op
    request: str
    failed_blocks: SlotIndices = b""
    reason: str = ""
    host_seconds: float = 0.0
    """How long its part from the own host tier took; likewise the others."""
    disk_seconds: float = 0.0
    remote_seconds: float = 0.0


class StepResults(Message, frozen=True):
    """What one rank has finished since its last report."""

    rank: int
    moved: tuple[Moved, ...] = ()
    loads: tuple[LoadResult, ...] = ()
    disk_lost: str = ""
    """Why this rank's disk tier has been given up; empty while it works."""


class Survivors(Message, frozen=True):
    """What a rank found in `tier` when it started: blocks of an earlier life, oldest first."""

    tier: Tier
    hashes: BlockHashes
    fills: FillStamps
    slots: SlotIndices
