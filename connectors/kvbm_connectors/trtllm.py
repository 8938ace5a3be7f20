"""The connector that TensorRT-LLM loads, from the `kv_connector_config` of its LLM API options:

    kv_connector_config:
      connector_module: kvbm_connectors.trtllm
      connector_scheduler_class: DynamoKVBMConnectorLeader
      connector_worker_class: DynamoKVBMConnectorWorker

TensorRT-LLM makes a worker on every rank, and on rank 0 a leader beside it, in one process.
Written for its interface of release 1.2 and for the newest one, which adds groups of layers.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from kvbm_connectors import identity, trtllm_layout
from kvbm_connectors.trtllm_interface import (
    KvCacheConnectorScheduler,
    KvCacheConnectorWorker,
    Ranks,
    release,
)
from kvbm_connectors.trtllm_leader import LeaderSide
from kvbm_connectors.trtllm_step import Commands
from kvbm_connectors.trtllm_worker import WorkerSide
from kvbm_service.errors import KvbmError, LayoutError
from kvbm_service.settings import Settings

if TYPE_CHECKING:
    import torch

_leaders: WeakValueDictionary[int, LeaderSide] = WeakValueDictionary()
"""By the engine's arguments: how the worker on rank 0 finds the leader beside it."""


class KvbmConnectorLeader(KvCacheConnectorScheduler):
    """Decides which blocks are kept and which come back. On rank 0."""

    def __init__(self, llm_args: Any) -> None:
        super().__init__(llm_args)
        trtllm_layout.check(llm_args)
        self._side = _leaders[id(llm_args)] = LeaderSide(Settings.load(os.environ))
        atexit.register(self.shutdown)

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int, bool]:
        """Tokens that will be loaded, always while other requests go on."""
        tokens = self._side.matched_tokens(request, num_computed_tokens)
        return tokens, bool(tokens)

    def update_state_after_alloc(self, request: Any, block_ids: list[int]) -> None:
        """TensorRT-LLM has allocated the request's blocks."""
        self._side.allocated(request, [block_ids])

    def update_state_after_alloc_by_layer_group(
        self, request: Any, block_ids_by_layer_group: list[list[int]]
    ) -> None:
        """The same, of a cache that has groups of layers."""
        self._side.allocated(request, block_ids_by_layer_group)

    def build_connector_meta(self, scheduler_output: Any) -> Commands:
        """The step's commands for all ranks."""
        return self._side.commands(scheduler_output)

    def request_finished(self, request: Any, cache_block_ids: list[int]) -> bool:
        """Whether its blocks must stay, as some are being saved; a worker says for how long."""
        return self._side.finished(request)

    def request_finished_by_layer_group(
        self, request: Any, cache_block_ids_by_layer_group: list[list[int]]
    ) -> bool:
        """The same, of a cache that has groups of layers."""
        return self._side.finished(request)

    def request_reset(self, request: Any) -> None:
        """TensorRT-LLM has taken the request's blocks away; it will be told of it as if new."""
        self._side.reset(request)

    def wait_for_initialization(self) -> None:
        """Nothing to wait for: the ranks have met while the KV pool was registered."""

    def shutdown(self) -> None:
        """Leave the cluster. TensorRT-LLM does not say when it ends, so the interpreter does."""
        atexit.unregister(self.shutdown)
        self._side.close()


class KvbmConnectorWorker(KvCacheConnectorWorker):
    """Owns one rank's share of the tiers, and copies."""

    def __init__(self, llm_args: Any) -> None:
        super().__init__(llm_args)
        trtllm_layout.check(llm_args)
        self._args = llm_args
        self._settings = Settings.load(os.environ)
        self._ranks = Ranks()
        self._side = WorkerSide(self._settings, self._ranks)
        atexit.register(self.shutdown)

    def register_forward_pass_callable(self) -> Callable[[], None]:
        """Nothing to add to a CUDA graph: saves begin in `wait_for_save`, which is not in one."""
        return _nothing

    def register_kv_caches(self, kv_cache_tensor: torch.Tensor) -> None:
        """The one pool that all layers' blocks are in. Allocates this rank's tiers."""
        self._open(trtllm_layout.pool_of_tensor(kv_cache_tensor, self._args))

    def register_kv_cache_layout(self, layout: Any) -> None:
        """The same, where TensorRT-LLM describes its pools."""
        self._open(trtllm_layout.pool_of_layout(layout, self._args))

    def _open(self, pool: trtllm_layout.Pool) -> None:
        leader = _leaders.get(id(self._args))
        if (leader is not None) != (self._ranks.number == 0):
            raise LayoutError("a leader is needed beside the worker of rank 0, and there alone")

        def begin() -> trtllm_layout.Identity | str:
            assert leader is not None
            count = self._ranks.count
            who = trtllm_layout.identify(self._args, pool, count, release(), self._settings)
            try:
                leader.open(who, count, pool)
            except KvbmError as error:
                if count == 1:
                    raise
                return str(error)  # the others must not wait for this rank for ever
            return who

        who = self._ranks.tell_all(begin)
        if isinstance(who, str):
            raise LayoutError(f"rank 0: {who}")
        self._side.open(pool, who, identity.weights(self._args.model), leader)

    def start_load_kv(self, stream: torch.cuda.Stream) -> None:
        """Begins loads; they end in some later step."""
        commands = self.get_connector_meta()
        if commands is not None:
            self._clear_connector_meta()  # a step without new metadata must not begin it again
            self._side.start_loads(commands)

    def wait_for_layer_load(self, layer_idx: int, stream: torch.cuda.Stream) -> None:
        """Nothing to wait for: a request is scheduled only when its load is complete."""

    def save_kv_layer(self, layer_idx: int, stream: torch.cuda.Stream) -> None:
        """Nothing per layer: blocks are saved whole."""

    def wait_for_save(self, stream: torch.cuda.Stream) -> None:
        """Begins saves, ordered after the forward pass; waits for nothing."""
        self._side.start_saves()

    def get_finished(
        self, finished_gen_req_ids: list[int], started_loading_req_ids: list[int]
    ) -> tuple[list[int], list[int]]:
        """Requests whose saves and whose loads are done.

        Raises:
            TransferError: a promised block did not arrive. The engine ends; see the README.
        """
        return self._side.finished(finished_gen_req_ids, started_loading_req_ids)

    def shutdown(self) -> None:
        """Leave the cluster, let go of memory and files."""
        atexit.unregister(self.shutdown)
        self._side.close()


class DynamoKVBMConnectorLeader(KvbmConnectorLeader):
    """The same leader under the name that Dynamo's guides use."""


class DynamoKVBMConnectorWorker(KvbmConnectorWorker):
    """The same worker under the name that Dynamo's guides use."""


def _nothing() -> None:
    pass
