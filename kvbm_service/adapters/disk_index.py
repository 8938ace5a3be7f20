"""What each slot of the disk tier's file holds: a table in memory, and its copy beside the file.

    page of header | entry | entry | …

An entry is invalidated before its slot is written, and written after. Each carries a check of
itself, mixed with its slot and with who wrote it, so that a torn one, a misplaced one or
another engine's is recognized and never believed.

Entries are not forced to the disk. After a kill nothing is missing: the page cache outlives
us. After a power failure entries and data may be on the disk in any combination; what an
entry says of data that never came, or of data that came too soon, its checksum refutes.

The copy is written with pwrite rather than mapped: a failing disk then answers with an error,
not with SIGBUS.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import hashlib
import logging
import os
import struct
import threading
from collections.abc import Callable
from pathlib import Path

import numba
import numpy as np
import numpy.typing as npt

from kvbm_service.adapters.contents import contents
from kvbm_service.adapters.disk import Contents
from kvbm_service.adapters.disk_file import allocate
from kvbm_service.adapters.mover import Indices, Mask, Stamps
from kvbm_service.errors import LayoutError

_log = logging.getLogger(__name__)

VERSION = 1

ENTRY = np.dtype(
    [("hash", np.uint64, 2), ("fill", np.uint64), ("checksum", np.uint64), ("check", np.uint64)]
)
"""40 bytes. `checksum` is xxh3-64 of the padded slot, seeded with the block's name."""

HEADER_BYTES = 4096

NOTHING = 0
"""The fill of an entry that names nothing."""

Entries = npt.NDArray[np.void]
"""An array of `ENTRY`."""

Column = npt.NDArray[np.uint64]

_MAGIC = b"KVBM-G3\n"
_HEADER = struct.Struct("<8sIIQQ32s")
_MIX = np.uint64(0xD6E8_FEB8_6659_FD93)


