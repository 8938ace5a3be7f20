"""Whether all ranks of a node are there and at rest: only then does it promise anything.

    state      what is promised                          what is under way
    WHOLE      everything                                goes on
    AWAY       nothing: some rank cannot be seen. It     goes on: the rank may be working on it
               may be dead, or only cut off
    BROKEN     nothing: some rank's process is no more   is given up, and ends as the others report
    SETTLING   nothing: all are there again, and each    what a rank was never told of ends when
               says when it is done with what is older   all are at rest

    WHOLE ──away──► AWAY ──back──► WHOLE
      │              │
      └───lost───────┴──lost──► BROKEN ──all there──► SETTLING ──all at rest──► WHOLE
                                   ▲──────────lost────────┘

Only proof that a process is no more gives up what it was doing: another has its place, or the
engine says so. A rank that merely cannot be seen may still be writing to its slots, and reading
the device blocks of a save; giving those to others would spoil them.

A rank that takes another's place has to be kept from what the former one was told, and the
others from what only they were told. So each step says who is meant (`mark`): a rank obeys no
step that was made for another process. And a *fence* goes round: an op's number. A rank that
hears of it begins nothing older any more, and answers when nothing older is under way.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence

from kvbm_schemas.step import mark


class State(enum.Enum):
    """See the table above."""

    WHOLE = enum.auto()
    AWAY = enum.auto()
    BROKEN = enum.auto()
    SETTLING = enum.auto()


class Crew:
    """The ranks of one node, by agent, in rank order."""

    def __init__(self, agents: Sequence[str]) -> None:
        self.lives = 0
        """How often what the ranks held was given up."""
        self.fence = 0
        """While settling: ops up to this number are given up."""
        self._agents = list(agents)
        self._away: set[int] = set()
        self._lost: set[int] = set()
        self._restless: set[int] = set()
        """Ranks that have not answered to the fence."""
        self._mark()

    def _mark(self) -> None:
        self.meant = b"".join(map(mark, self._agents))
        """Which processes a step is made for."""

    @property
    def state(self) -> State:
        """See the table above."""
        if self._lost:
            return State.BROKEN
        if self._restless:
            return State.SETTLING
        return State.AWAY if self._away else State.WHOLE

    @property
    def whole(self) -> bool:
        """Whether anything may be promised."""
        return self.state is State.WHOLE

    @property
    def agents(self) -> tuple[str, ...]:
        """The processes that are there, or were last."""
        return tuple(self._agents)

    def is_lost(self, rank: int) -> bool:
        """Whether a rank's process is no more, and no other has its place."""
        return rank in self._lost

    def away(self, ranks: Sequence[int]) -> None:
        """These ranks cannot be seen; all others can."""
        self._away = set(ranks)

    def lost(self, rank: int) -> None:
        """A rank's process is no more."""
        self.lives += 1
        self._lost.add(rank)
        self._restless.clear()
        self.fence = 0

    def took_place(self, rank: int, agent: str, fence: int) -> None:
        """A new process has a lost rank's place. With the last one, `fence` goes round."""
        assert rank in self._lost
        self._agents[rank] = agent
        self._mark()
        self._lost.discard(rank)
        if not self._lost:
            self.fence = fence
            self._restless = set(range(len(self._agents)))

    def at_rest(self, op: int, rank: int) -> bool:
        """A rank has answered to a fence. True if all have."""
        if not self.fence or op != self.fence:
            return False
        self._restless.discard(rank)
        if self._restless:
            return False
        self.fence = 0
        return True

    def check_integrity(self) -> None:
        """A fence is round exactly while some rank has not answered."""
        assert bool(self.fence) == bool(self._restless)
        assert not (self._lost and self._restless)
