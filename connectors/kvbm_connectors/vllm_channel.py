"""What rides vLLM's own channels between its processes, wrapped as vLLM wants it."""

from __future__ import annotations

from dataclasses import dataclass

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from kvbm_schemas.records import RankRecord
from kvbm_schemas.step import StepCommands, StepResults, Survivors


@dataclass
class KvbmHandshake(KVConnectorHandshakeMetadata):
    """Worker → scheduler, once: the rank has its host slab."""

    record: RankRecord
    survivors: tuple[Survivors, ...] = ()
    """What it found there of an earlier life of the engine."""


@dataclass
class KvbmMetadata(KVConnectorMetadata):
    """Scheduler → every worker, each step."""

    commands: StepCommands


@dataclass
class KvbmWorkerMetadata(KVConnectorWorkerMetadata):
    """Worker → scheduler, each step in which something was finished."""

    results: tuple[StepResults, ...]

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KvbmWorkerMetadata:
        """The results of several ranks."""
        assert isinstance(other, KvbmWorkerMetadata)
        return KvbmWorkerMetadata(self.results + other.results)
