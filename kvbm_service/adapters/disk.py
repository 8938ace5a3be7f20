"""The disk port: what a rank does with its file.

A disk slot is stamped like a host slot, in an index beside the file: the block's name, the
fill stamp, and a checksum of its bytes. A read proves itself by all three.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from kvbm_service.adapters.mover import Blocks, Hop, Indices, Mask, Stamps
from kvbm_service.errors import TransferError


class DiskLost(TransferError):
    """The disk has failed for good: the tier is to be given up. Nothing of it may be believed."""


class Contents(NamedTuple):
    """Columns of blocks that a tier held when it was opened, oldest fill first."""

    hashes: npt.NDArray[np.uint64]
    """Shape (n, 2)."""
    fills: Stamps
    slots: Indices


class Disk(Protocol):
    """Moves blocks between the disk and the host slab or the device. Calls block the thread.

    Two threads may call at the same time: one of ours calls `save` and `spill`, another one
    calls `load` and `fetch`. `close` comes when both are done. A False in a mask means that
    this block is not in place (and, for reads, that it is not to be asked for again).

    A system call to a disk may hang for ever. A third thread may see that from `under_way`, and
    `give_up`; the two that hang are on their own from then on.
    """

    @property
    def slots(self) -> int:
        """How many blocks fit."""
        ...

    def contents(self) -> Contents:
        """What an earlier life left here, each entry proven untorn. Ask before the first write."""
        ...

    def forget(self) -> None:
        """Let no later life find what is here. This life goes on with it."""
        ...

    def save(self, blocks: Blocks) -> Mask:
        """Device → disk slots. Fills are not 0."""
        ...

    def spill(self, hop: Hop) -> Mask:
        """Own host slots → disk slots."""
        ...

    def load(self, blocks: Blocks) -> Mask:
        """Disk slots → device, each block's checksum compared."""
        ...

    def fetch(self, hop: Hop) -> Mask:
        """Disk slots → own host slots, each block's checksum compared; headers set after."""
        ...

    def under_way(self) -> frozenset[int]:
        """One number for each call that is under way. It changes whenever the call gets on."""
        ...

    def give_up(self, reason: str) -> None:
        """Every call raises `DiskLost` from now on, those under way if they ever come back.

        When this returns, none of them reads or writes the device or the host slab any more.
        """
        ...

    def close(self) -> None:
        """Let go of file and memory; the file and its index stay for the next life."""
        ...
