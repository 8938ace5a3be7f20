"""Which of a node's ranks are there, who says so, and whether they fit together.

A rank is known by its agent, a name that no process ever had before. The engine tells of its
ranks when it starts them, and the directory lists them under leases. What the engine has told
stays true until it tells of another process for the same rank; what only the directory has told
ends with the record there. A process whose place another has taken never gets it back.
"""

from __future__ import annotations

from collections import OrderedDict

from kvbm_schemas.records import RankRecord
from kvbm_service.errors import LayoutError, RanksMissing

MAX_FORMER = 1024
"""Agents of former processes that are remembered. An older one's record has long ended."""


class Roster:
    """The ranks of one node. Complete when all `world_size` of them have reported."""

    def __init__(self, world_size: int, instance: str = "") -> None:
        """`instance`: the engine's life that is being led."""
        self.world_size = world_size
        self._instance = instance
        self._ranks: dict[int, RankRecord] = {}
        self._latest: dict[int, RankRecord] = {}
        """Likewise, and of those that are no more, the last."""
        self._told_by_engine: set[int] = set()
        self._listed: dict[int, str] = {}
        """Agents that the directory lists, or (empty) has listed."""
        self._former: OrderedDict[str, None] = OrderedDict()
        self._refused: dict[int, str] = {}
        """Why, by rank: whoever came last."""

    # -- reports -------------------------------------------------------------------------

    def report(self, record: RankRecord, by_engine: bool = False) -> bool:
        """A rank is there (again). True if another process had its place.

        Raises:
            LayoutError: it does not belong to this engine, or not any more.
        """
        try:
            self._check(record, by_engine)
        except LayoutError as error:
            self._refused[record.rank] = str(error)
            raise
        before = self._ranks.get(record.rank)
        replaced = before is not None and before.agent != record.agent
        if before is not None and replaced:
            self._retire(before)
        self._ranks[record.rank] = self._latest[record.rank] = record
        self._refused.pop(record.rank, None)
        if by_engine:
            self._told_by_engine.add(record.rank)
        return replaced

    def listed(self, record: RankRecord) -> bool:
        """The directory lists a rank. True if another process had its place.

        Raises:
            LayoutError: it does not belong to this engine, or not any more.
        """
        there = self._ranks.get(record.rank)
        if record.rank in self._told_by_engine and there is not None and self._is_new(record):
            self._listed[record.rank] = record.agent  # that is what others see
            raise LayoutError(
                f"rank {record.rank} ({record.agent}) is not the process that the engine has "
                f"told of ({there.agent}): the engine has to tell of this one, or end it"
            )
        replaced = self.report(record)
        self._listed[record.rank] = record.agent
        return replaced

    def _is_new(self, record: RankRecord) -> bool:
        """Whether a process of this engine has never had its rank's place."""
        return (
            record.instance == self._instance
            and record.agent != self._ranks[record.rank].agent
            and record.agent not in self._former
        )

    def unlisted(self, rank: int) -> None:
        """The directory no longer lists a rank."""
        if rank in self._listed:
            self._listed[rank] = ""

    def lose(self, rank: int) -> bool:
        """A rank's process has ended, as the engine says. False if it was not known."""
        record = self._ranks.pop(rank, None)
        if record is not None:
            self._retire(record)
        return record is not None

    def _retire(self, record: RankRecord) -> None:
        self._former[record.agent] = None
        if len(self._former) > MAX_FORMER:
            self._former.popitem(last=False)
        self._told_by_engine.discard(record.rank)
        if self._listed.get(record.rank) == record.agent:
            self._listed[record.rank] = ""

    def _check(self, record: RankRecord, by_engine: bool) -> None:
        who = f"rank {record.rank} of {record.world_size} ({record.agent})"
        if record.instance != self._instance and not by_engine:
            raise LayoutError(
                f"{who} belongs to the engine {record.instance!r}, and this is "
                f"{self._instance!r}: an earlier life's record ends by itself; two engines need "
                "a KVBM_NODE_NAME each"
            )
        if record.world_size != self.world_size or record.rank >= self.world_size:
            raise LayoutError(
                f"{who} reported to a leader of {self.world_size}: start all ranks of an engine "
                "with the same parallel sizes"
            )
        if record.agent in self._former:
            raise LayoutError(f"{who} was given up, and another has taken its place: end it")
        before = self._latest.get(record.rank)
        if before is not None and _shape(before) != _shape(record):
            raise LayoutError(
                f"{who} has come back with {_describe(record)}, and had {_describe(before)}: "
                "start it with the settings that it had, or restart the engine"
            )

    # -- what is known -------------------------------------------------------------------

    @property
    def missing(self) -> list[int]:
        """The ranks that have not reported."""
        return [rank for rank in range(self.world_size) if rank not in self._ranks]

    @property
    def complete(self) -> bool:
        """Whether every rank has reported."""
        return len(self._ranks) == self.world_size

    @property
    def invisible(self) -> list[int]:
        """Ranks that others could read from, and cannot any more."""
        return sorted(
            rank
            for rank, agent in self._listed.items()
            if rank not in self._ranks or agent != self._ranks[rank].agent
        )

    @property
    def away(self) -> list[int]:
        """Of the invisible ranks, those that nobody else says are there."""
        return [rank for rank in self.invisible if rank not in self._told_by_engine]

    def require_all(self, waited_seconds: float) -> None:
        """Insist on completeness.

        Raises:
            RanksMissing: names those that have not reported.
        """
        if self.complete:
            return
        names = ", ".join(map(str, self.missing))
        refused = [f" ({why})" for rank, why in self._refused.items() if rank in self.missing]
        raise RanksMissing(
            f"rank {names} of {self.world_size} did not report within {waited_seconds:g} s"
            f"{''.join(refused)}: look at its log, or raise "
            "DYN_KVBM_LEADER_WORKER_INIT_TIMEOUT_SECS"
        )

    @property
    def records(self) -> tuple[RankRecord, ...]:
        """All ranks in order."""
        assert self.complete
        return tuple(self._ranks[rank] for rank in range(self.world_size))

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all ranks, once all have reported."""
        return sum(record.slab.slot_bytes for record in self._latest.values())


def _shape(record: RankRecord) -> tuple[object, ...]:
    """What a process must have like the one before whose place it takes."""
    slab = record.slab
    return slab.layout, slab.slot_bytes, slab.slots, record.disk_slots


def _describe(record: RankRecord) -> str:
    slab = record.slab
    return (
        f"{slab.slots} slots of {slab.slot_bytes} bytes in layout {slab.layout or 'unknown'}, "
        f"and {record.disk_slots} on disk"
    )
