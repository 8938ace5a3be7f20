"""Leases granted ahead: what a prefill engine keeps for the decode engine that goes on with it.

The lease begins when the prefill engine's request ends, and its token travels with the answer to
whoever routes requests, and on to the decode engine. That one's leader names it when it asks for
the blocks, renews it while its request waits, and releases it when the blocks have come.

Where the blocks are read from, is decided at the beginning:

    on the device   They are held there, and the ranks let others read them (lent_blocks.py).

    in the tiers    What can be read there is pinned, and what is still being saved will be as it
                    arrives. Whoever names the lease gets an ordinary one (lending.py) once
                    nothing is being saved any more.

Whoever names a lease too early waits, for longer than for a disk, and not for ever.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import NamedTuple

from kvbm_schemas.block import HASH_BYTES, BlockHash, Tier, unpack
from kvbm_schemas.requests import LeaseAnswer, Leased, Refused
from kvbm_service.core.columns import pack_u32, pack_u64
from kvbm_service.core.effects import Answer, Effect
from kvbm_service.core.lending import ANSWER_MARGIN, Lending, LendingLimits
from kvbm_service.core.lent_blocks import LentBlocks, Loan
from kvbm_service.core.tiers import Tiers

MAX_HAND_OVERS = 4096
"""More open hand-overs than this are refused: the decode engine then finds what it can."""

MAX_CLAIMS = 8
"""Questions about one hand-over that wait. More are refused."""

MAX_HAND_OVER_SECONDS = 600.0
"""However often it is renewed, a hand-over does not last longer."""

UNKNOWN = "no such lease"


class _Claim(NamedTuple):
    """Somebody names the lease, and waits."""

    question: str
    hashes: bytes
    answer_by: float


@dataclass(slots=True)
class _HandOver:
    """One request's blocks that are kept for another engine."""

    until: float
    longest_until: float
    loan: Loan | None = None
    """None: in the tiers."""
    pinned: list[int] = field(default_factory=list)
    """Host slots."""
    saving: set[BlockHash] = field(default_factory=set)
    """Blocks on their way into a tier."""
    claims: list[_Claim] = field(default_factory=list)

    @property
    def ready(self) -> bool:
        """Whether nobody need wait any more."""
        return not self.saving and (self.loan is None or not self.loan.waits)


