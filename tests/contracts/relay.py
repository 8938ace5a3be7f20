"""A TCP connection's middle, in which things happen that need no killing."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator


class Relay:
    """Hands bytes on, from `port` to another; until it is cut, or swallows them."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._life = 0
        self._swallows = False
        self.port = 0

    def swallow(self) -> None:
        """Lose what comes, as a cable that was pulled would; no connection survives that."""
        self._swallows = True

    async def cut(self) -> None:
        """End all connections, and take no new one."""
        assert self._server is not None
        self._server.close()
        for writer in self._writers:
            writer.transport.abort()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def heal(self) -> None:
        """Take connections (again). Those that were swallowed from remain as they are."""
        if self._swallows:
            self._swallows = False
            self._life += 1
        if self._server is None or not self._server.is_serving():
            self._server = await asyncio.start_server(self._take, "127.0.0.1", self.port)
            self.port = self._server.sockets[0].getsockname()[1]

    async def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._writers.add(writer)
        try:
            there = await asyncio.open_connection("127.0.0.1", self._target)
            self._writers.add(there[1])
            async with asyncio.TaskGroup() as both:
                both.create_task(self._pass(reader, there[1]))
                both.create_task(self._pass(there[0], writer))
            self._writers.discard(there[1])
        except* OSError:
            pass
        finally:
            self._writers.discard(writer)
            self._tasks.discard(task)

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        life = self._life
        try:
            while data := await reader.read(1 << 16):
                if not self._swallows and life == self._life:
                    writer.write(data)
                    await writer.drain()
        finally:
            writer.transport.abort()


@contextlib.asynccontextmanager
async def relay_to(target: int) -> AsyncIterator[Relay]:
    """A relay to a port of this host."""
    relay = Relay(target)
    await relay.heal()
    yield relay
    await relay.cut()
