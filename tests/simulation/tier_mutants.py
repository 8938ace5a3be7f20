"""Bugs planted in what concerns the tiers: moves between them, staging, prefetching, survival."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from kvbm_schemas import step
from kvbm_schemas.block import BlockHash, Tier
from kvbm_schemas.requests import Leased
from kvbm_service import once
from kvbm_service.core import (
    leader,
    lending,
    lookups,
    moves,
    offload_filter,
    orders,
    prefetch,
    reads,
    spills,
    tiers,
)
from kvbm_service.core.accounts import Path
from kvbm_service.core.columns import pack_u32, pack_u64
from kvbm_service.core.effects import GiveBack
from tests.simulation.mutants import Mutant, Patch
from tests.simulation.weather import Weather

BOTH = Weather(nodes=1, host_slots=6, disk_slots=12, requests=80, filtered=False)
"""Host and disk, and no other node."""
BUSY = Weather(
    nodes=1, host_slots=4, disk_slots=16, requests=100, filtered=False, copy_seconds=0.01
)
"""The host tier is hardly large enough for what is on its way."""
PAIR = Weather(nodes=2, host_slots=6, disk_slots=24, requests=100, filtered=False, device_blocks=6)
"""Two nodes that find on each other's disk what has left the host tiers."""
ILL_HEARD = Weather(
    nodes=3, host_slots=4, disk_slots=24, requests=100, filtered=False, loss=0.2, device_blocks=6
)
WAITING = Weather(
    nodes=2, host_slots=12, disk_slots=24, requests=120, filtered=False, running=1,
    prefetch_share=0.5, device_blocks=6,
)  # fmt: skip
"""Engines that let requests wait."""
MORTAL = Weather(
    nodes=2, world_size=2, host_slots=8, disk_slots=16, requests=60, filtered=False, crashes=3.0,
    copy_seconds=0.005,
)  # fmt: skip


def _spill_without_pinning(patch: Patch) -> None:
    right = spills.Spills._order_portion

    def order_portion(self: spills.Spills) -> bool:
        before = set(self._orders.moves._open)
        more = right(self)
        for op, one in self._orders.moves._open.items():
            if op not in before and one.move.pinned is not None:
                self._tiers.unpin(*one.move.pinned)
                one.move = one.move._replace(pinned=None)
        return more

    patch.setattr(spills.Spills, "_order_portion", order_portion)


def _read_the_disk_without_pinning(patch: Patch) -> None:
    right = tiers.Tiers.pin_runs

    def pin_runs(self: tiers.Tiers, chain: Sequence[BlockHash], start: int) -> list[reads.Pinned]:
        pinned = right(self, chain, start)
        for piece in pinned:
            if piece.tier is Tier.DISK:
                self.unpin(Tier.DISK, piece.slots)
        return pinned

    def let_go(self: lookups.Lookups, plan: reads.Plan) -> None:
        for pinned in plan.pinned:
            if pinned.tier is Tier.HOST:
                self._tiers.unpin(Tier.HOST, pinned.slots)
        self._outbox.effects.extend(GiveBack(grant.node, grant.lease) for grant in plan.grants)

    patch.setattr(tiers.Tiers, "pin_runs", pin_runs)
    patch.setattr(lookups.Lookups, "let_go", let_go)


def _show_a_fetch_before_all_ranks(patch: Patch) -> None:
    right = moves.Moves.report

    def report(self: moves.Moves, op: int, rank: int, *how: Any) -> Any:
        one = self._open.get(op)
        if one is None or one.move.path is not Path.DISK_TO_HOST:
            return right(self, op, rank, *how)
        for other in range(self._world_size):
            settled = right(self, op, other, *how)
        return settled

    patch.setattr(moves.Moves, "report", report)


def _show_what_failed(patch: Patch) -> None:
    right = tiers.Tiers.settle
    patch.setattr(
        tiers.Tiers, "settle", lambda self, tier, slots, failed: right(self, tier, slots, set())
    )


def _believe_the_first_rank(patch: Patch) -> None:
    right = tiers._alike
    patch.setattr(tiers, "_alike", lambda survivors: right(survivors[:1]))


def _use_stamps_again(patch: Patch) -> None:
    patch.setattr(orders.Orders, "skip_ops", lambda self, used: None)


def _forget_to_forget(patch: Patch) -> None:
    patch.setattr(orders.Orders, "forget", lambda self: None)


