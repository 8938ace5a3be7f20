"""The disk tier's data file: really allocated, and opened past the page cache where it can be.

It is made under another name and renamed when all of it is there, so a file that bears its
name is whole, also after kill -9 in the middle.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import mmap
import os
import time
from collections.abc import Callable
from pathlib import Path

from kvbm_service.adapters.homes import make_room, root_of, turn
from kvbm_service.errors import LayoutError

_log = logging.getLogger(__name__)

ALIGNMENT = 4096
"""Bytes: what O_DIRECT may ask of memory, offsets and lengths."""

STEP_BYTES = 1 << 30
"""Allocated at a time, between two looks at the clock."""

ZEROS_BYTES = 16 << 20
"""Written at a time where zeros have to be."""

PROGRESS_SECONDS = 3.0

_UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS)


class DiskFile:
    """The file at `path`, `nbytes` long, open for reading and writing.

    One of the right size is kept (`kept`), any other one is replaced. `direct` tells whether
    the page cache is passed by.

    Raises:
        LayoutError: there is no room for it, or it cannot be had here.
    """

    def __init__(
        self, path: Path, nbytes: int, *, zerofill_fallback: bool = False, direct: bool = True
    ) -> None:
        assert nbytes % ALIGNMENT == 0
        self.nbytes = nbytes
        try:
            self.kept = path.is_file() and path.stat().st_size == nbytes
            if not self.kept:
                path.unlink(missing_ok=True)
                _make(path, nbytes, zerofill_fallback)
            self.fd, self.direct = _open(path, direct)
        except OSError as error:
            raise LayoutError(
                f"the disk tier's file {path} cannot be used ({error.strerror}): "
                "set DYN_KVBM_DISK_CACHE_DIR to a directory where files can be written"
            ) from error

    def close(self) -> None:
        os.close(self.fd)


def allocate(fd: int, nbytes: int, *, zerofill_fallback: bool) -> None:
    """Reserve the first `nbytes` of a new file.

    Raises:
        OSError: ENOSPC among others; EOPNOTSUPP if only zeros would do and are not allowed.
    """
    try:
        _in_steps(nbytes, STEP_BYTES, lambda at, length: _fallocate(fd, at, length))
    except OSError as error:
        if error.errno not in _UNSUPPORTED or not zerofill_fallback:
            raise
        _log.warning("no fallocate here: the disk tier's file is filled with zeros instead")
        _write_zeros(fd, nbytes)


def _make(path: Path, nbytes: int, zerofill_fallback: bool) -> None:
    with turn(path.parent):
        _make_in_turn(path, nbytes, zerofill_fallback)


def _make_in_turn(path: Path, nbytes: int, zerofill_fallback: bool) -> None:
    unfinished = path.with_name(path.name + ".new")
    unfinished.unlink(missing_ok=True)
    _check_room(path.parent, nbytes)
    fd = os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        allocate(fd, nbytes, zerofill_fallback=zerofill_fallback)
        unfinished.rename(path)
    except OSError as error:
        raise _no_room(path.parent, nbytes, error) from error
    finally:
        os.close(fd)
        unfinished.unlink(missing_ok=True)


def _check_room(directory: Path, nbytes: int) -> None:
    """See that there is room; homes that nobody lives in, of other models say, make some."""

    def free() -> int:
        found = os.statvfs(directory)
        if not found.f_blocks:
            return nbytes  # a file system that cannot say
        return found.f_bavail * found.f_frsize

    found = os.statvfs(directory)
    hopeless = 0 < found.f_blocks * found.f_frsize < nbytes
    if hopeless or not make_room(root_of(directory), lambda: free() >= nbytes):
        raise LayoutError(
            f"a disk tier of {nbytes} bytes per rank does not fit into the {free()} bytes that "
            f"are free in {directory}: set DYN_KVBM_DISK_CACHE_GB lower, "
            "or DYN_KVBM_DISK_CACHE_DIR to another disk"
        )


def _no_room(directory: Path, nbytes: int, error: OSError) -> LayoutError:
    if error.errno in _UNSUPPORTED:
        return LayoutError(
            f"the file system of {directory} cannot reserve space (no fallocate): "
            "set DYN_KVBM_DISK_ZEROFILL_FALLBACK=true to have zeros written instead"
        )
    return LayoutError(
        f"no room for a disk tier of {nbytes} bytes per rank in {directory} ({error.strerror}): "
        "set DYN_KVBM_DISK_CACHE_GB lower, or DYN_KVBM_DISK_CACHE_DIR to another disk"
    )


def _open(path: Path, direct: bool) -> tuple[int, bool]:
    """A descriptor, and whether it passes the page cache by."""
    flags = os.O_RDWR | os.O_CLOEXEC
    if not direct:
        _log.info("disk tier: through the page cache, as configured")
        return os.open(path, flags), False
    try:
        fd = os.open(path, flags | os.O_DIRECT)
        try:
            with mmap.mmap(-1, ALIGNMENT) as probe:  # some refuse only now
                os.preadv(fd, [probe], 0)
                os.pwrite(fd, probe, 0)
        except OSError:
            os.close(fd)
            raise
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        _log.warning("no O_DIRECT in %s: the disk tier goes through the page cache", path.parent)
        return os.open(path, flags), False
    return fd, True


def _write_zeros(fd: int, nbytes: int) -> None:
    with mmap.mmap(-1, ZEROS_BYTES) as zeros, memoryview(zeros) as view:

        def write(at: int, length: int) -> None:
            done = 0
            while done < length:
                done += os.pwrite(fd, view[done:length], at + done)

        _in_steps(nbytes, ZEROS_BYTES, write)
    os.fsync(fd)  # writing back must not hit the first seconds of serving


def _in_steps(nbytes: int, step: int, act: Callable[[int, int], None]) -> None:
    """Call `act(offset, length)` until `nbytes` are through; log how far it is now and then."""
    said = time.monotonic()
    for at in range(0, nbytes, step):
        act(at, min(step, nbytes - at))
        if time.monotonic() - said > PROGRESS_SECONDS:
            said = time.monotonic()
            _log.info(
                "disk tier: %.1f of %.1f GB allocated", min(at + step, nbytes) / 1e9, nbytes / 1e9
            )


def _fallocate(fd: int, at: int, length: int) -> None:
    """The system call: glibc's posix_fallocate would write zeros where it is missing."""
    while _libc.fallocate(fd, 0, at, length) != 0:
        error = ctypes.get_errno()
        if error != errno.EINTR:
            raise OSError(error, os.strerror(error))


_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
