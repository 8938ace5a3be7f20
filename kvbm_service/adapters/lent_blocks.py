"""Which device blocks other nodes may read: a table of headers beside the device pool.

The engine, and not we, writes to the device pool, so a slab's rule (clear, write, stamp) becomes
the leader's: a block is lent when the forward pass that fills it is done, and nothing writes to it
until every rank has taken it back. A reader reads bytes, then the header, and believes the bytes
if the header shows the name and the op of the lend that it was told of (docs/adr/0013).

Why no reader believes half a header. An op is used once in a node's life, and a lend gives a
block one name. So the fill stamp alone proves the read: it is one aligned word, which is read as
it was written, and that it shows op X means that the block had been lent under X, and was not
taken back, when the word was read. That was after the bytes. The name is written before the fill
and after the fill has been cleared; if a reader gets it from another moment, it is another
name, and he refuses what he might have believed.

A command that comes twice, or late, must not undo what came after it: for each block the
greatest op so far is kept, and what is older is refused.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvbm_service.adapters import slab_memory
from kvbm_service.adapters.mover import HEADER, HEADER_PAGE, Blocks, Indices, Stamps
from kvbm_service.adapters.slab import Headers, clear, stamp
from kvbm_service.errors import TransferError


class LentBlocks:
    """The headers of `blocks` device blocks. One thread lends and takes back; any may read.

    Raises:
        LayoutError: the machine has no memory for them.
    """

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self.nbytes = -(-blocks // HEADER_PAGE) * HEADER_PAGE * HEADER.itemsize
        self._memory = slab_memory.private(self.nbytes)
        octets = self._memory.octets
        self.start = int(octets.ctypes.data)
        self._headers: Headers = octets[: blocks * HEADER.itemsize].view(HEADER)
        self._latest: Stamps = np.zeros(blocks, np.uint64)

    def lend(self, blocks: Blocks, checksums: npt.NDArray[np.uint64]) -> None:
        """Let the headers of `blocks.device` name these blocks.

        Raises:
            TransferError: a later command for one of them has come before. Nothing was lent.
        """
        if (self._latest[blocks.device] > blocks.fills).any():
            raise TransferError("a later command for a block that was to be lent came before")
        self._latest[blocks.device] = blocks.fills
        clear(self._headers, blocks.device)
        stamp(self._headers, blocks.device, blocks.hashes, blocks.fills, checksums)

    def take_back(self, device: Indices, op: int) -> None:
        """Let the headers of `device` name nothing, except where they were lent after `op`."""
        older = device[self._latest[device] <= op]
        self._latest[older] = op
        clear(self._headers, older)

    def take_back_all(self, op: int) -> None:
        """The same for every block."""
        self.take_back(np.arange(self.blocks, dtype=np.uint32), op)

    def read_headers(self, device: Indices) -> Headers:
        """A copy of the headers of these blocks, as they are now."""
        return self._headers[device]

    def close(self) -> None:
        """Give the memory back; nothing may point into it any more."""
        self._headers = np.zeros(0, HEADER)
        self._memory.close()
