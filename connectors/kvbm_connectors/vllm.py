"""The connector that vLLM loads.

    vllm serve MODEL --kv-transfer-config '{"kv_connector": "KvbmConnector", "kv_role": "kv_both",
        "kv_connector_module_path": "kvbm_connectors.vllm", "kv_load_failure_policy": "recompute"}'

vLLM makes one in its scheduler's process, which hosts the node's leader, and one in each
worker's process, which hosts that rank's tiers. Runs on vLLM 0.26 to 0.32; the older
of these do not ask all that is answered here (vllm_releases.py).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorRole,
)

from kvbm_connectors import identity, vllm_layout, vllm_releases
from kvbm_connectors.vllm_channel import KvbmHandshake, KvbmMetadata
from kvbm_connectors.vllm_events import EngineEvents
from kvbm_connectors.vllm_scheduler import SchedulerSide
from kvbm_connectors.vllm_tables import Tables
from kvbm_connectors.vllm_worker import WorkerSide
from kvbm_service.leader_service import LeaderService
from kvbm_service.network import over_nats
from kvbm_service.settings import Settings
from kvbm_service.worker_service import RankId

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.distributed.kv_events import KVCacheEvent
    from vllm.distributed.kv_transfer.kv_connector.v1.base import (
        KVConnectorHandshakeMetadata,
        KVConnectorMetadata,
        KVConnectorTransferResults,
        KVConnectorWorkerMetadata,
    )
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

_log = logging.getLogger(__name__)


class KvbmConnector(KVConnectorBase_V1, *vllm_releases.HYBRID):  # type: ignore[misc]
    """Shares KV blocks with other engines, and keeps those that the device has no room for."""

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        _log_like_vllm()
        transfer = vllm_config.kv_transfer_config
        settings = Settings.load(os.environ, transfer.kv_connector_extra_config)
        vllm_layout.check_names_are_shared(vllm_config)
        block_size = vllm_layout.block_size(vllm_config, kv_cache_config)
        scope = vllm_layout.scope(vllm_config, kv_cache_config, settings)
        node = vllm_layout.node_name(vllm_config, settings)
        world_size = vllm_config.parallel_config.world_size
        self._scheduler_side: SchedulerSide | None = None
        self._worker_side: WorkerSide | None = None
        if role is KVConnectorRole.SCHEDULER:
            if transfer.kv_load_failure_policy != "recompute":
                _log.warning(
                    "kv_load_failure_policy is %r: a request whose blocks cannot be loaded will "
                    'fail; set it to "recompute" in --kv-transfer-config',
                    transfer.kv_load_failure_policy,
                )
            connect = over_nats(settings, f"kvbm leader {node}", node)
            wants_events = _publishes_events(vllm_config)
            leader = LeaderService(
                settings,
                scope,
                node,
                world_size,
                connect,
                engine="vllm",
                instance=vllm_layout.instance(vllm_config),
                engine_wants_events=wants_events,
                block_tokens=block_size,
                front=vllm_layout.front(vllm_config, settings),
            )
            leader.start()
            events = EngineEvents(leader, wants_events, block_size)
            tables = Tables() if vllm_layout.by_rows(kv_cache_config) else None
            self._scheduler_side = SchedulerSide(leader, block_size, events, tables)
        else:
            number = vllm_config.parallel_config.rank
            self._worker_side = WorkerSide(
                settings,
                RankId(
                    scope,
                    node,
                    number,
                    world_size,
                    vllm_layout.instance(vllm_config),
                    identity.weights(vllm_config.model_config.model),
                ),
                kv_cache_config.num_blocks,
                over_nats(settings, f"kvbm worker {node} rank {number}", node),
                vllm_layout.layers_by_group(kv_cache_config),
            )

    @property
    def _scheduler(self) -> SchedulerSide:
        assert self._scheduler_side is not None, "a worker was asked the scheduler's questions"
        return self._scheduler_side

    @property
    def _worker(self) -> WorkerSide:
        assert self._worker_side is not None, "the scheduler was asked a worker's questions"
        return self._worker_side

    @property
    def _commands(self) -> KvbmMetadata:
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, KvbmMetadata)
        return metadata

    @property
    def requires_kv_delivery(self) -> bool:
        """What is lost on the way, saved or handed over, is computed again, nothing worse."""
        return False

    # -- scheduler side ----------------------------------------------------------------------

    def bind_gpu_block_pool(self, gpu_block_pool: BlockPool) -> None:
        """Source blocks of saves are held in vLLM's own pool."""
        self._scheduler.bind_block_pool(gpu_block_pool)

    def bind_kv_cache_manager(self, kv_cache_manager: KVCacheManager) -> None:
        """Block tables that change under a request are looked up in vLLM's own."""
        super().bind_kv_cache_manager(kv_cache_manager)
        self._scheduler.bind_block_tables(kv_cache_manager.get_blocks)

    def set_xfer_handshake_metadata_pp_aware(
        self, metadata: dict[tuple[int, int], KVConnectorHandshakeMetadata]
    ) -> None:
        """All ranks are there."""
        self._scheduler.meet_ranks(
            handshake for handshake in metadata.values() if isinstance(handshake, KvbmHandshake)
        )

    def on_new_request(self, request: Request) -> None:
        """Starts the lookup."""
        self._scheduler.on_new_request(request)

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """Tokens that can be loaded; (None, False) while that is being found out."""
        tokens = self._scheduler.matched_tokens(request, num_computed_tokens)
        return tokens, bool(tokens)

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        """vLLM has allocated blocks for what is to be loaded."""
        self._scheduler.allocated(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        """The step's commands for all ranks."""
        return self._scheduler.build_metadata(scheduler_output)

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """What the ranks have finished."""
        self._scheduler.worker_reported(connector_output)

    def request_finished(
        self, request: Request, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        """vLLM may free the request's blocks: those being saved or lent are held by themselves.

        What is returned goes to the engine that goes on with the request.
        """
        return False, self._scheduler.finished(request, block_ids)

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """The same for the releases and models that have several block tables."""
        return self.request_finished(request, block_ids[0])

    def has_pending_push_work(self) -> bool:
        """Keeps an otherwise idle engine stepping until its transfers have been reported."""
        return self._scheduler.busy

    def has_pending_block_frees(self) -> bool:
        """Whether waiting gives device blocks back, so that nobody need be preempted."""
        return self._scheduler.holds_blocks

    def take_events(self) -> Iterable[KVCacheEvent]:
        """Our tiers' part of vLLM's KV event stream."""
        return self._scheduler.take_events()

    def reset_cache(self) -> bool | None:
        """Forget every block of this node, for later lives, too."""
        self._scheduler.reset()
        return True

    def get_external_cache_hit_sources(
        self, request: Request, num_external_tokens: int
    ) -> dict[Any, int]:
        """Which tier the loaded tokens come from."""
        return vllm_releases.by_source(self._scheduler.hit_tokens(request), num_external_tokens)

    # -- worker side -------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Allocates this rank's share of the tiers."""
        self._worker.register(kv_caches)

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata | None:
        """This rank's record, for the leader."""
        return self._worker.handshake()

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Begins loads; they end in some later step."""
        self._worker.start_loads(self._commands)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing to wait for: a request is scheduled only when its load is complete."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """Nothing per layer: blocks are saved whole."""

    def wait_for_save(self) -> None:
        """Begins saves, ordered after the forward pass; waits for nothing."""
        self._worker.start_saves(self._commands)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Loads that have ended here."""
        return None, self._worker.finished_loads()

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """The same, with the requests that have to be computed from the beginning."""
        loaded = self._worker.finished_loads()
        return vllm_releases.transfer_results(loaded, self._worker.failed_requests())

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Blocks of those loads that have to be recomputed."""
        return self._worker.failed_blocks()

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        """What this rank has finished, for the leader."""
        return self._worker.metadata()

    # -- both --------------------------------------------------------------------------------

    def shutdown(self) -> None:
        """The engine ends."""
        if self._scheduler_side is not None:
            self._scheduler_side.close()
        if self._worker_side is not None:
            self._worker_side.close()


class DynamoConnector(KvbmConnector):
    """The same connector under the name that Dynamo's guides use."""


def _log_like_vllm() -> None:
    """Send our log where vLLM's goes, in its format and at its level."""
    theirs = logging.getLogger("vllm")
    for package in ("kvbm_connectors", "kvbm_service"):
        ours = logging.getLogger(package)
        ours.handlers = theirs.handlers
        ours.setLevel(theirs.level)
        ours.propagate = theirs.propagate


def _publishes_events(config: VllmConfig) -> bool:
    events = config.kv_events_config
    return events is not None and bool(events.enable_kv_cache_events)
