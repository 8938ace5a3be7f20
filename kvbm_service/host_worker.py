"""Putting one rank's worker together: its tiers, its copies, its NIXL agents."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import msgspec
import torch

from kvbm_schemas.block import Tier
from kvbm_schemas.records import DeviceRecord, RankRecord
from kvbm_schemas.step import Survivors
from kvbm_service import forgetting
from kvbm_service.adapters import device_pool
from kvbm_service.adapters.affinity import every_cpu
from kvbm_service.adapters.copies import Copies, CpuCopies
from kvbm_service.adapters.disk import Contents
from kvbm_service.adapters.disk_tier import DiskTier
from kvbm_service.adapters.homes import Home, generation
from kvbm_service.adapters.host_tier import HostTier, parts
from kvbm_service.adapters.nixl_mover import NixlMover
from kvbm_service.adapters.slab import Slab
from kvbm_service.errors import LayoutError
from kvbm_service.network import Connect
from kvbm_service.settings import TABLE, Settings, tier_slots
from kvbm_service.worker_service import RankId, WorkerService

_log = logging.getLogger(__name__)


def start_worker(
    settings: Settings,
    rank: RankId,
    kv_caches: Mapping[str, torch.Tensor],
    device_blocks: int | Sequence[int],
    connect: Connect,
    groups: Sequence[Collection[str]] = (),
) -> WorkerService:
    """Allocate one rank's share of the tiers beside its KV tensors, and start its worker.

    `kv_caches` has one tensor per layer; `device_blocks` of them fit into each. `groups` are the
    layers by block table, where blocks are rows (`device_pool.regions`), and `device_blocks` may
    be by group; such blocks are not lent from the device. The tiers have as many slots as the
    settings allow if all ranks have blocks like this one's. What an earlier engine of the same
    scope left in them is found again.

    Raises:
        LayoutError: the tensors cannot be cached, or memory or disk space is not there.
        SettingError: no tier has a size, or not even one block fits into one that has.
        TransferError: the memory cannot be pinned.
    """
    regions = device_pool.regions(kv_caches, device_blocks, groups)
    lengths = parts(regions)
    slots = tier_slots(settings, sum(lengths) * rank.world_size)
    layout = _layout(kv_caches)
    began = time.monotonic()
    with every_cpu():
        device = device_pool.device(kv_caches)
        shared = _home(settings, "host_cache_dir", rank) if slots.host else None
        slab = _slab(rank, slots.host or _staging_slots(settings), lengths, shared, layout)
        host = HostTier(slab, regions, _copies(device), verify=settings.verify)
        mover = NixlMover(
            host,
            device.index if device.type == "cuda" else None,
            lends=settings.lend_device and not groups,
        )
        home = _home(settings, "disk_cache_dir", rank) if slots.disk else None
        disk = _disk(settings, rank, slots.disk, home, host, layout) if home else None
    _log.info("rank %d: tiers ready after %.1f s", rank.number, time.monotonic() - began)
    record = RankRecord(
        node=rank.node,
        rank=rank.number,
        world_size=rank.world_size,
        agent=mover.agent,
        agent_metadata=mover.agent_metadata,
        slab=msgspec.structs.replace(slab.record(), layout=layout),
        device_blocks=_blocks_of_ours(device_blocks, len(groups)),
        instance=rank.instance,
        disk_slots=slots.disk,
        device=DeviceRecord(**mover.pool._asdict()) if mover.pool is not None else None,
    )
    survivors = [_survivors(Tier.HOST, slab.contents())]
    if disk is not None:
        survivors.append(_survivors(Tier.DISK, disk.contents()))
    return WorkerService(
        record,
        mover,
        disk,
        survivors=survivors,
        forget=forgetting.for_good(
            *forgetting.homes(settings, rank.scope),
            slab.forget,
            *([disk.forget] if disk else []),
        ),
        scope=rank.scope,
        connect=connect,
        close=_all(slab.close, *(one.close for one in (shared, home) if one is not None)),
    )


def _home(settings: Settings, field: str, rank: RankId) -> Home | None:
    """The directory where a tier's files are, if they are to be in one."""
    root = getattr(settings, field)
    if not root:
        return None
    variable = TABLE[field].variable
    try:
        return Home.claim(Path(root), rank.scope, rank.instance, variable)
    except LayoutError as error:
        if field != "host_cache_dir":
            raise
        _log.warning("%s; the host tier will not survive a restart", error)
        return None


def _slab(
    rank: RankId, slots: int, lengths: tuple[int, ...], home: Home | None, layout: str
) -> Slab:
    gigabytes = slots * sum(lengths) / 1e9
    _log.info("rank %d: host tier of %d blocks, %.2f GB", rank.number, slots, gigabytes)
    file = home.path / f"rank-{rank.number}.slab" if home else None
    return Slab(slots, lengths, file, identity=_identity(rank, layout, home))


def _disk(
    settings: Settings, rank: RankId, slots: int, home: Home, host: HostTier, layout: str
) -> DiskTier:
    gigabytes = slots * host.slab.slot_bytes / 1e9
    _log.info(
        "rank %d: disk tier of %d blocks, %.2f GB, in %s",
        rank.number, slots, gigabytes, home.path,
    )  # fmt: skip
    if settings.disk_only:
        _log.warning(
            "only the disk tier has a size: blocks go from the device straight to disk, all of "
            "them; this is experimental, and DYN_KVBM_CPU_CACHE_GB puts the host in between"
        )
    return DiskTier.open(
        home.path,
        rank.number,
        slots,
        host,
        identity=_identity(rank, layout, home),
        batch_blocks=settings.max_transfer_batch_size,
        batches=settings.max_concurrent_transfers,
        direct=not settings.disk_disable_o_direct,
        zerofill_fallback=settings.disk_zerofill_fallback,
        backend=settings.disk_backend,
    )


def _staging_slots(settings: Settings) -> int:
    """With no host tier asked for: slots through which other nodes are served from disk."""
    return settings.max_transfer_batch_size * settings.max_concurrent_transfers


def _identity(rank: RankId, layout: str, home: Home | None) -> str:
    """What must be equal for the bytes of an earlier life to be those of this one."""
    life = generation(home.path) if home else ""
    place = f"{rank.number}of{rank.world_size}"
    return "/".join([*rank.scope, place, layout, rank.weights, life])


def _survivors(tier: Tier, contents: Contents) -> Survivors:
    return Survivors(
        tier=tier,
        hashes=contents.hashes.tobytes(),
        fills=contents.fills.astype("<u8").tobytes(),
        slots=contents.slots.astype("<u4").tobytes(),
    )


def _all(*calls: Callable[[], None]) -> Callable[[], None]:
    def call() -> None:
        for one in calls:
            one()

    return call


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


def _blocks_of_ours(device_blocks: int | Sequence[int], groups: int) -> int:
    """How many the device has room for, if each is one block of every group."""
    if isinstance(device_blocks, int):
        return device_blocks // max(1, groups)
    return min(device_blocks)
