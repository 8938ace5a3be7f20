"""One connection to one server of an etcd cluster, in that server's own terms."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from kvbm_service.adapters.etcd_errors import Unreachable, explain
from kvbm_service.adapters.etcd_login import EtcdLogin, Member
from kvbm_service.adapters.etcd_rpc import aio, grpc, rpc
from kvbm_service.errors import DirectoryError, SettingError

MAX_MESSAGE_BYTES = 64 << 20
"""What one answer may have; gRPC's own limit of 4 MB is less than a page of large records."""
MAX_HEARTBEATS_MISSED = 3
"""A watch that hears nothing for so many heartbeats is over."""

_CHANNEL = (
    ("grpc.enable_http_proxy", 0),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # A new session tries at once, whatever befell the last one.
    ("grpc.use_local_subchannel_pool", 1),
)
_WITH_LEADER = (("hasleader", "true"),)
"""Have a server that is cut off from the others say so, instead of telling old news."""


class EtcdSession:
    """A connection, logged in if there is a user. Made with `open`."""

    def __init__(self, login: EtcdLogin, member: Member, answer_seconds: float) -> None:
        self.member = member
        self._login = login
        self._answer_seconds = answer_seconds
        self._metadata: tuple[tuple[str, str], ...] = _WITH_LEADER
        self._channel = _channel(login, member)
        self._kv = rpc.KVStub(self._channel)
        self._lease = rpc.LeaseStub(self._channel)
        self._watch = rpc.WatchStub(self._channel)
        self._count = 0
        """Calls under way."""
        self._retired = False

    @classmethod
    async def open(cls, login: EtcdLogin, member: Member, answer_seconds: float) -> EtcdSession:
        """Connect to `member`. Without a user, that is not tried before something is asked.

        Raises:
            DirectoryError: see `etcd_errors`; so does everything below.
        """
        try:
            session = cls(login, member, answer_seconds)
        except SettingError as error:
            raise DirectoryError(str(error)) from error
        try:
            if login.user:
                await session._log_in()
        except BaseException:
            await session.retire()
            raise
        return session

    async def retire(self) -> None:
        """Close as soon as nothing is under way any more."""
        self._retired = True
        await self._close_if_unused()

    async def range(self, request: Any) -> Any:
        """What is there: a RangeResponse."""
        return await self._ask(self._kv.Range, request)

    async def transact(self, request: Any) -> Any:
        """Compare and change: a TxnResponse."""
        return await self._ask(self._kv.Txn, request)

    async def grant(self, lease: int, seconds: int) -> None:
        """Begin a lease. It lasts longer where the server has a minimum."""
        await self._ask(self._lease.LeaseGrant, rpc.LeaseGrantRequest(ID=lease, TTL=seconds))

    async def time_to_live(self, lease: int) -> Any:
        """How long a lease goes on: a LeaseTimeToLiveResponse, its TTL -1 if it has ended."""
        return await self._ask(self._lease.LeaseTimeToLive, rpc.LeaseTimeToLiveRequest(ID=lease))

    async def keep_alive(self, lease: int) -> bool:
        """Let a lease begin anew; False if it has ended."""
        async with self._stream(self._lease.LeaseKeepAlive, self._answer_seconds) as call:
            await call.write(rpc.LeaseKeepAliveRequest(ID=lease))
            return bool((await self._read(call)).TTL > 0)

    async def watch(self, request: Any, heartbeat_seconds: float) -> AsyncGenerator[Any, None]:
        """WatchResponses as they come, until a DirectoryError.

        The server's silence is one: it is asked for a sign of life after each heartbeat
        without a word.
        """
        async with self._stream(self._watch.Watch) as call:
            await _say(call, heartbeat_seconds, create_request=request)
            missed = 0
            reading = asyncio.ensure_future(self._read(call))
            try:
                while missed < MAX_HEARTBEATS_MISSED:
                    done, _ = await asyncio.wait([reading], timeout=heartbeat_seconds)
                    if done:
                        missed = 0
                        yield reading.result()
                        reading = asyncio.ensure_future(self._read(call))
                    else:
                        missed += 1
                        sign = rpc.WatchProgressRequest()
                        await _say(call, heartbeat_seconds, progress_request=sign)
                raise Unreachable(f"etcd at {self.member} has gone silent")
            finally:
                reading.cancel()
                await asyncio.gather(reading, return_exceptions=True)

    def explain(self, code: object, details: str) -> DirectoryError:
        """An error of ours for what this server said."""
        return explain(self._login, self.member, code, details)

    async def _log_in(self) -> None:
        request = rpc.AuthenticateRequest(name=self._login.user, password=self._login.password)
        authenticate = rpc.AuthStub(self._channel).Authenticate
        async with self._under_way():
            try:
                answer = await authenticate(request, timeout=self._answer_seconds)
            except rpc.AioRpcError as error:
                if "authentication is not enabled" not in (error.details() or ""):
                    raise
            else:
                self._metadata = (*_WITH_LEADER, ("token", answer.token))

    async def _ask(self, method: Any, request: Any) -> Any:
        async with self._under_way():
            return await method(request, timeout=self._answer_seconds, metadata=self._metadata)

    @contextlib.asynccontextmanager
    async def _stream(self, method: Any, seconds: float | None = None) -> AsyncIterator[Any]:
        async with self._under_way():
            call = method(timeout=seconds, metadata=self._metadata)
            try:
                yield call
            finally:
                call.cancel()

    async def _read(self, call: Any) -> Any:
        answer = await call.read()
        if answer is aio.EOF:
            raise Unreachable(f"etcd at {self.member} hung up")
        return answer

    @contextlib.asynccontextmanager
    async def _under_way(self) -> AsyncIterator[None]:
        self._count += 1
        try:
            yield
        except rpc.AioRpcError as error:
            raise self.explain(error.code(), error.details() or "") from None
        finally:
            self._count -= 1
            await self._close_if_unused()

    async def _close_if_unused(self) -> None:
        if self._retired and not self._count:
            await self._channel.close()


async def _say(call: Any, seconds: float, **request: Any) -> None:
    """Send one request of a watch."""
    try:
        async with asyncio.timeout(seconds):
            await call.write(rpc.WatchRequest(**request))
    except TimeoutError:
        raise Unreachable("etcd takes no more requests") from None
    except asyncio.InvalidStateError:
        return  # it has ended; reading tells why


def _channel(login: EtcdLogin, member: Member) -> Any:
    if not member.tls:
        return rpc.insecure_channel(member.address, options=_CHANNEL)
    pem = login.read_pem()
    credentials = grpc.ssl_channel_credentials(pem.ca, pem.key, pem.certificate)
    return rpc.secure_channel(member.address, credentials, options=_CHANNEL)
