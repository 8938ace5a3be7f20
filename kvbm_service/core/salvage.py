"""What is left of a node's blocks when a rank's process has ended and another takes its place.

A block is there if every rank has its share. So what can be kept is what all ranks had, as far
as each new process finds its share again in the memory or on the disk that it took over.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvbm_schemas.step import Survivors


class Salvage:
    """From the loss of a rank until all ranks are at rest again."""

    def __init__(self) -> None:
        self._held: list[Survivors] | None = None
        self._found: dict[int, Sequence[Survivors]] = {}

    def begin(self, held: list[Survivors]) -> None:
        """All ranks had this. Of a second loss before the first is over, nothing more."""
        if self._held is None:
            self._held = held

    def found(self, rank: int, survivors: Sequence[Survivors]) -> None:
        """A new process has this of it, for all that it can tell."""
        self._found[rank] = survivors

    def forget(self) -> None:
        """Nothing is to be kept."""
        if self._held is not None:
            self._held = []

    def end(self) -> list[list[Survivors]]:
        """What is left, to be adopted: for each tier, what each has of it."""
        held, found = self._held or [], list(self._found.values())
        self._held, self._found = None, {}
        left = []
        for had in held:
            again = [one for each in found for one in each if one.tier is had.tier]
            if len(again) == len(found):
                left.append([had, *again])
        return left
