"""Host → disk: which blocks are worth it, and in what portions they go.

A block is offered when it has come into the host tier, and again whenever it is used there. The
filter says when it has been used often enough. What it lets through waits here for its turn:
only so many portions are on their way at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from kvbm_schemas.block import BlockHash, Tier
from kvbm_service.core.accounts import Path, Refusal
from kvbm_service.core.offload_filter import OffloadFilter
from kvbm_service.core.orders import Orders
from kvbm_service.core.tiers import Tiers

MAX_WAITING = 65_536
"""Blocks that wait for their turn. Beyond, they are not taken; they will be offered again."""

MAX_PINNED_SHARE = 0.25
"""At most this share of the host tier is kept from reuse by spills."""


class SpillLimits(NamedTuple):
    """In what portions blocks go to the disk."""

    batch_blocks: int = 16
    """`DYN_KVBM_MAX_TRANSFER_BATCH_SIZE`."""
    batches: int = 4
    """`DYN_KVBM_MAX_CONCURRENT_TRANSFERS`."""


class Spills:
    """One node's way from host to disk. Without a filter, every block goes."""

    def __init__(
        self, tiers: Tiers, orders: Orders, limits: SpillLimits, chosen: OffloadFilter | None
    ) -> None:
        self._tiers = tiers
        self._orders = orders
        self._filter = chosen
        most = max(1, int(tiers.host.capacity * MAX_PINNED_SHARE))
        self._batch_blocks = min(limits.batch_blocks, most)
        self._batches = min(limits.batches, max(1, most // self._batch_blocks))
        self._waiting: dict[BlockHash, None] = {}
        """Blocks to spill, oldest first."""

    def __len__(self) -> int:
        return len(self._waiting)

    def offer(self, blocks: Sequence[BlockHash], now: float) -> list[Refusal]:
        """These blocks have come into the host tier, or were used there.

        Returns which of them will not go to disk, and why.
        """
        if self._tiers.disk is None or not blocks:
            return []
        worth = [True] * len(blocks)
        if self._filter is not None:  # not its truth: one that has seen nothing yet is empty
            worth = self._filter.offer(blocks, now)
        seldom = too_many = 0
        for block, good in zip(blocks, worth, strict=True):
            if block in self._tiers.disk or block in self._waiting:
                continue
            if not good:
                seldom += 1
            elif len(self._waiting) >= MAX_WAITING:
                too_many += 1
            else:
                self._waiting[block] = None
        refusals = [Refusal("filter", seldom), Refusal("the queue to the disk is full", too_many)]
        return [refusal for refusal in refusals if refusal.blocks]

    def order(self) -> None:
        """Put as many portions into the coming step as may be on their way."""
        if self._tiers.disk is None:
            self._waiting.clear()
        while self._waiting and self._under_way < self._batches:
            if not self._order_portion():
                break

    @property
    def _under_way(self) -> int:
        return self._orders.moves.under_way[Path.HOST_TO_DISK]

    def _order_portion(self) -> bool:
        """One portion. False if the disk tier has no slot to give."""
        assert self._tiers.disk is not None
        op = self._orders.next_op()
        blocks: list[BlockHash] = []
        disk: list[int] = []
        full = False
        while self._waiting and len(blocks) < self._batch_blocks and not full:
            block = next(iter(self._waiting))
            del self._waiting[block]
            if not self._tiers.host.readable(block) or block in self._tiers.disk:
                continue
            taken = self._tiers.reserve(Tier.DISK, [block], op)
            if taken.slots:
                blocks.append(block)
                disk.extend(taken.slots)
            else:
                full = True
        if blocks:
            host = self._tiers.host.pin(blocks)
            fills = self._tiers.host.fills(host)
            self._orders.spill(op, blocks, host, fills, disk)
        return not full

    def clear(self) -> None:
        """Forget what waits."""
        self._waiting.clear()
