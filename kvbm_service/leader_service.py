"""The leader at work: the pure core, the engine's thread on one side, the bus on the other.

The engine's thread never waits here: each call takes the core's lock for microseconds, and
what has to be said on the bus is left to a loop on another thread. With no bus, the loop keeps
trying to connect, and the node goes on with its own tiers.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

from kvbm_schemas.block import BlockHash, Tier
from kvbm_schemas.codec import encode
from kvbm_schemas.events import BlockEvent, Cleared, Removed, Stored
from kvbm_schemas.records import NodeRecord, RankRecord, TierStatus
from kvbm_schemas.step import LoadResult, StepCommands, StepResults, Survivors
from kvbm_schemas.subjects import Scope
from kvbm_service.adapters import metrics_server
from kvbm_service.adapters.metrics import Metrics
from kvbm_service.core.effects import Effect, Publish
from kvbm_service.core.leader import Leader
from kvbm_service.core.limits import Limits
from kvbm_service.core.reads import NO_HITS, Hits, Origin
from kvbm_service.core.roster import Roster
from kvbm_service.core.spills import SpillLimits
from kvbm_service.leader_bus import LeaderBus
from kvbm_service.loop_thread import LoopThread
from kvbm_service.network import Connect
from kvbm_service.settings import Settings

_log = logging.getLogger(__name__)

MAX_ENGINE_EVENTS = 4096
"""Block events kept for the engine's own event stream; beyond, the oldest are dropped."""

T = TypeVar("T")


class Front(NamedTuple):
    """How prompts reach the leader's engine, for those who route them; see `NodeRecord`."""

    url: str = ""
    role: str = "both"
    names: str = ""
    model: str = ""


