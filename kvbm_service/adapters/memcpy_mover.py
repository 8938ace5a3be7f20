"""The mover inside one process: slabs of other ranks are read with memcpy.

For tests and simulations, and where several ranks live in one process.
"""

from __future__ import annotations

import uuid

import numpy as np
import numpy.typing as npt

from kvbm_schemas.block import Tier
from kvbm_service.adapters.host_tier import HostTier
from kvbm_service.adapters.mover import (
    Blocks,
    DevicePool,
    Fence,
    Hop,
    Indices,
    Mask,
    RemoteSlab,
)
from kvbm_service.errors import TransferError

_here: dict[str, HostTier] = {}
"""Every open `MemcpyMover` of this process, by agent."""


class MemcpyMover:
    """`Mover` among the ranks of one process."""

    def __init__(self, tier: HostTier) -> None:
        self._tier = tier
        self._peers: dict[str, RemoteSlab] = {}
        self.agent = f"memcpy-{uuid.uuid4().hex}"
        self.agent_metadata = b""
        self.pool: DevicePool | None = tier.pool()
        _here[self.agent] = tier

    def mark(self) -> Fence:
        return self._tier.mark()

    def save(self, blocks: Blocks) -> None:
        self._tier.save(blocks)

    def load(self, blocks: Blocks) -> Mask:
        return self._tier.load(blocks)

    def lend(self, blocks: Blocks) -> None:
        self._tier.lend(blocks)

    def unlend(self, device: Indices, op: int) -> None:
        self._tier.unlend(device, op)

    def unlend_all(self, op: int) -> None:
        self._tier.lent.take_back_all(op)

    def connect(self, peer: RemoteSlab) -> None:
        self._tier.check_layout(peer)
        self._tier_of(peer.agent)
        self._peers[peer.agent] = peer

    def forget(self, agent: str) -> None:
        self._peers.pop(agent, None)

    def pull(
        self, agent: str, blocks: Blocks, timeout_seconds: float, tier: Tier = Tier.HOST
    ) -> Mask:
        self._tier.check_pull(blocks, self._peer(agent), tier)
        if not len(blocks.slots):
            return np.zeros(0, np.bool_)
        self._read(agent, blocks, tier)
        owner = self._tier_of(agent)
        table = owner.slab if tier is Tier.HOST else owner.lent
        return self._tier.arrived(table.read_headers(blocks.slots), blocks)

    def fetch(self, agent: str, hop: Hop, timeout_seconds: float) -> Mask:
        self._tier.check_fetch(hop, self._peer(agent))
        self._tier.slab.clear(hop.target)
        blocks = self._read_slots(agent, hop.source)
        start, stride = np.uint64(blocks.ctypes.data), np.uint64(self._tier.slab.slot_bytes)
        rows = start + np.arange(len(blocks), dtype=np.uint64) * stride
        headers = self._tier_of(agent).slab.read_headers(hop.source)
        return self._tier.adopt(rows, headers, hop)

    def progress(self) -> None:
        """Nothing to do."""

    def close(self) -> None:
        del _here[self.agent]
        self._tier.close()

    def _read(self, agent: str, blocks: Blocks, tier: Tier) -> None:
        owner = self._tier_of(agent)
        if tier is Tier.HOST:
            self._tier.fill_from(owner.slab.base, blocks)
        else:
            self._tier.fill_from_pool(owner, blocks)

    def _read_slots(self, agent: str, slots: Indices) -> npt.NDArray[np.uint8]:
        return self._tier_of(agent).slab.blocks[slots]

    def _peer(self, agent: str) -> RemoteSlab:
        try:
            return self._peers[agent]
        except KeyError:
            raise TransferError(f"{agent} is not connected") from None

    def _tier_of(self, agent: str) -> HostTier:
        try:
            return _here[agent]
        except KeyError:
            raise TransferError(f"{agent} is not in this process, or is gone") from None
