"""The directory port on any store of records that can compare-and-set.

What keeping a name and watching names takes is the same everywhere, so it is here once: an
adapter adds a `RecordStore`, which knows one library and no rules. The store forgets a
record one lease after it was last written, on a best effort: observers keep time themselves
(`core/liveness.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import AsyncGenerator
from typing import NamedTuple, Protocol

from kvbm_schemas.subjects import is_token
from kvbm_service.adapters.background import Background
from kvbm_service.adapters.directory import Change, Entry, OnChange
from kvbm_service.core.liveness import Liveness
from kvbm_service.errors import DirectoryError, NameTaken

RENEWALS_PER_LEASE = 3
LOOKS_PER_LEASE = 10
"""How often an observer checks for leases that have ended."""
RETRIES_PER_LEASE = 20
MAX_RETRY_SECONDS = 0.5
"""How soon a failed renewal or a broken watch is tried again, at most."""
MAX_RECORDS = 65_536
"""Records that one watch keeps. Further ones are not reported; logged once."""

log = logging.getLogger(__name__)


class Stored(NamedTuple):
    """A record as the store has it. `value` None: it was removed, and a trace of it is left."""

    value: bytes | None
    owner: str
    revision: int


class Sighting(NamedTuple):
    """A record that exists, or was written, or (`value` None) was removed."""

    key: str
    value: bytes | None
    revision: int
    age_seconds: float = 0.0
    """Since it was written, by the store's own clock."""


class Conflict(DirectoryError):
    """The record is not at the revision that was expected."""


class RecordStore(Protocol):
    """Records that vanish one lease after they were last written.

    A revision is never given twice, not even by a store that lost everything in between.
    Any method raises DirectoryError when the store cannot be reached.
    """

    @property
    def lease_seconds(self) -> float: ...

    async def write(self, key: str, value: bytes, owner: str, expected: int) -> int:
        """Write over revision `expected` (0: there must be none); the new revision.

        Raises:
            Conflict: another revision is there.
        """
        ...

    async def read(self, key: str) -> Stored | None:
        """The latest that is known of `key`."""
        ...

    async def remove(self, key: str, expected: int) -> None:
        """Remove revision `expected`; watchers see it.

        Raises:
            Conflict: another revision is there.
        """
        ...

    def follow(self, prefix: str) -> AsyncGenerator[Sighting | None, None]:
        """What exists, then None, then everything that is written, without a gap.

        Ends in a DirectoryError as soon as that cannot be promised any more.
        """
        ...


class Rivals:
    """Others' records that keep us out, and since when nobody has renewed them.

    A store that forgets by a clock of its own keeps a dead owner's record for as long as that
    clock is set back. Whoever is alive renews; so what has stood still for a lease, by our own
    clock, is nobody's.
    """

    def __init__(self, lease_seconds: float) -> None:
        self._lease_seconds = lease_seconds
        self._met: dict[str, tuple[int, float]] = {}
        """Revision, and when we first met it, by key; only of keys that we want ourselves."""

    def abandoned(self, key: str, revision: int) -> bool:
        """Whether this record, which is there now, has outlived its owner's lease."""
        now = time.monotonic()
        met, since = self._met.get(key, (0, now))
        if met != revision:
            self._met[key] = revision, now
            return False
        return now - since > self._lease_seconds


class KeptRecord:
    """The `Membership` port: a record that is renewed, and made again whenever it is lost."""

    def __init__(
        self, store: RecordStore, key: str, value: bytes, owner: str, rivals: Rivals
    ) -> None:
        self.key = key
        self._rivals = rivals
        self._store = store
        self._value = value
        self._owner = owner
        self._revision = 0
        self._renewed_at = -float("inf")
        self._taken = False
        self.left = False
        self._writing = asyncio.Lock()
        self._work: Background | None = None

    @property
    def alive(self) -> bool:
        age = time.monotonic() - self._renewed_at
        return not (self._taken or self.left) and age < self._store.lease_seconds

    async def start(self) -> None:
        """Write the record and go on renewing it. Raises as `Directory.join`."""
        await self._write()
        self._work = Background(self._renew(), f"lease of {self.key}")

    async def update(self, value: bytes) -> None:
        if self.left:
            raise DirectoryError(f"{self.key} has left the directory")
        self._value = value
        await self._write()

    async def leave(self) -> None:
        self.left = True
        if self._work is not None:
            await self._work.end()
        with contextlib.suppress(DirectoryError):
            await self._remove()

    async def _remove(self) -> None:
        try:
            await self._store.remove(self.key, self._revision)
        except Conflict:
            revision = await self._revision_to_replace()
            if revision:
                await self._store.remove(self.key, revision)

    async def _renew(self) -> None:
        lease = self._store.lease_seconds
        pause = lease / RENEWALS_PER_LEASE
        failing = False
        while True:
            await asyncio.sleep(pause)
            try:
                await self._write()
            except DirectoryError as error:
                if not failing:
                    log.warning("cannot renew %s in the directory: %s", self.key, error)
                failing = True
                pause = min(MAX_RETRY_SECONDS, lease / RETRIES_PER_LEASE)
            else:
                if failing:
                    log.info("renewed %s in the directory again", self.key)
                failing = False
                pause = lease / RENEWALS_PER_LEASE

    async def _write(self) -> None:
        async with self._writing:
            # The lease counts from before the write: we give up before anyone else does.
            started = time.monotonic()
            try:
                revision = await self._put(self._revision)
            except Conflict:
                revision = await self._put(await self._revision_to_replace())
            self._revision = revision
            self._renewed_at = started
            self._taken = False

    async def _put(self, expected: int) -> int:
        return await self._store.write(self.key, self._value, self._owner, expected)

    async def _revision_to_replace(self) -> int:
        """What to write over after a conflict.

        The record has expired, or was removed, or the store lost it, or a write of ours
        arrived and its confirmation did not, or its owner is gone. Anything else is another's.
        """
        stored = await self._store.read(self.key)
        if stored is None:
            return 0
        others = stored.value is not None and stored.owner != self._owner
        if others and not self._rivals.abandoned(self.key, stored.revision):
            self._taken = True
            raise NameTaken(
                f"a live node is already called {self.key}: give each node a name of its own "
                f"(if it is the same node's former life, its lease ends within "
                f"{self._store.lease_seconds:g} s)"
            )
        return stored.revision


