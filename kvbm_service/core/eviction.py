"""The question a full tier asks: which block is to go?

`Pool` knows what state each slot is in; an `Eviction` knows what the blocks in them are worth.
It is told of all that may change its mind, and names slots. A slot that it knows is either
shown, and may then be a victim, or hidden:

             add                show
    unknown ────► hidden ◄────────────► shown ◄──── adopt
       ▲             │      hide          │
       └────drop─────┴───drop, victims────┘
"""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from typing import Protocol

from kvbm_schemas.block import BlockHash


class Eviction(Protocol):
    """What is to go next, of the slots it was shown."""

    def use(self, chain: Sequence[BlockHash], now: float) -> None:
        """A request with this whole chain has come, be its blocks here or not.

        `now` is in seconds and never goes back.
        """

    def add(self, blocks: Sequence[BlockHash], slots: Sequence[int], after: int | None) -> None:
        """These blocks, in chain order, are about to fill these slots; hidden until shown.

        `after`: the slot of the block before the first of them, if that is known.
        """

    def adopt(self, blocks: Sequence[BlockHash], slots: Sequence[int]) -> None:
        """These blocks were found in these slots, oldest first; nothing else is known of them."""

    def show(self, slots: Sequence[int]) -> None:
        """Nobody touches these slots, in chain order, any more."""

    def hide(self, slots: Sequence[int]) -> None:
        """Somebody touches these slots."""

    def drop(self, block: BlockHash, slot: int) -> None:
        """This block, which is in this slot, is forgotten, be it shown or hidden."""

    def victims(self, wanted: int, spared: AbstractSet[int]) -> list[int]:
        """Forget the shown slots that are to go next, but none of `spared`, and return them.

        Fewer than `wanted` only if there are not more.
        """

    def check_integrity(self, shown: AbstractSet[int], hidden: AbstractSet[int]) -> None:
        """All tables agree, and the slots in them are these."""
