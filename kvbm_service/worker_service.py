"""The worker at work: one rank's copies, reads and writes, off the engine's threads.

Five lanes, each a thread: copies between the device and the host tier, lending, reads from others,
reads from the disk, writes to it. A peer that hangs or a slow disk thereby delays nobody's local
hit. Within a lane, loads go first: a request waits for a load, nobody waits for the rest.
A disk that does not answer at all is given up, and its lanes with it (disk_watch.py).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kvbm_schemas.block import Tier
from kvbm_schemas.records import RankRecord
from kvbm_schemas.step import (
    Fetch,
    Lend,
    Load,
    LoadResult,
    LocalRead,
    Moved,
    RemoteFetch,
    RemoteRead,
    Save,
    Spill,
    StepCommands,
    StepResults,
    Survivors,
    Unlend,
)
from kvbm_schemas.subjects import Scope
from kvbm_service.adapters.disk import Disk, DiskLost
from kvbm_service.adapters.mover import (
    NO_BLOCK,
    Blocks,
    DevicePool,
    Fence,
    Hop,
    Indices,
    Mask,
    Mover,
    RemoteSlab,
)
from kvbm_service.disk_watch import DiskWatch
from kvbm_service.errors import TransferError
from kvbm_service.lanes import Job, Lane, Tell
from kvbm_service.loop_thread import LoopThread
from kvbm_service.meant import Meant
from kvbm_service.network import Connect
from kvbm_service.once import Once
from kvbm_service.worker_bus import WorkerBus

_log = logging.getLogger(__name__)

NO_DISK = "this rank has no disk tier"

SERVING_SECONDS = 0.002
"""How often others' connections to us make progress while somebody may read. Over TCP, UCX aborts
a process that comes back to a queued read after its reader has died: this is not to be long."""

RESTING_SECONDS = 0.02
"""The same while nobody has a lease. Each time takes a processor from an engine on CPUs, whose
threads wait for each other."""


class RankId(NamedTuple):
    """Which rank of which engine this is."""

    scope: Scope
    node: str
    number: int
    world_size: int
    instance: str
    """The engine's present life, as its leader names it."""
    weights: str = ""
    """A digest of the model's files: an engine with others must not believe what it finds."""


@dataclass
class _LoadUnderWay:
    """A load whose parts some lanes have not finished."""

    command: Load
    parts_left: int
    failed: list[int] = field(default_factory=list)
    reason: str = ""
    seconds: dict[str, float] = field(default_factory=dict)


