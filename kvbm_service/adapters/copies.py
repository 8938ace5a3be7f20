"""Copying pieces of memory between the device pool and the slab; this file: CPU to CPU.

A transfer is three columns: where to, where from, how many bytes. One call copies them all
with the GIL released once. That matters more than the copying itself: a loop that gives the
GIL up and asks for it again at every piece waits up to the interpreter's switch interval
(5 ms) each time while the engine computes.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Protocol

import numba
import numpy as np
import numpy.typing as npt

from kvbm_service.adapters.mover import Fence

Column = npt.NDArray[np.uint64]


class Copies(Protocol):
    """Copies pieces between memory that the device can reach. Any thread may call."""

    def mark(self) -> Fence:
        """See `Mover.mark`."""
        ...

    def pin(self, address: int, nbytes: int) -> None:
        """Make host memory fit for fast copies.

        Raises:
            TransferError: refused by the device's driver.
        """
        ...

    def unpin(self, address: int) -> None:
        """Undo `pin`."""
        ...

    def host_buffer(self, nbytes: int) -> npt.NDArray[np.uint8]:
        """Host memory to copy to, for a short while."""
        ...

    def copy(self, to: Column, source: Column, lengths: Column) -> None:
        """Copy every piece; returns when all bytes are in place.

        Raises:
            TransferError: the device failed; the destinations hold anything.
        """
        ...


class CpuCopies:
    """`Copies` for an engine whose KV tensors are in ordinary memory."""

    def __init__(self) -> None:
        self._loop = _compiled_loop()

    def mark(self) -> Fence:
        return _nothing_to_wait_for

    def pin(self, address: int, nbytes: int) -> None:
        """Nothing to do."""

    def unpin(self, address: int) -> None:
        """Nothing to do."""

    def host_buffer(self, nbytes: int) -> npt.NDArray[np.uint8]:
        return np.empty(nbytes, np.uint8)

    def copy(self, to: Column, source: Column, lengths: Column) -> None:
        self._loop(to, source, lengths)


@functools.cache
def _compiled_loop() -> Callable[[Column, Column, Column], None]:
    memcpy = ctypes.CDLL(None).memcpy
    memcpy.argtypes = [ctypes.c_size_t] * 3  # addresses as plain numbers: numba passes those
    memcpy.restype = ctypes.c_size_t

    @numba.njit("void(uint64[::1], uint64[::1], uint64[::1])", nogil=True)  # type: ignore[untyped-decorator]
    def loop(to: Column, source: Column, lengths: Column) -> None:
        for i in range(to.size):
            memcpy(to[i], source[i], lengths[i])

    compiled: Callable[[Column, Column, Column], None] = loop
    return compiled


def _nothing_to_wait_for() -> None:
    """A CPU's work is done when the call that asked for it returns."""
