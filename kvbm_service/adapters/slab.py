"""The host slab: one rank's host tier, as memory.

    start                     base
    | header | header | … pad | slot                      | slot | …
                                part | part | part | …

A header says what its slot holds. It is cleared before the slot is written and set after,
so whoever finds the expected header *after* reading a slot has read that block whole. The
order in which the two become visible is the order in which they are written: the GIL is
handed over between header and copy, both ways, and its lock is a fence for all stores.

The memory is private and anonymous on purpose. Huge pages are the reason: NIXL reads it
from another process through the kernel, page by page, and shared memory files have no huge
pages unless the host's administrator allows them. It also
means that nothing is left behind after kill -9.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from itertools import accumulate
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kvbm_schemas.records import SlabRecord
from kvbm_service.adapters.mover import HEADER, HEADER_PAGE, Blocks, Indices, Mask
from kvbm_service.errors import LayoutError

Headers = npt.NDArray[np.void]
"""An array of `HEADER`."""

EMPTY_FILL = 0
"""The fill stamp of a header that names nothing."""


class Slab:
    """`slots` headers and `slots` blocks, each the concatenation of its `parts`.

    Every page is touched while this is constructed, so the memory is really there.

    Raises:
        LayoutError: the machine has not that much memory.
    """

    def __init__(self, slots: int, parts: tuple[int, ...]) -> None:
        assert slots > 0
        assert min(parts) > 0
        self.slots = slots
        self.parts = parts
        self.offsets = (0, *accumulate(parts))[:-1]
        self.slot_bytes = sum(parts)
        padded = -(-slots // HEADER_PAGE) * HEADER_PAGE * HEADER.itemsize
        table = -(-padded // mmap.PAGESIZE) * mmap.PAGESIZE
        self.nbytes = table + slots * self.slot_bytes
        self._memory = _map(self.nbytes)
        octets = np.frombuffer(self._memory, np.uint8)
        self.start = int(octets.ctypes.data)
        self.base = self.start + table
        self.headers: Headers = octets[: slots * HEADER.itemsize].view(HEADER)
        ctypes.memset(self.start, 0, self.nbytes)

    def record(self) -> SlabRecord:
        """Where the slab lies, for other nodes."""
        return SlabRecord(
            base=self.base,
            headers=self.start,
            slots=self.slots,
            slot_bytes=self.slot_bytes,
            header_bytes=HEADER.itemsize,
            parts=self.parts,
        )

    def clear(self, slots: Indices) -> None:
        """Let the headers of `slots` name nothing."""
        self.headers[slots] = np.zeros((), HEADER)

    def stamp(self, blocks: Blocks, checksums: npt.NDArray[np.uint64]) -> None:
        """Let the headers of `blocks.slots` name these blocks, `fill` last."""
        assert (blocks.fills != EMPTY_FILL).all(), "fill 0 means empty"
        self.headers["hash"][blocks.slots] = blocks.hashes
        self.headers["checksum"][blocks.slots] = checksums
        self.headers["fill"][blocks.slots] = blocks.fills

    def read_headers(self, slots: Indices) -> Headers:
        """A copy of the headers of `slots`, as they are now."""
        return self.headers[slots]

    def close(self) -> None:
        """Give the memory back; nothing may point into it any more."""
        self.headers = np.zeros(0, HEADER)
        with contextlib.suppress(BufferError):  # someone holds a view: freed along with it
            self._memory.close()


def names(headers: Headers, blocks: Blocks) -> Mask:
    """True where a header names exactly the block expected, with the fill stamp expected."""
    same = (headers["hash"] == blocks.hashes).all(axis=1)
    return np.asarray(same & (headers["fill"] == blocks.fills), np.bool_)


def _map(nbytes: int) -> mmap.mmap:
    available = _available_bytes()
    if nbytes > available:
        raise LayoutError(
            f"a host tier of {nbytes} bytes does not fit into the {available} bytes of memory "
            "that are available: set DYN_KVBM_CPU_CACHE_GB lower"
        )
    try:
        memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise LayoutError(
            f"no memory for a host tier of {nbytes} bytes ({error.strerror}): "
            "set DYN_KVBM_CPU_CACHE_GB lower"
        ) from error
    for advice in (mmap.MADV_HUGEPAGE, mmap.MADV_DONTFORK):
        with contextlib.suppress(OSError):  # a kernel built without it
            memory.madvise(advice)
    return memory


def _available_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise LayoutError("/proc/meminfo does not say how much memory is available")
