"""Saves under way: a block counts only when every rank has confirmed its bytes."""

from __future__ import annotations

from typing import NamedTuple


class Save(NamedTuple):
    """One save that all ranks carry out."""

    slots: list[int]
    device_blocks: list[int]
    """Held until every rank has finished with them, however it went."""


class Settled(NamedTuple):
    """A save that every rank has come to the end of."""

    save: Save
    good: bool
    """Whether all ranks succeeded."""


class Saves:
    """Open saves by op, and the ranks that have not reported yet."""

    def __init__(self, world_size: int) -> None:
        self._world_size = world_size
        self._open: dict[int, Save] = {}
        self._waiting: dict[int, set[int]] = {}
        self._failed: set[int] = set()
        self.held_blocks = 0

    def __len__(self) -> int:
        return len(self._open)

    def begin(self, op: int, save: Save) -> None:
        """All ranks were told."""
        assert op not in self._open
        self._open[op] = save
        self._waiting[op] = set(range(self._world_size))
        self.held_blocks += len(save.device_blocks)

    def report(self, op: int, rank: int, good: bool) -> Settled | None:
        """A rank has finished. Returns the save once the last one has.

        An unknown op, or a second report of the same rank, changes nothing.
        """
        waiting = self._waiting.get(op)
        if waiting is None or rank not in waiting:
            return None
        waiting.remove(rank)
        if not good:
            self._failed.add(op)
        if waiting:
            return None
        del self._waiting[op]
        save = self._open.pop(op)
        self.held_blocks -= len(save.device_blocks)
        failed = op in self._failed
        self._failed.discard(op)
        return Settled(save, good=not failed)

    def check_integrity(self) -> None:
        """Every open save waits for some rank."""
        assert set(self._open) == set(self._waiting), "a save waits for nobody"
        assert all(self._waiting.values()), "a settled save was kept"
        assert self._failed <= set(self._open), "a failure outlived its save"
        held = sum(len(save.device_blocks) for save in self._open.values())
        assert held == self.held_blocks, "the count of held blocks is wrong"
