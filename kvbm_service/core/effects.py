"""What the leader's core wants done on the bus. Carried out by the shell, in order."""

from __future__ import annotations

from typing import NamedTuple

from kvbm_schemas.events import BlockEvent, Loaded
from kvbm_schemas.requests import LeaseAnswer
from kvbm_schemas.step import Fetch, Lend


class Publish(NamedTuple):
    """Tell everyone."""

    event: BlockEvent


class Announce(NamedTuple):
    """Tell whoever watches."""

    loaded: Loaded


class AskRegistry(NamedTuple):
    """Ask who has the chain `hashes`; answer with `Leader.located`."""

    request: str
    attempt: int
    hashes: bytes


class AskOwner(NamedTuple):
    """Ask `node` for a lease on `hashes`, the chain from `start`; answer with `Leader.answered`."""

    request: str
    attempt: int
    node: str
    start: int
    hashes: bytes
    seconds: float
    """When nobody waits for the answer any more, counted from now."""
    handed_over: str = ""
    """The lease, granted ahead, that is to be named."""


class GiveBack(NamedTuple):
    """Tell `node` that its lease is no longer needed."""

    node: str
    lease: str


class KeepUp(NamedTuple):
    """Tell `node` that its lease, granted ahead, is still needed."""

    node: str
    lease: str


class Answer(NamedTuple):
    """Answer the lease request that was given the token `lease`, which had to wait."""

    lease: str
    answer: LeaseAnswer
    blocks: int = 0
    """How many were asked for."""


class TellRanks(NamedTuple):
    """Have every own rank carry `order` out now, not with the engine's next step.

    Tell `Leader.moved` what each says, or `Leader.unheard` if some rank says nothing.
    """

    order: Fetch | Lend
    seconds: float


Effect = Publish | Announce | AskRegistry | AskOwner | GiveBack | KeepUp | Answer | TellRanks
