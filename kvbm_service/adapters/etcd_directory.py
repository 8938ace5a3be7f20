"""The directory on etcd: keys that lie under leases, which their owners keep alive.

`etcdctl get --prefix kvbm/members/` shows it. What leases, revisions and ages are in etcd's
terms, and why, is in docs/adr/0009-etcd.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import secrets
from collections.abc import AsyncGenerator
from typing import Any, NamedTuple

from kvbm_service.adapters.directory import Entry
from kvbm_service.adapters.etcd_errors import LeaseGone, Unreachable
from kvbm_service.adapters.etcd_login import PREFIX, EtcdLogin
from kvbm_service.adapters.etcd_rpc import rpc
from kvbm_service.adapters.etcd_servers import EtcdServers
from kvbm_service.adapters.etcd_session import EtcdSession
from kvbm_service.adapters.leased_records import Conflict, LeasedRecords, Sighting, Stored
from kvbm_service.errors import DirectoryError, SettingError

DEFAULT_LEASE_SECONDS = 10.0
MIN_LEASE_SECONDS = 0.5
MIN_ANSWER_SECONDS, MAX_ANSWER_SECONDS = 1.0, 2.0
"""How long one server may take to answer: a third of a lease, within these bounds."""
HEARTBEATS_PER_LEASE = 5
MAX_RECORDS_PER_PAGE = 256
MAX_AGES_ASKED = 32
"""Of how many records the age is asked for at a time."""

_LEASE_BITS = 63
_REVISION_BITS = 64


class _Held(NamedTuple):
    """A lease of ours, and in whose name."""

    lease: int
    owner: str


class _Members:
    """The `RecordStore` port on the keys that begin with `PREFIX`.

    A revision of ours is etcd's, which counts from 1 again where it lost everything, together
    with the lease that the record lies under: leases have random names, and end with the rest.
    """

    def __init__(self, servers: EtcdServers, lease_seconds: float) -> None:
        self._servers = servers
        self._lease_seconds = lease_seconds
        self._held: dict[str, _Held] = {}

    @property
    def lease_seconds(self) -> float:
        return self._lease_seconds

    async def write(self, key: str, value: bytes, owner: str, expected: int) -> int:
        held = await self._keep(key, owner)
        put = rpc.PutRequest(key=_path(key), value=value, lease=held.lease)
        try:
            modified = await self._replace(key, expected, rpc.RequestOp(request_put=put))
        except LeaseGone:
            self._held.pop(key, None)
            raise
        return _revision(held.lease, modified)

    async def remove(self, key: str, expected: int) -> None:
        delete = rpc.DeleteRangeRequest(key=_path(key))
        await self._replace(key, expected, rpc.RequestOp(request_delete_range=delete))
        self._held.pop(key, None)

    async def read(self, key: str) -> Stored | None:
        for kv in (await self._page(rpc.RangeRequest(key=_path(key)))).kvs:
            held = self._held.get(key)
            ours = held is not None and held.lease == kv.lease
            owner = held.owner if held is not None and ours else f"lease {kv.lease:x}"
            return Stored(kv.value, owner, _revision(kv.lease, kv.mod_revision))
        return None

    async def follow(self, prefix: str) -> AsyncGenerator[Sighting | None, None]:
        # Ages are left out: they would have to be asked for one by one, and whoever follows
        # keeps time for itself.
        revision = 0
        async for moment, kvs in self._pages(prefix):
            revision = moment
            for kv in kvs:
                yield _sighting(kv)
        yield None
        async with contextlib.aclosing(self._changes(prefix, revision)) as sightings:
            async for sighting in sightings:
                yield sighting

    async def entries(self, prefix: str) -> list[Entry]:
        """The live records with their ages."""
        found = [kv async for _, kvs in self._pages(prefix) for kv in kvs]
        ages: list[float] = []
        for start in range(0, len(found), MAX_AGES_ASKED):
            some = found[start : start + MAX_AGES_ASKED]
            ages += await asyncio.gather(*(self._age(kv.lease) for kv in some))
        return [
            Entry(_key(kv), kv.value, _revision(kv.lease, kv.mod_revision), age)
            for kv, age in zip(found, ages, strict=True)
            if age < self._lease_seconds
        ]

    async def _keep(self, key: str, owner: str) -> _Held:
        """The lease for `key`, at the beginning of its time."""
        held = self._held.get(key)
        if held is None or not await self._keep_alive(held.lease):
            held = self._held[key] = _Held(await self._servers.ask(self._grant), owner)
        return held

    async def _keep_alive(self, lease: int) -> bool:
        return await self._servers.ask(lambda session: session.keep_alive(lease))

    async def _grant(self, session: EtcdSession) -> int:
        lease = secrets.randbits(_LEASE_BITS) or 1
        await session.grant(lease, math.ceil(self._lease_seconds))
        return lease

    async def _replace(self, key: str, expected: int, change: Any) -> int:
        """Make a change to revision `expected`; etcd's own number of the new one."""
        request = rpc.TxnRequest(compare=_is_at(key, expected), success=[change])
        answer = await self._servers.ask(lambda session: session.transact(request))
        if not answer.succeeded:
            raise Conflict(f"{key} was changed by another")
        return int(answer.header.revision)

    async def _pages(self, prefix: str) -> AsyncGenerator[tuple[int, Any], None]:
        """All there was at one moment: that moment's revision, and some of the keys."""
        start, end = _path(prefix), _end(prefix)
        revision, more = 0, True
        while more:
            request = rpc.RangeRequest(
                key=start, range_end=end, revision=revision, limit=MAX_RECORDS_PER_PAGE
            )
            page = await self._page(request)
            revision, more = revision or page.header.revision, page.more
            if more:
                start = page.kvs[-1].key + b"\0"
            yield revision, page.kvs

    async def _page(self, request: Any) -> Any:
        return await self._servers.ask(lambda session: session.range(request))

    async def _changes(self, prefix: str, revision: int) -> AsyncGenerator[Sighting, None]:
        """What was written after `revision`."""
        request = rpc.WatchCreateRequest(
            key=_path(prefix), range_end=_end(prefix), start_revision=revision + 1, fragment=True
        )
        heartbeat = self._lease_seconds / HEARTBEATS_PER_LEASE
        async with (
            self._servers.use() as session,
            contextlib.aclosing(session.watch(request, heartbeat)) as answers,
        ):
            async for answer in answers:
                self._check(answer, session, revision)
                for event in answer.events:
                    yield _change(event)

    def _check(self, answer: Any, session: EtcdSession, revision: int) -> None:
        if answer.compact_revision:
            raise DirectoryError(f"etcd has forgotten what was before {answer.compact_revision}")
        if answer.canceled:
            code = rpc.StatusCode.UNKNOWN
            raise session.explain(code, answer.cancel_reason)
        if answer.header.revision < revision:
            # It lost its state meanwhile, or lags behind the server that was read from. To wait
            # for a revision which it reaches some day would be to miss all before.
            raise Unreachable(f"etcd at {session.member} is behind what was read")

    async def _age(self, lease: int) -> float:
        """Seconds since the lease was kept alive, at least: etcd tells whole ones."""
        if not lease:
            return math.inf  # not written by one of us, and never renewed
        left = await self._servers.ask(lambda session: session.time_to_live(lease))
        return max(0.0, left.grantedTTL - left.TTL - 1.0) if left.TTL >= 0 else math.inf


