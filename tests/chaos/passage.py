"""A way from one node to one server that can be cut, blocked in either direction, or slowed.

Bytes are passed on by a thread of this process, one for all passages. What is blocked is kept
and arrives later, as TCP's would; what is cut is lost together with its connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")

CHUNK_BYTES = 16 << 10
OPENING_SECONDS = 5.0


class Way(NamedTuple):
    """What a passage does with bytes."""

    cut: bool = False
    """Connections end, and no new one is made."""
    deaf: bool = False
    """Nothing arrives from the server."""
    mute: bool = False
    """Nothing arrives at the server."""
    delay_seconds: float = 0.0
    """How much longer each piece takes, either way; those behind it wait."""


OPEN = Way()


class Passages:
    """The thread on which all passages pass bytes on. A context manager."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="passages")
        self._passages: list[Passage] = []

    def to(self, port: int) -> Passage:
        """Open a passage to a port of this host."""
        passage = Passage(port, self)
        self.run(passage.open())
        self._passages.append(passage)
        return passage

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Do something on the thread, and wait for it."""
        future: Future[T] = asyncio.run_coroutine_threadsafe(work, self._loop)
        return future.result(OPENING_SECONDS)

    def __enter__(self) -> Passages:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        for passage in self._passages:
            self.run(passage.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class Passage:
    """Listens on a free port, and passes on what comes, as long as its way is open."""

    def __init__(self, port: int, passages: Passages) -> None:
        self._target = port
        self._passages = passages
        self._way = OPEN
        self._changed = asyncio.Event()
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def port(self) -> int:
        """Where to connect."""
        assert self._server is not None
        number: int = self._server.sockets[0].getsockname()[1]
        return number

    def become(self, way: Way) -> None:
        """From now on, bytes fare like this."""
        self._passages.run(self._become(way))

    async def open(self) -> None:
        """Listen. On the thread of passages, like the next one."""
        self._server = await asyncio.start_server(self._enter, "127.0.0.1", 0)

    async def close(self) -> None:
        """End all connections, and listen no more."""
        assert self._server is not None
        self._server.close()
        await self._become(Way(cut=True))

    async def _become(self, way: Way) -> None:
        self._way = way
        self._changed.set()
        self._changed = asyncio.Event()
        if way.cut:
            await self._cut()

    async def _cut(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _enter(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        with contextlib.suppress(OSError, asyncio.CancelledError):
            if not self._way.cut:
                await self._pass_on(reader, writer)
        writer.transport.abort()
        self._tasks.discard(task)

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", self._target)
        pumps = [
            asyncio.create_task(self._pump(reader, back, to_server=True)),
            asyncio.create_task(self._pump(there, writer, to_server=False)),
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            back.transport.abort()
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)

    async def _pump(
        self, source: asyncio.StreamReader, target: asyncio.StreamWriter, to_server: bool
    ) -> None:
        while chunk := await source.read(CHUNK_BYTES):
            while self._way.mute if to_server else self._way.deaf:
                await self._changed.wait()
            if self._way.delay_seconds:
                await asyncio.sleep(self._way.delay_seconds)
            target.write(chunk)
            await target.drain()
