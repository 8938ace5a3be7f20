"""The engine's own block pool, after vLLM's rules: counted references, and a prefix cache."""

from __future__ import annotations

from collections import OrderedDict

from kvbm_schemas.block import BlockHash


class DevicePool:
    """Device blocks. One that nobody refers to keeps its content until it is taken."""

    def __init__(self, capacity: int) -> None:
        self._references = [0] * capacity
        self._names: list[BlockHash | None] = [None] * capacity
        self._cached: dict[BlockHash, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(capacity))

    @property
    def in_use(self) -> int:
        """How many blocks somebody refers to."""
        return len(self._references) - len(self._free)

    def cached_prefix(self, chain: list[BlockHash]) -> list[int]:
        """The blocks that hold the head of `chain`."""
        found = []
        for name in chain:
            if name not in self._cached:
                break
            found.append(self._cached[name])
        return found

    def take(self, prefix: list[int], count: int) -> list[int] | None:
        """Refer to the cached `prefix` and to `count` blocks more; None if there are too few."""
        if len(self._free) - sum(block in self._free for block in prefix) < count:
            return None
        self.hold(prefix)
        fresh = []
        for _ in range(count):
            block, _ = self._free.popitem(last=False)
            self.forget(block)
            self._references[block] = 1
            fresh.append(block)
        return prefix + fresh

    def hold(self, blocks: list[int]) -> None:
        """Refer to these blocks once more."""
        for block in blocks:
            self._references[block] += 1
            self._free.pop(block, None)

    def release(self, blocks: list[int]) -> None:
        """Refer to these blocks once less."""
        for block in reversed(blocks):
            self._references[block] -= 1
            assert self._references[block] >= 0
            if not self._references[block]:
                self._free[block] = None

    def cache(self, name: BlockHash, block: int) -> None:
        """`block` holds `name`, or will after the coming forward pass."""
        if name not in self._cached and self._names[block] is None:
            self._cached[name] = block
            self._names[block] = name

    def forget(self, block: int) -> None:
        """Do not find `block` any more."""
        name, self._names[block] = self._names[block], None
        if name is not None:
            del self._cached[name]

    def reset(self) -> None:
        """Do not find any block any more."""
        for block in list(self._cached.values()):
            self.forget(block)
