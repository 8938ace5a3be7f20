"""A worker with a disk and without an engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from kvbm_schemas.block import Tier
from kvbm_schemas.records import RankRecord
from kvbm_schemas.step import Fetch, Load, LoadResult, LocalRead, Moved, Save, StepCommands
from kvbm_service.adapters.nixl_mover import NixlMover
from kvbm_service.core.columns import pack_u32, pack_u64
from kvbm_service.worker_service import WorkerService
from tests.contracts.disk_rank import DiskRank, named
from tests.patience import until

MIB = 1 << 20
BLOCKS = 4


class DiskWorker:
    """One rank with a disk, and what it has reported."""

    def __init__(self, home: Path) -> None:
        self.rank = rank_in(home)
        mover = NixlMover(self.rank.host)
        record = RankRecord(
            node="node", rank=0, world_size=1, agent=mover.agent, agent_metadata=b"",
            slab=self.rank.slab.record(), disk_slots=self.rank.disk.slots,
        )  # fmt: skip
        self.service = WorkerService(record, mover, self.rank.disk)
        self.moved: dict[int, Moved] = {}
        self.loads: dict[str, LoadResult] = {}
        self.disk_lost = ""
        self._op = 0
        self._open = True

    def save(self, names: list[int], device: list[int]) -> int:
        """Have device blocks written to the disk slots of these names."""
        self._op += 1
        self.service.submit(
            StepCommands(
                saves=(
                    Save(
                        op=self._op, hashes=named(names).tobytes(), blocks=pack_u32(device),
                        slots=pack_u32(names), tier=Tier.DISK,
                    ),
                )
            )
        )  # fmt: skip
        return self._op

    def load(self, request: str, names: list[int], fill: int, device: list[int]) -> None:
        """Have device blocks read from the disk slots of these names."""
        self._op += 1
        read = LocalRead(
            hashes=named(names).tobytes(), fills=pack_u64([fill] * len(names)),
            slots=pack_u32(names), blocks=pack_u32(device),
        )  # fmt: skip
        self.service.submit(StepCommands(loads=(Load(op=self._op, request=request, disk=read),)))

    def fetch(self, names: list[int], fill: int, host: list[int]) -> int:
        """Have host slots read from the disk slots of these names."""
        self._op += 1
        fetch = Fetch(
            op=self._op, hashes=named(names).tobytes(), fills=pack_u64([fill] * len(names)),
            disk=pack_u32(names), host=pack_u32(host),
        )  # fmt: skip
        self.service.submit(StepCommands(fetches=(fetch,)))
        return self._op

    def step(self) -> None:
        """What an engine does that has nothing else to do."""
        results = self.service.collect()
        if results is not None:
            self.moved |= {moved.op: moved for moved in results.moved}
            self.loads |= {load.request: load for load in results.loads}
            self.disk_lost = results.disk_lost

    def until(self, is_so: Callable[[], object]) -> None:
        """Step until it is so."""
        until(lambda: (self.step(), is_so())[-1])

    def hangs(self) -> bool:
        """Whether a save is at the table of slots. On a frozen file system it stays there."""
        return self.rank.disk._index._lock.locked()

    def close(self) -> None:
        """End. Closes mover and disk; what they lie on is the rank's."""
        if self._open:
            self._open = False
            self.service.close()
            self.rank.host.close()
            self.rank.slab.close()


def rank_in(home: Path) -> DiskRank:
    """One with blocks of a mebibyte."""
    return DiskRank(home, (MIB,), slots=2 * BLOCKS)
