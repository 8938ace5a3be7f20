"""Makes the worker for an engine's KV tensors: its host slab, its copies, its NIXL agents."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Mapping

import msgspec
import torch

from kvbm_schemas.records import RankRecord
from kvbm_schemas.subjects import Scope
from kvbm_service.adapters import device_pool
from kvbm_service.adapters.affinity import every_cpu
from kvbm_service.adapters.copies import Copies, CpuCopies
from kvbm_service.adapters.host_tier import HostTier, parts
from kvbm_service.adapters.nixl_mover import NixlMover
from kvbm_service.adapters.slab import Slab
from kvbm_service.network import Connect
from kvbm_service.settings import Settings, host_slots
from kvbm_service.worker_service import WorkerService

_log = logging.getLogger(__name__)


def start_worker(
    settings: Settings,
    scope: Scope,
    node: str,
    rank: int,
    world_size: int,
    kv_caches: Mapping[str, torch.Tensor],
    device_blocks: int,
    connect: Connect,
    instance: str = "",
) -> WorkerService:
    """Allocate one rank's share of the host tier beside its KV tensors, and start its worker.

    `kv_caches` has one tensor per layer; `device_blocks` of them fit into each. The slab has
    as many slots as the settings allow if all `world_size` ranks have blocks like this one's.
    `instance` names the engine's present life, as its leader does.

    Raises:
        LayoutError: the tensors cannot be cached, or the memory is not there.
        SettingError: the host tier has no size, or not even one block fits into it.
        TransferError: the memory cannot be pinned.
    """
    regions = device_pool.regions(kv_caches, device_blocks)
    block_bytes = sum(parts(regions))
    slots = host_slots(settings, block_bytes * world_size)
    _log.info("rank %d: allocating %.2f GB for %d blocks", rank, slots * block_bytes / 1e9, slots)
    began = time.monotonic()
    with every_cpu():
        device = device_pool.device(kv_caches)
        tier = HostTier(
            Slab(slots, parts(regions)), regions, _copies(device), verify=settings.verify
        )
        mover = NixlMover(tier, device.index if device.type == "cuda" else None)
    _log.info("rank %d: host tier ready after %.1f s", rank, time.monotonic() - began)
    record = RankRecord(
        node=node,
        rank=rank,
        world_size=world_size,
        agent=mover.agent,
        agent_metadata=mover.agent_metadata,
        slab=msgspec.structs.replace(tier.slab.record(), layout=_layout(kv_caches)),
        device_blocks=device_blocks,
        instance=instance,
    )
    return WorkerService(record, mover, scope, connect)


def _copies(device: torch.device) -> Copies:
    if device.type == "cuda":
        from kvbm_service.adapters.cuda_copies import CudaCopies

        return CudaCopies(device)
    return CpuCopies()


def _layout(kv_caches: Mapping[str, torch.Tensor]) -> str:
    """A digest of how the bytes of a block are arranged: equal digests, exchangeable bytes."""
    described = [
        (str(tensor.dtype), list(tensor.shape[1:]), list(tensor.stride()[1:]))
        for tensor in kv_caches.values()
    ]
    return hashlib.sha256(msgspec.json.encode(described)).hexdigest()[:16]
