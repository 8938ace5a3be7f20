"""The engine's step channel: commands down to every rank, results up from each.

These ride the engine's own connector metadata, so a step's copies are ordered with its
forward pass. Lists are columns: one entry per block, packed like on the wire.
"""

from __future__ import annotations

from kvbm_schemas.message import BlockHashes, FillStamps, Message, SlotIndices
from kvbm_schemas.records import RankRecord


class Save(Message, frozen=True):
    """Copy device blocks into host slots, and stamp each slot's header (G1 → G2)."""

    op: int
    """Also the fill stamp that the headers of these slots get."""
    hashes: BlockHashes
    blocks: SlotIndices
    """Device block numbers."""
    slots: SlotIndices


class LocalRead(Message, frozen=True):
    """Copy own host slots into device blocks (G2 → G1)."""

    hashes: BlockHashes
    fills: FillStamps
    slots: SlotIndices
    blocks: SlotIndices


class RemoteRead(Message, frozen=True):
    """NIXL-READ another node's host slots straight into device blocks (remote G2 → G1)."""

    node: str
    agents: tuple[str, ...]
    """The owner's agents in rank order: each rank reads from the one of its own rank."""
    seconds: float
    """Time left to finish, counted from when the command is received."""
    hashes: BlockHashes
    fills: FillStamps
    slots: SlotIndices
    blocks: SlotIndices


class Load(Message, frozen=True):
    """Fill device blocks of one request, from any number of places."""

    op: int
    request: str
    local: LocalRead | None = None
    remote: tuple[RemoteRead, ...] = ()


class StepCommands(Message, frozen=True):
    """What the leader wants done around one forward pass."""

    saves: tuple[Save, ...] = ()
    loads: tuple[Load, ...] = ()
    peers: tuple[RankRecord, ...] = ()
    """Ranks of other nodes that appeared: loads may read from them from now on."""
    gone: tuple[str, ...] = ()
    """Agents of ranks that disappeared. To be forgotten before `peers` are met."""


class LoadResult(Message, frozen=True):
    """One rank has come to the end of a load; `failed_blocks` hold no valid bytes."""

    op: int
    request: str
    failed_blocks: SlotIndices = b""
    reason: str = ""


class StepResults(Message, frozen=True):
    """What one rank has finished since its last report."""

    rank: int
    saved: tuple[int, ...] = ()
    """Save ops whose bytes are all in place."""
    save_failed: tuple[int, ...] = ()
    """Save ops of which at least one block failed: none of them counts."""
    loads: tuple[LoadResult, ...] = ()
