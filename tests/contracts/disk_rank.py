"""One rank with a disk tier for the disk's tests: memory with known bytes in it, and its files."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np

from kvbm_service.adapters.copies import Copies, CpuCopies
from kvbm_service.adapters.disk_tier import DiskTier
from kvbm_service.adapters.host_tier import HostTier
from kvbm_service.adapters.mover import Blocks, Hop, Region
from kvbm_service.adapters.slab import Slab

POOL = 48
"""Device blocks, and host slots."""
SLOTS = 64
"""On the disk."""
IDENTITY = "a model, a layout"

PADDED = (4096, 100, 28)
"""Parts of a block that does not fill whole pages: it is written from a bounce buffer."""
WHOLE = (4096, 4096)
"""Parts of a block that does: it is written straight from the slab."""

LAYOUTS = {"padded": PADDED, "whole": WHOLE}


class DiskRank:
    """A rank whose device pool, slab and disk files tests can look into and change."""

    def __init__(
        self,
        home: Path,
        parts: tuple[int, ...] = PADDED,
        *,
        slots: int = SLOTS,
        identity: str = IDENTITY,
        verify: bool = False,
        copies: Copies | None = None,
        **options: Any,
    ) -> None:
        self.home = home
        self._parts = parts
        self._pool = [np.zeros((POOL, length), np.uint8) for length in parts]
        regions = [
            Region(piece.ctypes.data, piece.shape[1], piece.shape[1], POOL) for piece in self._pool
        ]
        self._open = True
        self.slab = Slab(POOL, parts)
        self.host = HostTier(self.slab, regions, copies or cpu_copies(), verify=verify)
        self.disk = DiskTier.open(home, 0, slots, self.host, identity, **options)

    @property
    def file(self) -> Path:
        return self.home / "rank-0.blocks"

    @property
    def index(self) -> Path:
        return self.home / "rank-0.index"

    @property
    def row_bytes(self) -> int:
        """What a block takes in the file."""
        return -(-sum(self._parts) // 4096) * 4096

    @property
    def fd(self) -> int:
        """The tier's descriptor of the file of blocks."""
        (found,) = (
            int(entry.name)
            for entry in Path("/proc/self/fd").iterdir()
            if entry.is_symlink() and entry.readlink() == self.file
        )
        return found

    def fill_pool(self, seed: int) -> None:
        """Let every byte of the device pool be drawn from `seed`; 0 clears it."""
        draw = np.random.default_rng(seed)
        for piece in self._pool:
            piece[:] = draw.integers(0, 256 if seed else 1, piece.shape, np.uint8)

    def block(self, number: int) -> bytes:
        """The bytes of one device block."""
        return b"".join(piece[number].tobytes() for piece in self._pool)

    def write_block(self, number: int, octets: bytes) -> None:
        """Let one device block hold `octets`."""
        at = 0
        for piece in self._pool:
            length = piece.shape[1]
            piece[number] = np.frombuffer(octets, np.uint8)[at : at + length]
            at += length

    def pool(self) -> list[bytes]:
        return [self.block(number) for number in range(POOL)]

    def in_slot(self, slot: int) -> bytes:
        """The bytes of one host slot."""
        found: bytes = self.slab.blocks[slot].tobytes()
        return found

    def in_file(self, slot: int) -> bytes:
        with self.file.open("rb") as file:
            file.seek(slot * self.row_bytes)
            return file.read(self.row_bytes)

    def damage(self, slot: int, at: int, octets: bytes) -> None:
        """Overwrite bytes of a disk slot, behind everyone's back."""
        with self.file.open("r+b") as file:
            file.seek(slot * self.row_bytes + at)
            file.write(octets)

    def reopened(self, **options: Any) -> DiskRank:
        """The same files, in another life."""
        self.close()
        return DiskRank(self.home, self._parts, **options)

    def close(self) -> None:
        if not self._open:
            return
        self._open = False
        self.disk.close()
        self.host.close()
        self.slab.close()


@functools.cache
def cpu_copies() -> CpuCopies:
    """One for all: each compiles its loop."""
    return CpuCopies()


def on_disk(disk: list[int], device: list[int], fill: int = 1) -> Blocks:
    """Columns to save or load: the block in disk slot s is named (s + 1, 1000)."""
    return Blocks(
        hashes=named(disk),
        fills=np.full(len(disk), fill, np.uint64),
        slots=np.array(disk, np.uint32),
        device=np.array(device, np.uint32),
    )


def in_host(host: list[int], device: list[int], names: list[int], fill: int = 1) -> Blocks:
    """Columns to save into host slots, or load from them, under chosen names."""
    return on_disk(host, device, fill)._replace(hashes=named(names))


def hop(names: list[int], source: list[int], target: list[int], of: int, fill: int) -> Hop:
    """Columns of a move: source slots are stamped `of`, target slots get `fill`."""
    return Hop(
        hashes=named(names),
        fills=np.full(len(names), of, np.uint64),
        source=np.array(source, np.uint32),
        target=np.array(target, np.uint32),
        fill=fill,
    )


def named(numbers: list[int]) -> np.ndarray[Any, np.dtype[np.uint64]]:
    return np.array([(number + 1, 1000) for number in numbers], np.uint64).reshape(-1, 2)
