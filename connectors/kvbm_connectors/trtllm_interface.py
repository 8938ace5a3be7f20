"""Where TensorRT-LLM keeps what the connector needs of it, from release 1.1 on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorrt_llm

try:
    from tensorrt_llm._torch.pyexecutor.connectors.kv_cache_connector import (
        KvCacheConnectorScheduler,
        KvCacheConnectorWorker,
    )
except ImportError:  # until 1.2
    from tensorrt_llm._torch.pyexecutor.kv_cache_connector import (
        KvCacheConnectorScheduler,
        KvCacheConnectorWorker,
    )
from tensorrt_llm._utils import mpi_allgather, mpi_broadcast, mpi_rank, mpi_world_size

__all__ = ["KvCacheConnectorScheduler", "KvCacheConnectorWorker", "Ranks", "release"]


def release() -> str:
    """The release of TensorRT-LLM that runs."""
    return str(tensorrt_llm.__version__)


class Ranks:
    """The engine's ranks, seen from one of them. All must make the same calls in one order."""

    def __init__(self) -> None:
        self.number = int(mpi_rank())
        self.count = int(mpi_world_size())

    def tell_all(self, say: Callable[[], Any]) -> Any:
        """What rank 0 says, on all ranks."""
        said = say() if self.number == 0 else None
        return mpi_broadcast(said, root=0) if self.count > 1 else said

    def gather(self, own: Any) -> list[Any]:
        """What each rank has, in rank order, on all ranks."""
        return list(mpi_allgather(own)) if self.count > 1 else [own]
