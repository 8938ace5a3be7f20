"""The servers of one etcd cluster: one is used until it cannot serve us, then the next."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

from kvbm_service.adapters.etcd_errors import EtcdRefused, LoggedOut, LoginRefused, Unreachable
from kvbm_service.adapters.etcd_login import EtcdLogin
from kvbm_service.adapters.etcd_session import EtcdSession
from kvbm_service.errors import DirectoryError

LOGINS_PER_QUESTION = 2
"""A login that has expired is renewed once; if that does not help, something else is wrong."""
REFUSED_LOGIN_SECONDS = 5.0
"""How long a refused login is not tried again: each try costs the server much computing."""

T = TypeVar("T")

log = logging.getLogger(__name__)


class EtcdServers:
    """Access to a cluster of which one server, or all, may be away. Makes no connection yet."""

    def __init__(self, login: EtcdLogin, answer_seconds: float) -> None:
        self._login = login
        self._answer_seconds = answer_seconds
        self._turn = 0
        self._session: EtcdSession | None = None
        self._opening = asyncio.Lock()
        self._closed = False
        self._refusal = ""
        self._refused_until = -math.inf
        self._logged: type[DirectoryError] | None = DirectoryError
        """What kind of trouble was logged last; None: all is well."""

    async def ask(self, question: Callable[[EtcdSession], Awaitable[T]]) -> T:
        """Put a question to one server and, as long as none answers, to the others.

        One that changes something may arrive twice.

        Raises:
            DirectoryError: see `etcd_errors`.
        """
        tries = {Unreachable: len(self._login.members), LoggedOut: LOGINS_PER_QUESTION}
        while True:
            try:
                async with self.use() as session:
                    answer = await question(session)
            except (Unreachable, LoggedOut) as error:
                tries[type(error)] -= 1
                if not tries[type(error)]:
                    self.tell(error)
                    raise
            except EtcdRefused as error:
                self.tell(error)
                raise
            else:
                self.tell(None)
                return answer

    @contextlib.asynccontextmanager
    async def use(self) -> AsyncIterator[EtcdSession]:
        """The present session. If it fails in here, the next user gets a new one."""
        session = await self._connected()
        try:
            yield session
        except LoggedOut:
            await self._leave(session)
            raise
        except Unreachable:
            if session is self._session:
                self._turn += 1
            await self._leave(session)
            raise

    def tell(self, problem: DirectoryError | None) -> None:
        """Log what is wrong, once, and when it is right again."""
        kind = None if problem is None else type(problem)
        if kind is self._logged:
            return
        self._logged = kind
        if problem is None:
            log.info("connected to etcd at %s", self._login)
        else:
            log.warning("%s; trying again in the background", problem)

    async def close(self) -> None:
        """Let go of the connection, and make no other one."""
        self._closed = True
        if self._session is not None:
            await self._leave(self._session)

    async def _connected(self) -> EtcdSession:
        async with self._opening:
            if self._session is None:
                self._session = await self._open()
            return self._session

    async def _open(self) -> EtcdSession:
        if self._closed:
            raise DirectoryError("the directory is closed")
        if time.monotonic() < self._refused_until:
            raise LoginRefused(self._refusal)
        member = self._login.members[self._turn % len(self._login.members)]
        try:
            return await EtcdSession.open(self._login, member, self._answer_seconds)
        except Unreachable:
            self._turn += 1
            raise
        except LoginRefused as error:
            self._refusal = str(error)
            self._refused_until = time.monotonic() + REFUSED_LOGIN_SECONDS
            raise

    async def _leave(self, session: EtcdSession) -> None:
        if session is self._session:
            self._session = None
        await session.retire()
