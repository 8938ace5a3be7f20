"""What vLLM's configuration says about blocks: their size, their names, who may share them."""

from __future__ import annotations

import hashlib
import os
from typing import TYPE_CHECKING, Any

from kvbm_connectors import identity
from kvbm_connectors.vllm_releases import (
    KEYS_OF_NAMES,
    LOST_REQUESTS,
    SEED_OF_NAMES,
    SHARED_NAMES,
)
from kvbm_schemas.block import HASH_BYTES, BlockHash
from kvbm_schemas.subjects import Scope
from kvbm_service.errors import LayoutError, SettingError
from kvbm_service.leader_service import Front
from kvbm_service.route.fleet import Role
from kvbm_service.route.vllm_names import ALGORITHMS, Naming
from kvbm_service.settings import Settings

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec

STAYING = ("FullAttentionSpec", "MLAAttentionSpec")
"""Kinds of KV cache whose blocks all stay for as long as their request runs."""

LEAVING = ("SlidingWindowSpec",) if LOST_REQUESTS.here else ()
"""Kinds of which blocks leave a request's table in between, with vLLM's null block put into their
place. Other kinds may do anything: they have states that are not blocks, or blocks that move."""


def block_size(config: VllmConfig, kv_cache_config: KVCacheConfig) -> int:
    """Tokens per block.

    Raises:
        LayoutError: the model's KV cache is of a kind that cannot be cached yet.
    """
    groups = kv_cache_config.kv_cache_groups
    if not groups or (len(groups) > 1 and not LOST_REQUESTS.here):
        raise LayoutError(
            f"the model has {len(groups)} KV cache groups, and with this vLLM one can be cached: "
            "start it with --disable-hybrid-kv-cache-manager"
        )
    known = STAYING + LEAVING
    strange = set().union(*(_kinds(group) for group in groups)) - set(known)
    if strange:
        raise LayoutError(
            f"the model's KV cache is of kind {', '.join(sorted(strange))}, and this version "
            f"caches {', '.join(known)}: serve this model without the connector"
        )
    sizes = sorted({int(group.kv_cache_spec.block_size) for group in groups})
    if len(sizes) > 1:
        raise LayoutError(
            f"the model's KV cache groups have blocks of {sizes} tokens, and this version caches "
            "groups with blocks of one size: start vLLM with --disable-hybrid-kv-cache-manager"
        )
    parallel = config.parallel_config
    for setting in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, setting) > 1:
            raise LayoutError(
                f"{setting}={getattr(parallel, setting)}: blocks that context parallel ranks "
                "share out cannot be cached yet; set it to 1"
            )
    return sizes[0]


def by_rows(kv_cache_config: KVCacheConfig) -> bool:
    """Whether a block is a row of device blocks, of which some may be gone (`vllm_tables.py`)."""
    groups = kv_cache_config.kv_cache_groups
    return len(groups) > 1 or not _kinds(groups[0]) <= set(STAYING)


def layers_by_group(kv_cache_config: KVCacheConfig) -> list[frozenset[str]]:
    """The names of the layers that share a block table, for each table; empty where blocks are not
    rows.
    """
    if not by_rows(kv_cache_config):
        return []
    return [frozenset(group.layer_names) for group in kv_cache_config.kv_cache_groups]


def _kinds(group: KVCacheGroupSpec) -> set[str]:
    spec = group.kv_cache_spec
    return {type(each).__name__ for each in getattr(spec, "kv_cache_specs", {0: spec}).values()}


def check_names_are_shared(config: VllmConfig) -> None:
    """Refuse names of blocks that differ from process to process.

    Raises:
        SettingError: says what makes them differ, and what is allowed.
    """
    if os.environ.get("PYTHONHASHSEED") is not None:
        return
    if not SHARED_NAMES.here:
        raise SettingError(
            "PYTHONHASHSEED",
            None,
            f"vLLM before {SHARED_NAMES.since} then names the same block differently in every "
            "process; set it to the same number for all engines",
        )
    algorithm = str(config.cache_config.prefix_caching_hash_algo)
    if algorithm.startswith("xxhash"):
        raise SettingError(
            "--prefix-caching-hash-algo",
            algorithm,
            "with it, every process names the same block differently; use sha256 or sha256_cbor, "
            "or set PYTHONHASHSEED to the same number for all engines",
        )