class EtcdDirectory(LeasedRecords):
    """The `Directory` port on an etcd cluster, there or not; made before it is tried."""

    def __init__(self, login: EtcdLogin, lease_seconds: float = DEFAULT_LEASE_SECONDS) -> None:
        if lease_seconds < MIN_LEASE_SECONDS:
            raise SettingError("lease_seconds", lease_seconds, f"at least {MIN_LEASE_SECONDS} s")
        answer_seconds = max(MIN_ANSWER_SECONDS, min(lease_seconds / 3, MAX_ANSWER_SECONDS))
        self.servers = EtcdServers(login, answer_seconds)
        self._members = _Members(self.servers, lease_seconds)
        super().__init__(self._members)

    async def entries(self, prefix: str = "") -> list[Entry]:
        return await self._members.entries(prefix)

    async def close(self) -> None:
        """Leave with every record that was joined here, and let go of the connection."""
        await super().close()
        await self.servers.close()


def _path(key: str) -> bytes:
    return (PREFIX + key).encode()


def _end(prefix: str) -> bytes:
    """The first path after all that begin like `prefix`."""
    path = _path(prefix)
    return path[:-1] + bytes([path[-1] + 1])


def _key(kv: Any) -> str:
    path: bytes = kv.key
    return path.decode(errors="replace").removeprefix(PREFIX)


def _revision(lease: int, modified: int) -> int:
    return lease << _REVISION_BITS | modified


def _is_at(key: str, revision: int) -> list[Any]:
    """What has to hold for `key` to be at a revision; 0: it is not there."""
    lease, modified = revision >> _REVISION_BITS, revision & ((1 << _REVISION_BITS) - 1)
    compare, path = rpc.Compare, _path(key)
    same = [compare(key=path, target=compare.MOD, result=compare.EQUAL, mod_revision=modified)]
    if revision:
        same.append(compare(key=path, target=compare.LEASE, result=compare.EQUAL, lease=lease))
    return same


def _sighting(kv: Any) -> Sighting:
    return Sighting(_key(kv), kv.value, _revision(kv.lease, kv.mod_revision))


def _change(event: Any) -> Sighting:
    if event.type == rpc.Event.DELETE:
        return Sighting(_key(event.kv), None, event.kv.mod_revision)
    return _sighting(event.kv)
