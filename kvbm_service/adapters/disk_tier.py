"""One rank's disk tier: a file of slots, an index beside it, and verified moves.

    rank-R.blocks    slots of the block's size, padded to what O_DIRECT asks for
    rank-R.index     what each slot holds (disk_index.py)

A block is written in this order: its slot's entry is invalidated, its bytes are written, the
entry is written with a checksum of the bytes, seeded with the block's name. Whatever is read
back must be named by the index and agree with that checksum before anyone sees it: neither a
kill at any moment nor a power failure nor a disk that lies can bring up a wrong byte.

Padding is part of what is summed. It is zero: nothing is ever read into the memory that
blocks are written from.

A call may hang in the kernel, with a lock held that the other one needs, and come back when the
engine has long been told that it failed. So whatever touches the engine's memory does it under
its lane's lock, in which no system call of the disk is made, and asks whether it still may.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kvbm_service.adapters.bounce import Memory
from kvbm_service.adapters.checksums import (
    checksums,
    compile_loops,
    copy_checksums,
    copy_proven,
    seeds,
)
from kvbm_service.adapters.disk import Contents, DiskLost
from kvbm_service.adapters.disk_agent import Operation
from kvbm_service.adapters.disk_file import ALIGNMENT, DiskFile
from kvbm_service.adapters.disk_index import NOTHING, DiskIndex, names
from kvbm_service.adapters.disk_lane import Batch, Lane
from kvbm_service.adapters.host_tier import HostTier
from kvbm_service.adapters.mover import Blocks, Hop, Indices, Mask, Stamps
from kvbm_service.errors import TransferError

_log = logging.getLogger(__name__)

LOG_SECONDS = 10.0

Column = npt.NDArray[np.uint64]

Which = npt.NDArray[np.intp]
"""Positions in the columns of a transfer."""


class DiskTier:
    """`Disk` over NIXL."""

    def __init__(
        self,
        file: DiskFile,
        index: DiskIndex,
        host: HostTier,
        writer: Lane,
        reader: Lane,
        slots: int,
        padded: int,
    ) -> None:
        self.slots = slots
        self._file = file
        self._index = index
        self._host = host
        self._writer = writer
        self._reader = reader
        self._padded = padded
        slab = host.slab
        self._slab = Memory(slab.base, slab.slot_bytes, slab.slots)
        self._lost = ""
        self._logged = -LOG_SECONDS
        self.mismatches = 0
        """Blocks read whose bytes were not those written."""

    @classmethod
    def open(
        cls,
        home: Path,
        rank: int,
        slots: int,
        host: HostTier,
        identity: str,
        *,
        batch_blocks: int = 16,
        batches: int = 4,
        direct: bool = True,
        zerofill_fallback: bool = False,
        backend: str = "POSIX",
    ) -> DiskTier:
        """Find or make the files of `rank` in `home`, which nobody else uses.

        What an earlier life left is kept if it had the same `identity` (whose blocks these
        are, and how their bytes are arranged), as many slots, and blocks as large. A transfer
        goes in batches of `batch_blocks`, `batches` of them at a time.

        Raises:
            LayoutError: no room, no rights, no fallocate, or NIXL's backend does not start.
            TransferError: the buffers cannot be pinned.
        """
        compile_loops()
        slab = host.slab
        padded = -(-slab.slot_bytes // ALIGNMENT) * ALIGNMENT
        aligned = padded == slab.slot_bytes and slab.base % ALIGNMENT == 0
        own = Memory(slab.base, slab.slot_bytes, slab.slots) if aligned else None
        with ExitStack() as undo:
            file = DiskFile(
                home / f"rank-{rank}.blocks", slots * padded,
                zerofill_fallback=zerofill_fallback, direct=direct,
            )  # fmt: skip
            undo.callback(file.close)
            entries = home / f"rank-{rank}.index"
            if not file.kept:
                entries.unlink(missing_ok=True)  # it says what was in another file
            index = DiskIndex(entries, slots, padded, identity)
            undo.callback(index.close)

            def lane(operation: Operation, slab: Memory | None) -> Lane:
                return Lane(
                    operation, file, slots, padded, host,
                    batch_blocks=batch_blocks, batches=batches, backend=backend, slab=slab,
                )  # fmt: skip

            writer = lane("WRITE", own)
            undo.callback(writer.close)
            tier = cls(file, index, host, writer, lane("READ", None), slots, padded)
            undo.pop_all()
        return tier

    @property
    def failures(self) -> int:
        """Blocks that could not be read or written."""
        return self._writer.failures + self._reader.failures

    def contents(self) -> Contents:
        return self._index.contents()

    def forget(self) -> None:
        self._index.forget()

    def under_way(self) -> frozenset[int]:
        return frozenset({self._writer.step, self._reader.step}) - {0}

    def give_up(self, reason: str) -> None:
        with self._writer.touching, self._reader.touching:
            self._lost = self._lost or reason
            self._writer.given_up = self._reader.given_up = reason

    def save(self, blocks: Blocks) -> Mask:
        self._check(blocks.slots, len(blocks.hashes), len(blocks.fills), len(blocks.device))
        self._host.check_device(blocks.device)
        self._host.check_whole(blocks.device)

        def take(batch: Batch, seeds: Column) -> tuple[Column, Mask]:
            with self._may_touch(self._writer):
                self._host.copy_out(blocks.device[batch.some], batch.addresses)
            sums = checksums(batch.addresses, self._padded, seeds)
            return sums, np.ones(len(sums), np.bool_)

        return self._write(blocks.hashes, blocks.fills, blocks.slots, take)

    def spill(self, hop: Hop) -> Mask:
        self._check(hop.target, len(hop.hashes), len(hop.fills), len(hop.source))
        self._host.check_slots(hop.source)
        source = self._slab.addresses(hop.source)

        def take(batch: Batch, seeds: Column) -> tuple[Column, Mask]:
            some = batch.some
            if batch.memory is self._writer.slab:
                sums = checksums(source[some], self._padded, seeds)
            else:
                block = self._slab.stride
                sums = copy_checksums(batch.addresses, source[some], block, self._padded, seeds)
            named = self._host.holds(
                hop.source[some], hop.hashes[some], hop.fills[some], batch.addresses
            )
            return sums, named  # asked after the bytes were summed: these were the ones

        fills = np.full(len(hop.target), hop.fill, np.uint64)
        rows = hop.source if self._writer.slab is not None else None
        return self._write(hop.hashes, fills, hop.target, take, rows)

    def load(self, blocks: Blocks) -> Mask:
        self._check(blocks.slots, len(blocks.hashes), len(blocks.fills), len(blocks.device))
        self._host.check_device(blocks.device)

        def bring(which: Which, found: Column, seeds: Column, expected: Column) -> Mask:
            right = np.asarray(checksums(found, self._padded, seeds) == expected, np.bool_)
            with self._may_touch(self._reader):
                right[right] = self._host.copy_in(found[right], blocks.device[which][right])
            return right

        return self._read(blocks.hashes, blocks.fills, blocks.slots, bring)

    def fetch(self, hop: Hop) -> Mask:
        self._check(hop.source, len(hop.hashes), len(hop.fills), len(hop.target))
        self._host.check_slots(hop.target)
        with self._may_touch(self._reader):
            self._host.slab.clear(hop.target)
        target = self._slab.addresses(hop.target)

        def bring(which: Which, found: Column, seeds: Column, expected: Column) -> Mask:
            block = self._slab.stride
            with self._may_touch(self._reader):
                return copy_proven(target[which], found, block, self._padded, seeds, expected)

        arrived = self._read(hop.hashes, hop.fills, hop.source, bring)
        with self._may_touch(self._reader):
            self._host.stamp(hop.target[arrived], hop.hashes[arrived], hop.fill)
        return arrived

    def close(self) -> None:
        self._writer.close()
        self._reader.close()
        self._index.close()
        self._file.close()

    def _write(
        self,
        hashes: Column,
        fills: Stamps,
        slots: Indices,
        take: Callable[[Batch, Column], tuple[Column, Mask]],
        slab_rows: Indices | None = None,
    ) -> Mask:
        assert (fills != NOTHING).all(), "fill 0 means empty"
        named = seeds(hashes)
        sums = np.zeros(len(slots), np.uint64)
        in_place = np.zeros(len(slots), np.bool_)

        def prepare(batch: Batch) -> None:
            some = batch.some
            self._index.clear(batch.slots)
            sums[some], in_place[some] = take(batch, named[some])

        def settle(batch: Batch, came_through: Mask) -> None:
            some = batch.some
            in_place[some] &= came_through
            (which,) = np.nonzero(in_place[some])
            which += some.start
            self._index.enter(slots[which], hashes[which], fills[which], sums[which])

        with self._or_lost(self._writer):
            self._writer.transfer(slots, prepare, settle, slab_rows)
        return in_place

    def _read(
        self,
        hashes: Column,
        fills: Stamps,
        slots: Indices,
        bring: Callable[[Which, Column, Column, Column], Mask],
    ) -> Mask:
        with self._or_lost(self._reader):
            entries = self._index.look(slots)
        arrived = names(entries, hashes, fills)
        (asked,) = np.nonzero(arrived)
        named, expected = seeds(hashes), np.ascontiguousarray(entries["checksum"])

        def settle(batch: Batch, came_through: Mask) -> None:
            which = asked[batch.some]
            read = which[came_through]
            right = bring(read, batch.addresses[came_through], named[read], expected[read])
            if not right.all():
                self._count_mismatches(int(np.count_nonzero(~right)))
            if len(read) < len(which) or not right.all():
                arrived[which] = False
                arrived[read] = right
                bad = which[~arrived[which]]
                self._index.drop(slots[bad], entries[bad])

        with self._or_lost(self._reader):
            self._reader.transfer(slots[asked], _nothing, settle)
        return arrived

    @contextmanager
    def _may_touch(self, lane: Lane) -> Iterator[None]:
        """For those moments in which a transfer reads or writes the engine's memory."""
        with lane.touching:
            if lane.given_up:
                raise DiskLost(lane.given_up)
            yield

    @contextmanager
    def _or_lost(self, lane: Lane) -> Iterator[None]:
        """A call is under way. From the first `DiskLost` on, raise nothing else."""
        if self._lost:
            raise DiskLost(self._lost)
        lane.begin_step()
        try:
            yield
        except OSError as error:
            self._lost = f"the disk tier's index cannot be written: {error.strerror}"
            raise DiskLost(self._lost) from error
        except DiskLost as error:
            self._lost = str(error)
            raise
        finally:
            lane.step = 0

    def _check(self, slots: Indices, *lengths: int) -> None:
        if any(length != len(slots) for length in lengths):
            raise TransferError("columns of a transfer differ in length")
        if len(slots) and int(slots.max()) >= self.slots:
            raise TransferError(f"a disk slot is not below {self.slots}")

    def _count_mismatches(self, count: int) -> None:
        self.mismatches += count
        if time.monotonic() - self._logged > LOG_SECONDS:
            self._logged = time.monotonic()
            _log.warning(
                "disk tier: %d blocks were not what was written, and are dropped; "
                "%d since the start", count, self.mismatches,
            )  # fmt: skip


def _nothing(batch: Batch) -> None:
    """Nothing to prepare."""
