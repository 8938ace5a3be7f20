"""One NIXL agent that reads other ranks' memory, straight into our device blocks or into a buffer.

It is disposable, and that is how we prove that a failed transfer is quiet. While a handle
says PROC, or after it said ERR, some of its reads may still be going to land:

- Over shared memory and TCP our own calls into NIXL do the copying (there is no progress
  thread), so a handle left alone is still; but the next call, for another transfer, would
  carry it on.
- Over RDMA the network card does it, whenever it likes. Releasing the handle or removing the
  peer does not stop it: UCX cannot cancel a read, and closes endpoints by flushing them.

Destroying the agent destroys its UCX worker and with it every queue pair: nothing can write
any more. So the rule is: a transfer that is not DONE ends with `discard`. Nobody else knows
this agent (peers read from another one, see nixl_mover.py), so it costs us only the
time to make a new one and to connect again.

NIXL never notices a stopped peer, so each read has a deadline. After it we go on polling for
QUIET_SECONDS, because of TCP: there the peer's UCX serves each read in software, and aborts
the peer's whole process when it finds a read to serve whose reader is gone (seen with
1 MiB blocks; tiny ones fit into the socket). A stall shorter than that must not lead to it.
"""

from __future__ import annotations

import mmap
import os
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import nixl._bindings
import numpy as np
import numpy.typing as npt
from nixl._api import nixl_agent, nixl_agent_config

from kvbm_schemas.block import Tier
from kvbm_service.adapters.copies import Column
from kvbm_service.adapters.mover import (
    HEADER,
    HEADER_PAGE,
    NO_BLOCK,
    Indices,
    Region,
    RemoteSlab,
)
from kvbm_service.adapters.slab import Headers
from kvbm_service.adapters.slab_memory import in_huge_pages
from kvbm_service.errors import TransferError

SPIN_SECONDS = 0.000_2
"""A transfer that takes longer is polled with pauses."""

POLL_SECONDS = 0.000_05

QUIET_SECONDS = 1.0
"""How long a transfer that missed its deadline may take to end by itself."""

MAX_PAGES = 512
"""Pages of headers read at a time."""

BUFFER_BYTES = 8 << 20
"""Slots on their way to slots of ours pass through a buffer of this size (or of one slot)."""

MOST = np.iinfo(np.int32).max
"""NIXL numbers descriptors so far. What is beyond would wrap, and be some other memory."""

HEADER_WORDS = HEADER.itemsize // 8
"""Copying words is several times faster than copying records, in numpy."""

PAGE_BYTES = HEADER_PAGE * HEADER.itemsize

NIXL_ERRORS: tuple[type[Exception], ...] = (
    *(
        kind
        for kind in vars(nixl._bindings).values()
        if isinstance(kind, type) and issubclass(kind, Exception)
    ),
    RuntimeError,
)
"""NIXL's exceptions have no common base of their own. In a process that has loaded certain other
extension modules, they arrive as plain RuntimeError: those modules translate C++ exceptions, too,
and whoever came last is asked first."""


UCX_SETTINGS = {
    # Otherwise UCX waits for each connection inside our call, and a host that has vanished
    # without a word holds up every read for as long as the kernel goes on trying: 135 s.
    "UCX_TCP_CONN_NB": "y",
}
"""What we want UCX to do, unless the operator has said something else."""

UCX_READER_SETTINGS = {
    # The kernel goes on sending what is left when a connection is closed. The requests of a
    # reader that was discarded must not reach the owner after an outage (it would abort, see
    # above): by the time we discard, a connection that carries nothing is closed already.
    "UCX_TCP_USER_TIMEOUT": f"{QUIET_SECONDS:g}s",
}
"""The same for agents that read. Not for the one that serves, which is made before: an owner
that gives up a slow reader's connection may find another read to serve on it, and abort."""


def new_agent(name: str) -> Any:
    """A NIXL agent over UCX, without a thread of its own (it would burn a core)."""
    for variable, value in UCX_SETTINGS.items():
        os.environ.setdefault(variable, value)
    return nixl_agent(name, nixl_agent_config(enable_prog_thread=False, backends=["UCX"]))


def destroy(agent: Any) -> None:
    """Destroy an agent now, whoever may still hold the Python object."""
    inner = weakref.ref(agent.agent)
    agent.agent = None
    assert inner() is None, "something still holds the agent: it may still write"


class Unquiet(TransferError):
    """The reader must be discarded before the device blocks may be touched again."""


class _Attached(NamedTuple):
    """What was prepared once for one tier of one peer: handles of descriptor lists.

    A list says where blocks lie by address and stride, so it stays small whatever their number.
    """

    firsts: npt.NDArray[np.int64]
    """Index of each part's first descriptor in `blocks`; ours are numbered the same way."""
    blocks: Any
    headers: Any


