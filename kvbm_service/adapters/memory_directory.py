"""A directory within one event loop: for tests, simulations, and single processes.

Directories made on the same `Records` see each other. `cut` takes one off, as a lost
connection or a killed process would; `heal` puts it back; `wipe` loses everything.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from typing import NamedTuple

from kvbm_service.adapters.leased_records import Conflict, LeasedRecords, Sighting, Stored
from kvbm_service.errors import DirectoryError

MAX_WAITING_SIGHTINGS = 4_096
"""What may wait for one follower; beyond, it has to read everything again."""


class _Written(NamedTuple):
    stored: Stored
    at: float


class _Follower:
    """One reader of everything that is written under a prefix."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._waiting: asyncio.Queue[Sighting] = asyncio.Queue(MAX_WAITING_SIGHTINGS)
        self._broken = asyncio.Event()

    def put(self, sighting: Sighting) -> None:
        if not sighting.key.startswith(self._prefix):
            return
        try:
            self._waiting.put_nowait(sighting)
        except asyncio.QueueFull:
            self.interrupt()

    def interrupt(self) -> None:
        self._broken.set()
        # Whoever waits for a sighting must look up.
        if self._waiting.empty():
            self._waiting.put_nowait(Sighting("", None, 0))

    async def get(self) -> Sighting:
        sighting = await self._waiting.get()
        if self._broken.is_set():
            raise DirectoryError("the directory was interrupted")
        return sighting


class Records:
    """What the directories of one event loop have in common."""

    def __init__(self, lease_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` is what records are forgotten by."""
        self.lease_seconds = lease_seconds
        self.clock = clock
        self.followers: dict[_Follower, None] = {}
        self._written: dict[str, _Written] = {}
        self._revision = 0

    def live(self) -> dict[str, _Written]:
        """What has been written less than a lease ago."""
        oldest = self.clock() - self.lease_seconds
        self._written = {key: each for key, each in self._written.items() if each.at > oldest}
        return self._written

    def replace(self, key: str, value: bytes | None, owner: str, expected: int) -> int:
        """Compare and set; the new revision."""
        there = self.live().get(key)
        if (there.stored.revision if there else 0) != expected:
            raise Conflict(f"{key} was changed by another")
        self._revision += 1
        self._written[key] = _Written(Stored(value, owner, self._revision), self.clock())
        for follower in list(self.followers):
            follower.put(Sighting(key, value, self._revision))
        return self._revision

    def wipe(self) -> None:
        """Lose every record without a word."""
        self._written.clear()


class _Store:
    """The `RecordStore` port: one directory's access to the records."""

    def __init__(self, records: Records) -> None:
        self._records = records
        self._reachable = True
        self._followers: dict[_Follower, None] = {}

    @property
    def lease_seconds(self) -> float:
        return self._records.lease_seconds

    async def write(self, key: str, value: bytes, owner: str, expected: int) -> int:
        self._require_reachable()
        return self._records.replace(key, value, owner, expected)

    async def read(self, key: str) -> Stored | None:
        self._require_reachable()
        written = self._records.live().get(key)
        return written.stored if written else None

    async def remove(self, key: str, expected: int) -> None:
        self._require_reachable()
        self._records.replace(key, None, "", expected)

    async def follow(self, prefix: str) -> AsyncGenerator[Sighting | None, None]:
        self._require_reachable()
        follower = _Follower(prefix)
        self._followers[follower] = self._records.followers[follower] = None
        now = self._records.clock()
        there = [
            Sighting(key, each.stored.value, each.stored.revision, now - each.at)
            for key, each in self._records.live().items()
            if key.startswith(prefix)
        ]
        try:
            for sighting in there:
                yield sighting
            yield None
            while True:
                yield await follower.get()
        finally:
            del self._followers[follower], self._records.followers[follower]

    def reach(self, *, reachable: bool) -> None:
        self._reachable = reachable
        if not reachable:
            for follower in self._followers:
                follower.interrupt()

    def _require_reachable(self) -> None:
        if not self._reachable:
            raise DirectoryError("the directory is cut off")


class MemoryDirectory(LeasedRecords):
    """The `Directory` port on `Records`."""

    def __init__(self, records: Records) -> None:
        self._access = _Store(records)
        super().__init__(self._access)

    def cut(self) -> None:
        """Lose the records from sight, and be lost from theirs."""
        self._access.reach(reachable=False)

    def heal(self) -> None:
        """Have access again."""
        self._access.reach(reachable=True)
