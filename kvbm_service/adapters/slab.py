"""The host slab: one rank's host tier, as memory.

    start                     base
    | header | header | … pad | slot                      | slot | …
                                part | part | part | …

A header says what its slot holds. It is cleared before the slot is written and set after,
so whoever finds the expected header *after* reading a slot has read that block whole. The
order in which the two become visible is the order in which they are written: the GIL is
handed over between header and copy, both ways, and its lock is a fence for all stores.

At any moment a header with a fill stamp is right: its fill is cleared first and set last. So
a slab in lasting memory (slab_memory.py) can be believed after its process was killed, and
`contents` says what is in it (docs/adr/0007).
"""

from __future__ import annotations

from itertools import accumulate
from mmap import PAGESIZE
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kvbm_schemas.records import SlabRecord
from kvbm_service.adapters import slab_memory
from kvbm_service.adapters.contents import contents
from kvbm_service.adapters.disk import Contents
from kvbm_service.adapters.mover import HEADER, HEADER_PAGE, Blocks, Indices, Mask, Stamps

Headers = npt.NDArray[np.void]
"""An array of `HEADER`."""

EMPTY_FILL = 0
"""The fill stamp of a header that names nothing."""


class Slab:
    """`slots` headers and `slots` blocks, each the concatenation of its `parts`.

    With `file`, a path in a home of ours (homes.py) on a file system in memory, the slab is
    that file: it stays after us, and one that was left there for the same slots, parts and
    `identity` (of whatever else the bytes depend on) is taken over with its blocks. Where
    that cannot be, it is private memory, with a warning.

    Every page is touched while this is constructed, so the memory is really there.

    Raises:
        LayoutError: the machine has not that much memory.
    """

    def __init__(
        self, slots: int, parts: tuple[int, ...], file: Path | None = None, identity: str = ""
    ) -> None:
        assert slots > 0
        assert min(parts) > 0
        self.slots = slots
        self.parts = parts
        self.offsets = (0, *accumulate(parts))[:-1]
        self.slot_bytes = sum(parts)
        padded = -(-slots // HEADER_PAGE) * HEADER_PAGE * HEADER.itemsize
        table = -(-padded // PAGESIZE) * PAGESIZE
        self.nbytes = table + slots * self.slot_bytes
        layout = f"{slots} {parts} {identity}"
        found = slab_memory.lasting(file, self.nbytes, layout) if file is not None else None
        self._memory = found or slab_memory.private(self.nbytes)
        self.survives = self._memory.lasting
        self._file = file if self.survives else None
        octets = self._memory.octets
        self.start = int(octets.ctypes.data)
        self.base = self.start + table
        self.headers: Headers = octets[: slots * HEADER.itemsize].view(HEADER)
        self.blocks = octets[table:].reshape(slots, self.slot_bytes)

    def contents(self) -> Contents:
        """What an earlier life left here. Ask before the first write."""
        return contents(self.headers["hash"], self.headers["fill"])

    def forget(self) -> None:
        """Let no later life find what is here. This one goes on with it."""
        if self._file is not None:
            self._file.unlink(missing_ok=True)

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
        clear(self.headers, slots)

    def stamp(self, blocks: Blocks, checksums: npt.NDArray[np.uint64]) -> None:
        """Let the headers of `blocks.slots` name these blocks, `fill` last."""
        stamp(self.headers, blocks.slots, blocks.hashes, blocks.fills, checksums)

    def read_headers(self, slots: Indices) -> Headers:
        """A copy of the headers of `slots`, as they are now."""
        return self.headers[slots]

    def close(self) -> None:
        """Give the memory back; nothing may point into it any more. A file stays."""
        self.headers = np.zeros(0, HEADER)
        self.blocks = np.zeros((0, self.slot_bytes), np.uint8)
        self._memory.close()


def clear(headers: Headers, numbers: Indices) -> None:
    """Let these headers name nothing."""
    headers["fill"][numbers] = EMPTY_FILL


def stamp(
    headers: Headers,
    numbers: Indices,
    hashes: npt.NDArray[np.uint64],
    fills: Stamps,
    checksums: npt.NDArray[np.uint64],
) -> None:
    """Let these headers, which are clear, name these blocks; `fill` last."""
    assert (fills != EMPTY_FILL).all(), "fill 0 means empty"
    headers["hash"][numbers] = hashes
    headers["checksum"][numbers] = checksums
    headers["fill"][numbers] = fills


def names(headers: Headers, blocks: Blocks) -> Mask:
    """True where a header names exactly the block expected, with the fill stamp expected."""
    same = (headers["hash"] == blocks.hashes).all(axis=1)
    return np.asarray(same & (headers["fill"] == blocks.fills), np.bool_)
