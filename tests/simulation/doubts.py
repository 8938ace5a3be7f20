"""Own slots that some rank could not read: nobody may be sent there again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from kvbm_schemas import step
from kvbm_schemas.block import Tier
from kvbm_service.core.columns import unpack_u32, unpack_u64


class Spot(NamedTuple):
    """A slot as it was filled once."""

    tier: Tier
    slot: int
    fill: int


class Doubts:
    """One life of a node."""

    def __init__(self) -> None:
        self.spots: set[Spot] = set()
        """Those that could not be read."""
        self._loads: dict[int, dict[int, Spot]] = {}
        """By op and device block."""
        self.fetches: dict[int, Sequence[Spot]] = {}
        """By op, in the order of the command."""

    def told(self, commands: step.StepCommands) -> None:
        """Ranks begin to do this."""
        for load in commands.loads:
            self._loads[load.op] = {}
            for tier, read in ((Tier.HOST, load.local), (Tier.DISK, load.disk)):
                if read is not None:
                    spots = _spots(tier, read.slots, read.fills)
                    self._loads[load.op].update(zip(unpack_u32(read.blocks), spots, strict=True))
        for fetch in commands.fetches:
            self.told_to_fetch(fetch)

    def told_to_fetch(self, fetch: step.Fetch) -> None:
        """Likewise, by the bus."""
        self.fetches[fetch.op] = _spots(Tier.DISK, fetch.disk, fetch.fills)

    def reported(self, results: step.StepResults) -> None:
        """A rank has done that."""
        for load in results.loads:
            spots = self._loads[load.op]
            self.spots.update(
                spots[block] for block in unpack_u32(load.failed_blocks) if block in spots
            )
        for moved in results.moved:
            self.moved(moved)

    def moved(self, moved: step.Moved) -> None:
        """Likewise, by the bus."""
        spots = self.fetches.get(moved.op, ())
        if spots:
            self.spots.update(spots[position] for position in unpack_u32(moved.failed))


def _spots(tier: Tier, slots: bytes, fills: bytes) -> list[Spot]:
    stamped = zip(unpack_u32(slots), unpack_u64(fills), strict=True)
    return [Spot(tier, slot, fill) for slot, fill in stamped]
