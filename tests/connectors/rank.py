"""One rank of the engine under test: KV tensors, the connector's worker side, no model."""

from __future__ import annotations

import copy
import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer import kv_transfer_state
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.forward_context import set_forward_context
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.worker.kv_connector_model_runner_mixin import KVConnectorModelRunnerMixin as _Runner

from kvbm_schemas.block import BlockHash, Tier
from kvbm_schemas.step import NO_BLOCK
from kvbm_service.adapters.disk_tier import DiskTier
from kvbm_service.adapters.mover import Blocks
from kvbm_service.adapters.slab import Slab
from tests.connectors.computation import Digests
from tests.connectors.gate import DiskGate, Gate

RUBBISH = 0xEE
MAX_RANKS = 8


class Rank:
    """Its KV tensors, and the connector beside them, called as vLLM's model runner calls it."""

    def __init__(self, config: VllmConfig, kv_cache_config: KVCacheConfig, rank: int) -> None:
        self.rank = rank
        self._config = copy.copy(config)
        self._config.parallel_config = copy.copy(config.parallel_config)
        self._config.parallel_config.rank = rank
        groups = kv_cache_config.kv_cache_groups
        spec = groups[0].kv_cache_spec
        self._block_size = spec.block_size
        shape = (kv_cache_config.num_blocks, spec.num_kv_heads, spec.block_size, 2 * spec.head_size)
        memory = [torch.zeros(shape, dtype=spec.dtype) for _ in groups[0].layer_names]
        # As in vLLM, the first layers of all groups lie over the same memory, and so on.
        tensors = {
            name: tensor
            for group in groups
            for name, tensor in zip(group.layer_names, memory, strict=True)
        }
        self._layers: list[npt.NDArray[np.uint64]] = [
            tensor.numpy().view(np.uint64).reshape(shape[0], spec.block_size, -1)
            for tensor in memory
        ]
        self.connector = KVConnectorFactory.create_connector(
            config=self._config, role=KVConnectorRole.WORKER, kv_cache_config=kv_cache_config
        )
        self.connector.register_kv_caches(tensors)
        worker = self._worker
        worker._mover = self.gate = Gate(worker._mover, self.scribble)
        self._disk_gate: DiskGate | None = None
        if worker._disk is not None:
            worker._disk = self._disk_gate = DiskGate(worker._disk, self.scribble)

    @property
    def _worker(self) -> Any:
        """The connector's worker. Nothing else here reaches into it."""
        return self.connector._worker_side._worker

    @property
    def disk_gate(self) -> DiskGate:
        """In front of the disk tier that this rank was given."""
        assert self._disk_gate is not None, "this rank has no disk tier"
        return self._disk_gate

    @property
    def disk(self) -> DiskTier:
        """The rank's disk tier."""
        assert isinstance(self.disk_gate.disk, DiskTier)
        return self.disk_gate.disk

    @property
    def slab(self) -> Slab:
        """The rank's host memory."""
        slab = self.gate._mover._tier.slab  # type: ignore[attr-defined]
        assert isinstance(slab, Slab)
        return slab

    def read(self, tier: Tier, name: BlockHash, slot: int, fill: int, to: int) -> bool:
        """Read a block that `tier` holds into a device block, without leader and engine."""
        blocks = Blocks(
            hashes=np.frombuffer(name, np.uint64).reshape(1, 2),
            fills=np.array([fill], np.uint64),
            slots=np.array([slot], np.uint32),
            device=np.array([to], np.uint32),
        )
        source = self.disk_gate if tier is Tier.DISK else self.gate
        return bool(source.load(blocks).all())

    def flip_a_bit(self, slot: int) -> None:
        """As memory sometimes does by itself."""
        octet = ctypes.c_uint8.from_address(self.slab.base + slot * self.slab.slot_bytes + 17)
        octet.value ^= 1

    @property
    def unreported_moves(self) -> int:
        """Saves and the like that are done, and that the scheduler has not been told of."""
        return len(self._worker._moved)

    def lose_fetches(self) -> None:
        """What comes over the bus from now on gets lost on its way to this rank."""
        self._bus_side._carry_out = lambda order, tell: None

    def lose_answers(self) -> None:
        """Fetches that come over the bus are carried out, and the answers get lost."""
        self._bus_side._put = lambda reply, moved: None

    @property
    def _bus_side(self) -> Any:
        return self._worker._presence._main.__self__

    # -- what the model runner does ----------------------------------------------------------

    def step(self, output: SchedulerOutput, forward: Any) -> KVConnectorOutput:
        """One step: the connector's calls in the order of this release, `forward` among them."""
        try:
            kv_transfer_state._KV_CONNECTOR_AGENT = self.connector
            with set_forward_context(None, self._config):
                if not output.total_num_scheduled_tokens:
                    done = _Runner.kv_connector_no_forward(output, self._config)
                    return done.kv_connector_output or KVConnectorOutput()
                with _Runner.maybe_get_kv_connector_output(output) as transfers:
                    forward(self)
                return transfers
        finally:
            kv_transfer_state._KV_CONNECTOR_AGENT = None

    # -- bytes ---------------------------------------------------------------------------------

    def write(self, blocks: Sequence[int], digests: Digests, start: int, group: int = 0) -> None:
        """Compute the positions from `start` on."""
        for layer in range(len(self._layers)):
            at = self._places(blocks, start, len(digests))
            self._layers[layer][at] = self._content(digests[start:], layer, group)

    def wrong(
        self, blocks: Sequence[int], digests: Digests, group: int = 0, start: int = 0
    ) -> list[int]:
        """The positions from `start` on whose bytes a computation would not have written."""
        at = self._places(blocks, start, len(digests))
        right = np.ones(len(digests) - start, np.bool_)
        for layer in range(len(self._layers)):
            written = self._content(digests[start:], layer, group)
            right &= (self._layers[layer][at] == written).all(axis=1)
        return [start + int(position) for position in np.flatnonzero(~right)]

    def scribble(self, blocks: Any) -> None:
        """Leave rubbish in these blocks."""
        numbers = np.asarray(blocks, np.int64).ravel()
        for layer in self._layers:
            layer.view(np.uint8)[numbers[numbers != NO_BLOCK]] = RUBBISH

    def bytes_of(self, block: int) -> list[bytes]:
        """What is in a device block, layer by layer."""
        return [layer[block].tobytes() for layer in self._layers]

    def _places(self, blocks: Sequence[int], start: int, end: int) -> tuple[Any, Any]:
        positions = np.arange(start, end)
        return np.asarray(blocks, np.int64)[positions // self._block_size], (
            positions % self._block_size
        )

    def _content(self, digests: Digests, layer: int, group: int) -> npt.NDArray[np.uint64]:
        """Each rank, group and layer has other bytes for the same position."""
        words = self._layers[layer].shape[-1]
        place = (group * MAX_RANKS + self.rank) * len(self._layers) + layer
        salt = np.arange(1, words + 1, dtype=np.uint64) * np.uint64(2 * place + 1)
        return digests[:, None] * salt

    def close(self) -> None:
        """The worker process ends."""
        self.connector.shutdown()
