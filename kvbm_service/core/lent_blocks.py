"""Device blocks that other nodes may read, and the ranks that have to be told of it.

    LENDING ──all ranks do──► LENT ──nobody is to read it──► ENDING ──no rank does──► given back

Ranks are told to lend at once, over the bus, and to stop with the engine's next step. What they
are told first they have answered before they are told the second, so no late order can undo a
later one. Nobody writes to a block before all ranks have said that they lend it no more.

Requests share blocks, so several loans may be about the same one: it is lent until the last ends.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from kvbm_schemas.block import BlockHash
from kvbm_service.core.effects import Effect, TellRanks
from kvbm_service.core.orders import Orders


class _Phase(enum.Enum):
    """See the table above."""

    LENDING = enum.auto()
    LENT = enum.auto()
    ENDING = enum.auto()


@dataclass(slots=True)
class _Lent:
    """One device block."""

    name: BlockHash
    op: int
    """Of the order to lend it, which stamps its header."""
    loans: int = 1
    phase: _Phase = _Phase.LENDING


@dataclass(slots=True, eq=False)
class Loan:
    """Device blocks that are lent to one reader."""

    blocks: dict[BlockHash, int]
    fills: dict[BlockHash, int]
    waits: set[int]
    """Orders to lend some of them that not all ranks have answered."""
    fresh: list[int]
    """Those that nobody had lent before: they must not be reused until they are given back."""


@dataclass(slots=True)
class _Asked:
    """An order that ranks have to answer."""

    device_blocks: list[int]
    waiting: set[int] = field(default_factory=set)


class LentBlocks:
    """One node's lent device blocks, until they are given back."""

    def __init__(self, orders: Orders, effects: list[Effect], world_size: int, room: int) -> None:
        self._orders = orders
        self._effects = effects
        self._world_size = world_size
        self._room = room
        self._lent: dict[int, _Lent] = {}
        self._asked: dict[int, _Asked] = {}
        self._freed: list[int] = []

    def lend(
        self, chain: Sequence[BlockHash], device_blocks: Sequence[int], seconds: float
    ) -> Loan | None:
        """Have all ranks lend these; they are to answer within so many seconds.

        None: there is no room for more, or some of them are just being given back.
        """
        known = [self._lent.get(block) for block in device_blocks]
        fresh = [block for block, lent in zip(device_blocks, known, strict=True) if lent is None]
        ending = any(lent is not None and lent.phase is _Phase.ENDING for lent in known)
        if ending or len(self._lent) + len(fresh) > self._room:
            return None
        blocks = dict(zip(chain, device_blocks, strict=True))
        new = {name: block for name, block in blocks.items() if block not in self._lent}
        self._lend_fresh(new, seconds)
        lent = {name: self._lent[block] for name, block in blocks.items()}
        for one, before in zip(lent.values(), known, strict=True):
            one.loans += before is not None
        return Loan(
            blocks,
            fills={name: one.op for name, one in lent.items()},
            waits={one.op for one in lent.values() if one.phase is _Phase.LENDING},
            fresh=fresh,
        )

    def _lend_fresh(self, blocks: dict[BlockHash, int], seconds: float) -> None:
        if not blocks:
            return
        op = self._orders.next_op()
        self._lent.update((block, _Lent(name, op)) for name, block in blocks.items())
        self._ask(op, list(blocks.values()))
        order = self._orders.lend(op, list(blocks), list(blocks.values()))
        self._effects.append(TellRanks(order, seconds))

    def end(self, loan: Loan) -> None:
        """This reader is not to read them any more."""
        for block in loan.blocks.values():
            self._lent[block].loans -= 1
        self._unlend(loan.blocks.values())

    def awaits(self, op: int) -> bool:
        """Whether ranks have to answer an order of this number."""
        return op in self._asked

    def moved(self, op: int, rank: int) -> bool:
        """A rank has answered. True if all have, and the blocks are lent."""
        asked = self._asked[op]
        asked.waiting.discard(rank)
        if asked.waiting:
            return False
        del self._asked[op]
        ended = self._lent[asked.device_blocks[0]].phase is _Phase.ENDING
        if ended:
            for block in asked.device_blocks:
                del self._lent[block]
            self._freed += asked.device_blocks
            return False
        for block in asked.device_blocks:
            self._lent[block].phase = _Phase.LENT
        self._unlend(asked.device_blocks)
        return True

    def rank_lost(self) -> None:
        """A rank's process is no more, and every loan has ended.

        The other ranks may go on lending until they are all at rest.
        """
        self._asked.clear()

    def all_at_rest(self) -> None:
        """All ranks are there, and do nothing any more of what they were told before."""
        for one in self._lent.values():
            one.phase = _Phase.LENT
        self._unlend(self._lent)

    def take_freed(self) -> list[int]:
        """Device blocks that may be reused now."""
        freed, self._freed = self._freed, []
        return freed

    @property
    def awaited(self) -> bool:
        """Whether the engine's steps will bring news of some."""
        return bool(self._asked or self._freed)

    @property
    def coming_back(self) -> bool:
        """Whether the engine's steps will give some back."""
        asked = (self._lent[one.device_blocks[0]].phase for one in self._asked.values())
        return bool(self._freed) or any(phase is _Phase.ENDING for phase in asked)

    def _unlend(self, device_blocks: Iterable[int]) -> None:
        """Have the ranks lend no more what nobody is to read, as far as they do lend it."""
        unused = [
            block
            for block in device_blocks
            if self._lent[block].loans == 0 and self._lent[block].phase is _Phase.LENT
        ]
        if unused:
            op = self._orders.next_op()
            for block in unused:
                self._lent[block].phase = _Phase.ENDING
            self._ask(op, unused)
            self._orders.unlend(op, unused)

    def _ask(self, op: int, device_blocks: list[int]) -> None:
        self._asked[op] = _Asked(device_blocks, set(range(self._world_size)))

    def check_integrity(self, loans: Sequence[Loan], settled: bool) -> None:
        """Every lent block is in one of these loans, or will be given back.

        `settled`: no rank has been lost that is not replaced.
        """
        for block, one in self._lent.items():
            count = sum(block in loan.blocks.values() for loan in loans)
            assert one.loans == count, "the count of loans is wrong"
            asked = sum(block in asked.device_blocks for asked in self._asked.values())
            if settled:
                assert asked == (one.phase is not _Phase.LENT), "ranks will not answer"
                assert one.loans or one.phase is not _Phase.LENT, "a block is lent to nobody"
        assert all(asked.waiting for asked in self._asked.values()), "nobody has to answer"
