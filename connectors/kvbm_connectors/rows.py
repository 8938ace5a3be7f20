"""Rows: blocks of models whose layers do not all keep the same.

Layers with full attention keep every block of a request, those with a sliding window only the
last few: engines put them into groups, each with a block table of its own. A block of ours is
then a *row* of device blocks, one per group. Where a group has let go of its block, or never had
one, the row has `NO_BLOCK`; it can be loaded into, but for that part, and cannot be saved.

The leader goes on counting device blocks by one number: a row is known to it by its first block
that is there. The ranks are told the rows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import msgspec
import numpy as np

from kvbm_schemas.step import NO_BLOCK, Load, StepCommands

Row = tuple[int, ...]
"""One device block per group, or `NO_BLOCK`."""


def whole(rows: Sequence[Row], first: int) -> tuple[int, list[Row]]:
    """What can be saved of a request's rows from its block `first` on, and which block that begins
    with: those behind the last one of which a part is gone.
    """
    gone = max((at for at, row in enumerate(rows, 1) if NO_BLOCK in row), default=0)
    return first + gone, list(rows[gone:])


class Rows:
    """The rows behind the numbers that the leader knows."""

    def __init__(self, starts: Sequence[int] = ()) -> None:
        """`starts`: by group, what its block numbers begin with, so that no two blocks have the
        same number; nothing where all groups draw from one pool.
        """
        self._starts = starts
        self._coming: dict[int, Row] = {}
        """Of loads and saves for the coming step."""
        self._held: dict[int, deque[Row]] = {}
        """Of saves under way, oldest first."""

    def numbers(self, row: Row) -> list[int]:
        """The row's blocks that are there, each by a number that no other block has."""
        starts = self._starts or (0,) * len(row)
        pairs = zip(starts, row, strict=True)
        return [start + block for start, block in pairs if block != NO_BLOCK]

    def name(self, rows: Sequence[Row]) -> list[int]:
        """The numbers by which the leader knows these rows, until the step is built."""
        names = [next(iter(self.numbers(row)), NO_BLOCK) for row in rows]
        self._coming.update(zip(names, rows, strict=True))
        return names

    def hold(self, names: Sequence[int]) -> list[int]:
        """Rows that are about to be saved: all their blocks, to be kept until `let_go`."""
        rows = [self._coming[name] for name in names]
        for name, row in zip(names, rows, strict=True):
            self._held.setdefault(name, deque()).append(row)
        return [block for row in rows for block in self.numbers(row)]

    def let_go(self, names: Sequence[int]) -> list[int]:
        """Rows that have been saved, or will not be: their blocks."""
        blocks: list[int] = []
        for name in names:
            rows = self._held[name]
            blocks.extend(self.numbers(rows.popleft()))
            if not rows:
                del self._held[name]
        return blocks

    def spell_out(self, commands: StepCommands) -> StepCommands:
        """The step's commands with the rows in place of their numbers."""
        commands = msgspec.structs.replace(
            commands,
            saves=tuple(
                msgspec.structs.replace(save, blocks=self._spelled(save.blocks))
                for save in commands.saves
            ),
            loads=tuple(self._spell_load(load) for load in commands.loads),
        )
        self._coming.clear()
        return commands

    def _spell_load(self, load: Load) -> Load:
        return msgspec.structs.replace(
            load,
            local=load.local
            and msgspec.structs.replace(load.local, blocks=self._spelled(load.local.blocks)),
            disk=load.disk
            and msgspec.structs.replace(load.disk, blocks=self._spelled(load.disk.blocks)),
            remote=tuple(
                msgspec.structs.replace(read, blocks=self._spelled(read.blocks))
                for read in load.remote
            ),
        )

    def _spelled(self, names: bytes) -> bytes:
        rows = [self._coming[name] for name in np.frombuffer(names, "<u4").tolist()]
        return np.array(rows, "<u4").tobytes()
