"""Which of a node's ranks have reported, and whether they fit together."""

from __future__ import annotations

from kvbm_schemas.records import RankRecord
from kvbm_service.errors import LayoutError, RanksMissing


class Roster:
    """The ranks of one node. Complete when all `world_size` of them have reported."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._ranks: dict[int, RankRecord] = {}

    def report(self, record: RankRecord) -> None:
        """A rank is there (again).

        Raises:
            LayoutError: it belongs to an engine of another size.
        """
        if record.world_size != self.world_size or record.rank >= self.world_size:
            raise LayoutError(
                f"rank {record.rank} of {record.world_size} reported to a leader of "
                f"{self.world_size}: start all ranks of an engine with the same parallel sizes"
            )
        self._ranks[record.rank] = record

    def lose(self, rank: int) -> None:
        """A rank is gone."""
        self._ranks.pop(rank, None)

    @property
    def missing(self) -> list[int]:
        """The ranks that have not reported."""
        return [rank for rank in range(self.world_size) if rank not in self._ranks]

    @property
    def complete(self) -> bool:
        """Whether every rank has reported."""
        return len(self._ranks) == self.world_size

    def require_all(self, waited_seconds: float) -> None:
        """Insist on completeness.

        Raises:
            RanksMissing: names those that have not reported.
        """
        if not self.complete:
            raise RanksMissing(
                f"rank {', '.join(map(str, self.missing))} of {self.world_size} did not report "
                f"within {waited_seconds:g} s: look at its log, or raise "
                "DYN_KVBM_LEADER_WORKER_INIT_TIMEOUT_SECS"
            )

    @property
    def records(self) -> tuple[RankRecord, ...]:
        """All ranks in order."""
        assert self.complete
        return tuple(self._ranks[rank] for rank in range(self.world_size))

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all ranks."""
        return sum(record.slab.slot_bytes for record in self.records)
