"""A router in this process, and a client before it."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import aiohttp

from kvbm_service.network import Network
from kvbm_service.route.fleet import Engine, Fleet, Role
from kvbm_service.route.service import Options, RouteService
from tests.patience import eventually
from tests.route.fake_engine import FakeEngine

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
PATIENT = Options(
    port=0,
    idle_seconds=60.0,
    drain_seconds=20.0,
    deadline_seconds=10.0,
    look_seconds=0.1,
    first_look_seconds=0.2,
)
"""Deadlines that a starved machine keeps, too; and nothing is waited for."""


class Answer(NamedTuple):
    """What a client got."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        """A stream's events; the last may be `[DONE]`."""
        found = [line.removeprefix("data: ") for line in self.body.decode().split("\n\n") if line]
        return [one if one == "[DONE]" else json.loads(one) for one in found]

    @property
    def text(self) -> str:
        events = [event for event in self.events if event != "[DONE]"]
        choices = [event["choices"][0] for event in events if "choices" in event]
        return "".join(one.get("text") or one["delta"]["content"] for one in choices)


class Router:
    """A router that runs, and its client."""

    def __init__(self, service: RouteService, session: aiohttp.ClientSession) -> None:
        self.service = service
        self.session = session
        self.url = ""

    @property
    def fleet(self) -> Fleet:
        return self.service.fleet

    async def post(self, path: str, body: object, **headers: str) -> Answer:
        async with self.session.post(self.url + path, json=body, headers=headers) as response:
            return Answer(response.status, dict(response.headers), await response.read())

    async def get(self, path: str) -> Answer:
        async with self.session.get(self.url + path) as response:
            return Answer(response.status, dict(response.headers), await response.read())

    async def say(self, text: str = "hello", *, stream: bool = False, **more: object) -> Answer:
        """Post a completion."""
        return await self.post(COMPLETION, {"prompt": text, "stream": stream, **more})

    def engine(self, fake: FakeEngine) -> Engine:
        return next(engine for engine in self.fleet if engine.url == fake.url)

    async def until_ready(self, *fakes: FakeEngine) -> None:
        urls = {fake.url for fake in fakes}
        await eventually(lambda: urls <= {engine.url for engine in self.fleet if engine.healthy})

    async def metric(self, line: str) -> float:
        """The value behind a name with its labels; 0 if it is not there."""
        page = (await self.get("/metrics")).body.decode()
        for row in page.splitlines():
            if row.startswith(line + " "):
                return float(row.rpartition(" ")[2])
        return 0.0


@contextlib.asynccontextmanager
async def routing(
    *fakes: FakeEngine,
    prefill: Sequence[FakeEngine] = (),
    decode: Sequence[FakeEngine] = (),
    network: Network | None = None,
    ready: bool = True,
    options: Options = PATIENT,
) -> AsyncIterator[Router]:
    """A router before these engines; `ready`: they are known to be well."""
    roles = ((fakes, Role.BOTH), (prefill, Role.PREFILL), (decode, Role.DECODE))
    engines = tuple((fake.url, role) for some, role in roles for fake in some)
    listening: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    service = RouteService(
        replace(options, engines=engines),
        network,
        on_ready=lambda url, _: listening.set_result(url),
    )
    running = asyncio.create_task(service.run())
    async with aiohttp.ClientSession() as session:
        router = Router(service, session)
        try:
            await asyncio.wait([running, listening], return_when=asyncio.FIRST_COMPLETED)
            if running.done():
                await running
            router.url = listening.result()
            if ready:
                await router.until_ready(*fakes, *prefill, *decode)
            yield router
        finally:
            running.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await running
