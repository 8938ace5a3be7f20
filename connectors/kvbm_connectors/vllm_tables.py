"""Block tables of models whose layers do not all keep the same blocks.

Layers with full attention keep every block of a request, those with a sliding window only the
last few: vLLM puts them into groups, each with a block table of its own. A block of ours is then
a *row* of device blocks, one per group. Where a group has let go of its block, or never had one,
vLLM's table has the null block; such a row can be loaded into, but for that part, and cannot be
saved.

The leader goes on counting device blocks by one number: a row is known to it by its first block
that is there. The ranks are told the rows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from kvbm_schemas.step import NO_BLOCK, Load, StepCommands

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks

Row = tuple[int, ...]
"""One device block per group; `NO_BLOCK` for vLLM's null block."""


class Tables:
    """The rows behind the numbers that the leader knows."""

    def __init__(self) -> None:
        self.blocks_of: Callable[[str], KVCacheBlocks] | None = None
        """vLLM's tables as they are now: what left a window since is null there."""
        self._coming: dict[int, Row] = {}
        """Of loads and saves for the coming step."""
        self._held: dict[int, deque[Row]] = {}
        """Of saves under way, oldest first."""

    def rows(self, blocks: KVCacheBlocks, first: int, last: int) -> list[Row]:
        """Blocks `first` to `last` of a request; fewer if not all groups have got that far."""
        parts = [
            [NO_BLOCK if block.is_null else block.block_id for block in group[first:last]]
            for group in blocks.blocks
        ]
        return list(zip(*parts, strict=False))

    def whole(self, request: str, first: int, last: int) -> tuple[int, list[Row]]:
        """What can be saved of a request's blocks `first` to `last`, and which block that begins
        with: those behind the last one of which a part is gone.
        """
        assert self.blocks_of is not None
        rows = self.rows(self.blocks_of(request), first, last)
        gone = max((at for at, row in enumerate(rows, 1) if NO_BLOCK in row), default=0)
        return first + gone, rows[gone:]

    def name(self, rows: Sequence[Row]) -> list[int]:
        """The numbers by which the leader knows these rows, until the step is built."""
        numbers = [next((block for block in row if block != NO_BLOCK), NO_BLOCK) for row in rows]
        self._coming.update(zip(numbers, rows, strict=True))
        return numbers

    def hold(self, numbers: Sequence[int]) -> list[int]:
        """Rows that are about to be saved: all their blocks, to be kept until `let_go`."""
        rows = [self._coming[number] for number in numbers]
        for number, row in zip(numbers, rows, strict=True):
            self._held.setdefault(number, deque()).append(row)
        return [block for row in rows for block in row]

    def let_go(self, numbers: Sequence[int]) -> list[int]:
        """Rows that have been saved, or will not be: their blocks."""
        blocks: list[int] = []
        for number in numbers:
            rows = self._held[number]
            blocks.extend(rows.popleft())
            if not rows:
                del self._held[number]
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

    def _spelled(self, numbers: bytes) -> bytes:
        rows = [self._coming[number] for number in np.frombuffer(numbers, "<u4").tolist()]
        return np.array(rows, "<u4").tobytes()
