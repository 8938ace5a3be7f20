"""One rank's KV memory, and which of its blocks are whose: all as TensorRT-LLM's, but small."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kvbm_schemas.step import NO_BLOCK
from tests.connectors.computation import Digests

BLOCK_TOKENS = 4
LAYERS = 3
RUBBISH = 0xEEEEEEEEEEEEEEEE

NO_PAGE = -1
"""What TensorRT-LLM's tables have where a group has no page for a block."""

Tables = Sequence[Sequence[int]]
"""A request's blocks, by group of layers."""

Windows = tuple[int | None, ...]
"""By group of layers, how many positions they attend to; None: to all."""

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
    """The bytes: for each position in a block one digest per layer, keys and values alike.

    Each group of layers has blocks of its own, as many as no other: whoever takes the number of
    one for that of another is noticed.
    """

    def __init__(self, blocks: int, rank: int, windows: Windows) -> None:
        self.windows = windows
        self.counts = [blocks + 5 * group for group in range(len(windows))]
        self._layers = [range(group, LAYERS, len(windows)) for group in range(len(windows))]
        self._pools = [
            torch.zeros((count, len(layers), 2, BLOCK_TOKENS), dtype=torch.int64)
            for count, layers in zip(self.counts, self._layers, strict=True)
        ]
        self._digests = [pool.numpy().view(np.uint64) for pool in self._pools]
        twist = np.arange(2 * LAYERS, dtype=np.uint64).reshape(LAYERS, 2)
        self._twist = twist * np.uint64(1_000_003) + np.uint64(rank * 7_919)

    @property
    def tensor(self) -> torch.Tensor:
        """All of it, where it is one pool."""
        (pool,) = self._pools
        return pool

    def _at(self, layer: int) -> tuple[int, int]:
        """The layer's group, and its place in there."""
        return layer % len(self.windows), layer // len(self.windows)

    def needed(self, group: int, computed: int) -> int:
        """The first block that this group needs to go on after `computed` positions."""
        window = self.windows[group]
        return 0 if window is None else max(0, computed - window + 1) // BLOCK_TOKENS

    def write_layer(self, layer: int, tables: Tables, first: int, digests: Digests) -> None:
        """The forward pass of one layer has computed the positions from `first` on."""
        group, place = self._at(layer)
        for position, digest in enumerate(digests, first):
            block, at = tables[group][position // BLOCK_TOKENS], position % BLOCK_TOKENS
            assert block != NO_PAGE, f"position {position} has no page in group {group}"
            self._digests[group][block, place, :, at] = digest ^ self._twist[layer]

    def check(self, tables: Tables, digests: Digests, who: str) -> None:
        """What attention would read: every position that is in some layer's window."""
        for layer in range(LAYERS):
            group, place = self._at(layer)
            first = self.needed(group, len(digests)) * BLOCK_TOKENS
            window = self.windows[group]
            if window is not None:
                first = max(first, len(digests) - window + 1)
            for position, digest in enumerate(digests[first:], first):
                block, at = tables[group][position // BLOCK_TOKENS], position % BLOCK_TOKENS
                right = self._digests[group][block, place, :, at] == digest ^ self._twist[layer]
                assert block != NO_PAGE, f"{who}: position {position} has no page"
                assert right.all(), (
                    f"{who}: position {position} of layer {layer}, in block {block} of group "
                    f"{group}, is computed from rubbish"
                )

    def last(self, tables: Tables, length: int) -> int:
        """The digest at the last of `length` positions, as layer 0 has it."""
        block, at = tables[0][(length - 1) // BLOCK_TOKENS], (length - 1) % BLOCK_TOKENS
        return int(self._digests[0][block, 0, 0, at] ^ self._twist[0, 0])

    def scribble(self, rows: Sequence[Sequence[int]]) -> None:
        """These blocks, each a row of one per group, are somebody else's now."""
        for group, pages in enumerate(np.asarray(rows, np.int64).reshape(-1, len(self.windows)).T):
            self.scribble_in(group, [page for page in pages.tolist() if page not in (-1, NO_BLOCK)])

    def scribble_in(self, group: int, pages: Sequence[int]) -> None:
        self._digests[group][list(pages)] = RUBBISH

    def layout(self, numbered_from: int = 0) -> Layout:
        """The same memory, described: keys and values of a layer are a region each."""
        return Layout(
            BLOCK_TOKENS,
            tuple(
                Group(group + numbered_from, tuple(layers), window, self._regions(group))
                for group, (layers, window) in enumerate(
                    zip(self._layers, self.windows, strict=True)
                )
            ),
        )

    def _regions(self, group: int) -> tuple[Region, ...]:
        pool = self._pools[group]
        octets = pool.view(torch.uint8).reshape(pool.shape[0], pool.shape[1], 2, -1)
        return tuple(
            Region(octets[:, place, half], (Buffer(layer, role),))
            for place, layer in enumerate(self._layers[group])
            for half, role in enumerate(("key", "value"))
        )


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
        """The blocks of the longest cached prefix."""
        found: list[int] = []
        for prefix in prefixes:
            if prefix not in self._cached:
                break
            found.append(self._cached[prefix])
        return found

    def use(self, blocks: Sequence[int]) -> None:
        """These are used once more."""
        self._users.update(blocks)

    def take(self, count: int) -> list[int]:
        """Free blocks; those that are cached, and nobody uses, give way."""
        while len(self._free) < count:
            prefix, block = next(item for item in self._cached.items() if not self._users[item[1]])
            del self._cached[prefix]
            self._free.append(block)
        taken, self._free = self._free[:count], self._free[count:]
        self._users.update(taken)
        return taken

    def is_used(self, block: int) -> bool:
        return self._users[block] > 0

    def keep(self, prefixes: Sequence[Prefix], blocks: Sequence[int]) -> None:
        """These blocks are computed, and may be reused."""
        for prefix, block in zip(prefixes, blocks, strict=False):
            if block != NO_PAGE:
                self._cached.setdefault(prefix, block)

    def leave(self, blocks: Sequence[int]) -> list[int]:
        """A request uses them no more. Returns those that are free now."""
        blocks = [block for block in blocks if block != NO_PAGE]
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
