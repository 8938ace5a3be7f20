"""The authority on one node's blocks: what is where, what goes, who may read.

Called from two sides, never at the same time (the shell holds a lock): the engine's scheduler
asks, stores and loads; the bus brings answers and other nodes' requests. `now` is any clock
that never goes back. What must happen outside is left in `take_effects` and `take_commands`,
and what has happened in `take_accounts`.
"""

from __future__ import annotations

from collections.abc import Container, Sequence

from kvbm_schemas import step
from kvbm_schemas.block import HASH_BYTES, BlockHash, Tier
from kvbm_schemas.events import Beat
from kvbm_schemas.records import RankRecord, TierStatus
from kvbm_schemas.requests import LeaseAnswer, Leased, Located, Refused
from kvbm_service.core.accounts import Account, Path, Refusal
from kvbm_service.core.columns import pack_u32, unpack_u32, unpack_u64
from kvbm_service.core.crew import Crew, State
from kvbm_service.core.effects import Answer, Effect, GiveBack, Publish
from kvbm_service.core.hand_overs import HandOvers
from kvbm_service.core.journal import Journal
from kvbm_service.core.lending import Lending, LendingLimits
from kvbm_service.core.lent_blocks import LentBlocks
from kvbm_service.core.limits import Limits
from kvbm_service.core.load_order import LoadOrder
from kvbm_service.core.loads import Load, Loads
from kvbm_service.core.lookups import Lookups
from kvbm_service.core.moves import Move, Settled
from kvbm_service.core.offload_filter import OffloadFilter
from kvbm_service.core.orders import Orders
from kvbm_service.core.outbox import Outbox
from kvbm_service.core.peers import Peers
from kvbm_service.core.prefetch import Prefetch
from kvbm_service.core.reads import NO_HITS, Hits, Origin, Reader
from kvbm_service.core.salvage import Salvage
from kvbm_service.core.snapshot import Snapshot
from kvbm_service.core.spills import Spills
from kvbm_service.core.tiers import Tiers

RANK_MISSING = "a rank is missing"
"""Why nothing is lent."""

MAX_LOST_LOADS = 65_536
"""Loads given up that the engine has not been told of. Beyond, the oldest are dropped."""


