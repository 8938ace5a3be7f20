"""Where requests' blocks are: each request's way from its arrival to the promise of a load.

`reads.py` draws the stages. What is here is pinned and what others have is leased before anything
is promised, so a promise can be kept.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvbm_schemas.block import BlockHash, Tier, pack
from kvbm_schemas.message import MAX_BATCH_BLOCKS
from kvbm_schemas.requests import Leased, Located, Refused, Segment
from kvbm_service.core.accounts import Looked
from kvbm_service.core.effects import AskOwner, AskRegistry, GiveBack, KeepUp
from kvbm_service.core.limits import Limits
from kvbm_service.core.orders import Orders
from kvbm_service.core.outbox import Outbox
from kvbm_service.core.peers import Peers
from kvbm_service.core.prefetch import Prefetch
from kvbm_service.core.reads import (
    MAX_PARTS,
    NO_HITS,
    Grant,
    Hits,
    Origin,
    Part,
    Plan,
    Reader,
    Stage,
)
from kvbm_service.core.tiers import Tiers

RENEWAL_SHARE = 1 / 3
"""How often blocks that were handed over are asked for again, as a share of a lease's time."""

MAX_READERS = 65_536
"""Requests whose read path is followed; later ones are simply computed."""


class Lookups:
    """The requests of one node's engine that may read, and their plans."""

    def __init__(
        self,
        tiers: Tiers,
        orders: Orders,
        peers: Peers,
        prefetch: Prefetch,
        outbox: Outbox,
        limits: Limits,
    ) -> None:
        self.readers: dict[str, Reader] = {}
        self.waiting: dict[str, Reader] = {}
        """Those that the engine has not scheduled yet."""
        self.steps = 0
        """How many steps the engine has built."""
        self._tiers = tiers
        self._orders = orders
        self._peers = peers
        self._prefetch = prefetch
        self._outbox = outbox
        self._limits = limits

    # -- the engine's questions --------------------------------------------------------

    def arrive(
        self, request: str, chain: list[BlockHash], now: float, origin: Origin | None = None
    ) -> None:
        """See `Leader.arrive`."""
        self.finish(request)
        if len(self.readers) >= MAX_READERS or not chain:
            self._give_back(origin)
            return
        reader = Reader(chain, origin=origin, renewed=now)
        self.readers[request] = self.waiting[request] = reader
        self._keep_up(reader)
        self._tiers.use(chain, now)
        self._ask_registry_if_needed(request, reader, 0, now)

    def match(self, request: str, computed: int, now: float) -> int | None:
        """How many blocks after the first `computed` can be loaded; None: ask again.

        May be asked any number of times. Answers within two lookup deadlines, and the staging
        deadline if blocks are on another node's disk, or that of a hand-over.
        """
        reader = self.readers.get(request)
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
            reader.promised_in = self.steps
        return found

    def nothing(self, request: str) -> int:
        """What `match` answers while nothing may be promised: forget what has been found out."""
        reader = self.readers.get(request)
        if reader is not None and reader.stage not in (Stage.SPENT, Stage.LOADING):
            if reader.plan is not None:
                self._drop_plan(reader)
            reader.stage, reader.segments = Stage.IDLE, ()
            reader.patience, reader.answered = None, True
        return 0

    def break_promise(self, reader: Reader) -> None:
        """What was promised cannot be had any more."""
        self.decline(reader)
        reader.stage = Stage.SPENT

    def promised(self, request: str) -> Reader | None:
        """The engine has scheduled the request: its reader, if it was promised something."""
        self.waiting.pop(request, None)
        reader = self.readers.get(request)
        return reader if reader is not None and reader.stage is Stage.READY else None

    def decline(self, reader: Reader) -> None:
        """The engine does not want what was promised."""
        self._count(reader, NO_HITS)
        self._drop_plan(reader)

    def release_origin(self, request: str) -> None:
        """What was handed over for this request is not needed any more."""
        reader = self.readers.get(request)
        if reader is not None:
            origin, reader.origin = reader.origin, None
            self._give_back(origin)

    def load(self, reader: Reader, op: int, hits: Hits) -> None:
        """The promise is being kept, as `op`."""
        reader.stage, reader.plan, reader.op = Stage.LOADING, None, op
        reader.hits = hits
        self._count(reader, hits)

    def loaded(self, request: str, op: int, failed: bool) -> None:
        """The load has ended."""
        reader = self.readers.get(request)
        if reader is not None and reader.stage is Stage.LOADING and reader.op == op:
            self.release_origin(request)
            reader.stage = Stage.SPENT if failed else Stage.IDLE
            reader.segments = ()

    def finish(self, request: str) -> None:
        """The request is over, however it ended."""
        self.waiting.pop(request, None)
        self.release_origin(request)
        reader = self.readers.pop(request, None)
        if reader is None:
            return
        self._count(reader, NO_HITS)
        if reader.plan is not None:
            self._drop_plan(reader)

    def reset(self) -> None:
        """Nothing that was planned can be counted on any more."""
        for reader in self.readers.values():
            if reader.plan is not None:
                self._drop_plan(reader)

    def tick(self, now: float) -> None:
        """Time has passed: drop plans that are too old.

        What the engine was told of in the step that it is building it may load, however long the
        process stood still meanwhile: reads prove themselves.
        """
        kept = self._limits.lease_seconds / 4  # the engine may be about to load what it was told of
        period = self._limits.lease_seconds * RENEWAL_SHARE
        for reader in self.readers.values():
            if reader.renewed + period <= now:
                reader.renewed = now
                self._keep_up(reader)
            if reader.plan is None or reader.plan.deadline + kept > now:
                continue
            if reader.promised_in != self.steps or reader.stage is not Stage.READY:
                self._drop_plan(reader)

    def let_go(self, plan: Plan) -> None:
        """Nobody reads any more what the plan counted on."""
        for pinned in plan.pinned:
            self._tiers.unpin(pinned.tier, pinned.slots)
        self._outbox.effects.extend(GiveBack(grant.node, grant.lease) for grant in plan.grants)

    def _keep_up(self, reader: Reader) -> None:
        """Say that what is kept for this request is still needed."""
        if reader.origin is not None:
            self._outbox.effects.append(KeepUp(reader.origin.node, reader.origin.lease))

    def _give_back(self, origin: Origin | None) -> None:
        if origin is not None:
            self._outbox.effects.append(GiveBack(origin.node, origin.lease))

    # -- answers -----------------------------------------------------------------------

    def located(self, request: str, attempt: int, answer: Located | None, now: float) -> None:
        """The registry answered, or (None) could not."""
        reader = self.readers.get(request)
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
    ) -> None:
        """An owner answered, or (None) did not. A lease that nobody waits for is given back."""
        reader = self.readers.get(request)
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
        if part is None or not fits or not self._peers.knows(node, answer.agents, answer.epoch):
            self._outbox.effects.append(GiveBack(node, answer.lease))
            return
        assert reader is not None
        assert reader.plan is not None
        reader.plan.deadline = min(reader.plan.deadline, asked_at + answer.seconds / 2)
        part.grant = grant

    def check_integrity(self) -> None:
        """There is a plan in the stages that have one, and in no other."""
        for reader in self.readers.values():
            planned = reader.stage in (Stage.LEASING, Stage.READY)
            assert planned == (reader.plan is not None), "a plan in the wrong stage"

    # -- inside ------------------------------------------------------------------------

    def _may_ask(self, reader: Reader, now: float) -> bool:
        patient = reader.patience is None or now < reader.patience
        return self._peers.online and patient and self._limits.lookup_seconds > 0

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
            if any(part.handed_over and part.grant is None for part in reader.plan.parts):
                reader.origin_failed = True
                self._drop_plan(reader)
            return self._advance(request, reader, computed, now)
        return self._make_plan(request, reader, computed, now)

    def _ask_registry_if_needed(
        self, request: str, reader: Reader, computed: int, now: float
    ) -> list[int] | None:
        """What is not here of `chain[computed:]`; None: the registry is being asked about it."""
        if not self._may_ask(reader, now):
            return []
        absent = self._tiers.absent(reader.chain, computed)
        known = reader.stage is not Stage.IDLE and (not absent or reader.is_told(absent[0]))
        if not absent or known:
            return absent
        if self._is_handed_over(reader, absent[0], now):
            self._ask_origin(reader, absent)
            return absent
        asked = absent[:MAX_BATCH_BLOCKS]
        reader.stage, reader.attempt, reader.asked = Stage.LOOKING, self._orders.next_op(), asked
        reader.deadline = self._answer_by(reader, now)
        wanted = pack(reader.chain[index] for index in asked)
        self._outbox.effects.append(AskRegistry(request, reader.attempt, wanted))
        return None

    def _is_handed_over(self, reader: Reader, index: int, now: float) -> bool:
        origin = reader.origin
        usable = origin is not None and self._peers.can_ask(origin.node, now)
        return usable and not reader.origin_failed and index < (origin.blocks if origin else 0)

    def _ask_origin(self, reader: Reader, absent: Sequence[int]) -> None:
        """Who hands blocks over need not be looked for: it has them, whatever the registry says."""
        assert reader.origin is not None
        asked = [index for index in absent if index < reader.origin.blocks][:MAX_BATCH_BLOCKS]
        reader.asked = asked
        kept = Segment(reader.origin.node, Tier.HOST, start=0, count=len(asked))
        self._set_located(reader, (kept,))

    def _set_located(self, reader: Reader, segments: tuple[Segment, ...]) -> None:
        reader.segments, reader.stage = segments, Stage.LOCATED

    def _make_plan(self, request: str, reader: Reader, computed: int, now: float) -> int | None:
        plan = Plan(computed, deadline=now + self._limits.lease_seconds / 2)
        gap = self._pin_own(reader.chain, plan, computed)
        if gap < len(reader.chain):
            absent = self._ask_registry_if_needed(request, reader, gap, now)
            if absent is None:
                self.let_go(plan)
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
            usable = segment.tier is not Tier.DEVICE and self._peers.can_ask(segment.node, now)
            if start != first_gap or not usable or len(plan.parts) >= MAX_PARTS:
                return
            on_disk, lease = segment.tier is Tier.DISK, self._lease_ahead(reader, segment.node)
            plan.parts.append(Part(segment.node, start, stop, on_disk, lease))
            for _ in range(stop - start - 1):
                next(gaps, None)

    def _lease_ahead(self, reader: Reader, node: str) -> str:
        """The lease under which `node` keeps this request's blocks, if it does."""
        origin = reader.origin
        kept = origin is not None and origin.node == node and not reader.origin_failed
        return origin.lease if origin is not None and kept else ""

    def _pin_own(self, chain: Sequence[BlockHash], plan: Plan, start: int) -> int:
        """Pin what is here of `chain[start:]`, up to the first gap. Returns where that is."""
        pinned = self._tiers.pin_runs(chain, start)
        plan.pinned.extend(pinned)
        return pinned[-1].end if pinned else start

    def _ask_owners(self, request: str, reader: Reader, plan: Plan, now: float) -> None:
        staging = max(self._longer(part) for part in plan.parts)
        if staging and reader.patience is not None and not reader.staging:
            reader.patience += staging
            reader.staging = True
        reader.stage, reader.attempt = Stage.LEASING, self._orders.next_op()
        reader.deadline = self._answer_by(reader, now, staging)
        for part in plan.parts:
            wanted = pack(reader.chain[part.start : part.end])
            self._outbox.effects.append(
                AskOwner(
                    request,
                    reader.attempt,
                    part.node,
                    part.start,
                    wanted,
                    reader.deadline - now,
                    part.handed_over,
                )
            )

    def _longer(self, part: Part) -> float:
        """How much more than a lookup's time the owner may take."""
        if part.handed_over:
            return self._limits.hand_over_seconds
        return self._limits.staging_seconds if part.on_disk else 0.0

    def _drop_plan(self, reader: Reader) -> None:
        """Let go of everything the plan counted on; the request starts over."""
        assert reader.plan is not None
        self.let_go(reader.plan)
        reader.plan, reader.stage, reader.segments = None, Stage.IDLE, ()

    def _count(self, reader: Reader, hits: Hits) -> None:
        """The lookup has ended: tell how, once, and stop bringing blocks up."""
        self._prefetch.let_go(reader)
        if reader.answered and not reader.counted:
            reader.counted = True
            self._outbox.tell(Looked(len(reader.chain) - reader.computed, *hits))