class DiskIndex:
    """The table of `slots` entries, in the file at `path`.

    `identity` says whose blocks these are and how their bytes are arranged: what another
    identity wrote is not read. Two threads may call at the same time.

    Raises:
        LayoutError: the file cannot be had.
    """

    def __init__(self, path: Path, slots: int, slot_bytes: int, identity: str) -> None:
        self._slots = slots
        self._path = path
        self._lock = threading.Lock()
        digest = hashlib.sha256(identity.encode()).digest()
        header = _HEADER.pack(_MAGIC, VERSION, ENTRY.itemsize, slots, slot_bytes, digest)
        self._salt = np.frombuffer(hashlib.sha256(header).digest(), np.uint64)[0]
        self._entries: Entries = np.zeros(slots, ENTRY)
        compile_write_loop()
        self._all = np.arange(slots, dtype=np.uint32)
        try:
            self._fd = self._open(path, header.ljust(HEADER_BYTES, b"\0"))
        except OSError as error:
            raise LayoutError(
                f"the disk tier's index {path} cannot be used ({error.strerror}): "
                "set DYN_KVBM_DISK_CACHE_DIR to a directory with room to write"
            ) from error

    def contents(self) -> Contents:
        """The blocks named, oldest fill first; of those named twice, the newest."""
        return contents(self._entries["hash"], self._entries["fill"])

    def look(self, slots: Indices) -> Entries:
        """A copy of the entries of `slots`."""
        with self._lock:
            return self._entries[slots]

    def clear(self, slots: Indices) -> None:
        """Let `slots` name nothing.

        Raises:
            OSError: it could not be written down; the table in memory is right.
        """
        with self._lock:
            slots = slots[self._entries["fill"][slots] != NOTHING]
            self._entries[slots] = np.zeros((), ENTRY)
            self._write(slots)

    def enter(self, slots: Indices, hashes: Column, fills: Stamps, checksums: Column) -> None:
        """Let `slots` name these blocks, whose bytes are written.

        Raises:
            OSError: as `clear`.
        """
        entries = np.zeros(len(slots), ENTRY)
        entries["hash"] = hashes
        entries["fill"] = fills
        entries["checksum"] = checksums
        entries["check"] = self._check(entries, slots)
        with self._lock:
            self._entries[slots] = entries
            self._write(slots)

    def drop(self, slots: Indices, entries: Entries) -> None:
        """Clear those of `slots` that still say what `entries` say."""
        with self._lock:
            stale = slots[self._entries[slots] == entries]
            self._entries[stale] = np.zeros((), ENTRY)
            try:
                self._write(stale)
            except OSError as error:
                _log.warning("disk tier: a dropped block stays in its index: %s", error.strerror)

    def forget(self) -> None:
        """Let no later life find what is in the table. This one goes on with it."""
        self._path.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the file; it stays."""
        os.close(self._fd)

    def _open(self, path: Path, header: bytes) -> int:
        if path.is_file():
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            if self._read(fd, header):
                return fd
            os.close(fd)
            _log.warning(
                "disk tier starts empty: %s was written by another engine, layout or size", path
            )
        return self._make(path, header)

    def _read(self, fd: int, header: bytes) -> bool:
        """Fill the table from the file, if it is ours."""
        if os.pread(fd, HEADER_BYTES, 0) != header:
            return False
        wanted = self._entries.view(np.uint8).data
        at = 0
        while read := os.preadv(fd, [wanted[at:]], HEADER_BYTES + at):
            at += read
        entries = self._entries
        (torn,) = np.nonzero(entries["check"] != self._check(entries, self._all))
        cleared = np.count_nonzero(entries["fill"][torn])
        entries[torn] = np.zeros((), ENTRY)
        if cleared:
            _log.warning("disk tier: %d torn entries of the index are ignored", cleared)
        return True

    def _make(self, path: Path, header: bytes) -> int:
        unfinished = path.with_name(path.name + ".new")
        fd = os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            allocate(fd, HEADER_BYTES + self._entries.nbytes, zerofill_fallback=True)
            os.pwrite(fd, header, 0)
            unfinished.rename(path)
        except OSError:
            os.close(fd)
            unfinished.unlink(missing_ok=True)
            raise
        return fd

    def _write(self, slots: Indices) -> None:
        base = self._entries.ctypes.data
        done = _write_loop()(self._fd, base, ENTRY.itemsize, HEADER_BYTES, slots)
        if done < len(slots):  # write that one again, to learn why
            slot = int(slots[done])
            at = HEADER_BYTES + slot * ENTRY.itemsize
            if os.pwrite(self._fd, self._entries[slot].tobytes(), at) < ENTRY.itemsize:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._write(slots[done + 1 :])

    def _check(self, entries: Entries, slots: Indices) -> Column:
        found: Column = slots.astype(np.uint64) ^ self._salt
        for word in (
            entries["hash"][:, 0], entries["hash"][:, 1], entries["fill"], entries["checksum"]
        ):  # fmt: skip
            found ^= word
            found *= _MIX
            found ^= found >> np.uint64(32)
        return found


def compile_write_loop() -> None:
    """Compile what writing needs: takes a moment, which no first request should."""
    _write_loop()


def names(entries: Entries, hashes: Column, fills: Stamps) -> Mask:
    """True where an entry names exactly the block expected, with the fill stamp expected."""
    same = (entries["hash"] == hashes).all(axis=1)
    return np.asarray(same & (entries["fill"] == fills), np.bool_)


@functools.cache
def _write_loop() -> Callable[[int, int, int, int, Indices], int]:
    """Writes entries; says how many were written before one failed. Releases the GIL once."""
    pwrite = ctypes.CDLL(None).pwrite
    pwrite.argtypes = [ctypes.c_int, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int64]
    pwrite.restype = ctypes.c_int64

    @numba.njit("int64(int32, uint64, uint64, int64, uint32[::1])", nogil=True)  # type: ignore[untyped-decorator]
    def loop(fd: int, base: int, length: int, first: int, slots: Indices) -> int:
        for i in range(slots.size):
            at = slots[i] * length
            if pwrite(fd, base + at, length, first + at) != length:
                return i
        return slots.size

    compiled: Callable[[int, int, int, int, Indices], int] = loop
    return compiled