class Leader:
    """One node's blocks in its tiers, and the read and write paths through them."""

    def __init__(self, ranks: Sequence[RankRecord], limits: Limits, instance: str = "") -> None:
        self.journal = Journal()
        self.tiers = Tiers(
            host_slots=min(rank.slab.slots for rank in ranks),
            disk_slots=min(rank.disk_slots for rank in ranks),
            journal=self.journal,
        )
        self.peers = Peers(tuple(rank.slab.layout for rank in ranks))
        self.crew = Crew([rank.agent for rank in ranks])
        self.disk_lost = ""
        """Why there is no disk tier any more."""
        self.outbox = Outbox(block_bytes=sum(rank.slab.slot_bytes for rank in ranks))
        self._limits = limits
        self._save_to = Tier.DISK if limits.disk_only else Tier.HOST
        self.orders = Orders(len(ranks), self._save_to, instance)
        self.lending = Lending(
            self.tiers,
            self.orders,
            agents=self.crew.agents,
            limits=LendingLimits(limits.lease_seconds, limits.staging_seconds),
        )
        lends = all(rank.device is not None for rank in ranks)
        self.lent = LentBlocks(
            self.orders,
            self.outbox.effects,
            world_size=len(ranks),
            room=limits.lent_blocks if lends else 0,
        )
        self.hand_overs = HandOvers(
            self.tiers,
            self.lending,
            self.lent,
            self.outbox.effects,
            LendingLimits(limits.lease_seconds, limits.staging_seconds, limits.hand_over_seconds),
        )
        self.spills = Spills(self.tiers, self.orders, limits.spill, self._new_filter())
        self._hot = OffloadFilter(2, limits.decay_seconds, limits.filter_entries)
        """Blocks of other nodes that were loaded here."""
        self.prefetch = Prefetch(
            self.tiers,
            self.orders,
            self.peers,
            self._hot,
            budget=0 if limits.disk_only else int(self.tiers.host.capacity * limits.prefetch_share),
            transfer_seconds=limits.transfer_seconds,
            answer_seconds=limits.lookup_seconds,
        )
        self.lookups = Lookups(
            self.tiers, self.orders, self.peers, self.prefetch, self.outbox, limits
        )
        self.loads = Loads(
            ranks[0].node, len(ranks), self.tiers, self.orders, self.peers, self.outbox,
            limits.transfer_seconds,
        )  # fmt: skip
        self._unsaved: set[str] = set()
        """Requests of which no further block is to be saved."""
        self._freed_blocks: list[int] = []
        self._lost_loads: list[step.LoadResult] = []
        self._salvage = Salvage()
        self._void = 0
        """Ops up to this number were given up."""

    def _new_filter(self) -> OffloadFilter | None:
        limits = self._limits
        if limits.min_frequency == 0 or limits.disk_only:
            return None
        return OffloadFilter(limits.min_frequency, limits.decay_seconds, limits.filter_entries)

    # -- read path, engine side ------------------------------------------------------

    def arrive(
        self, request: str, chain: list[BlockHash], now: float, origin: Origin | None = None
    ) -> None:
        """A request is there; start looking for its blocks.

        `origin`: a prefill engine has computed it, and hands its blocks over.
        """
        self._unsaved.discard(request)
        self.lookups.arrive(request, chain, now, origin)

    def match(self, request: str, computed: int, now: float) -> int | None:
        """How many blocks after the first `computed` can be loaded; None: ask again.

        May be asked any number of times. Answers within two lookup deadlines, and the staging
        deadline if blocks are on another node's disk, or that of a hand-over.
        """
        if not self.crew.whole:
            return self.lookups.nothing(request)
        return self.lookups.match(request, computed, now)

    def load(self, request: str, computed: int, device_blocks: Sequence[int], now: float) -> None:
        """Fill `device_blocks` with the chain's blocks from `computed` on, as `match` promised.

        With no device blocks, the engine does not want what was promised. If a rank has been
        lost since the promise, the load is among `take_lost_loads`.
        """
        reader = self.lookups.promised(request)
        if not device_blocks:
            self.lookups.release_origin(request)
        if reader is None:
            assert not device_blocks, f"{request} was promised nothing"
            return
        if not device_blocks:
            self.lookups.decline(reader)
            return
        if self.crew.state in (State.BROKEN, State.SETTLING):
            self.lookups.release_origin(request)
            self.lookups.break_promise(reader)
            self._tell_lost(0, request, device_blocks)
            return
        plan = reader.plan
        assert plan is not None
        assert plan.start <= computed, "other than was promised"
        assert computed + len(device_blocks) <= plan.end, "more than was promised"
        load = self.loads.begin(request, reader, computed, device_blocks, now)
        self.lookups.load(reader, load.op, load.order.hits)
        self._use_remote(reader, load.order, now)

    def hits(self, request: str) -> Hits:
        """Where the blocks of the request's last load come from."""
        reader = self.lookups.readers.get(request)
        return reader.hits if reader else NO_HITS

    def finish(self, request: str) -> None:
        """The request is over, however it ended. A load under way goes on by itself."""
        self._unsaved.discard(request)
        self.lookups.finish(request)

    # -- write path, engine side -------------------------------------------------------

    def store(
        self,
        chain: Sequence[BlockHash],
        device_blocks: Sequence[int],
        *,
        request: str = "",
        after: BlockHash | None = None,
        priorities: Sequence[int] | None = None,
    ) -> tuple[int, list[int]]:
        """The engine computes these full blocks in the coming step; save those not here yet.

        `chain[0]` follows the block `after` of `request`. Engines that have no priorities give
        none. Returns how many blocks are dealt with (offer the rest again), and the device
        blocks that must not be reused until `take_freed_blocks` returns them.
        """
        if not (self.crew.whole and self.tiers.has(self._save_to)):
            return len(chain), []
        offered = self._wanted(chain, request, priorities)
        room = self._limits.held_blocks - self.orders.held_blocks
        pool = self.tiers.pool(self._save_to)
        head, room_is_short = len(offered), False
        for position, index in enumerate(offered):
            if chain[index] not in pool:
                room -= 1
                if room < 0:
                    head, room_is_short = position, True
                    break
        dealt_with = offered[head] if room_is_short else len(chain)
        offered = offered[:head]
        op = self.orders.save_op
        taken = self.tiers.reserve(self._save_to, [chain[index] for index in offered], op, after)
        indices = [offered[position] for position in taken.indices]
        held = [device_blocks[index] for index in indices]
        self.orders.save([chain[index] for index in indices], taken.slots, held)
        absent = next((i for i in offered if chain[i] not in pool), None)
        if absent is not None:
            self.outbox.tell(Refusal(f"{self._save_to} is full", 1))
        return dealt_with if absent is None else absent, held

    def _wanted(
        self, chain: Sequence[BlockHash], request: str, priorities: Sequence[int] | None
    ) -> list[int]:
        """Which of these blocks are worth saving, as indices."""
        if request in self._unsaved:
            return []
        end = len(chain)
        least = self._limits.min_priority
        if least and priorities is not None:
            low = (index for index, priority in enumerate(priorities) if priority < least)
            end = next(low, end)
            if end < len(chain):
                self._unsaved.add(request)
                self.outbox.tell(Refusal("priority", len(chain) - end))
        reader = self.lookups.readers.get(request)
        if reader is None or not reader.in_place:
            return list(range(end))
        return [index for index in range(end) if chain[index] not in reader.in_place]

    def hand_over(
        self, token: str, chain: Sequence[BlockHash], device_blocks: Sequence[int], now: float
    ) -> list[int] | None:
        """Keep a request's full blocks for the engine that goes on with it.

        That one's leader names `token`. `device_blocks` holds `chain`, and is complete; if some
        of it may not be lent, give none: the blocks are then lent from the tiers. Returns the
        device blocks that must not be reused until `take_freed_blocks` returns them; None:
        nothing is handed over.
        """
        if not self.crew.whole:
            return None
        return self.hand_overs.begin(token, chain, device_blocks, now)

    def take_commands(self, now: float) -> step.StepCommands:
        """Everything the ranks have to do around the coming forward pass."""
        self.lookups.steps += 1
        if self.crew.whole:
            self.spills.order()
            self.prefetch.order(self.lookups.waiting.items(), self.outbox.effects, now)
        return self.orders.take(*self.peers.take_news(), self.crew.meant, self.crew.fence)

    def report(self, results: step.StepResults, now: float) -> None:
        """A rank has finished some of what it was told."""
        if results.disk_lost and not self.disk_lost:
            self.disk_lost = results.disk_lost
            self.tiers.give_up_disk()
            self.spills.clear()
        for moved in results.moved:
            self.moved(moved, results.rank, now)
        for result in results.loads:
            self._load_reported(result, results.rank, now)

    def take_freed_blocks(self) -> list[int]:
        """Device blocks that `store` held and that may be reused now."""
        freed, self._freed_blocks = self._freed_blocks, []
        return freed + self.lent.take_freed()

    def take_lost_loads(self) -> list[step.LoadResult]:
        """Loads that some rank, which is no more, will not report: none of their blocks arrived.

        Nobody writes to their device blocks any more.
        """
        lost, self._lost_loads = self._lost_loads, []
        return lost

    @property
    def busy(self) -> bool:
        """Whether ranks still have something to report, or to be told."""
        awaited = len(self.loads) or self.orders.moves.step_awaited or self.crew.fence
        awaited = awaited or self.lent.awaited
        return bool(awaited or self.orders.waiting or len(self.spills))

    @property
    def holds_device_blocks(self) -> bool:
        """Whether the engine will get device blocks back by itself."""
        return self.orders.held_blocks > 0 or self.lent.coming_back

    def reset(self) -> None:
        """Forget every block, those on their way included, for this life and later ones."""
        self.lookups.reset()
        self.hand_overs.end_all("all blocks are forgotten")
        self.spills.clear()
        self.tiers.clear()
        self.orders.forget()
        self._salvage.forget()

    def adopt(self, survivors: Sequence[step.Survivors]) -> int:
        """Take over what an earlier life left in one tier; `survivors` are those of each rank.

        To be called before anything is stored. Returns how many blocks that were.
        """
        for rank in survivors:
            self.orders.skip_ops(max(unpack_u64(rank.fills), default=0))
        return self.tiers.adopt(survivors)

    # -- ranks that go and come ------------------------------------------------------------

    def ranks_away(self, ranks: Sequence[int]) -> None:
        """These ranks cannot be seen, all others can: promise nothing until they are back.

        What is under way goes on: they may be working on it.
        """
        self.crew.away(ranks)
        if ranks:
            self.hand_overs.end_all(RANK_MISSING)
            self._answer_late(self.lending.end_all(RANK_MISSING))

    def rank_lost(self, rank: int, now: float) -> None:
        """A rank's process is no more, and with it its share of every block.

        Nothing is promised until another has its place and all are at rest. What is under way
        ends as failed, as soon as the other ranks are done with it.
        """
        self._salvage.begin(self.tiers.held())
        self.crew.lost(rank)
        self.hand_overs.rank_lost(RANK_MISSING)
        self.spills.clear()
        self._answer_late(self.lending.end_all(RANK_MISSING))
        self.tiers.clear()
        untold = self.orders.drop()
        self._void = self.orders.last_op
        self._give_up(now, rank, untold)

    def rank_took_place(
        self, record: RankRecord, survivors: Sequence[step.Survivors], now: float
    ) -> None:
        """Another process has a rank's place; `survivors` is what it found of the one before."""
        if record.agent in self.crew.agents:
            return
        if not self.crew.is_lost(record.rank):
            self.rank_lost(record.rank, now)
        self._salvage.found(record.rank, survivors)
        self.crew.took_place(record.rank, record.agent, fence=self.orders.next_op())
        self.lending.meet(self.crew.agents)
        self.peers.tell_again()

    def _all_at_rest(self, now: float) -> None:
        """Nothing older is under way on any rank, nor will be begun."""
        self._give_up(now)
        self.lent.all_at_rest()
        for had in self._salvage.end():
            self.adopt(had)

    def _give_up(self, now: float, rank: int | None = None, untold: Container[int] = ()) -> None:
        for op, settled in self.orders.moves.give_up(RANK_MISSING, rank, untold):
            self._settle(op, settled, now)
        for load in self.loads.give_up(RANK_MISSING, now, rank, untold):
            self._load_ended(load, now)

    # -- bus side ------------------------------------------------------------------------

    def located(self, request: str, attempt: int, answer: Located | None, now: float) -> None:
        """The registry answered, or (None) could not."""
        self.lookups.located(request, attempt, answer, now)

    def answered(
        self,
        request: str,
        attempt: int,
        node: str,
        start: int,
        answer: Leased | Refused | None,
        asked_at: float,
        now: float,
    ) -> None:
        """An owner answered, or (None) did not. A lease that nobody waits for is given back."""
        if answer is None:
            self.peers.shun(node, now)
        if isinstance(answer, Leased) and not self.crew.whole:
            self.outbox.effects.append(GiveBack(node, answer.lease))
            answer = Refused(reason=RANK_MISSING)
        if not self.prefetch.answered(attempt, answer, asked_at, now, self.outbox.effects):
            self.lookups.answered(request, attempt, node, start, answer, asked_at)

    def acquire(
        self, hashes: bytes, token: str, now: float, handed_over: str = ""
    ) -> LeaseAnswer | None:
        """Another node's leader wants to read this chain's blocks, which were `handed_over`.

        None: they are on disk only, or on their way, and the effect `Answer` follows.
        """
        if not self.crew.whole:
            return Refused(reason=RANK_MISSING)
        epoch = self.journal.epoch
        if handed_over:
            answer = self.hand_overs.claim(handed_over, hashes, token, epoch, now)
        else:
            answer = self.lending.acquire(hashes, token, epoch, now, self.outbox.effects)
        if isinstance(answer, Refused):
            self.outbox.tell(Refusal(answer.reason, len(hashes) // HASH_BYTES))
        return answer

    def release(self, token: str) -> None:
        """The reader is done. An unknown token changes nothing."""
        self.lending.release(token)
        self.hand_overs.release(token)

    def renew(self, token: str, now: float) -> None:
        """A decode engine still needs what was handed over. An unknown token changes nothing."""
        self.hand_overs.renew(token, now)

    def moved(self, moved: step.Moved, rank: int, now: float) -> None:
        """A rank has come to the end of a move."""
        if self.crew.at_rest(moved.op, rank):
            self._all_at_rest(now)
        failed = bool(moved.failed)
        if self.hand_overs.lent(moved.op, rank, failed, self.journal.epoch, now):
            return
        settled = self.orders.moves.report(
            moved.op, rank, unpack_u32(moved.failed), moved.reason, moved.seconds
        )
        if settled is not None:
            self._settle(moved.op, settled, now)

    def unheard(self, order: step.Fetch | step.Lend) -> None:
        """Some rank said nothing to `TellRanks`: tell it again, by way that loses nothing.

        A rank carries out each op once, and repeats what it said of it.
        """
        if order.op > self._void:
            self.orders.put_into_step(order)

    def begin_snapshot(self) -> Snapshot:
        """A copy of what is held, to be taken in slices so that nobody has to wait."""
        return Snapshot(self.tiers, self.journal)

    def snapshot(self) -> tuple[Beat, list[tuple[Tier, list[BlockHash]]]]:
        """All readable blocks by tier, and the last event they include; takes its time."""
        return self.journal.beat(), self.tiers.snapshot()

    def status(self) -> tuple[TierStatus, ...]:
        """How full the tiers are."""
        return self.tiers.status()

    def tick(self, now: float) -> None:
        """Time has passed: end what is overdue."""
        self._answer_late(self.lending.tick(self.journal.epoch, now))
        self.hand_overs.tick(self.journal.epoch, now)
        self.lookups.tick(now)

    def take_effects(self) -> list[Effect]:
        """What is to be done on the bus, in order."""
        return [*map(Publish, self.journal.take()), *self.outbox.take_effects()]

    def take_accounts(self) -> list[Account]:
        """What has happened since the last call."""
        return self.outbox.take_accounts()

    def check_integrity(self) -> None:
        """All tables agree with each other."""
        self.tiers.check_integrity()
        self.lending.check_integrity()
        self.hand_overs.check_integrity(self.crew.state in (State.WHOLE, State.AWAY))
        self.orders.moves.check_integrity()
        self.lookups.check_integrity()
        self.loads.check_integrity()
        self.crew.check_integrity()

    # -- inside --------------------------------------------------------------------------

    def _use_remote(self, reader: Reader, order: LoadOrder, now: float) -> None:
        """Blocks of other nodes get a copy here from the second time on that they are used."""
        came = [name for taken in order.taken if taken.node for name in taken.names]
        hot = self._hot.offer(came, now)
        reader.in_place.update(block for block, worth in zip(came, hot, strict=True) if not worth)

    def _settle(self, op: int, settled: Settled, now: float) -> None:
        """All ranks have come to the end of a move."""
        move = settled.move
        self._freed_blocks.extend(move.device_blocks)
        if move.pinned is not None:
            self.tiers.unpin(*move.pinned)
        if move.grant is not None:
            self.outbox.effects.append(GiveBack(move.grant.node, move.grant.lease))
        stored = self.tiers.settle(move.tier, move.slots, settled.failed)
        self._blame_move(move, settled.failed, now)
        self.outbox.transferred(
            move.path, len(move.blocks) - len(settled.failed), len(settled.failed),
            settled.reason, settled.seconds,
        )  # fmt: skip
        self.hand_overs.saved(move.blocks, self.journal.epoch, now)
        if move.path is Path.DISK_TO_HOST:
            self._answer_late(self.lending.fetched(op, self.journal.epoch, now))
        elif move.tier is Tier.HOST:
            self.outbox.tell(*self.spills.offer(stored, now))

    def _answer_late(self, answers: Sequence[Answer]) -> None:
        """Who had to wait for the disk need not wait any more."""
        self.outbox.effects.extend(answers)
        for _, answer, blocks in answers:
            if isinstance(answer, Refused):
                self.outbox.tell(Refusal(answer.reason, blocks))

    def _blame_move(self, move: Move, failed: set[int], now: float) -> None:
        """Blocks that could not be read from the disk are not there; nor is a node that failed."""
        if move.path is Path.DISK_TO_HOST:
            self.tiers.drop(Tier.DISK, [move.blocks[position] for position in failed])
        elif move.grant is not None and failed:
            self.peers.shun(move.grant.node, now)

    def _load_reported(self, result: step.LoadResult, rank: int, now: float) -> None:
        load = self.loads.report(result, rank, now)
        if load is not None:
            self._load_ended(load, now)

    def _load_ended(self, load: Load, now: float) -> None:
        self.lookups.let_go(load.order.plan)
        self.lookups.loaded(load.request, load.op, failed=bool(load.failed))
        # Blocks used in the host tier have earned a place on disk.
        self.outbox.tell(*self.spills.offer(load.arrived(Path.HOST_TO_DEVICE), now))
        if load.given_up:
            self._tell_lost(load.op, load.request, load.order.device_blocks)

    def _tell_lost(self, op: int, request: str, device_blocks: Sequence[int]) -> None:
        failed = pack_u32(device_blocks)
        self._lost_loads.append(
            step.LoadResult(op=op, request=request, failed_blocks=failed, reason=RANK_MISSING)
        )
        del self._lost_loads[:-MAX_LOST_LOADS]
