"""Moves under way: blocks on their way into slots of this node.

A save (device → tier), a spill (host → disk) and a fetch (disk or another node → host) are all
the same to the leader: each rank copies its share, and a block counts only when every rank has
confirmed its bytes. Until then nothing that the move touches is used for anything else.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from kvbm_schemas.block import BlockHash, Tier
from kvbm_service.core.accounts import Path
from kvbm_service.core.reads import Grant


class Move(NamedTuple):
    """Blocks that all ranks bring into `slots` of `tier`, and what they take them from."""

    path: Path
    tier: Tier
    blocks: list[BlockHash]
    slots: list[int]
    device_blocks: Sequence[int] = ()
    """Held until every rank has finished with them, however it went."""
    pinned: tuple[Tier, list[int]] | None = None
    """Own slots that are read."""
    grant: Grant | None = None
    """The lease under which another node's slots are read."""


class Settled(NamedTuple):
    """A move that every rank has come to the end of."""

    move: Move
    failed: set[int]
    """Positions of the blocks that some rank has not got."""
    reason: str
    seconds: float
    """Of the slowest rank."""


@dataclass(slots=True)
class _Open:
    move: Move
    waiting: set[int]
    failed: set[int] = field(default_factory=set)
    reason: str = ""
    seconds: float = 0.0


class Moves:
    """Open moves by op, and the ranks that have not reported yet."""

    def __init__(self, world_size: int) -> None:
        self._world_size = world_size
        self._open: dict[int, _Open] = {}
        self.held_blocks = 0
        """Device blocks that open moves read."""
        self.under_way: dict[Path, int] = dict.fromkeys(Path, 0)
        """How many moves of each kind are open."""
        self._by_bus: set[int] = set()
        """Those of which ranks tell by the bus."""

    def __len__(self) -> int:
        return len(self._open)

    @property
    def step_awaited(self) -> bool:
        """Whether the engine's steps will bring news of some."""
        return len(self._open) > len(self._by_bus)

    def begin(self, op: int, move: Move, by_bus: bool = False) -> None:
        """All ranks are being told."""
        assert op not in self._open
        assert len(move.blocks) == len(move.slots)
        self._open[op] = _Open(move, set(range(self._world_size)))
        self.held_blocks += len(move.device_blocks)
        self.under_way[move.path] += 1
        if by_bus:
            self._by_bus.add(op)

    def ask_by_step(self, op: int) -> None:
        """From now on the engine's steps bring news of this one."""
        self._by_bus.discard(op)

    def report(
        self, op: int, rank: int, failed: Iterable[int], reason: str = "", seconds: float = 0.0
    ) -> Settled | None:
        """A rank has finished. Returns the move once the last one has.

        An unknown op, or a second report of the same rank, changes nothing.
        """
        one = self._open.get(op)
        if one is None or rank not in one.waiting:
            return None
        one.waiting.remove(rank)
        one.failed.update(position for position in failed if position < len(one.move.slots))
        one.reason = one.reason or reason
        one.seconds = max(one.seconds, seconds)
        return None if one.waiting else self._settle(op)

    def give_up(
        self, reason: str, rank: int | None = None, untold: Container[int] = ()
    ) -> list[tuple[int, Settled]]:
        """Nothing that is open will be in place. Returns what nobody has to be waited for.

        That is what only `rank`, which is no more, had to report; the ops `untold`, of which
        no rank has heard; and, with no rank, everything.
        """
        for op, one in self._open.items():
            one.failed.update(range(len(one.move.slots)))
            one.reason = one.reason or reason
            if rank is None or op in untold:
                one.waiting.clear()
            else:
                one.waiting.discard(rank)
        ended = [op for op, one in self._open.items() if not one.waiting]
        return [(op, self._settle(op)) for op in ended]

    def _settle(self, op: int) -> Settled:
        one = self._open.pop(op)
        self._by_bus.discard(op)
        self.held_blocks -= len(one.move.device_blocks)
        self.under_way[one.move.path] -= 1
        return Settled(one.move, one.failed, one.reason, one.seconds)

    def check_integrity(self) -> None:
        """Every open move waits for some rank."""
        moves = [one.move for one in self._open.values()]
        assert all(one.waiting for one in self._open.values()), "a settled move was kept"
        held = sum(len(move.device_blocks) for move in moves)
        assert held == self.held_blocks, "the count of held blocks is wrong"
        assert self._by_bus <= self._open.keys(), "a settled move was kept"
        for path, count in self.under_way.items():
            assert count == sum(move.path is path for move in moves), "the count of moves is wrong"
