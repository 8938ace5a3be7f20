"""The authority on one node's blocks: what is where, what goes, who may read.

Called from two sides, never at the same time (the shell holds a lock): the engine's scheduler
asks, stores and loads; the bus brings answers and other nodes' requests. `now` is any clock
that never goes back. What must happen outside is left in `take_effects` and `take_commands`,
and what has happened in `take_accounts`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from kvbm_schemas import step
from kvbm_schemas.block import HASH_BYTES, BlockHash, Tier, pack
from kvbm_schemas.events import Beat, Loaded, Source
from kvbm_schemas.message import MAX_BATCH_BLOCKS
from kvbm_schemas.records import RankRecord, TierStatus
from kvbm_schemas.requests import LeaseAnswer, Leased, Located, Refused, Segment
from kvbm_service.core.accounts import Account, Looked, Path, Refusal, Transferred
from kvbm_service.core.columns import unpack_u32, unpack_u64
from kvbm_service.core.effects import Announce, AskOwner, AskRegistry, Effect, GiveBack, Publish
from kvbm_service.core.journal import Journal
from kvbm_service.core.lending import Lending, LendingLimits
from kvbm_service.core.load_order import LoadOrder
from kvbm_service.core.moves import Move, Settled
from kvbm_service.core.offload_filter import OffloadFilter
from kvbm_service.core.orders import Orders
from kvbm_service.core.peers import Peers
from kvbm_service.core.prefetch import Prefetch
from kvbm_service.core.reads import (
    MAX_PARTS,
    NO_HITS,
    Grant,
    Hits,
    Part,
    Plan,
    Reader,
    Stage,
)
from kvbm_service.core.spills import SpillLimits, Spills
from kvbm_service.core.tiers import Tiers

MAX_READERS = 65_536
"""Requests whose read path is followed; later ones are simply computed."""

MAX_ACCOUNTS = 65_536
"""Facts that nobody has fetched. Beyond, the oldest are dropped."""


class Limits(NamedTuple):
    """How long and how much."""

    lookup_seconds: float = 0.02
    """For each of the two questions, to the registry and to the owners. 0: never ask."""
    lease_seconds: float = 30.0
    transfer_seconds: float = 10.0
    held_blocks: int = 1024
    """Device blocks that unfinished saves may keep from the engine."""
    staging_seconds: float = 0.2
    """How much longer an owner may take whose blocks are on its disk."""
    disk_only: bool = False
    """Save to disk at once; the host tier only serves other nodes."""
    min_priority: int = 0
    """A request's blocks are saved up to the first whose priority is lower."""
    spill: SpillLimits = SpillLimits()
    min_frequency: int = 2
    """How often a block must have been used to go to disk. 0: all go."""
    decay_seconds: float = 600.0
    filter_entries: int = 1_000_000
    prefetch_share: float = 0.125
    """How much of the host tier may be filled for requests that wait."""


