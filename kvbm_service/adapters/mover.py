"""The mover port: what a rank does with bytes.

Three kinds of memory: the device pool (the engine's KV tensors), the own host slab, and
other nodes' slabs and device pools. Columns are numpy arrays with one entry per block.

A slab is a table of headers followed by slots. A header names what its slot holds; it is
cleared before a slot is written and set after, so a reader that finds the expected header
*after* its read knows that it read exactly that block (docs/adr/0003). Device blocks that are
lent to other nodes have headers, too (docs/adr/0013).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from kvbm_schemas import step
from kvbm_schemas.block import Tier

Indices = npt.NDArray[np.uint32]
Stamps = npt.NDArray[np.uint64]
Mask = npt.NDArray[np.bool_]

NO_BLOCK = np.uint32(step.NO_BLOCK)

HEADER = np.dtype([("hash", np.uint64, 2), ("fill", np.uint64), ("checksum", np.uint64)])
"""32 bytes per slot. `hash` is the block's name as two native words; `checksum` is xxh3-64 of
the block's device bytes at the time of saving, or 0 when verification is off."""

HEADER_PAGE = 128
"""A table of headers is padded to a multiple of this many, for reading by the page."""


class Region(NamedTuple):
    """One piece that every device block has: `blocks` × `length` bytes, `stride` apart."""

    address: int
    stride: int
    length: int
    blocks: int
    group: int = 0
    """Which of the engine's block tables numbers its blocks."""


class Blocks(NamedTuple):
    """Columns of a transfer: which blocks, where they are, where they belong."""

    hashes: npt.NDArray[np.uint64]
    """Shape (n, 2)."""
    fills: Stamps
    slots: Indices
    device: Indices
    """Shape (n,); with several groups (n, groups). `NO_BLOCK`: there is no place for the parts of
    that group, and they are not loaded. What is saved has all its parts."""


class Hop(NamedTuple):
    """Columns of a move between slots: own host and own disk, or another node's host and ours."""

    hashes: npt.NDArray[np.uint64]
    """Shape (n, 2)."""
    fills: Stamps
    """What the source slots are stamped with."""
    source: Indices
    target: Indices
    fill: int
    """What the target slots get stamped with."""


class DevicePool(NamedTuple):
    """A rank's device pool that may be read by others, as its record describes it."""

    headers: int
    blocks: int
    device: int | None
    """The CUDA device; None: ordinary memory."""
    regions: tuple[tuple[int, int], ...]
    """Of each part of a block: where block 0 has it, and the stride."""


class RemoteSlab(NamedTuple):
    """Another rank's slab, and the device pool if it lends from that, as its record says."""

    agent: str
    agent_metadata: bytes
    base: int
    headers: int
    slots: int
    slot_bytes: int
    parts: tuple[int, ...]
    pool: DevicePool | None = None


Fence = Callable[[], None]
"""Blocks the calling thread until the engine's work on the device has come to some point."""


class Mover(Protocol):
    """Moves blocks. Calls block the calling thread and release the GIL.

    Four threads may call at the same time: the engine's calls `mark`; one of ours calls `save`
    and `load`; one of ours calls `lend`, `unlend` and `unlend_all`; one of ours calls `connect`,
    `forget`, `pull`, `fetch` and `progress`. `close` comes when all of them are done.
    """

    @property
    def agent(self) -> str:
        """Our name among NIXL agents, unique to this process."""
        ...

    @property
    def agent_metadata(self) -> bytes:
        """What another mover needs to read from us."""
        ...

    @property
    def pool(self) -> DevicePool | None:
        """The device pool that others may read from; None: `lend` always fails."""
        ...

    def mark(self) -> Fence:
        """Where the engine's work is now; cheap, and never waits.

        The engine's thread calls it after it has queued the forward pass that a `save`
        must not overtake, or that a `load` or `pull` must not disturb; our thread waits
        for the fence before it makes that call.
        """
        ...

    def save(self, blocks: Blocks) -> None:
        """Device → own slab, headers cleared before and set after. Fills are not 0.

        Raises:
            TransferError: some slot was not filled; its header is clear.
        """
        ...

    def load(self, blocks: Blocks) -> Mask:
        """Own slab → device. True for each block whose header was right before and after.

        Raises:
            TransferError: the copy failed. No block may be believed.
        """
        ...

    def lend(self, blocks: Blocks) -> None:
        """Let other ranks read `blocks.device` until `unlend`; `slots` are not looked at.

        What is to be read has been written: nothing is waited for. Fills are the op of the
        command. The same one may come again.

        Raises:
            TransferError: our device pool cannot be read by others, it has no such block, or a
                later op for one has come before. Nothing was lent.
        """
        ...

    def unlend(self, device: Indices, op: int) -> None:
        """Let nobody believe any more what he reads from these blocks, unless lent after `op`.

        Raises:
            TransferError: there is no such block.
        """
        ...

    def unlend_all(self, op: int) -> None:
        """The same for every block that was lent up to `op`."""
        ...

    def connect(self, peer: RemoteSlab) -> None:
        """Make `peer` readable. Idempotent, and may be tried again after a failure.

        Returns once the peer has answered, so that the first pull is not a slow one.

        Raises:
            TransferError: unreachable, or its slots are not laid out like ours.
        """
        ...

    def forget(self, agent: str) -> None:
        """Drop what `connect` set up. Unknown agents are ignored."""
        ...

    def pull(
        self, agent: str, blocks: Blocks, timeout_seconds: float, tier: Tier = Tier.HOST
    ) -> Mask:
        """Slab of `agent` → device. True for each block proven to have arrived whole.

        With `Tier.DEVICE`, `blocks.slots` are lent blocks of the peer's device pool.

        Returns, or raises, only when nothing can write to the device blocks any more:
        that can take a little longer than the timeout. A later pull from the same peer
        may succeed again.

        Raises:
            TransferError: not connected, the peer is gone or does not lend, or time ran out.
                No block may be believed.
        """
        ...

    def fetch(self, agent: str, hop: Hop, timeout_seconds: float) -> Mask:
        """Slab of `agent` → own slab. Like `pull`, but into our own slots.

        Headers of the target slots are cleared before, and set for the blocks proven to have
        arrived whole. Slots are written by this call alone, from a buffer: whatever happens
        to the transfer, nothing comes late into a slab that may outlive us (docs/adr/0007).
        Called on the thread that calls `pull`.

        Raises:
            TransferError: as `pull`.
        """
        ...

    def progress(self) -> None:
        """Let other nodes' connections to us come about. Cheap; call it every few milliseconds."""
        ...

    def close(self) -> None:
        """Deregister everything. The slab's memory stays its owner's to free."""
        ...