class WorkerService:
    """One rank's worker. `submit` and `collect` are for the engine's thread, and never wait.

    `survivors` is what the tiers held when they were opened; `forget` is called when no later
    life may find what they hold (forgetting.py).
    """

    def __init__(
        self,
        record: RankRecord,
        mover: Mover,
        disk: Disk | None = None,
        survivors: Sequence[Survivors] = (),
        forget: Callable[[], None] = lambda: None,
        scope: Scope | None = None,
        connect: Connect | None = None,
        close: Callable[[], None] = lambda: None,
    ) -> None:
        self.record = record
        self.survivors = tuple(survivors)
        self._mover = mover
        self._disk = disk
        self._forget = forget
        self._close = close
        self._lock = threading.Lock()
        self._moved: list[Moved] = []
        self._loads: list[LoadResult] = []
        self._disk_lost = ""
        self._said_disk_lost = False
        self._once = Once()
        self._unmet: dict[str, RankRecord] = {}
        """Ranks of other nodes that nothing was read from yet, by agent. One that cannot be
        reached takes seconds to meet, so loads go before; a load meets only whom it needs.
        For the lane of such reads alone: who goes and comes does so in the order of its jobs."""
        self._meant = Meant(record)
        self._fencing = threading.Lock()
        """Held while something begins that came by the bus: a fence is before it or behind it."""
        self._lanes_to_rest = 0
        """Lanes that may still be at something older than the last fence."""
        self._copies = Lane("kvbm-copies")
        self._lending = Lane("kvbm-lending")
        self._readers_until = 0.0
        self._reads = Lane("kvbm-reads", idle=self._let_others_read)
        self._disk_reads = Lane("kvbm-disk-reads") if disk is not None else None
        self._disk_writes = Lane("kvbm-disk-writes") if disk is not None else None
        self._watch = DiskWatch(disk, self._abandon_disk) if disk is not None else None
        self._presence: LoopThread | None = None
        if scope is not None and connect is not None:
            bus = WorkerBus(record, scope, connect, self.carry_out_now, self.expect_readers)
            self._presence = LoopThread("kvbm-worker", bus.run)
            self._presence.start()

    # -- the engine's thread ---------------------------------------------------------------

    def submit(self, commands: StepCommands) -> None:
        """Take over what the leader wants done, after the device work that is queued now."""
        commands = self._meant.heed(commands)
        if commands.forget:
            self._forget()
        for agent in commands.gone:
            self._reads.add(Job(partial(self._part_with, agent), _warn))
        for peer in commands.peers:
            if peer.rank == self.record.rank:
                self._reads.add(Job(partial(self._hear_of, peer), _warn))
                self._reads.add(Job(partial(self._meet, peer.agent), _warn, urgent=False))
        self._begin_between_tiers(commands)
        if commands.fence:
            self._fence_off(commands.fence)
        self._begin_with_device(commands)

    def collect(self) -> StepResults | None:
        """What has been finished since the last call, if anything."""
        with self._lock:
            news = bool(self._disk_lost) and not self._said_disk_lost
            if not (self._moved or self._loads or news):
                return None
            self._said_disk_lost = bool(self._disk_lost)
            results = StepResults(
                rank=self.record.rank,
                moved=tuple(self._moved),
                loads=tuple(self._loads),
                disk_lost=self._disk_lost,
            )
            self._moved, self._loads = [], []
        return results

    def close(self) -> None:
        """Leave the directory, end the lanes, let go of memory and files."""
        if self._presence is not None:
            self._presence.stop()
        lanes = (self._reads, self._copies, self._lending, self._disk_reads, self._disk_writes)
        ended = [lane.close() for lane in lanes if lane is not None]
        if self._watch is not None:  # until now: a disk may hang just while its lanes end
            self._watch.close()
        if not all(ended):
            _log.error("the disk still does not answer: memory and files are left to the kernel")
            return
        if self._disk is not None:
            self._disk.close()
        self._mover.close()
        self._close()

    # -- when a rank has been replaced -----------------------------------------------------

    def _fence_off(self, op: int) -> None:
        """Begin nothing up to `op` any more, and tell when nothing of it is under way."""
        lanes = (self._copies, self._reads, self._lending, self._disk_reads, self._disk_writes)
        used = [lane for lane in lanes if lane is not None]
        with self._fencing, self._lock:
            if op == self._meant.fence and self._lanes_to_rest:
                return  # it will be told
            self._meant.fence, self._lanes_to_rest = op, len(used)

        def passed(_: object = None) -> None:
            with self._lock:
                if op != self._meant.fence:
                    return  # a later one goes round
                self._lanes_to_rest -= 1
                if not self._lanes_to_rest:
                    self._moved.append(Moved(op=op))

        self._lending.add(Job(partial(self._mover.unlend_all, op), _warn, urgent=False))
        for lane in used:
            lane.add(Job(passed, passed, urgent=False))

    # -- device blocks that other nodes may read --------------------------------------------
    # A few words are written for each, and another node's request waits: they have a lane.

    def _lend(self, lend: Lend, tell: Callable[[Moved], None]) -> None:
        """The request whose blocks these are has ended: the forward pass has written them."""
        blocks = _columns(lend.hashes, None, lend.blocks, lend.blocks, lend.op)
        if not self._once.begin(lend.op, tell, len(blocks.device)):
            return

        def run() -> Mask:
            self._mover.lend(blocks)
            return np.ones(len(blocks.device), np.bool_)

        self._move(self._lending, lend.op, len(blocks.device), run, self._once.end)

    def _begin_unlend(self, unlend: Unlend) -> None:
        """Behind every lend before it. The forward pass need not be waited for."""
        device = np.frombuffer(unlend.blocks, dtype="<u4")

        def run() -> Mask:
            self._mover.unlend(device, unlend.op)
            return np.ones(len(device), np.bool_)

        self._move(self._lending, unlend.op, len(device), run, self._tell_leader)

    # -- moves into slots ------------------------------------------------------------------

    def carry_out_now(self, order: Fetch | Lend, tell: Callable[[Moved], None]) -> bool:
        """Carry out what came by the bus. Called on the bus's thread.

        `tell` is called once it is done, on some thread. False: it is void, and nothing is told.
        """
        with self._fencing:
            if order.op <= self._meant.fence:
                return False
            if isinstance(order, Fetch):
                self._fetch(order, tell)
            else:
                self._lend(order, tell)
        return True

    def expect_readers(self, seconds: float) -> None:
        """Somebody may connect and read for so long. Called on the bus's thread."""
        self._readers_until = max(self._readers_until, time.monotonic() + seconds)
        self._reads.wake()

    def _let_others_read(self) -> float:
        self._mover.progress()
        return SERVING_SECONDS if time.monotonic() < self._readers_until else RESTING_SECONDS

    def _begin_save(self, save: Save, fence: Fence) -> None:
        blocks = _columns(save.hashes, None, save.slots, save.blocks, save.op)

        def run() -> Mask:
            fence()
            if save.tier is Tier.DISK:
                return self._with_disk(lambda disk: disk.save(blocks))
            self._mover.save(blocks)
            return np.ones(len(blocks.slots), np.bool_)

        lane = self._disk_writes if save.tier is Tier.DISK else self._copies
        self._move(lane, save.op, len(blocks.slots), run, self._tell_leader)

    def _begin_between_tiers(self, commands: StepCommands) -> None:
        for spill in commands.spills:
            self._begin_spill(spill)
        for fetch in commands.fetches:
            self._fetch(fetch, self._tell_leader)
        for remote in commands.remote_fetches:
            self._begin_remote_fetch(remote)

    def _begin_spill(self, spill: Spill) -> None:
        hop = _hop(spill.hashes, spill.fills, spill.host, spill.disk, spill.op)
        run = partial(self._with_disk, lambda disk: disk.spill(hop))
        self._move(self._disk_writes, spill.op, len(hop.source), run, self._tell_leader)

    def _fetch(self, fetch: Fetch, tell: Callable[[Moved], None]) -> None:
        """Each op is carried out once, by whatever way and how often it comes."""
        count = len(fetch.host) // 4
        if self._once.begin(fetch.op, tell, count):
            hop = _hop(fetch.hashes, fetch.fills, fetch.disk, fetch.host, fetch.op)
            run = partial(self._with_disk, lambda disk: disk.fetch(hop))
            self._move(self._disk_reads, fetch.op, len(hop.source), run, self._once.end)

    def _begin_remote_fetch(self, fetch: RemoteFetch) -> None:
        hop = _hop(fetch.hashes, fetch.fills, fetch.slots, fetch.host, fetch.op)
        agent = fetch.agents[self.record.rank]
        until = time.monotonic() + fetch.seconds

        def run() -> Mask:
            seconds = self._ready_to_read(agent, until)
            return self._mover.fetch(agent, hop, seconds)

        self._move(self._reads, fetch.op, len(hop.source), run, self._tell_leader)

    def _move(
        self,
        lane: Lane | None,
        op: int,
        count: int,
        run: Callable[[], Mask],
        tell: Callable[[Moved], None],
    ) -> None:
        """Have `run` bring `count` blocks into their slots, or lend them, and tell how it went."""

        def job() -> Tell:
            began = time.monotonic()
            (failed,) = np.nonzero(~run())
            seconds = time.monotonic() - began
            reason = "a block was not what its name says" if len(failed) else ""
            moved = Moved(op=op, failed=_packed(failed), reason=reason, seconds=seconds)
            return partial(tell, moved)

        def not_done(error: TransferError) -> None:
            self._note(error)
            _log.error("%d block(s) were not moved, or not lent: %s", count, error)
            tell(Moved(op=op, failed=_packed(np.arange(count)), reason=str(error)[:256]))

        if lane is None:
            not_done(TransferError(NO_DISK))
        else:
            lane.add(Job(job, not_done, urgent=False))

    def _tell_leader(self, moved: Moved) -> None:
        with self._lock:
            self._moved.append(moved)

    # -- what is ordered with the forward pass ------------------------------------------------

    def _begin_with_device(self, commands: StepCommands) -> None:
        for unlend in commands.unlends:
            self._begin_unlend(unlend)
        for lend in commands.lends:
            self._lend(lend, self._tell_leader)
        if not (commands.loads or commands.saves):
            return
        fence = self._mover.mark()
        for load in commands.loads:
            self._begin_load(load, fence)
        for save in commands.saves:
            self._begin_save(save, fence)

    # -- loads into the device -------------------------------------------------------------

    def _begin_load(self, command: Load, fence: Fence) -> None:
        parts = (command.local is not None) + (command.disk is not None) + len(command.remote)
        load = _LoadUnderWay(command, parts_left=parts)
        if command.local is not None:
            self._add_read(self._copies, load, "host", command.local, self._mover.load, fence)
        if command.disk is not None:
            self._add_read(
                self._disk_reads, load, "disk", command.disk, self._load_from_disk, fence
            )
        for part in command.remote:
            pull = self._pulling(part.agents[self.record.rank], part.tier, part.seconds)
            self._add_read(self._reads, load, "remote", part, pull, fence)

    def _pulling(self, agent: str, tier: Tier, seconds: float) -> Callable[[Blocks], Mask]:
        """A read that ends within so many seconds from now, however long it waits for its turn."""
        until = time.monotonic() + seconds

        def pull(blocks: Blocks) -> Mask:
            return self._mover.pull(agent, blocks, self._ready_to_read(agent, until), tier)

        return pull

    def _ready_to_read(self, agent: str, until: float) -> float:
        """Meet `agent` if that is still to be done. Returns the seconds that are left then.

        Raises:
            TransferError: it cannot be reached, or none are left.
        """
        self._meet(agent)
        left = until - time.monotonic()
        if left <= 0:
            raise TransferError(f"no time was left to read from {agent}")
        return left

    def _load_from_disk(self, blocks: Blocks) -> Mask:
        return self._with_disk(lambda disk: disk.load(blocks))

    def _add_read(
        self,
        lane: Lane | None,
        load: _LoadUnderWay,
        source: str,
        part: LocalRead | RemoteRead,
        read: Callable[[Blocks], Mask],
        fence: Fence,
    ) -> None:
        blocks = _columns(part.hashes, part.fills, part.slots, part.blocks)

        def run() -> Tell:
            fence()
            began = time.monotonic()
            arrived = read(blocks)
            seconds = time.monotonic() - began

            def tell() -> None:
                load.seconds[source] = load.seconds.get(source, 0.0) + seconds
                lost = _first_of_rows(blocks.device[~arrived])
                self._part_done(load, lost, "a slot held something else")

            return tell

        def failed(error: TransferError) -> None:
            self._note(error)
            self._part_done(load, _first_of_rows(blocks.device), str(error))

        if lane is None:
            failed(TransferError(NO_DISK))
        else:
            lane.add(Job(run, failed))

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
                    failed_blocks=_packed(np.array(load.failed)),
                    reason=load.reason[:256],
                    host_seconds=load.seconds.get("host", 0.0),
                    disk_seconds=load.seconds.get("disk", 0.0),
                    remote_seconds=load.seconds.get("remote", 0.0),
                )
            )
        if load.failed:
            _log.warning(
                "%s: %d block(s) did not arrive and will be recomputed: %s",
                load.command.request, len(load.failed), load.reason,
            )  # fmt: skip

    # -- small things ------------------------------------------------------------------------

    def _with_disk(self, use: Callable[[Disk], Mask]) -> Mask:
        if self._disk is None:
            raise TransferError(NO_DISK)
        return use(self._disk)

    def _abandon_disk(self, error: DiskLost) -> None:
        """On the watch's thread: all that waits for the disk hears that it is lost."""
        for lane in (self._disk_reads, self._disk_writes):
            assert lane is not None
            lane.abandon(error)
        self._note(error)

    def _note(self, error: TransferError) -> None:
        """A disk that has failed for good is given up, which is said once."""
        if isinstance(error, DiskLost) and not self._disk_lost:
            _log.error("the disk tier is given up, serving goes on without it: %s", error)
            self._disk_lost = str(error)[:256] or "lost"

    def _part_with(self, agent: str) -> None:
        self._unmet.pop(agent, None)
        self._mover.forget(agent)

    def _hear_of(self, peer: RankRecord) -> None:
        self._unmet[peer.agent] = peer

    def _meet(self, agent: str) -> None:
        peer = self._unmet.pop(agent, None)
        if peer is None:
            return  # met before, or gone meanwhile
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
                pool=_pool(peer),
            )
        )