def _keep_a_lost_disk(patch: Patch) -> None:
    patch.setattr(tiers.Tiers, "give_up_disk", lambda self: None)


def _keep_what_could_not_be_read(patch: Patch) -> None:
    patch.setattr(tiers.Tiers, "drop", lambda self, tier, blocks: None)


def _never_answer_who_waits_for_the_disk(patch: Patch) -> None:
    patch.setattr(lending.Lending, "fetched", lambda self, op, epoch, now: [])
    patch.setattr(lending.Lending, "tick", lambda self, epoch, now: [])


def _keep_the_budget(patch: Patch) -> None:
    patch.setattr(prefetch.Prefetch, "let_go", lambda self, reader: None)


def _lend_what_is_on_its_way(patch: Patch) -> None:
    def grant(
        self: lending.Lending, chain: Sequence[BlockHash], token: str, epoch: int, now: float
    ) -> Any:
        host = self._tiers.host
        slots = []
        for block in chain:
            if block not in host:
                break
            slots.append(host._slots[block])
        ready = [block for block in chain[: len(slots)] if host.readable(block)]
        self.leases.grant(token, host.pin(ready), now + self._limits.lease_seconds)
        return Leased(
            lease=token,
            seconds=self._limits.lease_seconds,
            epoch=epoch,
            slots=pack_u32(slots),
            fills=pack_u64(host.fills(slots)),
            agents=self._agents,
        )

    patch.setattr(lending.Lending, "_grant", grant)


def _drop_what_ranks_did_not_hear(patch: Patch) -> None:
    patch.setattr(leader.Leader, "unheard", lambda self, fetch: None)


def _rest_while_a_step_is_awaited(patch: Patch) -> None:
    patch.setattr(moves.Moves, "ask_by_step", lambda self, op: None)


def _give_back_before_the_read(patch: Patch) -> None:
    right = prefetch.Prefetch.answered

    def answered(
        self: prefetch.Prefetch, attempt: int, answer: Any, asked_at: float, now: float,
        effects: list[Any],
    ) -> bool:  # fmt: skip
        before = set(self._orders.moves._open)
        ours = right(self, attempt, answer, asked_at, now, effects)
        for op, one in self._orders.moves._open.items():
            if op not in before and one.move.grant is not None:
                effects.append(GiveBack(one.move.grant.node, one.move.grant.lease))
                one.move = one.move._replace(grant=None)
        return ours

    patch.setattr(prefetch.Prefetch, "answered", answered)


def _keep_what_was_read(patch: Patch) -> None:
    right = leader.Leader._settle

    def settle(self: leader.Leader, op: int, settled: moves.Settled, now: float) -> None:
        right(self, op, settled._replace(move=settled.move._replace(grant=None)), now)

    patch.setattr(leader.Leader, "_settle", settle)


def _say_nothing_of_what_makes_room(patch: Patch) -> None:
    patch.setattr(
        tiers.Tiers,
        "reserve",
        lambda self, tier, chain, fill, after=None: self.pool(tier).reserve(chain, fill),
    )


def _name_the_wrong_tier(patch: Patch) -> None:
    def reserve(self: tiers.Tiers, tier: Tier, *what: Any) -> Any:
        taken = self.pool(tier).reserve(*what)
        if taken.evicted:
            self._journal.removed(taken.evicted, Tier.HOST)
        return taken

    patch.setattr(tiers.Tiers, "reserve", reserve)


def _promise_beyond_a_gap(patch: Patch) -> None:
    def pieces(self: reads.Plan) -> list[Any]:
        return sorted([*self.pinned, *self.grants], key=lambda piece: piece.start)

    patch.setattr(reads.Plan, "pieces", property(pieces))


def _free_what_goes_to_disk_early(patch: Patch) -> None:
    right = leader.Leader.store
    patch.setattr(
        leader.Leader, "store", lambda self, *what, **more: (right(self, *what, **more)[0], [])
    )
    patch.setattr(leader.Leader, "take_freed_blocks", lambda self: [])


def _fetch_as_often_as_told(patch: Patch) -> None:
    def begin(self: once.Once, op: int, tell: Callable[[step.Moved], None], blocks: int) -> bool:
        self._waiting.setdefault(op, []).append(tell)
        return True

    patch.setattr(once.Once, "begin", begin)


def _let_all_blocks_through(patch: Patch) -> None:
    patch.setattr(
        offload_filter.OffloadFilter, "offer", lambda self, blocks, now: [True for _ in blocks]
    )