def scope(config: VllmConfig, kv_cache_config: KVCacheConfig, settings: Settings) -> Scope:
    """Who can share blocks with this engine: a name, and a digest of all that shapes the bytes."""
    model, cache, parallel = config.model_config, config.cache_config, config.parallel_config
    spec = kv_cache_config.kv_cache_groups[0].kv_cache_spec
    described: dict[str, Any] = {
        "model": model.model,
        "revision": model.revision,
        "architecture": _architecture(model.hf_config),
        "weights": [str(config.load_config.load_format), model.quantization, model.seed]
        if str(config.load_config.load_format) == "dummy"
        else model.quantization,
        "dtype": str(model.dtype),
        "cache_dtype": str(cache.cache_dtype),
        "names": str(cache.prefix_caching_hash_algo),
        "seed_of_names": os.environ.get("PYTHONHASHSEED"),
        "block_tokens": spec.block_size,
        "block_bytes": spec.page_size_bytes,
        "spec": type(spec).__name__,
        "layers": len(kv_cache_config.kv_cache_groups[0].layer_names),
        "parallel": [
            parallel.tensor_parallel_size,
            parallel.pipeline_parallel_size,
            parallel.decode_context_parallel_size,
            parallel.prefill_context_parallel_size,
        ],
    }
    if by_rows(kv_cache_config):
        described["groups"] = [
            [
                sorted(_kinds(group)),
                group.kv_cache_spec.page_size_bytes,
                getattr(group.kv_cache_spec, "sliding_window", None),
                len(group.layer_names),
            ]
            for group in kv_cache_config.kv_cache_groups
        ]
    return identity.scope(settings.namespace, described)


def _architecture(hf_config: Any) -> dict[str, str]:
    """The model's own configuration, without what only tells where it was found."""
    items = hf_config.to_dict().items()
    return {key: str(value) for key, value in items if not key.startswith("_")}


def node_name(config: VllmConfig, settings: Settings) -> str:
    """This engine's name among the nodes; the same in all of its processes."""
    transfer = config.kv_transfer_config
    assert transfer is not None
    rank = config.parallel_config.data_parallel_rank
    several = config.parallel_config.data_parallel_size > 1
    if settings.node_name:
        return f"{settings.node_name}-dp{rank}" if several else settings.node_name
    return identity.node_name(hashlib.sha256(f"{transfer.engine_id}/{rank}".encode()).hexdigest())


def instance(config: VllmConfig) -> str:
    """This life of the engine: the same in all of its processes, another at its next start."""
    transfer = config.kv_transfer_config
    assert transfer is not None
    rank = config.parallel_config.data_parallel_rank
    described = f"{transfer.engine_id}/{config.instance_id}/{rank}"
    return hashlib.sha256(described.encode()).hexdigest()[:16]


def name_of(block_hash: bytes) -> BlockHash:
    """A block's name: the head of vLLM's own chained hash."""
    return BlockHash(block_hash[:HASH_BYTES])


def front(config: VllmConfig, settings: Settings) -> Front:
    """How prompts reach this engine, and what a router has to know to send it the right ones."""
    transfer = config.kv_transfer_config
    assert transfer is not None
    served = config.model_config.served_model_name
    return Front(
        url=settings.engine_url,
        role=ROLES.get(str(transfer.kv_role), Role.BOTH),
        names=_naming(config),
        model=str(served if isinstance(served, str) else served[0] if served else ""),
    )


ROLES = {"kv_producer": Role.PREFILL, "kv_consumer": Role.DECODE, "kv_both": Role.BOTH}
"""What vLLM calls what an engine is for."""


def _naming(config: VllmConfig) -> str:
    """How the engine names blocks; empty where another process cannot do the same."""
    algorithm = str(config.cache_config.prefix_caching_hash_algo)
    seed = os.environ.get("PYTHONHASHSEED", SEED_OF_NAMES)
    if algorithm not in ALGORITHMS or not seed:
        return ""
    return str(Naming(KEYS_OF_NAMES, algorithm, seed))