def _pool(peer: RankRecord) -> DevicePool | None:
    if peer.device is None:
        return None
    where = peer.device
    return DevicePool(where.headers, where.blocks, where.device, where.regions)


def _warn(error: TransferError) -> None:
    _log.warning("%s", error)


def _packed(numbers: npt.NDArray[Any]) -> bytes:
    return numbers.astype("<u4").tobytes()


def _hop(hashes: bytes, fills: bytes, source: bytes, target: bytes, fill: int) -> Hop:
    return Hop(
        hashes=np.frombuffer(hashes, dtype=np.uint64).reshape(-1, 2),
        fills=np.frombuffer(fills, dtype="<u8"),
        source=np.frombuffer(source, dtype="<u4"),
        target=np.frombuffer(target, dtype="<u4"),
        fill=fill,
    )


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
        device=_rows(np.frombuffer(blocks, dtype="<u4"), len(slot_numbers)),
    )


def _rows(device: Indices, count: int) -> Indices:
    """One number for each of `count` blocks, or a row of as many."""
    return device if len(device) == count else device.reshape(count, -1)


def _first_of_rows(device: Indices) -> Indices:
    """By what a row is known: its first number that stands for a block."""
    if device.ndim == 1:
        return device
    first = (device != NO_BLOCK).argmax(axis=1)
    named: Indices = device[np.arange(len(device)), first]
    return named
