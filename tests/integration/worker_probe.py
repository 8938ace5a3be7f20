"""Hands inside an engine's worker, for tests: look at a block's bytes, spoil them, hold a rank up.

Each rank's worker gets these methods beside its own (vLLM's `worker_extension_cls`), and
`Engine.call_workers` calls them. Bytes are read and written straight in memory, so that none
of the code under test is part of the proof.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import threading
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from kvbm_service.adapters.host_tier import HostTier
    from kvbm_service.worker_service import WorkerService

HOLD_SECONDS = 120.0
"""A rank that nobody lets go goes on by itself."""

_let_go = threading.Event()

os.nice(10)
"""A worker of vLLM's spins for a second after each step: who has something to do comes first."""


class Probe:
    """Mixed into vLLM's worker; each method is run in every rank."""

    model_runner: Any

    def kvbm_device_blocks(self) -> list[list[int]]:
        """The device blocks of each request that is running."""
        return [list(request.block_ids[0]) for request in self.model_runner.requests.values()]

    def kvbm_device_sums(self, blocks: list[int]) -> list[str]:
        """A digest of the bytes of each of these device blocks."""
        return [_digest(_device_pieces(block)) for block in blocks]

    def kvbm_slab_sums(self, names: list[str]) -> list[str]:
        """A digest of the bytes of the slot that holds each of these blocks; empty: none does."""
        slots = [_slot_of(name) for name in names]
        return ["" if slot is None else _digest([_slot_piece(slot)]) for slot in slots]

    def kvbm_spoil_device(self, block: int) -> None:
        """Write nonsense over a device block."""
        for address, length in _device_pieces(block):
            _spoil(address, length)

    def kvbm_spoil_slab(self, name: str) -> None:
        """Write nonsense over the slot that holds this block, and leave its header as it is."""
        slot = _slot_of(name)
        assert slot is not None, "the block is not here"
        _spoil(*_slot_piece(slot))

    def kvbm_hold(self, rank: int) -> None:
        """Let `rank` copy nothing until `kvbm_let_go`."""
        from kvbm_service.lanes import Job

        worker = _worker()
        if worker.record.rank == rank:
            _let_go.clear()
            worker._copies.add(Job(lambda: _let_go.wait(HOLD_SECONDS) and None, print))

    def kvbm_make_disk_read_only(self) -> None:
        """Let every write to the disk tier's file fail from now on."""
        file = _worker()._disk._file  # type: ignore[union-attr]
        read_only = os.open(f"/proc/self/fd/{file.fd}", os.O_RDONLY | os.O_DIRECT)
        os.dup2(read_only, file.fd, inheritable=False)
        os.close(read_only)

    def kvbm_let_go(self) -> None:
        """Let it copy again."""
        _let_go.set()


def _worker() -> WorkerService:
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    worker: WorkerService = get_kv_transfer_group()._worker_side._worker
    return worker


def _tier() -> HostTier:
    tier: HostTier = _worker()._mover._tier  # type: ignore[attr-defined]
    return tier


def _device_pieces(block: int) -> list[tuple[int, int]]:
    """Where the bytes of a device block are: address and length of each piece."""
    return [(region.address + block * region.stride, region.length) for region in _tier().regions]


def _slot_piece(slot: int) -> tuple[int, int]:
    slab = _tier().slab
    return slab.base + slot * slab.slot_bytes, slab.slot_bytes


def _slot_of(name: str) -> int | None:
    wanted = np.frombuffer(bytes.fromhex(name), dtype=np.uint64)
    headers = _tier().slab.headers
    (found,) = np.nonzero((headers["hash"] == wanted).all(axis=1) & (headers["fill"] != 0))
    return int(found[0]) if len(found) else None


def _digest(pieces: list[tuple[int, int]]) -> str:
    digest = hashlib.sha256()
    for address, length in pieces:
        digest.update(ctypes.string_at(address, length))
    return digest.hexdigest()


def _spoil(address: int, length: int) -> None:
    """Turn the numbers there into others of the same size: nothing overflows, all is wrong."""
    numbers = np.frombuffer((ctypes.c_char * length).from_address(address), dtype=np.float32)
    numbers[:] = -numbers[::-1].copy()
