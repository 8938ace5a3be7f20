"""The worker's half of the vLLM connector: one rank's KV tensors in, copies and reads done.

vLLM calls it around each forward pass; all work happens on the worker service's own threads.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from kvbm_connectors.vllm_channel import KvbmHandshake, KvbmMetadata, KvbmWorkerMetadata
from kvbm_schemas.step import StepCommands, StepResults
from kvbm_service.network import Connect
from kvbm_service.settings import Settings
from kvbm_service.worker_service import RankId, WorkerService

if TYPE_CHECKING:
    import torch


class WorkerSide:
    """One rank. All calls come from the model runner's thread."""

    def __init__(
        self,
        settings: Settings,
        rank: RankId,
        device_blocks: int,
        connect: Connect,
        groups: Sequence[Collection[str]],
    ) -> None:
        """`groups`: if blocks are rows, the layers by block table. A load that fails is then
        reported by its request, for there is no saying from which block on to compute it again.
        """
        self._settings = settings
        self._rank = rank
        self._device_blocks = device_blocks
        self._connect = connect
        self._groups = groups
        self._worker: WorkerService | None = None
        self._collected: StepResults | None = None

    def register(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """vLLM has allocated its KV tensors: allocate the tiers that go with them."""
        assert self._worker is None, "the KV tensors were registered twice"
        from kvbm_service.host_worker import start_worker

        self._worker = start_worker(
            self._settings,
            self._rank,
            kv_caches,
            self._device_blocks,
            self._connect,
            self._groups,
        )

    def handshake(self) -> KvbmHandshake | None:
        """What the scheduler's side has to know of this rank."""
        if self._worker is None:
            return None
        return KvbmHandshake(self._worker.record, self._worker.survivors)

    def start_loads(self, metadata: KvbmMetadata) -> None:
        """Begin to fill blocks of waiting requests."""
        commands = metadata.commands
        if self._worker:
            self._worker.submit(msgspec.structs.replace(commands, saves=()))

    def start_saves(self, metadata: KvbmMetadata) -> None:
        """The forward pass is under way or done: copy the blocks it fills, after it."""
        if self._worker and metadata.commands.saves:
            commands = metadata.commands
            self._worker.submit(StepCommands(saves=commands.saves, meant=commands.meant))

    def finished_loads(self) -> set[str]:
        """The requests whose loads came to their end here since the last call.

        Begins the step's report: `failed_blocks` and `metadata` belong to the same moment.
        """
        self._collected = self._worker.collect() if self._worker else None
        return {load.request for load in self._collected.loads} if self._collected else set()

    def failed_blocks(self) -> set[int]:
        """Device blocks that hold no valid bytes, of the loads just reported."""
        if self._collected is None or self._groups:
            return set()
        failed: set[int] = set()
        for load in self._collected.loads:
            failed.update(np.frombuffer(load.failed_blocks, dtype="<u4").tolist())
        return failed

    def failed_requests(self) -> set[str]:
        """The requests of the loads just reported that have to be computed from the beginning."""
        if self._collected is None or not self._groups:
            return set()
        return {load.request for load in self._collected.loads if load.failed_blocks}

    def metadata(self) -> KvbmWorkerMetadata | None:
        """The report for the scheduler's side."""
        return KvbmWorkerMetadata((self._collected,)) if self._collected else None

    def close(self) -> None:
        """The engine ends."""
        if self._worker is not None:
            self._worker.close()
            self._worker = None
