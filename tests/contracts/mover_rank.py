"""One rank for the mover's tests: KV tensors, a slab and a mover, with known bytes in them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from kvbm_service.adapters.copies import Copies, CpuCopies
from kvbm_service.adapters.device_pool import regions
from kvbm_service.adapters.host_tier import HostTier, parts
from kvbm_service.adapters.memcpy_mover import MemcpyMover
from kvbm_service.adapters.mover import HEADER, Blocks, RemoteSlab
from kvbm_service.adapters.nixl_mover import NixlMover
from kvbm_service.adapters.slab import Slab

POOL = 24
"""Device blocks."""
SLOTS = 300
"""More than two pages of headers."""

Kind = type[MemcpyMover] | type[NixlMover]


def _heads_first() -> dict[str, torch.Tensor]:
    return {f"layer{i}": torch.zeros(POOL, 2, 16, 32, dtype=torch.float32) for i in range(3)}


def _keys_and_values_apart() -> dict[str, torch.Tensor]:
    return {f"layer{i}": torch.zeros(2, POOL, 16, 2, 16, dtype=torch.bfloat16) for i in range(3)}


def _all_layers_of_a_block_together() -> dict[str, torch.Tensor]:
    whole = torch.zeros(POOL, 3, 2, 16, 16, dtype=torch.float16)
    return {f"layer{i}": whole[:, i] for i in range(3)}


def _transposed_inside_and_shared() -> dict[str, torch.Tensor]:
    heads_inside = torch.zeros(POOL, 16, 2, 16, dtype=torch.float16).permute(0, 2, 1, 3)
    small = torch.zeros(POOL, 5, dtype=torch.uint8)
    padded = torch.zeros(POOL, 4, 8, dtype=torch.float32)[:, :3]
    return {"a": heads_inside, "b": heads_inside, "c": small, "d": padded}


LAYOUTS: dict[str, Callable[[], dict[str, torch.Tensor]]] = {
    "heads_first": _heads_first,
    "keys_and_values_apart": _keys_and_values_apart,
    "all_layers_of_a_block_together": _all_layers_of_a_block_together,
    "transposed_inside_and_shared": _transposed_inside_and_shared,
}


MANY_PARTS = "many_parts"
"""A layout for which a slab of so many slots takes 100 MB: not for every test."""


def _many_parts() -> dict[str, torch.Tensor]:
    return {f"layer{i}": torch.zeros(2, POOL, 16, 4, 32, dtype=torch.bfloat16) for i in range(40)}


class Rank:
    """A rank whose device pool, slab and headers tests can look into and change.

    A `device` other than the CPU is named with its number.
    """

    def __init__(
        self,
        kind: Kind,
        layout: str = "heads_first",
        *,
        verify: bool = False,
        device: str = "cpu",
    ) -> None:
        where = torch.device(device)
        with where:
            self.caches = _many_parts() if layout == MANY_PARTS else LAYOUTS[layout]()
        found = regions(self.caches, POOL)
        self.slab = Slab(SLOTS, parts(found))
        tier = HostTier(self.slab, found, _copies(where), verify=verify)
        self.mover = kind(tier) if kind is MemcpyMover else NixlMover(tier, where.index)
        record = self.slab.record()
        self.as_peer = RemoteSlab(
            agent=self.mover.agent,
            agent_metadata=self.mover.agent_metadata,
            base=record.base,
            headers=record.headers,
            slots=record.slots,
            slot_bytes=record.slot_bytes,
            parts=record.parts,
            pool=self.mover.pool,
        )

    def fill_pool(self, seed: int) -> None:
        """Let every byte of the device pool be drawn from `seed`; 0 clears it."""
        generator = torch.Generator().manual_seed(seed)
        for cache in self.caches.values():
            octets = torch.randint(0, 255 if seed else 1, cache.shape, generator=generator)
            cache.copy_(octets.to(cache.dtype))

    def block(self, number: int) -> bytes:
        """The bytes of one device block, in all layers."""
        return b"".join(
            half[number].contiguous().view(torch.uint8).cpu().numpy().tobytes()
            for cache in self.caches.values()
            for half in ([cache] if cache.shape[0] == POOL else list(cache))
        )

    def lend(self, device: list[int], op: int) -> None:
        """Lend these device blocks, named like slots of the same numbers."""
        self.mover.mark()()
        self.mover.lend(blocks(device, device, op))

    def unlend(self, device: list[int], op: int) -> None:
        self.mover.unlend(np.array(device, np.uint32), op)

    def write(self, number: int, octet: int) -> None:
        """Let all bytes of one device block be this one, as an engine that uses it again would."""
        for cache in self.caches.values():
            halves = [cache] if cache.shape[0] == POOL else list(cache)
            for half in halves:
                half[number].view(torch.uint8).fill_(octet)
        self.mover.mark()()

    def stamp(self, slot: int, name: tuple[int, int], fill: int) -> None:
        """Let the header of `slot` name something else."""
        self.slab.headers[slot] = np.array((name, fill, 0), HEADER)

    def flip_a_bit(self, slot: int) -> None:
        """Damage one byte in the middle of `slot`, as failing memory would."""
        self.slab.blocks[slot, self.slab.slot_bytes // 2] ^= 4

    def close(self) -> None:
        self.mover.close()
        self.slab.close()


def _copies(device: torch.device) -> Copies:
    if device.type == "cpu":
        return CpuCopies()
    from kvbm_service.adapters.cuda_copies import CudaCopies

    return CudaCopies(device)


def blocks(slots: list[int], device: list[int], fill: int = 1) -> Blocks:
    """Columns for a transfer: the block in slot s is named (s + 1, 1000)."""
    return Blocks(
        hashes=np.array([name(slot) for slot in slots], np.uint64).reshape(-1, 2),
        fills=np.full(len(slots), fill, np.uint64),
        slots=np.array(slots, np.uint32),
        device=np.array(device, np.uint32),
    )


def name(slot: int) -> tuple[int, int]:
    return (slot + 1, 1000)
