"""How often each block was wanted on one node, counted from what its ranks were told and did.

The offload filter's rule, told dumbly: a block counts 1 when it has come into the host tier, and
doubles whenever it comes again, or is used there. Nothing decays within a world's few seconds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from kvbm_schemas import step
from kvbm_schemas.block import BlockHash, Tier, unpack
from kvbm_service.core.columns import unpack_u32


class Demand:
    """One life of a node."""

    def __init__(self, world_size: int) -> None:
        self._world_size = world_size
        self._moving: dict[int, dict[int, BlockHash]] = {}
        """Blocks by op and position, less those that failed."""
        self._loading: dict[int, dict[int, BlockHash]] = {}
        """Blocks by op and device block, likewise."""
        self._reports: Counter[int] = Counter()
        self._offers: Counter[BlockHash] = Counter()

    def frequency(self, block: BlockHash) -> int:
        """At most what it is."""
        offers = self._offers[block]
        return 1 << (offers - 1) if offers else 0

    def told(self, commands: step.StepCommands) -> None:
        """Ranks begin to do this."""
        for save in commands.saves:
            if save.tier is Tier.HOST:
                self._moving[save.op] = dict(enumerate(unpack(save.hashes)))
        for fetch in commands.remote_fetches:
            self._moving[fetch.op] = dict(enumerate(unpack(fetch.hashes)))
        for load in commands.loads:
            if load.local is not None:
                blocks = unpack_u32(load.local.blocks)
                self._loading[load.op] = dict(zip(blocks, unpack(load.local.hashes), strict=True))

    def reported(self, results: step.StepResults) -> None:
        """A rank has done that."""
        for moved in results.moved:
            self._done(self._moving, moved.op, unpack_u32(moved.failed))
        for load in results.loads:
            self._done(self._loading, load.op, unpack_u32(load.failed_blocks))

    def _done(
        self, under_way: dict[int, dict[int, BlockHash]], op: int, failed: Iterable[int]
    ) -> None:
        if op not in under_way:
            return
        for number in failed:
            under_way[op].pop(number, None)
        self._reports[op] += 1
        if self._reports[op] == self._world_size:
            self._offers.update(under_way.pop(op).values())
