"""Memory that blocks pass through on their way to and from the disk."""

from __future__ import annotations

import contextlib
import mmap
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt


class Memory(NamedTuple):
    """Rows of memory for one block each, `stride` apart."""

    address: int
    stride: int
    rows: int

    def addresses(self, rows: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.uint64]:
        """Where these rows begin."""
        return rows.astype(np.uint64) * np.uint64(self.stride) + np.uint64(self.address)


class Bounce:
    """Private memory of our own, page-aligned, zero at first, in huge pages if there are any.

    Nobody else has it mapped, not even a child (a page shared with one would be copied under
    a read that is under way). It is freed when nothing refers to this object any more.
    """

    def __init__(self, rows: int, row_bytes: int) -> None:
        self.nbytes = rows * row_bytes
        self._mapping = mmap.mmap(-1, self.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        for advice in (mmap.MADV_HUGEPAGE, mmap.MADV_DONTFORK):
            with contextlib.suppress(OSError):  # a kernel built without it
                self._mapping.madvise(advice)
        address = np.frombuffer(self._mapping, np.uint8).ctypes.data
        self.memory = Memory(address, row_bytes, rows)
