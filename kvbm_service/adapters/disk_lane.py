"""One direction of traffic between memory and the disk tier's file.

Blocks go in batches, several of them in flight; while they are, the neighbours' bytes are
copied and summed. Each lane has an agent of its own, so that a read never queues behind writes.

The memory of a batch is a part of the lane's own bounce buffer. A slot of the slab is only
ever written from (`slab`), never read into: a read that the kernel still has when this
process is killed must not land in memory that a next life of the engine uses.

When a transfer fails, its agent is destroyed before its memory is used again; where that does
not prove the transfer quiet (disk_agent.py), the memory is given up along with it. A transfer
that does not end at all is waited for until somebody gives the disk up (disk_watch.py), and left
as it is: destroying its agent would hang just as long.

NIXL does not say why a transfer failed. Each of its blocks is then tried once more with a plain
read or write: that tells the reason, and spares the blocks that are fine.
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import numpy.typing as npt

from kvbm_service.adapters.bounce import Bounce, Memory
from kvbm_service.adapters.disk import DiskLost
from kvbm_service.adapters.disk_agent import DiskAgent, FileTransfer, Operation
from kvbm_service.adapters.disk_file import DiskFile
from kvbm_service.adapters.host_tier import HostTier
from kvbm_service.adapters.mover import Indices, Mask
from kvbm_service.errors import LayoutError

_log = logging.getLogger(__name__)

BOUNCE_BYTES = 256 << 20
"""A lane's buffer is not larger, unless two blocks are."""

BATCH_BYTES = 8 << 20
"""A batch is not larger, unless one block is."""

LEAST_BATCH_BYTES = 1 << 20
"""A transfer is not split into batches smaller than this."""

POLL_SECONDS = 0.000_02

FAILED_BATCHES = 3
"""So many in a row without one block in place, and the disk is given up."""

MAX_GIVEN_UP = 4
"""Bounce buffers given up to transfers that may still be writing; then the disk is, too."""

LOG_SECONDS = 10.0

FATAL = frozenset(
    {errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENODEV, errno.ENXIO, errno.EBADF,
     errno.ESTALE, errno.EFBIG}
)  # fmt: skip
"""Errors that the next block will meet as well."""

_given_up: list[object] = []
"""Agents and memory that something may still use: kept until the process ends."""

_steps = itertools.count(1)


class Batch:
    """Blocks that go together: disk slots, and the rows of `memory` for them."""

    def __init__(self, some: slice, memory: Memory, rows: Indices, slots: Indices) -> None:
        self.some = some
        """Which of the blocks of the whole transfer."""
        self.memory = memory
        self.rows = rows
        self.slots = slots
        self.transfer: FileTransfer | None = None
        """NIXL's, from the start on."""

    @property
    def failed(self) -> bool:
        return self.transfer is not None and self.transfer.state == "ERR"

    @property
    def loose(self) -> bool:
        """Failed, and may still be going on."""
        return self.failed and self.transfer is not None and self.transfer.handle is not None

    @property
    def addresses(self) -> npt.NDArray[np.uint64]:
        return self.memory.addresses(self.rows)