def _give_the_disks_time_again_and_again(patch: Patch) -> None:
    right = lookups.Lookups._ask_owners

    def ask_owners(
        self: lookups.Lookups, request: str, reader: reads.Reader, plan: reads.Plan, now: float
    ) -> None:
        reader.staging = False
        right(self, request, reader, plan, now)

    patch.setattr(lookups.Lookups, "_ask_owners", ask_owners)


TIER_MUTANTS = [
    Mutant("spill without pinning", _spill_without_pinning, BUSY, "while it is copied"),
    Mutant("read the disk without pinning", _read_the_disk_without_pinning,
           Weather(nodes=1, host_slots=1, disk_slots=5, disk_only=True, requests=80,
                   device_blocks=14, copy_seconds=0.005), "in use"),
    Mutant("show a fetch before all ranks have it", _show_a_fetch_before_all_ranks,
           Weather(nodes=2, world_size=2, host_slots=6, disk_slots=24, requests=100,
                   filtered=False, copy_seconds=0.005), "is not there"),
    Mutant("show what failed", _show_what_failed,
           Weather(nodes=1, host_slots=6, disk_slots=12, requests=40, filtered=False,
                   copy_failure=0.2), "is not there"),
    Mutant("adopt what the first rank has", _believe_the_first_rank, MORTAL,
           "adopted what is not there"),
    Mutant("use stamps of an earlier life again", _use_stamps_again, MORTAL, "stamp"),
    Mutant("forget to forget", _forget_to_forget,
           Weather(nodes=2, host_slots=8, disk_slots=16, requests=60, crashes=3.0, resets=0.1),
           "were to be forgotten"),
    Mutant("keep a disk that is lost", _keep_a_lost_disk,
           Weather(nodes=2, host_slots=6, disk_slots=24, requests=60, filtered=False,
                   disk_losses=3.0), "a disk that is lost"),
    Mutant("keep what could not be read", _keep_what_could_not_be_read,
           Weather(nodes=2, host_slots=4, disk_slots=24, requests=60, filtered=False,
                   decay=30.0), "could not be read"),
    Mutant("never answer who waits for the disk", _never_answer_who_waits_for_the_disk, PAIR,
           "owes an answer"),
    Mutant("keep the budget for prefetching", _keep_the_budget, WAITING, "may prefetch"),
    Mutant("lend what is on its way", _lend_what_is_on_its_way, PAIR, "is not there"),
    Mutant("drop what ranks did not hear", _drop_what_ranks_did_not_hear, ILL_HEARD,
           "still moves"),
    Mutant("rest while a step is awaited", _rest_while_a_step_is_awaited,
           Weather(nodes=4, host_slots=3, disk_slots=24, requests=30, filtered=False, loss=0.3,
                   device_blocks=6), "still moves"),
    Mutant("give a lease back before the read", _give_back_before_the_read, WAITING,
           "without a lease"),
    Mutant("keep the lease of what was read", _keep_what_was_read, WAITING, "had to run out"),
    Mutant("say nothing of what makes room", _say_nothing_of_what_makes_room, BOTH,
           "does not know"),
    Mutant("name the wrong tier", _name_the_wrong_tier, BOTH, "does not know"),
    Mutant("promise blocks beyond a gap", _promise_beyond_a_gap,
           Weather(nodes=3, host_slots=4, disk_slots=12, requests=100, loss=0.2), "wrong bytes"),
    Mutant("free what goes to disk early", _free_what_goes_to_disk_early,
           Weather(nodes=1, host_slots=2, disk_slots=24, disk_only=True, requests=60,
                   copy_seconds=0.01), "other bytes"),
    Mutant("fetch as often as told", _fetch_as_often_as_told,
           Weather(nodes=2, host_slots=4, disk_slots=24, requests=100, filtered=False,
                   duplication=0.3, longest_delay=0.03, device_blocks=6, copy_seconds=0.005),
           "while it is copied"),
    Mutant("let all blocks go to disk", _let_all_blocks_through,
           Weather(nodes=1, disk_slots=12, requests=20), "nobody wants"),
    Mutant("give the disk's time again and again", _give_the_disks_time_again_and_again,
           Weather(nodes=3, host_slots=4, disk_slots=24, requests=100, filtered=False,
                   disk_slowness=5.0, copy_seconds=0.01, lease_seconds=0.1, device_blocks=6,
                   loss=0.01),
           "has waited"),
]  # fmt: skip
