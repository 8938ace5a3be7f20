"""What not every release of vLLM asks of a connector."""

from __future__ import annotations

import importlib.util

import pytest
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1

needs_sources = pytest.mark.skipif(
    importlib.util.find_spec("vllm.v1.metrics.cache_hit_source") is None,
    reason="this vLLM does not ask where tokens come from",
)
needs_patience = pytest.mark.skipif(
    not hasattr(KVConnectorBase_V1, "has_pending_block_frees"),
    reason="this vLLM preempts without asking whether blocks will come back",
)