class Lane:
    """Reads from `file`, or writes to it, blocks of `row_bytes` in `slots` slots.

    Raises:
        LayoutError: NIXL's backend does not start.
    """

    def __init__(
        self,
        operation: Operation,
        file: DiskFile,
        slots: int,
        row_bytes: int,
        tier: HostTier,
        *,
        batch_blocks: int,
        batches: int,
        backend: str,
        slab: Memory | None = None,
    ) -> None:
        self._operation = operation
        self._file = file
        self._slots = slots
        self._row_bytes = row_bytes
        self._tier = tier
        rows = max(2, BOUNCE_BYTES // row_bytes)
        self._at_a_time = min(batches, rows // 2)
        self._parts = 2 * self._at_a_time
        """Disks may answer all at once: as many again are prepared, or wait to be looked at."""
        self._part_rows = max(1, min(batch_blocks, BATCH_BYTES // row_bytes, rows // self._parts))
        self._backend = backend
        self.slab = slab
        """Where blocks may also be written from."""
        self._failed_in_a_row = 0
        self._buffers_given_up = 0
        self._reason = ""
        self._logged = -LOG_SECONDS
        self.failures = 0
        """Blocks that could not be read or written."""
        self.step = 0
        """Another number after each step of a transfer; 0 while there is none."""
        self.touching = threading.Lock()
        """Held by whoever reads or writes the engine's memory for a transfer."""
        self.given_up = ""
        """Why nobody may touch the engine's memory any more, or wait for a transfer."""
        self._bounce = self._new_bounce()
        self._agent: DiskAgent | None = self._connect()
        """None when the disk has been given up."""

    def transfer(
        self,
        slots: Indices,
        prepare: Callable[[Batch], None],
        settle: Callable[[Batch, Mask], None],
        slab_rows: Indices | None = None,
    ) -> None:
        """Move the blocks of `slots`, batch by batch.

        `prepare` is called before a batch starts, `settle` when it has ended, with the mask of
        its blocks that came through. With `slab_rows` their memory is the slab's.

        Raises:
            DiskLost: the disk is to be given up.
        """
        batches = self._batches(slots, slab_rows)
        ready: deque[Batch] = deque()
        under_way: deque[Batch] = deque()
        ended: deque[Batch] = deque()
        coming = next(batches, None)
        try:
            while coming or ready or under_way or ended:
                self._advance(ready, under_way, ended)
                room = len(ready) + len(under_way) + len(ended) < self._parts
                if coming and room and not (ready and ended):
                    prepare(coming)
                    ready.append(coming)
                    coming = next(batches, None)
                    self.begin_step()
                elif ended:
                    settle(ended[0], self._outcome(ended[0]))
                    ended.popleft()
                    self.begin_step()
                else:
                    self._pause()
        finally:
            try:
                if self._agent is not None:  # on the way out with an error: leave our memory alone
                    self._quiet(under_way)
            finally:
                if self._agent is None:  # the disk does not answer
                    self._give_up(under_way)

    def begin_step(self) -> None:
        """Whatever comes next is not what was before, for whoever looks whether we get on."""
        self.step = next(_steps)

    def close(self) -> None:
        """Let go of NIXL and of the memory, unless the disk may still be at it."""
        if self._agent is not None:
            self._agent.destroy()
            self._tier.unpin(self._bounce.memory.address)

    def _batches(self, slots: Indices, slab_rows: Indices | None) -> Iterator[Batch]:
        least = max(1, LEAST_BATCH_BYTES // self._row_bytes)
        at = 0
        for part in itertools.cycle(range(self._parts)):
            left = len(slots) - at
            if not left:
                return
            share = max(least, -(-left // self._at_a_time))
            some = slice(at, at + min(left, self._part_rows, share))
            at = some.stop
            if slab_rows is not None:
                assert self.slab is not None
                yield Batch(some, self.slab, slab_rows[some], slots[some])
            else:
                first = part * self._part_rows
                rows = np.arange(first, first + some.stop - some.start, dtype=np.uint32)
                yield Batch(some, self._bounce.memory, rows, slots[some])

    # -- one batch -----------------------------------------------------------------------------

    def _advance(self, ready: deque[Batch], under_way: deque[Batch], ended: deque[Batch]) -> None:
        """Take note of what has ended, and keep the disk busy: before any other work."""
        while under_way and self._has_ended(under_way[0]):
            if under_way[0].loose:
                self._quiet(under_way)
            ended.append(under_way.popleft())
            self.begin_step()
        while ready and len(under_way) < self._at_a_time:
            self._start(ready[0])
            under_way.append(ready.popleft())

    def _start(self, batch: Batch) -> None:
        assert self._agent is not None
        if self._operation == "READ":
            batch.memory = self._bounce.memory  # it may have been replaced
        batch.transfer = self._agent.start(self._operation, batch.memory, batch.rows, batch.slots)

    def _has_ended(self, batch: Batch) -> bool:
        assert self._agent is not None
        assert batch.transfer is not None
        return self._agent.poll(batch.transfer) != "PROC"

    def _pause(self) -> None:
        """Nothing can be done before a transfer ends.

        Raises:
            DiskLost: nobody waits for it any more.
        """
        if self.given_up:
            self._give_up(self._agent)
            self._agent = None
            raise DiskLost(self.given_up)
        time.sleep(POLL_SECONDS)

    def _outcome(self, batch: Batch) -> Mask:
        """Which blocks of an ended batch came through."""
        if batch.failed:
            return self._by_hand(batch)
        self._failed_in_a_row = 0
        return np.ones(len(batch.slots), np.bool_)

    def _quiet(self, under_way: Iterable[Batch]) -> None:
        """Let all batches end; of those that failed, make sure that nothing more happens.

        Raises:
            DiskLost: one does not end.
        """
        for batch in under_way:
            while not self._has_ended(batch):
                self._pause()
        loose = [batch for batch in under_way if batch.loose]
        if loose and self._agent is not None:
            agent, self._agent = self._agent, None
            agent.destroy([batch.transfer for batch in loose if batch.transfer])
            if not agent.quiet_when_destroyed and self._operation == "READ":
                self._replace_bounce(loose)  # a stray write does no harm: its sum is wrong
            try:
                self._agent = self._connect()
            except LayoutError as error:
                raise DiskLost(str(error)) from error

    def _by_hand(self, batch: Batch) -> Mask:
        """Try each block of a failed batch once more, to learn why it fails.

        Raises:
            DiskLost: it is not this block, it is the disk.
        """
        came_through = np.zeros(len(batch.slots), np.bool_)
        for at, (address, slot) in enumerate(
            zip(batch.addresses.tolist(), batch.slots.tolist(), strict=True)
        ):
            try:
                self._one(address, slot * self._row_bytes)
                came_through[at] = True
            except OSError as error:
                self.failures += 1
                self._explain(error, slot)
        self._failed_in_a_row = 0 if came_through.any() else self._failed_in_a_row + 1
        if self._failed_in_a_row == FAILED_BATCHES:
            raise DiskLost(f"the disk failed {FAILED_BATCHES} times in a row: {self._reason}")
        return came_through

    def _one(self, address: int, offset: int) -> None:
        memory = memoryview((ctypes.c_char * self._row_bytes).from_address(address))
        if self._operation == "READ":
            moved = os.preadv(self._file.fd, [memory], offset)
        else:
            moved = os.pwrite(self._file.fd, memory, offset)
        if moved < self._row_bytes:
            raise OSError(errno.EIO, f"only {moved} of {self._row_bytes} bytes went through")

    def _explain(self, error: OSError, slot: int) -> None:
        self._reason = f"{error.strerror} ({self._operation.lower()} of slot {slot})"
        if error.errno in FATAL:
            raise DiskLost(f"the disk fails: {self._reason}")
        if time.monotonic() - self._logged > LOG_SECONDS:
            self._logged = time.monotonic()
            _log.warning("disk tier: %s; %d blocks so far", self._reason, self.failures)

    # -- agents and memory ---------------------------------------------------------------------

    def _connect(self) -> DiskAgent:
        memories = [self._bounce.memory, *([self.slab] if self.slab else [])]
        in_flight = self._parts * self._part_rows
        return DiskAgent(
            self._backend, self._file, self._slots, self._row_bytes, memories, in_flight
        )

    def _new_bounce(self) -> Bounce:
        bounce = Bounce(self._parts * self._part_rows, self._row_bytes)
        self._tier.pin(bounce.memory.address, bounce.nbytes)
        return bounce

    def _replace_bounce(self, loose: list[Batch]) -> None:
        """Leave the buffer to transfers that may still be at it."""
        self._give_up()
        self._buffers_given_up += 1
        if self._buffers_given_up > MAX_GIVEN_UP:
            raise DiskLost(f"the disk failed {MAX_GIVEN_UP} times: {self._reason}")
        self._bounce = self._new_bounce()
        for batch in loose:
            batch.memory = self._bounce.memory

    def _give_up(self, *kept: object) -> None:
        _given_up.append((self._bounce, *kept))
