"""The authority on one node's blocks: what is where, what goes, who may read.

Called from two sides, never at the same time (the shell holds a lock): the engine's scheduler
asks, stores and loads; the bus brings answers and other nodes' requests. `now` is any clock
that never goes back. What must happen outside is left in `take_effects` and `take_commands`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from kvbm_schemas import step
from kvbm_schemas.block import BlockHash, Tier, pack, unpack
from kvbm_schemas.events import Beat, Loaded, Source
from kvbm_schemas.message import MAX_BATCH_BLOCKS
from kvbm_schemas.records import RankRecord, TierStatus
from kvbm_schemas.requests import Leased, Located, Refused, Segment
from kvbm_service.core.columns import pack_u32, pack_u64, unpack_u32, unpack_u64
from kvbm_service.core.effects import Announce, AskOwner, AskRegistry, Effect, GiveBack, Publish
from kvbm_service.core.journal import Journal
from kvbm_service.core.lease import LeaseTable
from kvbm_service.core.load_order import order_load
from kvbm_service.core.peers import Peers
from kvbm_service.core.pool import Pool
from kvbm_service.core.reads import MAX_PARTS, Grant, Part, Plan, Reader, Stage
from kvbm_service.core.saves import Save, Saves

MAX_READERS = 65_536
"""Requests whose read path is followed; later ones are simply computed."""

LEASABLE_SHARE = 0.5
"""At most this share of the pool may be pinned before leases are refused: the node's own
engine must always find slots to save to."""


class Limits(NamedTuple):
    """How long and how much."""

    lookup_seconds: float = 0.02
    """For each of the two questions, to the registry and to the owners. 0: never ask."""
    lease_seconds: float = 30.0
    transfer_seconds: float = 10.0
    held_blocks: int = 1024
    """Device blocks that unfinished saves may keep from the engine."""


@dataclass(slots=True)
class LoadUnderWay:
    """A load that some ranks have not finished."""

    request: str
    plan: Plan
    places: dict[int, tuple[BlockHash, str]]
    """Device block → what it gets, and from which node (empty: from here)."""
    waiting: set[int]
    began: float
    failed: set[int] = field(default_factory=set)


@dataclass(slots=True)
class _Step:
    """What was decided since the last forward pass began. `op` is 0: nothing is to be saved."""

    op: int = 0
    hashes: list[BlockHash] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    loads: list[step.Load] = field(default_factory=list)


class Leader:
    """One node's blocks in its host tier, and the read and write paths through it."""

    def __init__(self, ranks: Sequence[RankRecord], limits: Limits) -> None:
        self.pool = Pool(min(rank.slab.slots for rank in ranks))
        self.leases = LeaseTable()
        self.journal = Journal()
        self.peers = Peers(tuple(rank.slab.layout for rank in ranks))
        self.online = False
        """Whether the registry and the owners can be asked."""
        self._limits = limits
        self._node = ranks[0].node
        self._world_size = len(ranks)
        self._block_bytes = sum(rank.slab.slot_bytes for rank in ranks)
        self._agents = tuple(rank.agent for rank in ranks)
        self._readers: dict[str, Reader] = {}
        self._saves = Saves(len(ranks))
        self._loads: dict[int, LoadUnderWay] = {}
        self._effects: list[Effect] = []
        self._freed_blocks: list[int] = []
        self._last_attempt = 0
        self._last_op = 0
        self._step = _Step()

    # -- read path, engine side ------------------------------------------------------

    def arrive(self, request: str, chain: list[BlockHash], now: float) -> None:
        """A request is there; start looking for its blocks."""
        self.finish(request)
        if len(self._readers) >= MAX_READERS or not chain:
            return
        reader = self._readers[request] = Reader(chain)
        self.pool.touch(chain)
        own_end = self.pool.match(chain)
        if own_end < len(chain) and self._may_ask(reader, now):
            self._ask_registry(request, reader, own_end, now)

    def match(self, request: str, computed: int, now: float) -> int | None:
        """How many blocks after the first `computed` can be loaded; None: ask again.

        May be asked any number of times. Answers within two lookup deadlines.
        """
        reader = self._readers.get(request)
        if reader is None or reader.stage in (Stage.SPENT, Stage.LOADING):
            return 0
        if reader.patience is None:
            reader.patience = now + 2 * self._limits.lookup_seconds
        found = self._advance(request, reader, computed, now)
        if found is not None:
            reader.patience = None
        return found

    def load(
        self, request: str, computed: int, device_blocks: Sequence[int], now: float
    ) -> None:
        """Fill `device_blocks` with the chain's blocks from `computed` on, as `match` promised.

        With no device blocks, the engine does not want what was promised.
        """
        reader = self._readers.get(request)
        if reader is None or reader.stage is not Stage.READY:
            assert not device_blocks, f"{request} was promised nothing"
            return
        plan = reader.plan
        assert plan is not None
        if not device_blocks:
            self._drop_plan(reader)
            return
        end = computed + len(device_blocks)
        assert plan.start <= computed, "other than was promised"
        assert end <= plan.end, "more than was promised"
        op = self._next_op()
        seconds = self._limits.transfer_seconds
        command, places = order_load(op, request, reader, computed, device_blocks, now, seconds)
        self._step.loads.append(command)
        self._loads[op] = LoadUnderWay(
            request, plan, places, set(range(self._world_size)), began=now
        )
        reader.stage, reader.plan, reader.op = Stage.LOADING, None, op
        reader.local_hits = max(0, min(plan.local_end, end) - computed)
        reader.remote_hits = len(device_blocks) - reader.local_hits

    def hits(self, request: str) -> tuple[int, int]:
        """Blocks of the request's last load: from this node's tiers, from other nodes."""
        reader = self._readers.get(request)
        return (reader.local_hits, reader.remote_hits) if reader else (0, 0)

    def finish(self, request: str) -> None:
        """The request is over, however it ended. A load under way goes on by itself."""
        reader = self._readers.pop(request, None)
        if reader is not None and reader.plan is not None:
            self._drop_plan(reader)

    # -- write path, engine side -------------------------------------------------------

    def store(
        self, chain: Sequence[BlockHash], device_blocks: Sequence[int]
    ) -> tuple[int, list[int]]:
        """The engine computes these full blocks in the coming step; save those not here yet.

        Returns how many of them are dealt with (offer the rest again), and the device blocks
        that must not be reused until `take_freed_blocks` returns them.
        """
        room = self._limits.held_blocks - self._saves.held_blocks - len(self._step.slots)
        dealt_with, wanted = _head_within(chain, room, self.pool)
        op = self._step.op or self._next_op()
        indices, slots, evicted = self.pool.reserve(chain[:dealt_with], fill=op)
        if len(indices) < wanted:
            dealt_with = _first_absent(chain, self.pool)
        if evicted:
            self.journal.removed(evicted)
        held = [device_blocks[index] for index in indices]
        if held:
            self._step.op = op
            self._step.hashes.extend(chain[index] for index in indices)
            self._step.slots.extend(slots)
            self._step.blocks.extend(held)
        return dealt_with, held

    def take_commands(self) -> step.StepCommands:
        """Everything the ranks have to do around the coming forward pass."""
        done, self._step = self._step, _Step()
        came, gone = self.peers.take_news()
        saves: tuple[step.Save, ...] = ()
        if done.op:
            self._saves.begin(done.op, Save(done.slots, done.blocks))
            saves = (
                step.Save(
                    op=done.op,
                    hashes=pack(done.hashes),
                    blocks=pack_u32(done.blocks),
                    slots=pack_u32(done.slots),
                ),
            )
        return step.StepCommands(saves=saves, loads=tuple(done.loads), peers=came, gone=gone)

    def report(self, results: step.StepResults, now: float) -> None:
        """A rank has finished some of what it was told."""
        for op in results.saved:
            self._save_reported(op, results.rank, good=True)
        for op in results.save_failed:
            self._save_reported(op, results.rank, good=False)
        for result in results.loads:
            self._load_reported(result, results.rank, now)

    def take_freed_blocks(self) -> list[int]:
        """Device blocks that `store` held and that may be reused now."""
        freed, self._freed_blocks = self._freed_blocks, []
        return freed

    @property
    def busy(self) -> bool:
        """Whether ranks still have something to report."""
        return bool(self._loads or len(self._saves) or self._step.op or self._step.loads)

    @property
    def holds_device_blocks(self) -> bool:
        """Whether the engine will get device blocks back by itself."""
        return bool(self._saves.held_blocks or self._step.slots)

    def reset(self) -> None:
        """Forget every block, those on their way included."""
        for reader in self._readers.values():
            if reader.plan is not None:
                self._drop_plan(reader)
        self.pool.clear()
        self.journal.cleared()

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
        reader = self._readers.get(request)
        part = None
        if reader is not None and reader.stage is Stage.LEASING and reader.attempt == attempt:
            assert reader.plan is not None
            part = reader.plan.unanswered(node, start)
        if part is not None:
            part.answered = True
        if not isinstance(answer, Leased):
            return
        slots = unpack_u32(answer.slots)
        fits = part is not None and len(slots) <= part.end - part.start
        if part is None or not fits or not self.peers.knows(node, answer.agents):
            self._effects.append(GiveBack(node, answer.lease))
            return
        assert reader is not None
        assert reader.plan is not None
        reader.plan.deadline = min(reader.plan.deadline, asked_at + answer.seconds / 2)
        part.grant = Grant(
            node=node,
            agents=answer.agents,
            lease=answer.lease,
            start=part.start,
            slots=slots,
            fills=unpack_u64(answer.fills),
            deadline=asked_at + answer.seconds,
        )

    def acquire(self, hashes: bytes, token: str, now: float) -> Leased | Refused:
        """Another node's leader wants to read this chain's blocks."""
        chain = unpack(hashes)
        here = self.pool.match(chain)
        if here == 0:
            return Refused(reason="not here")
        room = int(self.pool.capacity * LEASABLE_SHARE) - self.pool.pinned
        count = self.pool.pinnable(chain[:here], room)
        if count == 0 or self.leases.full:
            return Refused(reason="too many blocks are leased or in use")
        slots = self.pool.pin(chain[:count])
        self.leases.grant(token, slots, now + self._limits.lease_seconds)
        return Leased(
            lease=token,
            seconds=self._limits.lease_seconds,
            epoch=self.journal.epoch,
            slots=pack_u32(slots),
            fills=pack_u64(self.pool.fills(slots)),
            agents=self._agents,
        )

    def release(self, token: str) -> None:
        """The reader is done. An unknown token changes nothing."""
        self.pool.unpin(self.leases.release(token))

    def snapshot(self) -> tuple[Beat, list[BlockHash]]:
        """All readable blocks, and the last event they include."""
        return self.journal.beat(), self.pool.blocks()

    def status(self) -> TierStatus:
        """How full the host tier is."""
        return TierStatus(Tier.HOST, self.pool.capacity, self.pool.used, self.pool.pinned)

    def tick(self, now: float) -> None:
        """Time has passed: end what is overdue."""
        for slots in self.leases.expire(now):
            self.pool.unpin(slots)
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

    def check_integrity(self) -> None:
        """All tables agree with each other."""
        self.pool.check_integrity()
        self.leases.check_integrity()
        self._saves.check_integrity()
        for reader in self._readers.values():
            planned = reader.stage in (Stage.LEASING, Stage.READY)
            assert planned == (reader.plan is not None), "a plan in the wrong stage"
        for load in self._loads.values():
            assert load.waiting, "a finished load was kept"

    # -- inside --------------------------------------------------------------------------

    def _may_ask(self, reader: Reader, now: float) -> bool:
        patient = reader.patience is None or now < reader.patience
        return self.online and patient and self._limits.lookup_seconds > 0

    def _answer_by(self, reader: Reader, now: float) -> float:
        """When a question asked now counts as unanswered."""
        deadline = now + self._limits.lookup_seconds
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

    def _next_op(self) -> int:
        self._last_op += 1
        return self._last_op

    def _ask_registry(self, request: str, reader: Reader, start: int, now: float) -> None:
        self._last_attempt += 1
        reader.stage, reader.attempt, reader.asked_from = Stage.LOOKING, self._last_attempt, start
        reader.deadline = self._answer_by(reader, now)
        wanted = reader.chain[start : start + MAX_BATCH_BLOCKS]
        self._effects.append(AskRegistry(request, reader.attempt, pack(wanted)))

    def _set_located(self, reader: Reader, segments: tuple[Segment, ...]) -> None:
        reader.segments, reader.stage = segments, Stage.LOCATED

    def _make_plan(self, request: str, reader: Reader, computed: int, now: float) -> int | None:
        chain = reader.chain
        own_end = self.pool.match(chain, computed)
        if own_end < len(chain) and self._may_ask(reader, now):
            unknown = reader.stage is Stage.IDLE or not (
                reader.asked_from <= own_end <= reader.located_end
            )
            if unknown:
                self._ask_registry(request, reader, own_end, now)
                return None
        slots = self.pool.pin(chain[computed:own_end])
        deadline = now + self._limits.lease_seconds / 2
        reader.plan = plan = Plan(computed, own_end, slots, self.pool.fills(slots), deadline)
        reader.stage = Stage.READY
        if reader.segments and self._may_ask(reader, now):
            self._ask_owners(request, reader, plan, now)
        return None if reader.stage is Stage.LEASING else plan.end - computed

    def _ask_owners(self, request: str, reader: Reader, plan: Plan, now: float) -> None:
        end = plan.local_end
        for segment, start, stop in reader.parts_from(plan.local_end):
            usable = segment.tier is Tier.HOST and self.peers.can_ask(segment.node, now)
            if start != end or not usable or len(plan.parts) >= MAX_PARTS:
                break
            plan.parts.append(Part(segment.node, start, stop))
            end = stop
        if not plan.parts:
            return
        self._last_attempt += 1
        reader.stage, reader.attempt = Stage.LEASING, self._last_attempt
        reader.deadline = self._answer_by(reader, now)
        for part in plan.parts:
            wanted = pack(reader.chain[part.start : part.end])
            self._effects.append(AskOwner(request, reader.attempt, part.node, part.start, wanted))

    def _drop_plan(self, reader: Reader) -> None:
        """Let go of everything the plan counted on; the request starts over."""
        assert reader.plan is not None
        self._let_go(reader.plan)
        reader.plan, reader.stage, reader.segments = None, Stage.IDLE, ()

    def _let_go(self, plan: Plan) -> None:
        self.pool.unpin(plan.local_slots)
        self._effects.extend(GiveBack(grant.node, grant.lease) for grant in plan.grants)

    def _save_reported(self, op: int, rank: int, good: bool) -> None:
        settled = self._saves.report(op, rank, good)
        if settled is None:
            return
        self._freed_blocks.extend(settled.save.device_blocks)
        if settled.good:
            stored = self.pool.commit(settled.save.slots)
            if stored:
                self.journal.stored(stored)
        else:
            self.pool.abort(settled.save.slots)

    def _load_reported(self, result: step.LoadResult, rank: int, now: float) -> None:
        load = self._loads.get(result.op)
        if load is None or rank not in load.waiting:
            return
        load.waiting.remove(rank)
        load.failed.update(unpack_u32(result.failed_blocks))
        if load.waiting:
            return
        del self._loads[result.op]
        self._let_go(load.plan)
        self._blame(load, now)
        self._effects.append(Announce(self._account(load, now)))
        reader = self._readers.get(load.request)
        if reader is not None and reader.stage is Stage.LOADING and reader.op == result.op:
            reader.stage = Stage.SPENT if load.failed else Stage.IDLE
            reader.segments = ()

    def _account(self, load: LoadUnderWay, now: float) -> Loaded:
        """How the load went, and where its blocks came from."""
        arrived = Counter(
            node for block, (_, node) in load.places.items() if block not in load.failed
        )
        return Loaded(
            request=load.request[:256],
            sources=tuple(
                Source(node or self._node, Tier.HOST, blocks, blocks * self._block_bytes)
                for node, blocks in arrived.items()
            ),
            failed=len(load.failed),
            seconds=now - load.began,
        )

    def _blame(self, load: LoadUnderWay, now: float) -> None:
        """Own blocks that could not be read are forgotten; a node that failed is left alone."""
        lost: list[BlockHash] = []
        for device_block in load.failed:
            block, node = load.places[device_block]
            if node:
                self.peers.shun(node, now)
            elif self.pool.drop(block):
                lost.append(block)
        if lost:
            self.journal.removed(lost)


def _head_within(chain: Sequence[BlockHash], room: int, pool: Pool) -> tuple[int, int]:
    """The longest head of `chain` with at most `room` blocks that are not in `pool`.

    Returns its length, and how many blocks of it are not there.
    """
    absent = 0
    for index, block in enumerate(chain):
        if block not in pool:
            if absent >= room:
                return index, absent
            absent += 1
    return len(chain), absent


def _first_absent(chain: Sequence[BlockHash], pool: Pool) -> int:
    return next((i for i, block in enumerate(chain) if block not in pool), len(chain))