class LeaderService:
    """One node's leader. Call `start`, then the engine side from one thread, then `close`."""

    def __init__(
        self,
        settings: Settings,
        scope: Scope,
        node: str,
        world_size: int,
        connect: Connect,
        engine: str = "",
        instance: str = "",
        engine_wants_events: bool = False,
        block_tokens: int = 1,
        front: Front = Front(),  # noqa: B008 # it cannot be changed
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.node = node
        self.scope = scope
        self.rejected = 0
        """Messages that were not what their subject carries."""
        self._settings = settings
        self._engine = engine
        self._block_tokens = block_tokens
        self._front = front
        self._clock = clock
        self._lock = threading.Lock()
        self._roster = Roster(world_size, instance)
        self._core: Leader | None = None
        self.instance = instance
        """This life of the engine: a rank of an earlier one may still be in the directory."""
        self._engine_events: list[BlockEvent] = []
        self._keep_engine_events = engine_wants_events
        self.metrics = Metrics(block_tokens, settings.cache_stats_max_requests)
        self.metrics.watch_rejected(lambda: self.rejected)
        self._said_rates = self.metrics.hit_rates()
        self._metrics_server: metrics_server.MetricsServer | None = None
        self._survivors: dict[int, tuple[Survivors, ...]] = {}
        """What ranks brought along from an earlier life, until the core is there."""
        self._bus_side = LeaderBus(self, connect)
        self._loop = LoopThread("kvbm-leader", self._bus_side.run)
        self._incomplete_since = clock()

    # -- life ------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to meet ranks and other nodes, and to serve metrics if that is wanted."""
        if self._settings.metrics:
            self._metrics_server = metrics_server.serve(
                self.metrics, self._settings.metrics_host, self._settings.metrics_port
            )
        self._loop.start()

    def close(self) -> None:
        """Leave the directory and end."""
        self._loop.stop()
        if self._metrics_server is not None:
            self._metrics_server.close()

    def attach(self, record: RankRecord, survivors: Sequence[Survivors] = ()) -> None:
        """The engine has started a rank, which has this of an earlier life, or of its predecessor.

        With the last one, the node begins to work. A rank whose process is another than before
        has lost what it held, but for `survivors`.

        Raises:
            LayoutError: the rank does not fit this engine.
        """
        with self._lock:
            self._roster.report(record, by_engine=True)
            if self._core is None or record.agent in self._core.crew.agents:
                self._survivors[record.rank] = tuple(survivors)
        self._met(record, survivors)

    def rank_listed(self, record: RankRecord) -> None:
        """The directory lists a rank of ours.

        Raises:
            LayoutError: the rank does not fit this engine.
        """
        with self._lock:
            self._roster.listed(record)
        self._met(record, ())

    def rank_unlisted(self, rank: int) -> None:
        """The directory, which can be reached, does not list a rank any more."""
        with self._lock:
            self._roster.unlisted(rank)
        self._look_who_is_away()

    def rank_died(self, rank: int) -> None:
        """The engine says that a rank's process is no more. Another may `attach` in its place."""
        with self._lock:
            known = self._roster.lose(rank)
            self._incomplete_since = self._clock()
        if known:
            _log.warning("rank %d of node %s is gone: no cache until it is back", rank, self.node)
            self._with_core(lambda core: core.rank_lost(rank, self._clock()), None)
            self._look_who_is_away()

    def _met(self, record: RankRecord, survivors: Sequence[Survivors]) -> None:
        with self._lock:
            if self._core is None and self._roster.complete:
                self._core = self._make_core()
            if self._core is not None and self._all_brought_something:
                self._adopt(self._core)
        self._with_core(lambda core: self._take_place(core, record, survivors), None)
        self._look_who_is_away()

    @property
    def _all_brought_something(self) -> bool:
        return len(self._survivors) == self._roster.world_size and all(self._survivors.values())

    def _take_place(self, core: Leader, record: RankRecord, survivors: Sequence[Survivors]) -> None:
        if record.agent in core.crew.agents:
            return
        _log.warning(
            "rank %d of node %s is another process now, %s: what it held is lost%s",
            record.rank, self.node, record.agent,
            ", but for what it has found again" if survivors else "",
        )  # fmt: skip
        self._survivors.clear()
        core.rank_took_place(record, survivors, self._clock())

    def _look_who_is_away(self) -> None:
        with self._lock:
            away = self._roster.away
        self._with_core(lambda core: core.ranks_away(away), None)
        self._loop.call(self._bus_side.wake)

    def _adopt(self, core: Leader) -> None:
        """Take over the tiers of an earlier life, as far as all ranks have them alike."""
        ranks = [self._survivors[rank] for rank in sorted(self._survivors)]
        self._survivors.clear()
        for tiers in zip(*ranks, strict=False):
            found = [len(survivors.slots) // 4 for survivors in tiers]
            adopted = core.adopt(tiers)
            _log.info(
                "node %s: %d blocks of an earlier life are in %s (%s on the ranks)",
                self.node, adopted, tiers[0].tier, ", ".join(map(str, found)),
            )  # fmt: skip

    def require_ranks(self) -> None:
        """Check that all ranks reported in time.

        Raises:
            RanksMissing: some did not, and the time is up.
        """
        patience = self._settings.leader_worker_init_timeout_seconds
        if self._clock() - self._incomplete_since >= patience:
            with self._lock:
                self._roster.require_all(patience)

    def _make_core(self) -> Leader:
        records = self._roster.records
        device_blocks = min(record.device_blocks for record in records)
        core = Leader(records, _limits(self._settings, device_blocks), self.instance)
        _log.info(
            "node %s: %s of %d bytes, %d rank(s), scope %s.%s",
            self.node,
            ", ".join(f"{tier.capacity} blocks in {tier.tier}" for tier in core.status()),
            self._roster.block_bytes, len(records), *self.scope,
        )  # fmt: skip
        if core.tiers.disk is not None:
            self.metrics.disk_works(True)
        self.metrics.watch_tiers(self._tier_status, self._evicted)
        return core

    def _tier_status(self) -> tuple[TierStatus, ...]:
        return self._with_core(lambda core: core.status(), ())

    def _evicted(self) -> dict[Tier, int]:
        nothing: dict[Tier, int] = {}
        return self._with_core(lambda core: dict(core.tiers.evicted), nothing)

    # -- engine side -------------------------------------------------------------------------

    def arrive(self, request: str, chain: list[BlockHash], origin: Origin | None = None) -> None:
        """A request is there; start looking for its blocks, which `origin` may hand over."""
        self._with_core(lambda core: core.arrive(request, chain, self._clock(), origin), None)

    def match(self, request: str, computed: int) -> int | None:
        """How many blocks after the first `computed` can be loaded; None: ask again soon."""
        nothing: int | None = 0
        return self._with_core(lambda core: core.match(request, computed, self._clock()), nothing)

    def load(self, request: str, computed: int, device_blocks: Sequence[int]) -> None:
        """Load what `match` promised into `device_blocks`; none: it is not wanted."""
        self._with_core(
            lambda core: core.load(request, computed, device_blocks, self._clock()), None
        )

    def hits(self, request: str) -> Hits:
        """Where the blocks of the request's last load come from."""
        return self._with_core(lambda core: core.hits(request), NO_HITS)

    def store(
        self,
        request: str,
        after: BlockHash | None,
        chain: Sequence[BlockHash],
        device_blocks: Sequence[int],
        priorities: Sequence[int] | None = None,
    ) -> tuple[int, list[int]]:
        """Save blocks that the coming step computes; see `Leader.store`."""
        nothing: tuple[int, list[int]] = (len(chain), [])
        return self._with_core(
            lambda core: core.store(
                chain, device_blocks, request=request, after=after, priorities=priorities
            ),
            nothing,
        )

    def hand_over(
        self, chain: Sequence[BlockHash], device_blocks: Sequence[int]
    ) -> tuple[Origin, list[int]] | None:
        """Keep these blocks for another engine; see `Leader.hand_over`.

        Returns what that engine has to be told, and the device blocks that must not be reused
        until `report` returns them.
        """
        token = secrets.token_hex(16)
        nothing: list[int] | None = None
        held = self._with_core(
            lambda core: core.hand_over(token, chain, device_blocks, self._clock()), nothing
        )
        return None if held is None else (Origin(self.node, token, len(chain)), held)

    def finish(self, request: str) -> None:
        """The request is over."""
        self._with_core(lambda core: core.finish(request), None)

    def take_commands(self) -> StepCommands:
        """What the ranks have to do around the coming forward pass."""
        return self._with_core(lambda core: core.take_commands(self._clock()), StepCommands())

    def report(self, results: Sequence[StepResults]) -> list[int]:
        """What ranks have finished. Returns the device blocks that may be reused now."""

        def tell(core: Leader) -> list[int]:
            was_whole = core.crew.whole
            for result in results:
                core.report(result, self._clock())
            if core.crew.whole and not was_whole:
                self._loop.call(self._bus_side.wake)
            if core.disk_lost:
                self.metrics.disk_works(False)
            return core.take_freed_blocks()

        return self._with_core(tell, [])

    def take_lost_loads(self) -> list[LoadResult]:
        """Loads that a lost rank will not report; see `Leader.take_lost_loads`."""
        nothing: list[LoadResult] = []
        return self._with_core(lambda core: core.take_lost_loads(), nothing)

    def reset(self) -> None:
        """Forget every block."""
        self._with_core(lambda core: core.reset(), None)

    @property
    def busy(self) -> bool:
        """Whether ranks still have something to report."""
        return self._core is not None and self._core.busy

    @property
    def holds_device_blocks(self) -> bool:
        """Whether the engine will get device blocks back by itself."""
        return self._core is not None and self._core.holds_device_blocks

    def take_engine_events(self) -> list[BlockEvent]:
        """The block events since the last call, if the engine wants them for its own stream."""
        with self._lock:
            events, self._engine_events = self._engine_events, []
        return events

    def _with_core(self, ask: Callable[[Leader], T], without: T) -> T:
        """Ask the core, then have its effects carried out elsewhere."""
        with self._lock:
            if self._core is None:
                return without
            answer = ask(self._core)
            for account in self._core.take_accounts():
                self.metrics.account(account)
            if effects := self._core.take_effects():
                self._keep_for_engine(effects)
                self._loop.call(lambda: self._bus_side.carry_out(effects))
        return answer

    def _keep_for_engine(self, effects: list[Effect]) -> None:
        if not self._keep_engine_events:
            return
        events = (effect.event for effect in effects if isinstance(effect, Publish))
        self._engine_events.extend(
            event for event in events if isinstance(event, Stored | Removed | Cleared)
        )
        del self._engine_events[:-MAX_ENGINE_EVENTS]

    # -- bus side: called on the loop ----------------------------------------------------------

    def on_core(self, tell: Callable[[Leader], T], without: T) -> T:
        """For the bus side: ask the core if it is there."""
        return self._with_core(tell, without)

    @property
    def ready(self) -> bool:
        """Whether all ranks have reported once."""
        return self._core is not None

    @property
    def complete(self) -> bool:
        """Whether all ranks are there now."""
        with self._lock:
            return self._roster.complete and not self._roster.away

    @property
    def visible(self) -> bool:
        """Whether other nodes may see this one: all its ranks are there, for them too."""
        with self._lock:
            whole = self._core is not None and self._core.crew.whole
            return whole and self._roster.complete and not self._roster.invisible

    @property
    def lives(self) -> int:
        """How often what the ranks held was lost. Each time the node needs a new epoch."""
        return self._core.crew.lives if self._core is not None else 0

    @property
    def epoch(self) -> int:
        """The present epoch, or the last."""
        return self._core.journal.epoch if self._core is not None else 0

    def log_hit_rates(self) -> None:
        """Say how often requests find their blocks, if that has changed."""
        rates = self.metrics.hit_rates()
        if rates != self._said_rates:
            self._said_rates = rates
            _log.info(
                "found of the blocks wanted lately: %.1f %% in the host tier, %.1f %% on disk, "
                "%.1f %% on other nodes",
                100 * rates.host, 100 * rates.disk, 100 * rates.remote,
            )  # fmt: skip

    def record(self, epoch: int) -> bytes:
        """What the directory says about this node in its life `epoch`."""
        assert self._core is not None
        with self._lock:
            tiers = self._core.status()
        return encode(
            NodeRecord(
                node=self.node,
                epoch=epoch,
                world_size=self._roster.world_size,
                block_bytes=self._roster.block_bytes,
                tiers=tiers,
                engine=self._engine,
                instance=self.instance,
                block_tokens=self._block_tokens,
                **self._front._asdict(),
            )
        )

    def begin(self, epoch: int) -> None:
        """Take up `epoch`, whose events count from now."""
        with self._lock:
            assert self._core is not None
            self._core.journal.begin(epoch, empty=self._core.tiers.empty)

    def now(self) -> float:
        """The clock that the core's times are read from."""
        return self._clock()

    @property
    def world_size(self) -> int:
        """How many ranks this node has."""
        return self._roster.world_size

    @property
    def settings(self) -> Settings:
        """What the operator chose."""
        return self._settings


HELD_SHARE = 0.5
"""At most this share of the device pool is kept from the engine by unfinished saves."""

LENT_SHARE = 0.25
"""At most this share of the device pool is lent to decode engines."""


def _limits(settings: Settings, device_blocks: int) -> Limits:
    """What the operator chose, for the core."""
    unfiltered = settings.disable_disk_offload_filter
    return Limits(
        lookup_seconds=settings.lookup_deadline_seconds,
        lease_seconds=settings.lease_seconds,
        transfer_seconds=settings.transfer_timeout_seconds,
        held_blocks=max(1, int(device_blocks * HELD_SHARE)),
        lent_blocks=int(device_blocks * LENT_SHARE),
        staging_seconds=settings.staging_deadline_seconds,
        hand_over_seconds=settings.hand_over_deadline_seconds,
        disk_only=settings.disk_only,
        min_priority=settings.host_offload_prefix_min_priority,
        spill=SpillLimits(settings.max_transfer_batch_size, settings.max_concurrent_transfers),
        min_frequency=0 if unfiltered else settings.disk_offload_min_frequency,
        decay_seconds=settings.disk_offload_decay_seconds,
        filter_entries=settings.disk_offload_max_entries,
        prefetch_share=settings.prefetch_share,
    )
