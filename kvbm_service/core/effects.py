"""What the leader's core wants done on the bus. Carried out by the shell, in order."""

from __future__ import annotations

from typing import NamedTuple

from kvbm_schemas.events import BlockEvent, Loaded


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


class GiveBack(NamedTuple):
    """Tell `node` that its lease is no longer needed."""

    node: str
    lease: str


Effect = Publish | Announce | AskRegistry | AskOwner | GiveBack
