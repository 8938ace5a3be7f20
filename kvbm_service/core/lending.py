"""Leases for other nodes: their ranks read our host slots, which stay put meanwhile.

What lies on our disk only is brought into the host tier first. The one who asked waits for that,
but not for ever: when its time is up it gets what is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from kvbm_schemas.block import BlockHash, Tier, unpack
from kvbm_schemas.requests import LeaseAnswer, Leased, Refused
from kvbm_service.core.columns import pack_u32, pack_u64
from kvbm_service.core.effects import Answer, Effect, TellRanks
from kvbm_service.core.lease import LeaseTable
from kvbm_service.core.orders import Orders
from kvbm_service.core.pool import Pool
from kvbm_service.core.tiers import Tiers

LEASABLE_SHARE = 0.5
"""At most this share of the host tier may be pinned before leases are refused: the node's own
engine must always find slots to save to."""

MAX_STAGED = 64
"""Lease requests that wait for the disk. Beyond, they get what is in the host tier already."""

ANSWER_MARGIN = 0.5
"""The owner answers when this share of the time is over that it may let the other one wait."""


class LendingLimits(NamedTuple):
    """For how long."""

    lease_seconds: float = 30.0
    staging_seconds: float = 0.2
    """How long a lease request may wait for the disk."""
    hand_over_seconds: float = 2.0
    """How long it may wait for what is being handed over."""


class _Staged(NamedTuple):
    """A lease request that waits for blocks to come up from the disk."""

    chain: list[BlockHash]
    ops: set[int]
    """Fetches that bring them and are under way."""
    answer_by: float


class Lending:
    """The open leases on one node's blocks."""

    def __init__(
        self, tiers: Tiers, orders: Orders, agents: tuple[str, ...], limits: LendingLimits
    ) -> None:
        self.leases = LeaseTable()
        self._tiers = tiers
        self._orders = orders
        self._agents = agents
        self._limits = limits
        self._staged: dict[str, _Staged] = {}
        self._coming: dict[BlockHash, int] = {}
        """Blocks on their way up, and the fetch that brings each."""

    @property
    def agents(self) -> tuple[str, ...]:
        """The processes whose memory is lent."""
        return self._agents

    @property
    def has_room(self) -> bool:
        """Whether another block may be pinned for other nodes."""
        return self._room > 0

    def acquire(
        self, hashes: bytes, token: str, epoch: int, now: float, effects: list[Effect]
    ) -> LeaseAnswer | None:
        """Another node's leader wants to read this chain. None: an `Answer` follows."""
        chain = unpack(hashes)
        ops = self._stage(chain, effects)
        if not ops:
            return self._grant(chain, token, epoch, now)
        answer_by = now + self._limits.staging_seconds * ANSWER_MARGIN
        self._staged[token] = _Staged(chain, ops, answer_by)
        return None

    def release(self, token: str) -> None:
        """The reader is done. An unknown token changes nothing."""
        self._tiers.host.unpin(self.leases.release(token))

    def end_all(self, reason: str) -> list[Answer]:
        """Nobody may read any more, or is to wait."""
        for slots in self.leases.end_all():
            self._tiers.host.unpin(slots)
        waiting, self._staged = self._staged, {}
        refused = Refused(reason=reason)
        return [Answer(token, refused, len(one.chain)) for token, one in waiting.items()]

    def meet(self, agents: tuple[str, ...]) -> None:
        """From now on these are the processes whose memory is lent."""
        self._agents = agents

    def fetched(self, op: int, epoch: int, now: float) -> list[Answer]:
        """Blocks have come up from the disk, or will not: answer who waited for them."""
        self._coming = {block: by for block, by in self._coming.items() if by != op}
        waited = [token for token, one in self._staged.items() if op in one.ops]
        for token in waited:
            self._staged[token].ops.remove(op)
        return self._answer([t for t in waited if not self._staged[t].ops], epoch, now)

    def tick(self, epoch: int, now: float) -> list[Answer]:
        """Time has passed: end the leases and the waiting whose time is up."""
        for slots in self.leases.expire(now):
            self._tiers.host.unpin(slots)
        late = [token for token, one in self._staged.items() if one.answer_by <= now]
        return self._answer(late, epoch, now)

    def _answer(self, tokens: Sequence[str], epoch: int, now: float) -> list[Answer]:
        chains = [(token, self._staged.pop(token).chain) for token in tokens]
        return [
            Answer(token, self._grant(chain, token, epoch, now), len(chain))
            for token, chain in chains
        ]

    def _grant(
        self, chain: Sequence[BlockHash], token: str, epoch: int, now: float
    ) -> Leased | Refused:
        host = self._tiers.host
        here = host.match(chain)
        if here == 0:
            return Refused(reason="not here")
        count = host.pinnable(chain[:here], self._room)
        if count == 0 or self.leases.full:
            return Refused(reason="too many blocks are leased or in use")
        slots = host.pin(chain[:count])
        self.leases.grant(token, slots, now + self._limits.lease_seconds)
        return Leased(
            lease=token,
            seconds=self._limits.lease_seconds,
            epoch=epoch,
            slots=pack_u32(slots),
            fills=pack_u64(host.fills(slots)),
            agents=self._agents,
        )

    @property
    def _room(self) -> int:
        host = self._tiers.host
        return int(host.capacity * LEASABLE_SHARE) - host.pinned - len(self._coming)

    def _stage(self, chain: Sequence[BlockHash], effects: list[Effect]) -> set[int]:
        """Begin to bring up what only the disk has. Returns the fetches to be waited for."""
        host, disk = self._tiers.host, self._tiers.disk
        if disk is None or len(self._staged) >= MAX_STAGED:
            return set()
        end, absent = 0, False
        awaited: set[int] = set()
        for block in chain[: max(0, self._room)]:
            if not host.readable(block):
                coming = self._coming.get(block) if block in host else None
                if coming is not None:
                    awaited.add(coming)
                elif block in host or not disk.readable(block):
                    break
                else:
                    absent = True
            end += 1
        if absent and (op := self._fetch(disk, chain[:end], effects)) is not None:
            awaited.add(op)
        return awaited

    def _fetch(self, disk: Pool, chain: Sequence[BlockHash], effects: list[Effect]) -> int | None:
        """Have the ranks fetch what is not in the host tier; None if that has no slot to give."""
        op = self._orders.next_op()
        taken = self._tiers.reserve(Tier.HOST, chain, op)
        blocks = [chain[index] for index in taken.indices]
        if not blocks:
            return None
        self._coming.update(dict.fromkeys(blocks, op))
        pinned = disk.pin(blocks)
        fetch = self._orders.fetch(op, blocks, pinned, disk.fills(pinned), taken.slots)
        effects.append(TellRanks(fetch, self._limits.staging_seconds))
        return op

    def check_integrity(self) -> None:
        """Every open lease will end, and whoever waits waits for something."""
        self.leases.check_integrity()
        assert all(one.ops for one in self._staged.values()), "one waits for nothing"
