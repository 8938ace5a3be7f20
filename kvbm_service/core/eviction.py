"""The question a full tier asks: which block is to go?

`Pool` knows what state each slot is in; an `Eviction` knows what the blocks in them are worth.
It is told of all that may change its mind, and names slots. A slot that it knows is either
shown, and may then be a victim, or hidden:

             add                show
    unknown ────► hidden ◄────────────► shown ◄──── adopt
       ▲             │      hide          │
       └────drop─────┴───drop, victim─────┘
"""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from typing import Protocol

from kvbm_schemas.block import BlockHash


class Eviction(Protocol):
    """What is to go next, of the slots it was shown."""

    def use(self, chain: Sequence[BlockHash], slots: Sequence[int | None], now: float) -> None:
        """A request with this whole chain has come; None: that block cannot be read.

        `now` is in seconds and never goes back.
        """

    def add(self, blocks: Sequence[BlockHash], slots: Sequence[int], depth: int) -> None:
        """These blocks, in chain order, are about to fill these slots; hidden until shown.

        The first is at least the block at place `depth` of its request.
        """

    def adopt(self, slots: Sequence[int]) -> None:
        """Blocks of which nothing is known were found in these slots, oldest first."""

    def show(self, slots: Sequence[int]) -> None:
        """Nobody touches these slots, in chain order, any more."""

    def hide(self, slots: Sequence[int]) -> None:
        """Somebody touches these slots."""

    def drop(self, slot: int) -> None:
        """This slot's block is forgotten, be it shown or hidden."""

    def victim(self, spared: AbstractSet[int]) -> int | None:
        """Forget the shown slot that is to go next, but none of `spared`, and return it."""

    def check_integrity(self, shown: AbstractSet[int], hidden: AbstractSet[int]) -> None:
        """All tables agree, and the slots in them are these."""
