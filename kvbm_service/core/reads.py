"""The read path of one request, from the first question to the bytes.

    IDLE ──ask registry──► LOOKING ──answer──► LOCATED ──ask owners──► LEASING
     │                        │ deadline          │                       │ answers, deadline
     │                        └───────────────────┤ nobody has more       │
     └── all of it is here, or nobody can be asked┴──────────────► READY ◄┘
                                                                     │ load
                                     IDLE ◄── every rank is done ── LOADING ──► SPENT (failed)

A prefix mixes places freely: the registry is asked for exactly the blocks that are not here, so
what others have fills the gaps between own blocks.

Every question carries an attempt number; an answer to an older one is late and changes nothing.
A plan pins what it counts on, and is dropped when it gets too old.
"""

from __future__ import annotations

import enum
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from kvbm_schemas.block import BlockHash, Tier
from kvbm_schemas.requests import Leased, Segment
from kvbm_service.core.columns import unpack_u32, unpack_u64

MAX_PARTS = 8
"""A prefix is taken from at most this many places on other nodes."""


class Stage(enum.Enum):
    """Where a request's read path is."""

    IDLE = enum.auto()
    LOOKING = enum.auto()
    LOCATED = enum.auto()
    LEASING = enum.auto()
    READY = enum.auto()
    LOADING = enum.auto()
    SPENT = enum.auto()


@dataclass(frozen=True, slots=True)
class Grant:
    """A lease that another node gave us: its slots hold `chain[start:start + len(slots)]`."""

    node: str
    agents: tuple[str, ...]
    lease: str
    start: int
    slots: Sequence[int]
    fills: Sequence[int]
    deadline: float
    tier: Tier = Tier.HOST

    @classmethod
    def of(cls, answer: Leased, node: str, start: int, asked_at: float) -> Grant:
        """What an owner answered to a question of `asked_at` about the chain from `start`."""
        return cls(
            node=node,
            agents=answer.agents,
            lease=answer.lease,
            start=start,
            slots=unpack_u32(answer.slots),
            fills=unpack_u64(answer.fills),
            deadline=asked_at + answer.seconds,
            tier=answer.tier,
        )

    @property
    def end(self) -> int:
        return self.start + len(self.slots)


@dataclass(frozen=True, slots=True)
class Pinned:
    """Own slots that hold `chain[start:start + len(slots)]`, kept from reuse."""

    tier: Tier
    start: int
    slots: list[int]

    @property
    def end(self) -> int:
        return self.start + len(self.slots)


@dataclass(slots=True)
class Part:
    """What one owner is asked for: `chain[start:end]`."""

    node: str
    start: int
    end: int
    on_disk: bool = False
    handed_over: str = ""
    """The lease, granted ahead, that is named."""
    answered: bool = False
    grant: Grant | None = None


@dataclass(slots=True)
class Plan:
    """Where the chain from `start` on is to come from."""

    start: int
    deadline: float
    pinned: list[Pinned] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)

    @property
    def pieces(self) -> list[Pinned | Grant]:
        """What is certain, in chain order, without a gap from `start` on."""
        certain: list[Pinned | Grant] = [*self.pinned, *self.grants]
        if self.parts:
            certain.sort(key=lambda piece: piece.start)
        unbroken: list[Pinned | Grant] = []
        end = self.start
        for piece in certain:
            if piece.start != end:
                break
            unbroken.append(piece)
            end = piece.end
        return unbroken

    @property
    def end(self) -> int:
        """The end of the unbroken run that is certain."""
        pieces = self.pieces
        return pieces[-1].end if pieces else self.start

    def covers(self, index: int, now: float) -> bool:
        """Whether the plan can serve a request that needs `chain[index:]`."""
        return self.start <= index <= self.end and now < self.deadline

    def unanswered(self, node: str, start: int) -> Part | None:
        """What `node` was asked for from `start` on, if it has not answered yet."""
        for part in self.parts:
            if (part.node, part.start) == (node, start) and not part.answered:
                return part
        return None

    @property
    def grants(self) -> list[Grant]:
        """Every lease that was given, needed or not."""
        return [part.grant for part in self.parts if part.grant is not None]


class Hits(NamedTuple):
    """How many blocks a load takes from where."""

    host: int = 0
    disk: int = 0
    remote: int = 0


NO_HITS = Hits()


class Origin(NamedTuple):
    """The prefill engine that has computed a request's first `blocks`, and keeps them for us."""

    node: str
    lease: str
    blocks: int


@dataclass(slots=True)
class Reader:
    """One request's chain, and how far its read path has come."""

    chain: list[BlockHash]
    stage: Stage = Stage.IDLE
    attempt: int = 0
    deadline: float = 0.0
    """Of the question under way."""
    op: int = 0
    """Of the load under way."""
    patience: float | None = None
    """While the engine is told to ask again: when it will get an answer at the latest."""
    staging: bool = False
    """Whether that includes another node's disk already: its time is given once."""
    asked: Sequence[int] = ()
    """The blocks that the registry was asked for, as ascending indices into the chain."""
    segments: tuple[Segment, ...] = ()
    """The registry's answer; its numbers are positions in `asked`."""
    plan: Plan | None = None
    promised_in: int = 0
    """The engine's step in which it was last told what can be loaded."""
    hits: Hits = NO_HITS
    answered: bool = False
    """Whether the engine has been told how much can be loaded."""
    counted: bool = False
    """Whether the outcome of the lookup has been told."""
    computed: int = 0
    """Blocks that the engine had itself when it last asked."""
    brought: int | None = None
    """Blocks that were brought up while the request waited; None: not tried yet."""
    origin: Origin | None = None
    """Who keeps this request's blocks, until they are released."""
    origin_failed: bool = False
    """Whether what was kept could not be had."""
    renewed: float = 0.0
    """When the origin was last told that its blocks are still needed."""
    in_place: set[BlockHash] = field(default_factory=set)
    """Blocks that came from another node and are not worth a copy here."""

    def is_told(self, index: int) -> bool:
        """Whether the registry has said who has `chain[index]`, or that nobody has.

        It goes through the blocks it is asked for until it comes to one that nobody has.
        """
        at = bisect_left(self.asked, index)
        told = 1 + sum(segment.count for segment in self.segments)
        return at < min(told, len(self.asked)) and self.asked[at] == index

    def located(self, absent: Sequence[int]) -> Iterator[tuple[Segment, int, int]]:
        """Who has those of the blocks `absent`: segments, cut to unbroken pieces of the chain."""
        wanted = set(absent)
        for segment in self.segments:
            indices = self.asked[segment.start : segment.start + segment.count]
            start: int | None = None
            previous = -1
            for index in indices:
                if start is not None and (index != previous + 1 or index not in wanted):
                    yield segment, start, previous + 1
                    start = None
                if start is None and index in wanted:
                    start = index
                previous = index
            if start is not None:
                yield segment, start, previous + 1
