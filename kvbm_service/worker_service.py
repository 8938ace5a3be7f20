"""The worker at work: one rank's copies and reads, off the engine's threads.

Two lanes, each a thread: copies between the device and the own host tier, and reads from other
nodes. A peer that hangs thereby delays nobody's local hit. Within a lane, loads go before
saves: a request waits for a load, nobody waits for a save.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import numpy as np

from kvbm_schemas.codec import encode
from kvbm_schemas.records import RankRecord
from kvbm_schemas.step import (
    Load,
    LoadResult,
    LocalRead,
    RemoteRead,
    Save,
    StepCommands,
    StepResults,
)
from kvbm_schemas.subjects import Scope
from kvbm_service.adapters.affinity import use_every_cpu
from kvbm_service.adapters.mover import Blocks, Fence, Indices, Mask, Mover, RemoteSlab
from kvbm_service.errors import TransferError
from kvbm_service.loop_thread import LoopThread
from kvbm_service.network import Connect
from kvbm_service.presence import join

_log = logging.getLogger(__name__)

PROGRESS_SECONDS = 0.002
"""How often an idle rank lets others' connections to it make progress. Over TCP, UCX aborts a
process that comes back to a queued read after its reader has died, so this is not to be long."""


@dataclass
class _LoadUnderWay:
    """A load whose parts some lanes have not finished."""

    command: Load
    parts_left: int
    failed: list[int] = field(default_factory=list)
    reason: str = ""


class _Job(NamedTuple):
    """Something to do, and whom to tell why it could not be done."""

    run: Callable[[], None]
    failed: Callable[[str], None]
    urgent: bool = True


class _Lane:
    """One thread that works off jobs, urgent ones first. Whatever a job raises, it is told of."""

    def __init__(self, name: str, idle: Callable[[], None] | None = None) -> None:
        self._urgent: deque[_Job] = deque()
        self._other: deque[_Job] = deque()
        self._idle = idle
        self._woken = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def add(self, job: _Job) -> None:
        """Do `job` soon."""
        with self._woken:
            (self._urgent if job.urgent else self._other).append(job)
            self._woken.notify()

    def close(self) -> None:
        """Finish what was begun, forget the rest, end."""
        with self._woken:
            self._closed = True
            self._woken.notify()
        self._thread.join()

    def _run(self) -> None:
        use_every_cpu()
        while (job := self._next()) is not None:
            try:
                job.run()
            except TransferError as error:
                job.failed(str(error))
            except Exception as error:  # noqa: BLE001
                # Tasks are supervised here: a bug of ours costs a recompute, never a hang.
                _log.exception("a job failed")
                job.failed(f"internal error: {error}")

    def _next(self) -> _Job | None:
        """The next job, or None when the lane is closed."""
        while True:
            with self._woken:
                if not (self._urgent or self._other or self._closed):
                    self._woken.wait(PROGRESS_SECONDS if self._idle else None)
                if self._closed:
                    return None
                jobs = self._urgent or self._other
                if jobs:
                    return jobs.popleft()
            if self._idle is not None:
                self._idle()


class WorkerService:
    """One rank's worker. `submit` and `collect` are for the engine's thread, and never wait."""

    def __init__(
        self,
        record: RankRecord,
        mover: Mover,
        scope: Scope | None = None,
        connect: Connect | None = None,
    ) -> None:
        self.record = record
        self._mover = mover
        self._lock = threading.Lock()
        self._saved: list[int] = []
        self._not_saved: list[int] = []
        self._loads: list[LoadResult] = []
        self._copies = _Lane("kvbm-copies")
        self._reads = _Lane("kvbm-reads", idle=mover.progress)
        self._presence: LoopThread | None = None
        if scope is not None and connect is not None:
            self._presence = LoopThread("kvbm-worker", lambda: self._be_present(scope, connect))
            self._presence.start()

    # -- the engine's thread ---------------------------------------------------------------

    def submit(self, commands: StepCommands) -> None:
        """Take over what the leader wants done, after the device work that is queued now."""
        for agent in commands.gone:
            self._reads.add(_Job(partial(self._mover.forget, agent), _log.warning))
        for peer in commands.peers:
            if peer.rank == self.record.rank:
                self._reads.add(_Job(partial(self._meet, peer), _log.warning))
        if not (commands.loads or commands.saves):
            return
        fence = self._mover.mark()
        for command in commands.loads:
            self._begin_load(command, fence)
        for save in commands.saves:
            run = partial(self._save, save, fence)
            self._copies.add(_Job(run, partial(self._save_failed, save), urgent=False))

    def collect(self) -> StepResults | None:
        """What has been finished since the last call, if anything."""
        with self._lock:
            if not (self._saved or self._not_saved or self._loads):
                return None
            results = StepResults(
                rank=self.record.rank,
                saved=tuple(self._saved),
                save_failed=tuple(self._not_saved),
                loads=tuple(self._loads),
            )
            self._saved, self._not_saved, self._loads = [], [], []
        return results

    def close(self) -> None:
        """Leave the directory, end both lanes, let go of the memory."""
        if self._presence is not None:
            self._presence.stop()
        self._reads.close()
        self._copies.close()
        self._mover.close()

    # -- the lanes -------------------------------------------------------------------------

    def _save(self, save: Save, fence: Fence) -> None:
        fence()
        self._mover.save(_columns(save.hashes, None, save.slots, save.blocks, save.op))
        with self._lock:
            self._saved.append(save.op)

    def _save_failed(self, save: Save, reason: str) -> None:
        _log.error("a save failed: %s", reason)
        with self._lock:
            self._not_saved.append(save.op)

    def _begin_load(self, command: Load, fence: Fence) -> None:
        load = _LoadUnderWay(command, parts_left=len(command.remote) + (command.local is not None))
        if command.local is not None:
            self._add_read(self._copies, load, command.local, self._mover.load, fence)
        for part in command.remote:
            agent = part.agents[self.record.rank]
            pull = partial(self._mover.pull, agent, timeout_seconds=part.seconds)
            self._add_read(self._reads, load, part, pull, fence)

    def _add_read(
        self,
        lane: _Lane,
        load: _LoadUnderWay,
        part: LocalRead | RemoteRead,
        read: Callable[[Blocks], Mask],
        fence: Fence,
    ) -> None:
        blocks = _columns(part.hashes, part.fills, part.slots, part.blocks)

        def run() -> None:
            fence()
            arrived = read(blocks)
            self._part_done(load, blocks.device[~arrived], "a slot held something else")

        lane.add(_Job(run, partial(self._part_done, load, blocks.device)))

    def _part_done(self, load: _LoadUnderWay, failed: Indices, reason: str) -> None:
        with self._lock:
            if len(failed):
                load.failed.extend(failed.tolist())
                load.reason = reason
            load.parts_left -= 1
            if load.parts_left:
                return
            self._loads.append(
                LoadResult(
                    op=load.command.op,
                    request=load.command.request,
                    failed_blocks=np.array(load.failed, dtype="<u4").tobytes(),
                    reason=load.reason[:256],
                )
            )
        if load.failed:
            _log.warning(
                "%s: %d block(s) did not arrive and will be recomputed: %s",
                load.command.request, len(load.failed), load.reason,
            )  # fmt: skip

    def _meet(self, peer: RankRecord) -> None:
        slab = peer.slab
        self._mover.connect(
            RemoteSlab(
                agent=peer.agent,
                agent_metadata=peer.agent_metadata,
                base=slab.base,
                headers=slab.headers,
                slots=slab.slots,
                slot_bytes=slab.slot_bytes,
                parts=slab.parts,
            )
        )

    # -- the directory -----------------------------------------------------------------------

    async def _be_present(self, scope: Scope, connect: Connect) -> None:
        """Keep this rank's record in the directory, whenever that can be reached."""
        network = await connect()
        key = ".".join([*scope, self.record.node, str(self.record.rank)])
        try:
            membership, _ = await join(network, key, lambda _: encode(self.record))
            try:
                await asyncio.Event().wait()
            finally:
                await membership.leave()
        finally:
            await network.bus.close()


def _columns(
    hashes: bytes, fills: bytes | None, slots: bytes, blocks: bytes, fill: int = 0
) -> Blocks:
    slot_numbers = np.frombuffer(slots, dtype="<u4")
    if fills is None:
        stamps = np.full(len(slot_numbers), fill, dtype=np.uint64)
    else:
        stamps = np.frombuffer(fills, dtype="<u8")
    return Blocks(
        hashes=np.frombuffer(hashes, dtype=np.uint64).reshape(-1, 2),
        fills=stamps,
        slots=slot_numbers,
        device=np.frombuffer(blocks, dtype="<u4"),
    )