class Watching:
    """The `Watch` port: a table of what is alive, kept right over any interruption."""

    def __init__(self, store: RecordStore, on_change: OnChange, prefix: str) -> None:
        self._store = store
        self._on_change = on_change
        self._prefix = prefix
        self._alive = Liveness(store.lease_seconds)
        self._known: dict[str, tuple[bytes, int]] = {}
        """Value and revision of each that is alive."""
        self._full = False
        self._ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._work: list[Background] = []

    async def start(self) -> None:
        """Report what is there, and go on. Raises as `Directory.watch`."""
        self._work = [
            Background(self._follow(), f"watch of {self._prefix}*"),
            Background(self._look(), f"leases in {self._prefix}*"),
        ]
        try:
            await self._ready
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        async with contextlib.AsyncExitStack() as ending:  # of each, also if this is cancelled
            for work in self._work:
                ending.push_async_callback(work.end)

    async def _follow(self) -> None:
        pause = min(MAX_RETRY_SECONDS, self._store.lease_seconds / RETRIES_PER_LEASE)
        while True:
            try:
                async with contextlib.aclosing(self._store.follow(self._prefix)) as sightings:
                    async for sighting in sightings:
                        self._see(sighting)
            except DirectoryError as error:
                if not self._ready.done():
                    self._ready.set_exception(error)
                log.debug("watch of %s*: %s", self._prefix, error)
            await asyncio.sleep(pause)

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(self._store.lease_seconds / LOOKS_PER_LEASE)
            for key in self._alive.expired(time.monotonic()):
                self._bury(key)

    def _see(self, sighting: Sighting | None) -> None:
        if sighting is None:
            # What is missing from a re-read is left to expire: a store that lost its
            # records gets them back from their owners within moments.
            if not self._ready.done():
                self._ready.set_result(None)
        elif sighting.value is None:
            if self._alive.gone(sighting.key):
                self._bury(sighting.key)
        else:
            self._note(sighting.key, sighting.value, sighting.revision)

    def _note(self, key: str, value: bytes, revision: int) -> None:
        if key not in self._known and len(self._known) >= MAX_RECORDS:
            if not self._full:
                self._full = True
                log.error("more than %d records in the directory: ignoring some", MAX_RECORDS)
            return
        self._alive.renewed(key, revision, time.monotonic())
        before = self._known.get(key)
        self._known[key] = (value, revision)
        if before is None or before[0] != value:
            self._tell(Change(key, value, revision))

    def _bury(self, key: str) -> None:
        _, revision = self._known.pop(key)
        self._tell(Change(key, None, revision))

    def _tell(self, change: Change) -> None:
        try:
            self._on_change(change)
        except Exception:  # the one place where these callbacks are supervised
            log.exception("a watcher failed on %s", change.key)


class LeasedRecords:
    """The `Directory` port on a `RecordStore`."""

    def __init__(self, store: RecordStore) -> None:
        self._store = store
        self._owner = secrets.token_hex(8)
        self._kept: dict[str, KeptRecord] = {}
        self._rivals = Rivals(store.lease_seconds)

    @property
    def lease_seconds(self) -> float:
        return self._store.lease_seconds

    async def join(self, key: str, value: bytes) -> KeptRecord:
        assert all(map(is_token, key.split("."))), key
        # One owner's name for all our attempts: a record of ours whose confirmation was
        # lost must not keep us out. So a second one of our own is told apart here.
        kept = self._kept.get(key)
        if kept is not None and not kept.left:
            raise NameTaken(f"{key} is in the directory already, by this very process")
        record = self._kept[key] = KeptRecord(self._store, key, value, self._owner, self._rivals)
        try:
            await record.start()
        except BaseException:
            del self._kept[key]
            raise
        return record

    async def entries(self, prefix: str = "") -> list[Entry]:
        found = []
        async with contextlib.aclosing(self._store.follow(prefix)) as sightings:
            async for sighting in sightings:
                if sighting is None:
                    break
                key, value, revision, age_seconds = sighting
                if value is not None and age_seconds < self.lease_seconds:
                    found.append(Entry(key, value, revision, age_seconds))
        return found

    async def watch(self, on_change: OnChange, prefix: str = "") -> Watching:
        watching = Watching(self._store, on_change, prefix)
        await watching.start()
        return watching

    async def close(self) -> None:
        """Leave with every record that was joined here."""
        for record in self._kept.values():
            if not record.left:
                await record.leave()
