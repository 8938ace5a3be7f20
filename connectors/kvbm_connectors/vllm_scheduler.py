"""The scheduler's half of the vLLM connector: requests and block tables in, our calls out.

Source blocks of saves are held by their reference count in vLLM's own block pool. So a
request that ends, is aborted or is preempted frees its blocks as always, and those still
being copied stay until the copy is done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kvbm_connectors import kv_transfer_params
from kvbm_connectors.vllm_channel import KvbmHandshake, KvbmMetadata, KvbmWorkerMetadata
from kvbm_connectors.vllm_events import EngineEvents
from kvbm_connectors.vllm_layout import name_of
from kvbm_connectors.vllm_tables import Tables
from kvbm_schemas.block import BlockHash
from kvbm_schemas.message import MAX_BATCH_BLOCKS
from kvbm_service import forgetting
from kvbm_service.core.reads import Hits, Origin
from kvbm_service.errors import LayoutError
from kvbm_service.leader_service import LeaderService

if TYPE_CHECKING:
    from vllm.distributed.kv_events import KVCacheEvent
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request


@dataclass(slots=True)
class _Followed:
    """One request: the names of its full blocks, and where they are on the device."""

    request: Request
    names: list[BlockHash] = field(default_factory=list)
    device_blocks: list[int] = field(default_factory=list)
    loadable: int = 0
    """Blocks that the leader was told to look for."""
    computed: int = 0
    """Blocks that vLLM had itself when it last asked."""
    offered: int = 0
    """Full blocks that the leader was offered for saving."""

    def update_names(self) -> list[BlockHash]:
        """The names of all full blocks whose tokens are known."""
        hashes = self.request.block_hashes
        known = len(self.names)
        if known and (known > len(hashes) or name_of(hashes[known - 1]) != self.names[-1]):
            self.names.clear()  # the session went back and took another turn
            self.offered = known = 0
        if known < len(hashes):
            self.names.extend(name_of(block_hash) for block_hash in hashes[known:])
        return self.names


class SchedulerSide:
    """Follows vLLM's requests for one leader. All calls come from the scheduler's thread."""

    def __init__(
        self,
        leader: LeaderService,
        block_size: int,
        events: EngineEvents,
        tables: Tables | None = None,
    ) -> None:
        """`tables`: of a model whose blocks are rows."""
        self._tables = tables
        self._leader = leader
        self._block_size = block_size
        self._events = events
        self._followed: dict[str, _Followed] = {}
        self._pool: BlockPool | None = None

    def bind_block_pool(self, pool: BlockPool) -> None:
        """Where the source blocks of saves are held."""
        self._pool = pool

    def bind_block_tables(self, blocks_of: Callable[[str], KVCacheBlocks]) -> None:
        """Where rows are looked up, if blocks are rows."""
        if self._tables is not None:
            self._tables.blocks_of = blocks_of

    def meet_ranks(self, handshakes: Iterable[KvbmHandshake]) -> None:
        """All ranks of the engine have allocated their tiers."""
        for handshake in handshakes:
            self._leader.attach(handshake.record, handshake.survivors)

    # -- read path -------------------------------------------------------------------------

    def on_new_request(self, request: Request) -> None:
        """Start looking for the request's blocks."""
        followed = self._followed[request.request_id] = _Followed(request)
        self._look_for(followed, kv_transfer_params.read(request.kv_transfer_params))

    def _look_for(self, followed: _Followed, origin: Origin | None = None) -> None:
        request = followed.request
        names = followed.update_names()
        if len(names) * self._block_size > request.num_tokens:
            raise LayoutError(
                f"vLLM names pieces smaller than its blocks of {self._block_size} tokens, and "
                "this version caches whole blocks: do not set --prefix-match-unit"
            )
        # The last token is always computed: its output is what the request is about.
        followed.loadable = min(len(names), (request.num_tokens - 1) // self._block_size)
        wanted = [] if request.skip_reading_prefix_cache else names[: followed.loadable]
        self._leader.arrive(request.request_id, wanted, origin)

    def matched_tokens(self, request: Request, computed_tokens: int) -> int | None:
        """How many further tokens can be loaded; None: ask again."""
        followed = self._followed.get(request.request_id)
        if followed is None:
            self.on_new_request(request)
            followed = self._followed[request.request_id]
        if request.skip_reading_prefix_cache or computed_tokens % self._block_size:
            return 0
        if (request.num_tokens - 1) // self._block_size > followed.loadable:
            self._leader.finish(request.request_id)  # preempted, and longer than it was
            self._look_for(followed)
        followed.computed = computed_tokens // self._block_size
        blocks = self._leader.match(request.request_id, followed.computed)
        return None if blocks is None else blocks * self._block_size

    def allocated(self, request: Request, blocks: KVCacheBlocks, external_tokens: int) -> None:
        """vLLM has blocks for what was promised; or (0 tokens) does not want it."""
        followed = self._followed[request.request_id]
        first = followed.computed
        count = external_tokens // self._block_size
        if self._tables is not None:
            wanted = self._tables.name(self._tables.rows(blocks, first, first + count))
            assert len(wanted) == count, "vLLM has no blocks for what it accepted"
        else:
            wanted = blocks.get_block_ids()[0][first : first + count] if count else []
        self._leader.load(request.request_id, first, wanted)

    def hit_tokens(self, request: Request) -> Hits:
        """Tokens of the request's load, by where they come from."""
        hits = self._leader.hits(request.request_id)
        return Hits(*(blocks * self._block_size for blocks in hits))

    def finished(self, request: Request, device_blocks: list[int]) -> dict[str, Any] | None:
        """The request is over. Returns what the engine that goes on with it has to be told."""
        handed_over = self._hand_over(request, device_blocks)
        self._leader.finish(request.request_id)
        self._followed.pop(request.request_id, None)
        return handed_over

    def _hand_over(self, request: Request, device_blocks: list[int]) -> dict[str, Any] | None:
        followed = self._followed.get(request.request_id)
        wanted = kv_transfer_params.wants_hand_over(request.kv_transfer_params)
        if followed is None or not wanted or not _ended_well(request):
            return None
        names = followed.update_names()
        count = min(len(names), request.num_prompt_tokens // self._block_size, MAX_BATCH_BLOCKS)
        if self._tables is not None or request.num_preemptions:
            # Rows are not lent. Nor is what may still have to be computed: a request that was
            # preempted can end by an output from before. What is in the tiers is there.
            device_blocks = []
        else:
            count = min(count, len(device_blocks))
        kept = self._leader.hand_over(names[:count], device_blocks[:count])
        if kept is None:
            return None
        origin, held = kept
        self._hold(held)
        return kv_transfer_params.written(origin)

    # -- write path ------------------------------------------------------------------------

    def build_metadata(self, output: SchedulerOutput) -> KvbmMetadata:
        """Offer the blocks that this step fills, and hand over what the ranks have to do."""
        for new in output.scheduled_new_reqs:
            self._follow_blocks(new.req_id, new.block_ids, replaced=True)
        cached = output.scheduled_cached_reqs
        for request_id, block_ids in zip(cached.req_ids, cached.new_block_ids, strict=True):
            self._follow_blocks(request_id, block_ids, request_id in cached.resumed_req_ids)
        starts = [(new.req_id, new.num_computed_tokens) for new in output.scheduled_new_reqs]
        starts += zip(cached.req_ids, cached.num_computed_tokens, strict=True)
        for request_id, computed in starts:
            self._offer(request_id, computed + output.num_scheduled_tokens.get(request_id, 0))
        commands = self._leader.take_commands()
        return KvbmMetadata(self._tables.spell_out(commands) if self._tables else commands)

    def _follow_blocks(
        self, request_id: str, block_ids: tuple[list[int], ...] | None, replaced: bool
    ) -> None:
        followed = self._followed.get(request_id)
        if followed is None or self._tables is not None:
            return
        if replaced:
            followed.device_blocks.clear()
        if block_ids is not None:
            followed.device_blocks.extend(block_ids[0])

    def _offer(self, request_id: str, end_token: int) -> None:
        followed = self._followed.get(request_id)
        if followed is None or end_token // self._block_size <= followed.offered:
            return
        names = followed.update_names()
        last = min(end_token // self._block_size, len(names))
        if self._tables is None:
            last = min(last, len(followed.device_blocks))
            device_blocks = followed.device_blocks[followed.offered : last]
            self._store(followed, followed.offered, device_blocks)
            return
        followed.offered, rows = self._tables.whole(request_id, followed.offered, last)
        self._store(followed, followed.offered, self._tables.name(rows))

    def _store(self, followed: _Followed, first: int, device_blocks: list[int]) -> None:
        """Offer blocks that lie there, from the request's block `first` on."""
        if not device_blocks:
            return
        names = followed.names
        chain = names[first : first + len(device_blocks)]
        after = names[first - 1] if first else None
        request = followed.request
        dealt_with, held = self._leader.store(request.request_id, after, chain, device_blocks)
        if held:
            self._hold(held)
            self._events.offered(request, first, first + dealt_with)
        followed.offered = first + dealt_with

    def _hold(self, device_blocks: list[int]) -> None:
        if not device_blocks:
            return
        assert self._pool is not None
        if self._tables is not None:
            device_blocks = self._tables.hold(device_blocks)
        self._pool.touch([self._pool.blocks[block] for block in device_blocks])

    def worker_reported(self, output: KVConnectorOutput) -> None:
        """Ranks have finished something: give back the blocks that were held for it."""
        meta = output.kv_connector_worker_meta
        if meta is None:
            return
        assert isinstance(meta, KvbmWorkerMetadata)
        freed = self._leader.report(meta.results)
        if freed:
            assert self._pool is not None
            if self._tables is not None:
                freed = self._tables.let_go(freed)
            self._pool.free_blocks(self._pool.blocks[block] for block in reversed(freed))

    @property
    def busy(self) -> bool:
        """Whether the engine must go on stepping to hear of finished transfers."""
        return self._leader.busy

    @property
    def holds_blocks(self) -> bool:
        """Whether device blocks will come back by themselves."""
        return self._leader.holds_device_blocks

    def take_events(self) -> list[KVCacheEvent]:
        """Our tiers' part of vLLM's own KV event stream."""
        return self._events.take()

    def reset(self) -> None:
        """Forget every block, for later lives, too."""
        self._leader.reset()
        forgetting.for_good(*forgetting.homes(self._leader.settings, self._leader.scope))()

    def close(self) -> None:
        """The engine ends."""
        self._leader.close()


def _ended_well(request: Request) -> bool:
    """Whether the request was neither aborted nor failed."""
    from vllm.v1.request import RequestStatus

    return request.status in (RequestStatus.FINISHED_LENGTH_CAPPED, RequestStatus.FINISHED_STOPPED)
