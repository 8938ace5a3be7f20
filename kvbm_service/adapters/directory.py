"""The directory port: who takes part, under leases.

A record lives as long as its owner keeps beating. Keys are subject tokens joined by dots:
`<namespace>.<fingerprint>.<node>` for a leader, the same with `.<rank>` for a worker.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol


class Entry(NamedTuple):
    """One live record. `age_seconds`: time since its owner last renewed it."""

    key: str
    value: bytes
    revision: int
    age_seconds: float


class Change(NamedTuple):
    """Something happened to `key`. `value` is None when its owner left or its lease ended."""

    key: str
    value: bytes | None
    revision: int


OnChange = Callable[[Change], None]


class Membership(Protocol):
    """One's own record, renewed in the background until `leave`."""

    @property
    def alive(self) -> bool:
        """False once the lease could not be renewed in time, or another took the name."""
        ...

    async def update(self, value: bytes) -> None:
        """Replace the record (and renew it).

        Raises:
            DirectoryError: the directory cannot be reached, or the record is no longer ours.
        """
        ...

    async def leave(self) -> None:
        """Remove the record at once. Never raises for an unreachable directory."""
        ...


class Watch(Protocol):
    """Ends with `close`."""

    async def close(self) -> None: ...


class Directory(Protocol):
    """Membership with lease semantics."""

    @property
    def lease_seconds(self) -> float:
        """How long a record outlives its owner."""
        ...

    async def join(self, key: str, value: bytes) -> Membership:
        """Create one's record and keep renewing it.

        Raises:
            NameTaken: a live record with this key exists.
            DirectoryError: the directory cannot be reached.
        """
        ...

    async def entries(self, prefix: str = "") -> list[Entry]:
        """The live records whose key starts with `prefix`.

        Raises:
            DirectoryError: the directory cannot be reached.
        """
        ...

    async def watch(self, on_change: OnChange, prefix: str = "") -> Watch:
        """Report every live record now, and every change from now on.

        A record that its owner stopped renewing is reported gone within two lease times,
        also when the directory itself has become unreachable meanwhile. Renewals without
        a changed value are not reported.

        Raises:
            DirectoryError: the directory cannot be reached.
        """
        ...

    async def close(self) -> None:
        """Leave with every record that was joined here. Never raises."""
        ...
