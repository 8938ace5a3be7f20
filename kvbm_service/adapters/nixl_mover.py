"""The mover between processes and machines: other ranks' memory is read with NIXL.

Two agents. One serves: the slab is registered with it, and the device pool if blocks may be lent
from that; its metadata is published, and it lives as long as we do. The other reads, into the
device pool or a buffer of its own; it is replaced whenever a transfer did not end well
(nixl_reader.py says why).

A peer that failed stays known: the next pull attaches to it again, so a stall costs the
pulls it delayed and no later one.
"""

from __future__ import annotations

import itertools
import logging
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from kvbm_schemas.block import Tier
from kvbm_service.adapters.copies import Column
from kvbm_service.adapters.host_tier import HostTier, cut
from kvbm_service.adapters.mover import (
    Blocks,
    DevicePool,
    Fence,
    Hop,
    Indices,
    Mask,
    RemoteSlab,
)
from kvbm_service.adapters.nixl_reader import (
    NIXL_ERRORS,
    Reader,
    Unquiet,
    destroy,
    extents,
    memory_of,
    new_agent,
)
from kvbm_service.errors import TransferError

_log = logging.getLogger(__name__)

CONNECT_SECONDS = 2.0
"""How long a peer may take to answer for the first time."""


class NixlMover:
    """`Mover` over NIXL. The device pool is on CUDA device `device_id`, or in ordinary memory.

    `lends` says whether other nodes may read what is lent of it. If it cannot be registered for
    that, they may not, with a warning.

    NIXL and UCX start threads when the first agent is made; they inherit the calling
    thread's CPU mask (affinity.py).
    """

    def __init__(self, tier: HostTier, device_id: int | None = None, *, lends: bool = True) -> None:
        self._tier = tier
        self._device_id = device_id
        self._peers: dict[str, RemoteSlab] = {}
        self._lives = itertools.count(1)
        self.agent = f"kvbm-{uuid.uuid4().hex}"
        self._server = new_agent(self.agent)
        slab = tier.slab
        self._served = [self._server.register_memory([(slab.start, slab.nbytes, 0, "")], "DRAM")]
        self._reader = self._new_reader()
        self.pool = self._serve_pool() if lends else None
        self.agent_metadata: bytes = self._server.get_agent_metadata()

    def mark(self) -> Fence:
        return self._tier.mark()

    def save(self, blocks: Blocks) -> None:
        self._tier.save(blocks)

    def load(self, blocks: Blocks) -> Mask:
        return self._tier.load(blocks)

    def lend(self, blocks: Blocks) -> None:
        if self.pool is None:
            raise TransferError("this rank's device pool cannot be read by others")
        self._tier.lend(blocks)

    def unlend(self, device: Indices, op: int) -> None:
        self._tier.unlend(device, op)

    def unlend_all(self, op: int) -> None:
        self._tier.lent.take_back_all(op)

    def connect(self, peer: RemoteSlab) -> None:
        self._tier.check_layout(peer)
        if self._peers.get(peer.agent) not in (None, peer):
            self.forget(peer.agent)
        self._peers[peer.agent] = peer
        first = np.zeros(1, np.uint32)
        deadline = time.monotonic() + CONNECT_SECONDS
        with self._attached(peer, Tier.HOST):
            self._reader.read_headers(peer.agent, Tier.HOST, first, deadline)

    def forget(self, agent: str) -> None:
        if self._peers.pop(agent, None) is not None:
            self._reader.detach(agent)

    def pull(
        self, agent: str, blocks: Blocks, timeout_seconds: float, tier: Tier = Tier.HOST
    ) -> Mask:
        deadline = time.monotonic() + timeout_seconds
        peer = self._peer(agent)
        self._tier.check_pull(blocks, peer, tier)
        if not len(blocks.slots):
            return np.zeros(0, np.bool_)
        with self._attached(peer, tier):
            self._read(agent, tier, blocks, deadline)
            headers = self._reader.read_headers(agent, tier, blocks.slots, deadline)
        return self._tier.arrived(headers, blocks)

    def fetch(self, agent: str, hop: Hop, timeout_seconds: float) -> Mask:
        deadline = time.monotonic() + timeout_seconds
        peer = self._peer(agent)
        self._tier.check_fetch(hop, peer)
        self._tier.slab.clear(hop.target)
        arrived = np.zeros(len(hop.source), np.bool_)
        with self._attached(peer, Tier.HOST):
            for at in range(0, len(arrived), self._reader.rows):
                some = slice(at, at + self._reader.rows)
                part = cut(hop, some)
                rows = self._read_slots(agent, part.source, deadline)
                headers = self._reader.read_headers(agent, Tier.HOST, part.source, deadline)
                arrived[some] = self._tier.adopt(rows, headers, part)
        return arrived

    def progress(self) -> None:
        self._server.get_new_notifs()

    def close(self) -> None:
        self._peers.clear()
        self._reader.discard()
        for served in self._served:
            self._server.deregister_memory(served)
        destroy(self._server)
        self._tier.close()

    def _read(self, agent: str, tier: Tier, blocks: Blocks, deadline: float) -> None:
        self._reader.read_blocks(agent, tier, blocks.slots, blocks.device, deadline)

    def _read_slots(self, agent: str, slots: Indices, deadline: float) -> Column:
        return self._reader.read_slots(agent, slots, deadline)

    def _peer(self, agent: str) -> RemoteSlab:
        try:
            return self._peers[agent]
        except KeyError:
            raise TransferError(f"{agent} is not connected") from None

    @contextmanager
    def _attached(self, peer: RemoteSlab, tier: Tier) -> Iterator[None]:
        """Read from that tier of `peer`; afterwards nothing is under way, whatever has happened."""
        try:
            self._reader.attach(peer, tier)
            yield
        except Unquiet:
            self._replace_reader()
            raise

    def _serve_pool(self) -> DevicePool | None:
        """Register the device pool and its headers for others to read."""
        kind, device = memory_of(self._device_id)
        table = (self._tier.lent.start, self._tier.lent.nbytes, 0, "")
        pool = [(*extent, device, "") for extent in extents(self._tier.regions)]
        try:
            for rows, memory in ((pool, kind), ([table], "DRAM")):
                self._served.append(self._server.register_memory(rows, memory))
        except NIXL_ERRORS as error:
            _log.warning(
                "device blocks cannot be lent, other nodes read them from the host tier: %s", error
            )
            return None
        return self._tier.pool(self._device_id)

    def _new_reader(self) -> Reader:
        name = f"{self.agent}-{next(self._lives)}"
        parts = self._tier.slab.parts
        return Reader(name, self._tier.regions, parts, self._device_id, self.progress)

    def _replace_reader(self) -> None:
        self._reader.discard()
        self._reader = self._new_reader()
