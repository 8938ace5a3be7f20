"""What connects engines in these tests: a real nats-server, and a registry or its stand-in."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from types import TracebackType

from kvbm_schemas.codec import encode
from kvbm_schemas.requests import Located
from kvbm_schemas.subjects import REGISTRY_NODE, every
from kvbm_service.adapters.bus import Delivery
from kvbm_service.adapters.nats_bus import NatsBus
from kvbm_service.adapters.nats_directory import NatsDirectory
from kvbm_service.loop_thread import LoopThread
from kvbm_service.registry_service import RegistryService

PATIENCE_SECONDS = 30.0
MEMBERSHIP_SECONDS = 10.0


def eventually(condition: Callable[[], object], seconds: float = PATIENCE_SECONDS) -> None:
    """Wait until `condition` holds; fail if it never does."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.005)


class LiveRegistry:
    """A real registry on a thread of its own."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._service: RegistryService | None = None
        self._loop = LoopThread("registry", self._run)

    async def _run(self) -> None:
        bus = await NatsBus.connect(self._url)
        directory = NatsDirectory(bus, lease_seconds=MEMBERSHIP_SECONDS)
        try:
            self._service = RegistryService(bus, directory)
            await self._service.run()
        finally:
            await directory.close()
            await bus.close()

    @property
    def copies(self) -> int:
        """How many blocks it knows of, each once for every holder."""
        return self._service.status().copies if self._service else 0

    def __enter__(self) -> LiveRegistry:
        self._loop.start()
        eventually(lambda: self._service is not None and self._service.ready.is_set())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._loop.stop()


class SilentRegistry:
    """Hears every lookup, and answers "nobody has it" when told to; or never."""

    def __init__(self, url: str) -> None:
        self.asked: list[Delivery] = []
        self._url = url
        self._bus: NatsBus | None = None
        self._loop = LoopThread("silent-registry", self._run)

    async def _run(self) -> None:
        bus = await NatsBus.connect(self._url)

        async def hear(delivery: Delivery) -> None:
            self.asked.append(delivery)

        try:
            await bus.subscribe(every("lookup", REGISTRY_NODE), hear)
            self._bus = bus
            await asyncio.Event().wait()
        finally:
            await bus.close()

    def answer(self) -> None:
        """Answer everything that was asked."""
        questions, self.asked = self.asked, []

        async def send() -> None:
            assert self._bus is not None
            for question in questions:
                await self._bus.publish(question.reply, encode(Located()))

        self._loop.call(lambda: asyncio.ensure_future(send()))

    def __enter__(self) -> SilentRegistry:
        self._loop.start()
        eventually(lambda: self._bus is not None)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._loop.stop()