@dataclass(slots=True)
class LoadUnderWay:
    """A load that some ranks have not finished."""

    request: str
    order: LoadOrder
    waiting: set[int]
    began: float
    failed: set[int] = field(default_factory=set)
    reason: str = ""
    seconds: dict[Path, float] = field(default_factory=dict)


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
        self.online = False
        """Whether the registry and the owners can be asked."""
        self.disk_lost = ""
        """Why there is no disk tier any more."""
        self._limits = limits
        self._node = ranks[0].node
        self._world_size = len(ranks)
        self._block_bytes = sum(rank.slab.slot_bytes for rank in ranks)
        self._save_to = Tier.DISK if limits.disk_only else Tier.HOST
        self.orders = Orders(len(ranks), self._save_to, instance)
        self.lending = Lending(
            self.tiers,
            self.orders,
            agents=tuple(rank.agent for rank in ranks),
            limits=LendingLimits(limits.lease_seconds, limits.staging_seconds),
        )
        self.spills = Spills(self.tiers, self.orders, limits.spill, self._new_filter())
        self._hot = OffloadFilter(2, limits.decay_seconds, limits.filter_entries)
        """Blocks of other nodes that were loaded here."""
        self.prefetch = Prefetch(
            self.tiers,
            self.orders,
            self.peers,
            self._hot,
            budget=0
            if limits.disk_only
            else int(self.tiers.host.capacity * limits.prefetch_share),
            transfer_seconds=limits.transfer_seconds,
            answer_seconds=limits.lookup_seconds,
        )
        self._readers: dict[str, Reader] = {}
        self._waiting: dict[str, Reader] = {}
        """Those that the engine has not scheduled yet."""
        self._loads: dict[int, LoadUnderWay] = {}
        self._unsaved: set[str] = set()
        """Requests of which no further block is to be saved."""
        self._effects: list[Effect] = []
        self._accounts: list[Account] = []
        self._freed_blocks: list[int] = []

    def _new_filter(self) -> OffloadFilter | None:
        limits = self._limits
        if limits.min_frequency == 0 or limits.disk_only:
            return None
        return OffloadFilter(limits.min_frequency, limits.decay_seconds, limits.filter_entries)

    # -- read path, engine side ------------------------------------------------------

    def arrive(self, request: str, chain: list[BlockHash], now: float) -> None:
        """A request is there; start looking for its blocks."""
        self.finish(request)
        if len(self._readers) >= MAX_READERS or not chain:
            return
        reader = self._readers[request] = self._waiting[request] = Reader(chain)
        self.tiers.use(chain, now)
        self._ask_registry_if_needed(request, reader, 0, now)

    def match(self, request: str, computed: int, now: float) -> int | None:
        """How many blocks after the first `computed` can be loaded; None: ask again.

        May be asked any number of times. Answers within two lookup deadlines, and the staging
        deadline if blocks are on another node's disk.
        """
        reader = self._readers.get(request)
        if reader is None or reader.stage in (Stage.SPENT, Stage.LOADING):
            return 0
        reader.computed = computed
        if reader.patience is None:
            reader.patience = now + 2 * self._limits.lookup_seconds
            reader.staging = False
        found = self._advance(request, reader, computed, now)
        if found is not None:
            reader.patience = None
            reader.answered = True
        return found

    def load(
        self, request: str, computed: int, device_blocks: Sequence[int], now: float
    ) -> None:
        """Fill `device_blocks` with the chain's blocks from `computed` on, as `match` promised.

        With no device blocks, the engine does not want what was promised.
        """
        self._waiting.pop(request, None)
        reader = self._readers.get(request)
        if reader is None or reader.stage is not Stage.READY:
            assert not device_blocks, f"{request} was promised nothing"
            return
        plan = reader.plan
        assert plan is not None
        if not device_blocks:
            self._count(reader, NO_HITS)
            self._drop_plan(reader)
            return
        assert plan.start <= computed, "other than was promised"
        assert computed + len(device_blocks) <= plan.end, "more than was promised"
        op = self.orders.next_op()
        order = LoadOrder(reader, computed, device_blocks, self.tiers)
        self.orders.load(order.command(op, request, now, self._limits.transfer_seconds))
        self._loads[op] = LoadUnderWay(request, order, set(range(self._world_size)), began=now)
        reader.stage, reader.plan, reader.op = Stage.LOADING, None, op
        reader.hits = order.hits
        self._count(reader, order.hits)
        self._use_remote(reader, order, now)

    def hits(self, request: str) -> Hits:
        """Where the blocks of the request's last load come from."""
        reader = self._readers.get(request)
        return reader.hits if reader else NO_HITS

    def finish(self, request: str) -> None:
        """The request is over, however it ended. A load under way goes on by itself."""
        self._unsaved.discard(request)
        self._waiting.pop(request, None)
        reader = self._readers.pop(request, None)
        if reader is None:
            return
        self._count(reader, NO_HITS)
        if reader.plan is not None:
            self._drop_plan(reader)

    # -- write path, engine side -------------------------------------------------------

    def store(
        self,
        chain: Sequence[BlockHash],
        device_blocks: Sequence[int],
        *,
        request: str = "",
        depth: int = 0,
        after: BlockHash | None = None,
        priorities: Sequence[int] | None = None,
    ) -> tuple[int, list[int]]:
        """The engine computes these full blocks in the coming step; save those not here yet.

        `chain[0]` is block number `depth` of `request`, and follows `after`; a block's priority counts as 0 where
        none is given. Returns how many of them are dealt with (offer the rest again), and the
        device blocks that must not be reused until `take_freed_blocks` returns them.
        """
        if not self.tiers.has(self._save_to):
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
        taken = self.tiers.reserve(
            self._save_to, [chain[index] for index in offered], op, depth, after
        )
        indices = [offered[position] for position in taken.indices]
        held = [device_blocks[index] for index in indices]
        self.orders.save([chain[index] for index in indices], taken.slots, held)
        absent = next((i for i in offered if chain[i] not in pool), None)
        if absent is not None:
            self._tell(Refusal(f"{self._save_to} is full", 1))
        return dealt_with if absent is None else absent, held

    def _wanted(
        self, chain: Sequence[BlockHash], request: str, priorities: Sequence[int] | None
    ) -> list[int]:
        """Which of these blocks are worth saving, as indices."""
        if request in self._unsaved:
            return []
        end = len(chain)
        if self._limits.min_priority:
            given = priorities or [0] * len(chain)
            low = (i for i, priority in enumerate(given) if priority < self._limits.min_priority)
            end = next(low, end)
            if end < len(chain):
                self._unsaved.add(request)
                self._tell(Refusal("priority", len(chain) - end))
        reader = self._readers.get(request)
        if reader is None or not reader.in_place:
            return list(range(end))
        return [index for index in range(end) if chain[index] not in reader.in_place]

    def take_commands(self, now: float) -> step.StepCommands:
        """Everything the ranks have to do around the coming forward pass."""
        self.spills.order()
        self.prefetch.order(self._waiting.items(), self._effects, now)
        return self.orders.take(*self.peers.take_news())

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
        return freed

    @property
    def busy(self) -> bool:
        """Whether ranks still have something to report, or to be told."""
        awaited = self._loads or self.orders.moves.step_awaited
        return bool(awaited or self.orders.waiting or len(self.spills))

    @property
    def holds_device_blocks(self) -> bool:
        """Whether the engine will get device blocks back by itself."""
        return self.orders.held_blocks > 0

    def reset(self) -> None:
        """Forget every block, those on their way included, for this life and later ones."""
        for reader in self._readers.values():
            if reader.plan is not None:
                self._drop_plan(reader)
        self.spills.clear()
        self.tiers.clear()
        self.orders.forget()

    def adopt(self, survivors: Sequence[step.Survivors]) -> int:
        """Take over what an earlier life left in one tier; `survivors` are those of each rank.

        To be called before anything is stored. Returns how many blocks that were.
        """
        for rank in survivors:
            self.orders.skip_ops(max(unpack_u64(rank.fills), default=0))
        return self.tiers.adopt(survivors)

    # -- bus side ------------------------------------------------------------------------

    def located(self, request: str, attempt: int, answer: Located | None, now: float) -> None:
        """The registry answered, or (None) could not."""
        reader = self._readers.get(request)
        if reader is None or reader.stage is not Stage.LOOKING or reader.attempt != attempt:
            return
        self._set_located(reader, answer.segments if answer else ())

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
        if self.prefetch.answered(attempt, answer, asked_at, now, self._effects):
            return
        reader = self._readers.get(request)
        part = None
        if reader is not None and reader.stage is Stage.LEASING and reader.attempt == attempt:
            assert reader.plan is not None
            part = reader.plan.unanswered(node, start)
        if part is not None:
            part.answered = True
        if not isinstance(answer, Leased):
            return
        grant = Grant.of(answer, node, start, asked_at)
        fits = part is not None and grant.end <= part.end
        if part is None or not fits or not self.peers.knows(node, answer.agents):
            self._effects.append(GiveBack(node, answer.lease))
            return
        assert reader is not None
        assert reader.plan is not None
        reader.plan.deadline = min(reader.plan.deadline, asked_at + answer.seconds / 2)
        part.grant = grant

    def acquire(self, hashes: bytes, token: str, now: float) -> LeaseAnswer | None:
        """Another node's leader wants to read this chain's blocks.

        None: they are on disk only, and the effect `Answer` follows when they have come up.
        """
        answer = self.lending.acquire(hashes, token, self.journal.epoch, now, self._effects)
        if isinstance(answer, Refused):
            self._tell(Refusal(answer.reason, len(hashes) // HASH_BYTES))
        return answer

    def release(self, token: str) -> None:
        """The reader is done. An unknown token changes nothing."""
        self.lending.release(token)

    def moved(self, moved: step.Moved, rank: int, now: float) -> None:
        """A rank has come to the end of a move."""
        settled = self.orders.moves.report(
            moved.op, rank, unpack_u32(moved.failed), moved.reason, moved.seconds
        )
        if settled is not None:
            self._settle(moved.op, settled, now)

    def unheard(self, fetch: step.Fetch) -> None:
        """Some rank said nothing to `TellRanks`: tell it again, by way that loses nothing.

        A rank carries out each op once, and repeats what it said of it.
        """
        self.orders.put_into_step(fetch)

    def snapshot(self) -> tuple[Beat, list[tuple[Tier, list[BlockHash]]]]:
        """All readable blocks by tier, and the last event they include."""
        return self.journal.beat(), self.tiers.snapshot()

    def status(self) -> tuple[TierStatus, ...]:
        """How full the tiers are."""
        return self.tiers.status()

    def tick(self, now: float) -> None:
        """Time has passed: end what is overdue."""
        self._effects.extend(self.lending.tick(self.journal.epoch, now))
        kept = self._limits.lease_seconds / 4  # the engine may be about to load what it was told of
        for reader in self._readers.values():
            if reader.plan is not None and reader.plan.deadline + kept <= now:
                self._drop_plan(reader)

    def take_effects(self) -> list[Effect]:
        """What is to be done on the bus, in order."""
        effects: list[Effect] = [Publish(event) for event in self.journal.take()]
        effects.extend(self._effects)
        self._effects.clear()
        return effects

    def take_accounts(self) -> list[Account]:
        """What has happened since the last call."""
        accounts, self._accounts = self._accounts, []
        return accounts

    def check_integrity(self) -> None:
        """All tables agree with each other."""
        self.tiers.check_integrity()
        self.lending.check_integrity()
        self.orders.moves.check_integrity()
        for reader in self._readers.values():
            planned = reader.stage in (Stage.LEASING, Stage.READY)
            assert planned == (reader.plan is not None), "a plan in the wrong stage"
        for load in self._loads.values():
            assert load.waiting, "a finished load was kept"

    # -- inside: looking -----------------------------------------------------------------

    def _may_ask(self, reader: Reader, now: float) -> bool:
        patient = reader.patience is None or now < reader.patience
        return self.online and patient and self._limits.lookup_seconds > 0

    def _answer_by(self, reader: Reader, now: float, staging: float = 0.0) -> float:
        """When a question asked now counts as unanswered."""
        deadline = now + self._limits.lookup_seconds + staging
        return deadline if reader.patience is None else min(deadline, reader.patience)

    def _advance(self, request: str, reader: Reader, computed: int, now: float) -> int | None:
        """Take the read path as far as it goes now: what `match` answers."""
        if reader.stage is Stage.READY:
            assert reader.plan is not None
            if reader.plan.covers(computed, now):
                return reader.plan.end - computed
            self._drop_plan(reader)
        if reader.stage is Stage.LOOKING:
            if now < reader.deadline:
                return None
            self._set_located(reader, ())
        if reader.stage is Stage.LEASING:
            assert reader.plan is not None
            if now < reader.deadline and not all(p.answered for p in reader.plan.parts):
                return None
            reader.stage = Stage.READY
            return self._advance(request, reader, computed, now)
        return self._make_plan(request, reader, computed, now)

    def _ask_registry_if_needed(
        self, request: str, reader: Reader, computed: int, now: float
    ) -> list[int] | None:
        """What is not here of `chain[computed:]`; None: the registry is being asked about it."""
        if not self._may_ask(reader, now):
            return []
        absent = self.tiers.absent(reader.chain, computed)
        known = reader.stage is not Stage.IDLE and (not absent or reader.is_told(absent[0]))
        if not absent or known:
            return absent
        asked = absent[:MAX_BATCH_BLOCKS]
        reader.stage, reader.attempt, reader.asked = Stage.LOOKING, self.orders.next_op(), asked
        reader.deadline = self._answer_by(reader, now)
        wanted = pack(reader.chain[index] for index in asked)
        self._effects.append(AskRegistry(request, reader.attempt, wanted))
        return None

    def _set_located(self, reader: Reader, segments: tuple[Segment, ...]) -> None:
        reader.segments, reader.stage = segments, Stage.LOCATED

    def _make_plan(self, request: str, reader: Reader, computed: int, now: float) -> int | None:
        plan = Plan(computed, deadline=now + self._limits.lease_seconds / 2)
        gap = self._pin_own(reader.chain, plan, computed)
        if gap < len(reader.chain):
            absent = self._ask_registry_if_needed(request, reader, gap, now)
            if absent is None:
                self._let_go(plan)
                return None
            if absent and reader.segments:
                self._choose_owners(reader, plan, absent, now)
        for part in plan.parts:
            if part.start != gap:
                break
            gap = self._pin_own(reader.chain, plan, part.end)
        reader.plan, reader.stage = plan, Stage.READY
        if plan.parts:
            self._ask_owners(request, reader, plan, now)
        return None if reader.stage is Stage.LEASING else plan.end - computed

    def _choose_owners(self, reader: Reader, plan: Plan, absent: Sequence[int], now: float) -> None:
        """Take from the registry's answer what fills the gaps between own blocks, in order."""
        gaps = iter(absent)
        for segment, start, stop in reader.located(absent):
            first_gap = next(gaps, None)
            usable = segment.tier is not Tier.DEVICE and self.peers.can_ask(segment.node, now)
            if start != first_gap or not usable or len(plan.parts) >= MAX_PARTS:
                return
            plan.parts.append(Part(segment.node, start, stop, on_disk=segment.tier is Tier.DISK))
            for _ in range(stop - start - 1):
                next(gaps, None)

    def _pin_own(self, chain: Sequence[BlockHash], plan: Plan, start: int) -> int:
        """Pin what is here of `chain[start:]`, up to the first gap. Returns where that is."""
        pinned = self.tiers.pin_runs(chain, start)
        plan.pinned.extend(pinned)
        return pinned[-1].end if pinned else start

    def _ask_owners(self, request: str, reader: Reader, plan: Plan, now: float) -> None:
        staging = self._limits.staging_seconds if any(p.on_disk for p in plan.parts) else 0.0
        if staging and reader.patience is not None and not reader.staging:
            reader.patience += staging
            reader.staging = True
        reader.stage, reader.attempt = Stage.LEASING, self.orders.next_op()
        reader.deadline = self._answer_by(reader, now, staging)
        for part in plan.parts:
            wanted = pack(reader.chain[part.start : part.end])
            self._effects.append(
                AskOwner(
                    request, reader.attempt, part.node, part.start, wanted, reader.deadline - now
                )
            )

    def _drop_plan(self, reader: Reader) -> None:
        """Let go of everything the plan counted on; the request starts over."""
        assert reader.plan is not None
        self._let_go(reader.plan)
        reader.plan, reader.stage, reader.segments = None, Stage.IDLE, ()

    def _let_go(self, plan: Plan) -> None:
        for pinned in plan.pinned:
            self.tiers.unpin(pinned.tier, pinned.slots)
        self._effects.extend(GiveBack(grant.node, grant.lease) for grant in plan.grants)

    def _count(self, reader: Reader, hits: Hits) -> None:
        """The lookup has ended: tell how, once, and stop bringing blocks up."""
        self.prefetch.let_go(reader)
        if reader.answered and not reader.counted:
            reader.counted = True
            self._tell(Looked(len(reader.chain) - reader.computed, *hits))

    def _use_remote(self, reader: Reader, order: LoadOrder, now: float) -> None:
        """Blocks of other nodes get a copy here from the second time on that they are used."""
        came = [name for taken in order.taken if taken.node for name in taken.names]
        hot = self._hot.offer(came, now)
        reader.in_place.update(
            block for block, worth in zip(came, hot, strict=True) if not worth
        )

    # -- inside: what has been done --------------------------------------------------------

    def _settle(self, op: int, settled: Settled, now: float) -> None:
        """All ranks have come to the end of a move."""
        move = settled.move
        self._freed_blocks.extend(move.device_blocks)
        if move.pinned is not None:
            self.tiers.unpin(*move.pinned)
        if move.grant is not None:
            self._effects.append(GiveBack(move.grant.node, move.grant.lease))
        stored = self.tiers.settle(move.tier, move.slots, settled.failed)
        self._blame_move(move, settled.failed, now)
        self._transferred(
            move.path, len(move.blocks) - len(settled.failed), len(settled.failed),
            settled.reason, settled.seconds,
        )  # fmt: skip
        if move.path is Path.DISK_TO_HOST:
            self._effects.extend(self.lending.fetched(op, self.journal.epoch, now))
        elif move.tier is Tier.HOST:
            self._accounts.extend(self.spills.offer(stored, now))

    def _blame_move(self, move: Move, failed: set[int], now: float) -> None:
        """Blocks that could not be read from the disk are not there; nor is a node that failed."""
        if move.path is Path.DISK_TO_HOST:
            self.tiers.drop(Tier.DISK, [move.blocks[position] for position in failed])
        elif move.grant is not None and failed:
            self.peers.shun(move.grant.node, now)

    def _load_reported(self, result: step.LoadResult, rank: int, now: float) -> None:
        load = self._loads.get(result.op)
        if load is None or rank not in load.waiting:
            return
        load.waiting.remove(rank)
        load.failed.update(unpack_u32(result.failed_blocks))
        load.reason = load.reason or result.reason
        for path, seconds in (
            (Path.HOST_TO_DEVICE, result.host_seconds),
            (Path.DISK_TO_DEVICE, result.disk_seconds),
            (Path.REMOTE_TO_DEVICE, result.remote_seconds),
        ):
            load.seconds[path] = max(seconds, load.seconds.get(path, 0.0))
        if load.waiting:
            return
        del self._loads[result.op]
        self._let_go(load.order.plan)
        self._blame(load, now)
        self._account(load, now)
        self._spill_used(load, now)
        reader = self._readers.get(load.request)
        if reader is not None and reader.stage is Stage.LOADING and reader.op == result.op:
            reader.stage = Stage.SPENT if load.failed else Stage.IDLE
            reader.segments = ()

    def _account(self, load: LoadUnderWay, now: float) -> None:
        """Tell how the load went, and where its blocks came from."""
        arrived: Counter[tuple[str, Tier]] = Counter()
        by_path: dict[Path, list[int]] = {}
        for taken in load.order.taken:
            bad = len(load.failed.intersection(taken.device_blocks))
            good = len(taken.names) - bad
            count = by_path.setdefault(taken.path, [0, 0])
            count[0] += good
            count[1] += bad
            if good:
                arrived[taken.node or self._node, taken.tier] += good
        for path, (good, bad) in by_path.items():
            self._transferred(path, good, bad, load.reason, load.seconds[path])
        self._effects.append(
            Announce(
                Loaded(
                    request=load.request[:256],
                    sources=tuple(
                        Source(node, tier, blocks, blocks * self._block_bytes)
                        for (node, tier), blocks in arrived.items()
                    ),
                    failed=len(load.failed),
                    seconds=now - load.began,
                )
            )
        )

    def _transferred(
        self, path: Path, good: int, bad: int, reason: str, seconds: float
    ) -> None:
        why = (reason or "unknown") if bad else ""
        self._tell(Transferred(path, good, good * self._block_bytes, bad, why, seconds))

    def _tell(self, account: Account) -> None:
        self._accounts.append(account)
        if len(self._accounts) > MAX_ACCOUNTS:
            del self._accounts[: MAX_ACCOUNTS // 2]

    def _spill_used(self, load: LoadUnderWay, now: float) -> None:
        """Blocks used in the host tier have earned a place on disk."""
        used = [
            name
            for taken in load.order.taken
            if taken.path is Path.HOST_TO_DEVICE
            for name in taken.arrived(load.failed)
        ]
        self._accounts.extend(self.spills.offer(used, now))

    def _blame(self, load: LoadUnderWay, now: float) -> None:
        """Own blocks that could not be read are forgotten; a node that failed is left alone."""
        lost: dict[Tier, list[BlockHash]] = {}
        for taken in load.order.taken:
            names = taken.lost(load.failed)
            if names and taken.node:
                self.peers.shun(taken.node, now)
            elif names:
                lost.setdefault(taken.tier, []).extend(names)
        for tier, names in lost.items():
            self.tiers.drop(tier, names)
