"""The read path of one request, from the first question to the bytes.

    IDLE ──ask registry──► LOOKING ──answer──► LOCATED ──ask owners──► LEASING
     │                        │ deadline          │                       │ answers, deadline
     │                        └───────────────────┤ nobody has more       │
     └── all of it is here, or nobody can be asked┴──────────────► READY ◄┘
                                                                     │ load
                                     IDLE ◄── every rank is done ── LOADING ──► SPENT (failed)

Every question carries an attempt number; an answer to an older one is late and changes nothing.
A plan pins what it counts on, and is dropped when it gets too old.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from kvbm_schemas.block import BlockHash
from kvbm_schemas.requests import Segment

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

    @property
    def end(self) -> int:
        return self.start + len(self.slots)


@dataclass(slots=True)
class Part:
    """What one owner is asked for: `chain[start:end]`."""

    node: str
    start: int
    end: int
    answered: bool = False
    grant: Grant | None = None


@dataclass(slots=True)
class Plan:
    """Where `chain[start:end]` is to come from: pinned own slots first, then leased ones."""

    start: int
    local_end: int
    local_slots: list[int]
    local_fills: list[int]
    deadline: float
    parts: list[Part] = field(default_factory=list)

    @property
    def end(self) -> int:
        """The end of the unbroken run that is certain."""
        end = self.local_end
        for part in self.parts:
            if part.grant is None or part.grant.start != end:
                break
            end = part.grant.end
        return end

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
    asked_from: int = 0
    segments: tuple[Segment, ...] = ()
    plan: Plan | None = None
    local_hits: int = 0
    remote_hits: int = 0

    @property
    def located_end(self) -> int:
        """The end of what the registry's answer covers."""
        return self.asked_from + sum(segment.count for segment in self.segments)

    def parts_from(self, index: int) -> Iterator[tuple[Segment, int, int]]:
        """The answer's segments with their bounds in the chain, cut to begin at `index`."""
        for segment in self.segments:
            start = self.asked_from + segment.start
            end = min(start + segment.count, len(self.chain))
            if end > index:
                yield segment, max(start, index), end
