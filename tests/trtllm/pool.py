"""One rank's KV memory, and which of its blocks are whose: all as TensorRT-LLM's, but small."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tests.connectors.computation import Digests

BLOCK_TOKENS = 4
LAYERS = 3
RUBBISH = 0xEEEEEEEEEEEEEEEE

Prefix = tuple[object, ...]
"""What a block is found by on the device: salt, LoRA, all tokens up to its end."""


@dataclass(frozen=True)
class Buffer:
    """A layer's keys or values within a region."""

    layer_id: int
    role: str
    expansion: int = 1


@dataclass(frozen=True)
class Region:
    """A run of bytes that every block has."""

    rows: torch.Tensor
    buffers: tuple[Buffer, ...]

    @property
    def size(self) -> int:
        return int(self.rows.shape[1])

    @property
    def num_slots(self) -> int:
        return int(self.rows.shape[0])

    def as_tensor(self) -> torch.Tensor:
        return self.rows


@dataclass(frozen=True)
class Group:
    """Layers whose blocks have one numbering."""

    layer_group_id: int
    layer_ids: tuple[int, ...]
    window_size: int | None
    regions: tuple[Region, ...]
    replicated_regions: tuple[Region, ...] = ()


@dataclass(frozen=True)
class Layout:
    """What newer releases describe the pool by."""

    tokens_per_block: int
    groups: tuple[Group, ...]
    gpu_pool_mapping_bytes: int | None = None


class KvMemory:
    """The bytes: for each position in a block one digest per layer, keys and values alike."""

    def __init__(self, blocks: int, rank: int) -> None:
        self.tensor = torch.zeros((blocks, LAYERS, 2, BLOCK_TOKENS), dtype=torch.int64)
        self._digests = self.tensor.numpy().view(np.uint64)
        twist = np.arange(2 * LAYERS, dtype=np.uint64).reshape(LAYERS, 2, 1)
        self._twist = twist * np.uint64(1_000_003) + np.uint64(rank * 7_919)

    def write_layer(self, layer: int, blocks: Sequence[int], first: int, digests: Digests) -> None:
        """The forward pass of one layer has computed the positions from `first` on."""
        for position, digest in enumerate(digests, first):
            block, at = blocks[position // BLOCK_TOKENS], position % BLOCK_TOKENS
            self._digests[block, layer, :, at] = digest ^ self._twist[layer, :, 0]

    def check(self, blocks: Sequence[int], digests: Digests, who: str) -> None:
        """What attention would read: every position of these blocks, in every layer."""
        for position, digest in enumerate(digests):
            block, at = blocks[position // BLOCK_TOKENS], position % BLOCK_TOKENS
            right = (self._digests[block, :, :, at] == (digest ^ self._twist[:, :, 0])).all()
            assert right, f"{who}: position {position}, in block {block}, is computed from rubbish"

    def last(self, blocks: Sequence[int], length: int) -> int:
        """The digest at the last of `length` positions, as layer 0 has it."""
        block, at = blocks[(length - 1) // BLOCK_TOKENS], (length - 1) % BLOCK_TOKENS
        return int(self._digests[block, 0, 0, at] ^ self._twist[0, 0, 0])

    def scribble(self, blocks: Sequence[int]) -> None:
        """These blocks are somebody else's now."""
        self._digests[list(blocks)] = RUBBISH

    def layout(self, groups: int = 1, window: int | None = None) -> Layout:
        """The same memory, described: keys and values of a layer are a region each."""
        blocks = self.tensor.shape[0]
        octets = self.tensor.view(torch.uint8).reshape(blocks, LAYERS, 2, -1)
        regions = tuple(
            Region(octets[:, layer, half], (Buffer(layer, role),))
            for layer in range(LAYERS)
            for half, role in enumerate(("key", "value"))
        )
        layers = tuple(range(LAYERS))
        each = tuple(Group(g, layers, window, regions) for g in range(groups))
        return Layout(BLOCK_TOKENS, each)


class Blocks:
    """Which blocks are free, and which can be reused: reference counts, and a cache by prefix."""

    def __init__(self, count: int) -> None:
        self._free = list(range(count))
        self._users: Counter[int] = Counter()
        self._cached: dict[Prefix, int] = {}

    @property
    def free(self) -> int:
        return len(self._free)

    def find(self, prefixes: Sequence[Prefix]) -> list[int]:
        """The blocks of the longest cached prefix, which are used once more now."""
        found: list[int] = []
        for prefix in prefixes:
            if prefix not in self._cached:
                break
            found.append(self._cached[prefix])
        self._users.update(found)
        return found

    def take(self, count: int) -> list[int]:
        """Free blocks; those that are cached, and nobody uses, give way."""
        while len(self._free) < count:
            prefix, block = next(item for item in self._cached.items() if not self._users[item[1]])
            del self._cached[prefix]
            self._free.append(block)
        taken, self._free = self._free[:count], self._free[count:]
        self._users.update(taken)
        return taken

    def keep(self, prefixes: Sequence[Prefix], blocks: Sequence[int]) -> None:
        """These blocks are computed, and may be reused."""
        for prefix, block in zip(prefixes, blocks, strict=False):
            self._cached.setdefault(prefix, block)

    def leave(self, blocks: Sequence[int]) -> list[int]:
        """A request uses them no more. Returns those that are free now."""
        self._users.subtract(blocks)
        cached = set(self._cached.values())
        freed = [block for block in blocks if not self._users[block] and block not in cached]
        self._free.extend(freed)
        return freed

    def forget(self) -> list[int]:
        """Drop what is cached and not in use. Returns the blocks."""
        unused = {p: b for p, b in self._cached.items() if not self._users[b]}
        for prefix, block in unused.items():
            del self._cached[prefix]
            self._free.append(block)
        return list(unused.values())