class Reader:
    """Reads slabs and device pools, into `regions` of device `device_id` or into a buffer.

    Without `device_id` the regions are ordinary memory.
    A block consists of `parts`, which are as long as the regions' pieces.
    `meanwhile` is called again and again while a transfer is under way: two ranks that read
    from each other at the same time must also serve each other.
    """

    def __init__(
        self,
        name: str,
        regions: list[Region],
        parts: tuple[int, ...],
        device_id: int | None,
        meanwhile: Callable[[], None],
    ) -> None:
        self._meanwhile = meanwhile
        for variable, value in UCX_READER_SETTINGS.items():
            os.environ.setdefault(variable, value)
        self._agent = new_agent(name)
        self._attached: dict[tuple[str, Tier], _Attached] = {}
        self._known: set[str] = set()
        self._handles: list[Any] = []
        kind, device = memory_of(device_id)
        self._agent.register_memory([(*extent, device, "") for extent in extents(regions)], kind)
        counts = np.array([region.blocks for region in regions])
        self._firsts = np.cumsum(counts) - counts
        self._group_of = np.array([region.group for region in regions])
        self._pool = self._prepare(
            "NIXL_INIT_AGENT",
            [(region.address, region.length, device, region.stride, region.blocks)
             for region in regions],
            kind,
        )  # fmt: skip
        self._found = np.zeros((MAX_PAGES, HEADER_PAGE, HEADER_WORDS), np.uint64)
        address = self._found.ctypes.data
        self._agent.register_memory([(address, self._found.nbytes, 0, "")], "DRAM")
        row = (address, PAGE_BYTES, 0, PAGE_BYTES, MAX_PAGES)
        self._scratch = self._prepare("NIXL_INIT_AGENT", [row], "DRAM")

        self._row_bytes = sum(parts)
        self.rows = max(1, BUFFER_BYTES // self._row_bytes)
        """How many slots `read_slots` takes at a time."""
        self._parts = parts
        self._buffer: tuple[mmap.mmap, int, Any] | None = None
        """The buffer, its address, and its descriptors; there once it is needed."""

    def attach(self, peer: RemoteSlab, tier: Tier = Tier.HOST) -> None:
        """Prepare reading from that tier of `peer`. Nothing is sent yet; idempotent.

        Raises:
            TransferError: the peer's metadata is refused, what it describes cannot be read, or
                nobody listens there any more.
        """
        if (peer.agent, tier) in self._attached:
            return
        try:
            if peer.agent not in self._known:
                self._get_to_know(peer)
            self._attached[peer.agent, tier] = (
                self._slab_of(peer) if tier is Tier.HOST else self._pool_of(peer)
            )
        except NIXL_ERRORS as error:
            raise TransferError(f"{peer.agent} cannot be connected: {error}") from None

    def detach(self, agent: str) -> None:
        """Forget a peer from whom nothing is being read."""
        for tier in (Tier.HOST, Tier.DEVICE):
            attached = self._attached.pop((agent, tier), None)
            if attached is not None:
                for handle in (attached.blocks, attached.headers):
                    self._handles.remove(handle)
                    handle.release()
        if agent in self._known:
            self._known.remove(agent)
            self._agent.remove_remote_agent(agent)

    def read_blocks(
        self, agent: str, tier: Tier, slots: Indices, device: Indices, deadline: float
    ) -> None:
        """Slots of that tier of `agent` → device blocks, but for parts that have no place there.

        Raises:
            Unquiet: failed or too late; bytes may still arrive.
            TransferError: it ended, too late.
        """
        peer = self._attached[agent, tier]
        rows = device.reshape(len(device), -1)[:, self._group_of]
        placed = rows != NO_BLOCK
        if placed.any():
            ours = (rows + self._firsts)[placed]
            theirs = (slots[:, None] + peer.firsts)[placed]
            self._read(agent, self._pool, ours, peer.blocks, theirs, deadline)

    def read_slots(self, agent: str, slots: Indices, deadline: float) -> Column:
        """Slots of `agent`, `rows` at the most, → the buffer.

        Returns where each lies, until the next call.

        Raises:
            Unquiet, TransferError: as `read_blocks`.
        """
        assert len(slots) <= self.rows
        peer = self._attached[agent, Tier.HOST]
        _, address, descriptors = self._buffer = self._buffer or self._new_buffer()
        rows = np.arange(len(slots))
        ours = (rows[:, None] + np.arange(len(self._parts)) * self.rows).ravel()
        theirs = (slots[:, None] + peer.firsts).ravel()
        self._read(agent, descriptors, ours, peer.blocks, theirs, deadline)
        return rows.astype(np.uint64) * np.uint64(self._row_bytes) + np.uint64(address)

    def read_headers(self, agent: str, tier: Tier, slots: Indices, deadline: float) -> Headers:
        """The headers of `slots` of that tier of `agent`, as they are now.

        They are read by the page: a small read costs what a page does, and the blocks of one
        request mostly lie together.

        Raises:
            Unquiet, TransferError: as `read_blocks`.
        """
        theirs = self._attached[agent, tier].headers
        page, within = np.divmod(slots, HEADER_PAGE)
        wanted = np.unique(page)
        pages = np.empty((len(wanted), HEADER_PAGE, HEADER_WORDS), np.uint64)
        for at in range(0, len(wanted), MAX_PAGES):
            some = wanted[at : at + MAX_PAGES]
            self._read(agent, self._scratch, np.arange(len(some)), theirs, some, deadline)
            pages[at : at + MAX_PAGES] = self._found[: len(some)]
        found = pages[wanted.searchsorted(page), within]
        headers: Headers = found.view(HEADER)[:, 0]
        return headers

    def discard(self) -> None:
        """Destroy the agent. After this nothing writes to our memory any more."""
        for handle in self._handles:
            handle.release()
            handle._agent = None
        self._handles.clear()
        destroy(self._agent)

    def _get_to_know(self, peer: RemoteSlab) -> None:
        name = self._agent.add_remote_agent(peer.agent_metadata).decode()
        if name != peer.agent:
            self._agent.remove_remote_agent(name)
            raise TransferError(f"the metadata of {peer.agent} is that of another agent")
        self._known.add(name)

    def _slab_of(self, peer: RemoteSlab) -> _Attached:
        starts = np.cumsum((0, *peer.parts[:-1]))
        rows = [
            (peer.base + start, length, 0, peer.slot_bytes, peer.slots)
            for start, length in zip(starts.tolist(), peer.parts, strict=True)
        ]
        return self._attachment(peer.agent, rows, "DRAM", peer.headers, peer.slots)

    def _pool_of(self, peer: RemoteSlab) -> _Attached:
        pool = peer.pool
        assert pool is not None, "who does not lend is not read from"
        kind, device = memory_of(pool.device)
        rows = [
            (address, length, device, stride, pool.blocks)
            for (address, stride), length in zip(pool.regions, peer.parts, strict=True)
        ]
        return self._attachment(peer.agent, rows, kind, pool.headers, pool.blocks)

    def _attachment(
        self, agent: str, rows: Sequence[tuple[int, ...]], kind: str, headers: int, count: int
    ) -> _Attached:
        pages = (headers, PAGE_BYTES, 0, PAGE_BYTES, -(-count // HEADER_PAGE))
        return _Attached(
            firsts=np.arange(len(rows)) * count,
            blocks=self._prepare(agent, rows, kind),
            headers=self._prepare(agent, [pages], "DRAM"),
        )

    def _new_buffer(self) -> tuple[mmap.mmap, int, Any]:
        nbytes = self.rows * self._row_bytes
        memory = in_huge_pages(nbytes)
        address = int(np.frombuffer(memory, np.uint8).ctypes.data)
        self._agent.register_memory([(address, nbytes, 0, "")], "DRAM")
        starts = np.cumsum((0, *self._parts[:-1])).tolist()
        rows = [
            (address + start, length, 0, self._row_bytes, self.rows)
            for start, length in zip(starts, self._parts, strict=True)
        ]
        return memory, address, self._prepare("NIXL_INIT_AGENT", rows, "DRAM")

    def _prepare(self, agent: str, rows: Sequence[tuple[int, ...]], kind: str) -> Any:
        handle = self._agent.prep_xfer_dlist(agent, np.array(rows, np.uint64), kind)
        self._handles.append(handle)
        return handle

    def _read(
        self,
        agent: str,
        local: Any,
        ours: npt.NDArray[Any],
        remote: Any,
        theirs: npt.NDArray[Any],
        deadline: float,
    ) -> None:
        assert max(ours.max(), theirs.max()) <= MOST, "there are not that many descriptors"
        handle = self._agent.make_prepped_xfer(
            "READ", local, ours.astype(np.int32), remote, theirs.astype(np.int32)
        )
        self._handles.append(handle)
        state = self._run(handle, deadline)
        if state != "DONE":
            raise Unquiet(f"reading from {agent} failed: {state}")
        self._handles.remove(handle)
        handle.release()
        if time.monotonic() > deadline:
            raise TransferError(f"reading from {agent} took too long")

    def _run(self, handle: Any, deadline: float) -> str:
        """Post and poll. DONE, or why it is not."""
        step = self._agent.transfer
        spin_until = time.monotonic() + SPIN_SECONDS
        while True:
            try:
                state: str = step(handle)
            except NIXL_ERRORS as error:
                return str(error)
            if state != "PROC":
                return state
            step = self._agent.check_xfer_state
            now = time.monotonic()
            if now > deadline + QUIET_SECONDS:
                return "time ran out"
            if now > spin_until:
                self._meanwhile()
                time.sleep(POLL_SECONDS)


def memory_of(device_id: int | None) -> tuple[str, int]:
    """What NIXL calls the memory of that CUDA device (None: ordinary memory)."""
    return ("DRAM", 0) if device_id is None else ("VRAM", device_id)


def extents(regions: list[Region]) -> list[tuple[int, int]]:
    """Address and length of the memory that the regions lie in, overlapping ones as one."""
    spans: list[tuple[int, int]] = []
    for start, end in sorted(
        (region.address, region.address + region.stride * (region.blocks - 1) + region.length)
        for region in regions
    ):
        if spans and start < spans[-1][1]:
            spans[-1] = (spans[-1][0], max(end, spans[-1][1]))
        else:
            spans.append((start, end))
    return [(start, end - start) for start, end in spans]
