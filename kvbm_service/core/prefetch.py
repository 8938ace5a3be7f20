"""Bringing blocks up while their request waits: from the own disk, and from other nodes.

Only for requests that the engine had no room for in a step: whoever can be loaded at once reads
from where the blocks are. Blocks of other nodes get a copy here only if they have been wanted
here before; others are read in place when their turn comes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice, takewhile
from typing import NamedTuple

from kvbm_schemas.block import BlockHash, Tier, pack
from kvbm_schemas.requests import Leased
from kvbm_service.core.effects import AskOwner, Effect, GiveBack
from kvbm_service.core.offload_filter import OffloadFilter
from kvbm_service.core.orders import Orders
from kvbm_service.core.peers import Peers
from kvbm_service.core.reads import Grant, Reader, Stage
from kvbm_service.core.tiers import Run, Tiers

MAX_LOOKED_AT = 16
"""Waiting requests that are looked at in one step: those that came first."""

MAX_ASKED = 256
"""Leases that are being asked for. Beyond, none is asked for."""


class _Asked(NamedTuple):
    """A lease that was asked for on `chain[start:end]` of a request."""

    request: str
    node: str
    start: int
    blocks: list[BlockHash]


class Prefetch:
    """One node's bringing up. At most `budget` blocks are brought for requests that wait."""

    def __init__(
        self,
        tiers: Tiers,
        orders: Orders,
        peers: Peers,
        hot: OffloadFilter,
        budget: int,
        transfer_seconds: float,
        answer_seconds: float,
    ) -> None:
        self._tiers = tiers
        self._orders = orders
        self._peers = peers
        self._hot = hot
        self._budget = budget
        self._transfer_seconds = transfer_seconds
        self._answer_seconds = answer_seconds
        self._brought = 0
        self._asked: dict[int, _Asked] = {}

    def order(
        self, waiting: Iterable[tuple[str, Reader]], effects: list[Effect], now: float
    ) -> None:
        """Put into the coming step what may be brought up for these requests, in their order."""
        if self._budget == 0:
            return
        for request, reader in islice(waiting, MAX_LOOKED_AT):
            if self._brought >= self._budget:
                return
            asking = reader.patience is not None and now < reader.patience
            idle = reader.stage in (Stage.IDLE, Stage.LOCATED) and not asking
            if reader.brought is None and idle:
                reader.brought = 0
                self._from_disk(reader)
                self._from_others(request, reader, effects, now)

    def let_go(self, reader: Reader) -> None:
        """The request waits no longer."""
        self._brought -= reader.brought or 0
        reader.brought = 0

    # -- from the own disk -------------------------------------------------------------

    def _from_disk(self, reader: Reader) -> None:
        for run in self._tiers.runs(reader.chain, reader.computed):
            if run.tier is Tier.DISK:
                self._fetch(reader, run)

    def _fetch(self, reader: Reader, run: Run) -> None:
        assert self._tiers.disk is not None
        room = self._budget - self._brought
        wanted = reader.chain[run.start : min(run.end, run.start + room)]
        if not wanted:
            return
        op = self._orders.next_op()
        taken = self._tiers.reserve(Tier.HOST, wanted, op)
        blocks = [wanted[index] for index in taken.indices]
        if not blocks:
            return
        disk = self._tiers.disk.pin(blocks)
        fills = self._tiers.disk.fills(disk)
        self._orders.put_into_step(self._orders.fetch(op, blocks, disk, fills, taken.slots))
        self._count(reader, len(blocks))

    def _count(self, reader: Reader, blocks: int) -> None:
        assert reader.brought is not None
        reader.brought += blocks
        self._brought += blocks

    # -- from other nodes --------------------------------------------------------------

    def _from_others(self, request: str, reader: Reader, effects: list[Effect], now: float) -> None:
        absent = self._tiers.absent(reader.chain, reader.computed)
        for segment, start, end in reader.located(absent):
            room = self._budget - self._brought
            blocks = list(self._hot_head(reader.chain[start : min(end, start + room)]))
            full = len(self._asked) >= MAX_ASKED
            if not blocks or full or not self._peers.can_ask(segment.node, now):
                return
            attempt = self._orders.next_op()
            self._asked[attempt] = _Asked(request, segment.node, start, blocks)
            effects.append(
                AskOwner(request, attempt, segment.node, start, pack(blocks), self._answer_seconds)
            )
            self._count(reader, len(blocks))

    def _hot_head(self, chain: Sequence[BlockHash]) -> Iterable[BlockHash]:
        """Those at the head of the chain that have been wanted here before."""
        return takewhile(self._hot.frequency, chain)

    def answered(
        self, attempt: int, answer: object, asked_at: float, now: float, effects: list[Effect]
    ) -> bool:
        """An owner answered or did not. False: it was not asked by us."""
        asked = self._asked.pop(attempt, None)
        if asked is None:
            return False
        if not isinstance(answer, Leased):
            return True
        grant = Grant.of(answer, asked.node, asked.start, asked_at)
        fits = len(grant.slots) <= len(asked.blocks)
        if not fits or not self._peers.knows(asked.node, answer.agents, answer.epoch):
            effects.append(GiveBack(asked.node, answer.lease))
            return True
        op = self._orders.next_op()
        leased = asked.blocks[: len(grant.slots)]
        taken = self._tiers.reserve(Tier.HOST, leased, op)
        if not taken.slots:
            effects.append(GiveBack(asked.node, answer.lease))
            return True
        blocks = [leased[index] for index in taken.indices]
        seconds = max(0.0, min(self._transfer_seconds, grant.deadline - now))
        self._orders.fetch_remote(op, blocks, grant, taken.indices, taken.slots, seconds)
        return True
