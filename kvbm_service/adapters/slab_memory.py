"""Memory for a slab: private to this process, or a file in memory that outlives it.

Huge pages matter: NIXL reads a slab from another process through the kernel, page by page.
Private memory gets them when it is asked for (MADV_HUGEPAGE). Files in memory mostly do not,
unless the host's administrator says so; but their pages can be joined afterwards
(MADV_COLLAPSE, since Linux 6.1), which no setting but `deny` forbids.

A file in memory carries a mark in front: what it is laid out for, and which process uses it.
A later process maps it as it is only if the mark fits, and only when that process is done
with it or has ended completely. A lock is not enough for that: the kernel may free it before it has
stopped what the process's devices are still writing.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import logging
import mmap
import os
import select
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kvbm_service.adapters.homes import make_room, root_of, turn
from kvbm_service.errors import LayoutError

TMPFS_MAGIC = 0x01021994
"""What statfs says of a file system in memory. On any other, a crash of the machine tears."""

EXIT_SECONDS = 5.0
"""How long to wait for the end of the process that had the file before us."""

COLLAPSE_TRIES = 3
"""The kernel answers "try again" while it still finds pages in use."""

_MARK = np.dtype([("layout", np.uint8, 32), ("pid", np.uint64), ("started", np.uint64)])
_FRONT = mmap.PAGESIZE
"""Bytes that the mark takes, so that what follows is aligned."""

_NOBODY = 0

_VERSION = b"kvbm slab 1\n"
_HUGE_PAGE_SIZE = Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size")
_MAP_FIXED, _MAP_NORESERVE = 0x10, 0x4000
_MADV_POPULATE_WRITE = 23
_MADV_COLLAPSE = 25

Octets = npt.NDArray[np.uint8]

log = logging.getLogger(__name__)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_size_t, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]


class Memory:
    """`octets` lie in `mapping`, from a page boundary on. `mark` is in front of what lasts.

    `found` says that it holds what an earlier process left; else it is zeros.
    """

    def __init__(
        self,
        mapping: mmap.mmap,
        octets: Octets,
        mark: npt.NDArray[np.void] | None = None,
        *,
        found: bool = False,
    ) -> None:
        self._mapping = mapping
        self.octets = octets
        self._mark = mark
        self.lasting = mark is not None
        self.found = found

    def close(self) -> None:
        """Give it back; a file stays. If someone holds a view, it goes along with that."""
        if self._mark is not None:
            self._mark["pid"] = _NOBODY
        self._mark = None
        self.octets = np.zeros(0, np.uint8)
        with contextlib.suppress(BufferError):
            self._mapping.close()


def private(nbytes: int) -> Memory:
    """Zeros that end with this process. Every page is there.

    Raises:
        LayoutError: the machine has not that much memory.
    """
    available = _available_bytes()
    if nbytes > available:
        raise LayoutError(
            f"a host tier of {nbytes} bytes does not fit into the {available} bytes of memory "
            "that are available: set DYN_KVBM_CPU_CACHE_GB lower"
        )
    try:
        mapping = in_huge_pages(nbytes)
    except OSError as error:
        raise LayoutError(
            f"no memory for a host tier of {nbytes} bytes ({error.strerror}): "
            "set DYN_KVBM_CPU_CACHE_GB lower"
        ) from error
    octets = np.frombuffer(mapping, np.uint8)
    ctypes.memset(octets.ctypes.data, 0, nbytes)
    return Memory(mapping, octets)


def in_huge_pages(nbytes: int) -> mmap.mmap:
    """Private memory that forked children do not get, in huge pages where there are any."""
    mapping = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    _advise(mapping)
    return mapping


def lasting(file: Path, nbytes: int, layout: str) -> Memory | None:
    """The memory in `file`, which is in a home of ours; made anew unless it is laid out so.

    None, and one warning, if there cannot be such a file.
    """
    try:
        return _lasting(file, nbytes, hashlib.sha256(_VERSION + layout.encode()).digest())
    except _Impossible as reason:
        why = str(reason)
    except OSError as error:
        with contextlib.suppress(OSError):
            file.unlink()
        why = f"{file}: {error.strerror}"
    log.warning("the host tier will not survive restarts: %s", why)
    return None


class _Impossible(Exception):
    """There can be no lasting memory; the message says why, and what would help."""


def _lasting(file: Path, nbytes: int, layout: bytes) -> Memory:
    if not _in_memory(file.parent):
        raise _Impossible(
            f"{file.parent} is not on a file system in memory (tmpfs): "
            "set KVBM_HOST_CACHE_DIR to a directory on one"
        )
    fd = _left(file, nbytes, layout)
    found = fd is not None
    if fd is None:
        with turn(file.parent):
            fd = _new(file, nbytes)
    try:
        mapping, octets = _map(fd, _FRONT + nbytes)
    finally:
        os.close(fd)
    mark = octets[: _MARK.itemsize].view(_MARK)
    mark["pid"], mark["started"] = os.getpid(), _started(os.getpid())
    mark["layout"] = np.frombuffer(layout, np.uint8)
    return Memory(mapping, octets[_FRONT:], mark, found=found)


def _left(file: Path, nbytes: int, layout: bytes) -> int | None:
    """What an earlier process left, opened, if it fits and nothing writes to it any more."""
    try:
        fd = os.open(file, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    front = os.pread(fd, _MARK.itemsize, 0)
    if len(front) == _MARK.itemsize and os.fstat(fd).st_size == _FRONT + nbytes:
        mark = np.frombuffer(front, _MARK)[0]
        if mark["layout"].tobytes() == layout and _ended(int(mark["pid"]), int(mark["started"])):
            return fd
    os.close(fd)
    return None


def _new(file: Path, nbytes: int) -> int:
    """A file of zeros, with nothing of what may have been there before: not even its pages."""
    file.unlink(missing_ok=True)
    size = _FRONT + nbytes

    def enough() -> bool:
        return size <= min(_free_bytes(file.parent), _available_bytes())

    if not make_room(root_of(file.parent), enough):
        raise _Impossible(
            f"{file.parent} has room for {_free_bytes(file.parent)} of {size} bytes: give it more "
            "(for containers --shm-size, or a volume in memory), set KVBM_HOST_CACHE_DIR to "
            "another directory in memory, or set DYN_KVBM_CPU_CACHE_GB lower"
        )
    fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(fd, 0, size)  # else a full file system would kill us later, by SIGBUS
    except OSError:
        os.close(fd)
        raise
    return fd


def _map(fd: int, size: int) -> tuple[mmap.mmap, Octets]:
    """The whole file, from the boundary of a huge page on, in huge pages as far as possible."""
    huge = _huge_page_bytes()
    mapping = mmap.mmap(
        -1, size + huge, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    )
    everything = np.frombuffer(mapping, np.uint8)
    start = -(-everything.ctypes.data // huge) * huge
    protection, flags = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | _MAP_FIXED
    if _libc.mmap(start, size, protection, flags, fd, 0) != start:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    _advise(mapping)
    offset = start - everything.ctypes.data
    for _ in range(COLLAPSE_TRIES):
        with contextlib.suppress(OSError):  # an older kernel, or no huge pages are to be had
            mapping.madvise(_MADV_COLLAPSE, offset, size)
            break
    with contextlib.suppress(OSError):
        mapping.madvise(_MADV_POPULATE_WRITE, offset, size)
    return mapping, everything[offset : offset + size]


def _advise(mapping: mmap.mmap) -> None:
    for advice in (mmap.MADV_HUGEPAGE, mmap.MADV_DONTFORK):
        with contextlib.suppress(OSError):  # a kernel built without it
            mapping.madvise(advice)


def _ended(pid: int, started: int) -> bool:
    """Whether this process is gone with all its threads and files; waits a little for it.

    A process that we cannot see (it ran in another container) counts as gone.
    """
    if pid in (_NOBODY, os.getpid()):
        return True
    try:
        process = os.pidfd_open(pid)
    except OSError as error:
        return error.errno in (errno.ESRCH, errno.EINVAL)  # EINVAL: now a thread has this number
    try:
        if _started(pid) != started:
            return True
        poll = select.poll()
        poll.register(process, select.POLLIN)
        return bool(poll.poll(EXIT_SECONDS * 1000))
    finally:
        os.close(process)


def _started(pid: int) -> int:
    """When the process started, in ticks since the machine did; 0 if there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    return int(stat.rpartition(")")[2].split()[19])


def _in_memory(directory: Path) -> bool:
    answer = ctypes.create_string_buffer(256)
    if _libc.statfs(os.fsencode(directory), answer):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return ctypes.c_long.from_buffer(answer).value == TMPFS_MAGIC


def _free_bytes(directory: Path) -> int:
    found = os.statvfs(directory)
    return found.f_bavail * found.f_frsize


def _available_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise LayoutError("/proc/meminfo does not say how much memory is available")


def _huge_page_bytes() -> int:
    try:
        return int(_HUGE_PAGE_SIZE.read_text())
    except OSError:
        return 2 << 20