class HandOvers:
    """The open hand-overs of one node, by token."""

    def __init__(
        self,
        tiers: Tiers,
        lending: Lending,
        lent: LentBlocks,
        effects: list[Effect],
        limits: LendingLimits,
    ) -> None:
        self._tiers = tiers
        self._lending = lending
        self._lent = lent
        self._effects = effects
        self._limits = limits
        self._open: dict[str, _HandOver] = {}
        self._saving: dict[BlockHash, set[str]] = {}
        """Who waits for a block that is being saved."""

    def __len__(self) -> int:
        return len(self._open)

    # -- the engine's side -------------------------------------------------------------

    def begin(
        self, token: str, chain: Sequence[BlockHash], device_blocks: Sequence[int], now: float
    ) -> list[int] | None:
        """Keep these blocks for whoever names `token`; with no device blocks, in the tiers.

        Returns the device blocks that must not be reused until they are given back; None if
        nothing is handed over.
        """
        if len(self._open) >= MAX_HAND_OVERS or token in self._open or not chain:
            return None
        one = _HandOver(now + self._limits.lease_seconds, now + MAX_HAND_OVER_SECONDS)
        self._open[token] = one
        if device_blocks:
            one.loan = self._lent.lend(chain, device_blocks, self._limits.staging_seconds)
        if one.loan is not None:
            return one.loan.fresh
        self._keep_in_tiers(token, one, chain)
        return []

    def _keep_in_tiers(self, token: str, one: _HandOver, chain: Sequence[BlockHash]) -> None:
        for block in chain:
            if not self._tiers.is_known(block):
                break
            if self._tiers.is_coming(block):
                one.saving.add(block)
                self._saving.setdefault(block, set()).add(token)
            else:
                self._pin(one, block)

    def _pin(self, one: _HandOver, block: BlockHash) -> None:
        if self._tiers.host.readable(block) and self._lending.has_room:
            one.pinned += self._tiers.host.pin([block])

    # -- the bus's side ----------------------------------------------------------------

    def claim(
        self, token: str, hashes: bytes, question: str, epoch: int, now: float
    ) -> LeaseAnswer | None:
        """Another node's leader names the lease. None: an `Answer` to `question` follows."""
        one = self._open.get(token)
        if one is None or one.until <= now or len(one.claims) >= MAX_CLAIMS:
            return Refused(reason=UNKNOWN)
        if one.ready:
            return self._answer(one, hashes, question, epoch, now)
        answer_by = now + self._limits.hand_over_seconds * ANSWER_MARGIN
        one.claims.append(_Claim(question, hashes, answer_by))
        return None

    def renew(self, token: str, now: float) -> None:
        """The decode engine still waits. An unknown token changes nothing."""
        one = self._open.get(token)
        if one is not None:
            one.until = min(now + self._limits.lease_seconds, one.longest_until)

    def release(self, token: str, reason: str = UNKNOWN) -> None:
        """The decode engine has what it wants. An unknown token changes nothing."""
        one = self._open.pop(token, None)
        if one is None:
            return
        for claim in one.claims:
            self._effects.append(_answer(claim, Refused(reason=reason)))
        self._tiers.host.unpin(one.pinned)
        for block in one.saving:
            self._saving[block].discard(token)
            if not self._saving[block]:
                del self._saving[block]
        if one.loan is not None:
            self._lent.end(one.loan)

    def end_all(self, reason: str) -> None:
        """Nobody may read any more."""
        for token in list(self._open):
            self.release(token, reason)

    def tick(self, epoch: int, now: float) -> None:
        """Time has passed: end the leases and the waiting whose time is up."""
        for token, one in list(self._open.items()):
            if one.until <= now:
                self.release(token)
                continue
            late = [claim for claim in one.claims if claim.answer_by <= now]
            one.claims = [claim for claim in one.claims if claim.answer_by > now]
            self._answer_claims(one, late, epoch, now)

    # -- the ranks' side ---------------------------------------------------------------

    def saved(self, blocks: Iterable[BlockHash], epoch: int, now: float) -> None:
        """Saves of these blocks have ended, well or not."""
        if not self._saving:
            return
        for block in blocks:
            for token in self._saving.pop(block, ()):
                one = self._open[token]
                one.saving.discard(block)
                self._pin(one, block)
                self._answer_if_ready(one, epoch, now)

    def lent(self, op: int, rank: int, failed: bool, epoch: int, now: float) -> bool:
        """A rank has answered an order about device blocks. False if it was not asked."""
        if not self._lent.awaits(op):
            return False
        waiting = {
            token: one.loan
            for token, one in self._open.items()
            if one.loan is not None and op in one.loan.waits
        }
        if failed:
            for token in waiting:
                self.release(token, "a rank cannot lend")
        if self._lent.moved(op, rank) and not failed:
            for token, loan in waiting.items():
                loan.waits.discard(op)
                self._answer_if_ready(self._open[token], epoch, now)
        return True

    def rank_lost(self, reason: str) -> None:
        """A rank's process is no more."""
        self.end_all(reason)
        self._lent.rank_lost()

    # -- inside ------------------------------------------------------------------------

    def _answer_if_ready(self, one: _HandOver, epoch: int, now: float) -> None:
        if one.ready:
            claims, one.claims = one.claims, []
            self._answer_claims(one, claims, epoch, now)

    def _answer_claims(
        self, one: _HandOver, claims: Sequence[_Claim], epoch: int, now: float
    ) -> None:
        for claim in claims:
            answer = self._answer(one, claim.hashes, claim.question, epoch, now)
            if answer is not None:
                self._effects.append(_answer(claim, answer))

    def _answer(
        self, one: _HandOver, hashes: bytes, question: str, epoch: int, now: float
    ) -> LeaseAnswer | None:
        if one.until <= now:
            return Refused(reason=UNKNOWN)
        if one.loan is None:
            return self._lending.acquire(hashes, question, epoch, now, self._effects)
        if one.loan.waits:
            return Refused(reason="not all ranks lend yet")
        loan = one.loan
        names = list(takewhile(loan.blocks.__contains__, unpack(hashes)))
        if not names:
            return Refused(reason="not handed over")
        return Leased(
            lease=question,
            seconds=one.until - now,
            epoch=epoch,
            slots=pack_u32(loan.blocks[name] for name in names),
            fills=pack_u64(loan.fills[name] for name in names),
            agents=self._lending.agents,
            tier=Tier.DEVICE,
        )

    def check_integrity(self, settled: bool) -> None:
        """Whoever waits waits for something, and every loan will end."""
        loans = [one.loan for one in self._open.values() if one.loan is not None]
        self._lent.check_integrity(loans, settled)
        for token, one in self._open.items():
            assert not (one.ready and one.claims), "one waits for nothing"
            assert all(token in self._saving[block] for block in one.saving)


def _answer(claim: _Claim, answer: LeaseAnswer) -> Answer:
    return Answer(claim.question, answer, len(claim.hashes) // HASH_BYTES)
