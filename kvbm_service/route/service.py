"""The router at work: HTTP on one side, engines, registries and membership on the other."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from kvbm_service.adapters.route_metrics import RouteMetrics
from kvbm_service.errors import ClientGone, EngineLost, NoEngine, SettingError
from kvbm_service.network import Network
from kvbm_service.route import prompts
from kvbm_service.route.dispatch import Dispatcher
from kvbm_service.route.fleet import ANSWERING, Engine, Fleet, Role
from kvbm_service.route.health import Health
from kvbm_service.route.membership import Membership
from kvbm_service.route.prefixes import Prefixes
from kvbm_service.route.prompts import NotARequest, Path
from kvbm_service.route.relay import asked_headers, error
from kvbm_service.route.upstream import Upstream

MAX_REQUEST_BYTES = 1 << 26
"""A longer request is refused."""
RETRY_AFTER_SECONDS = 1
"""When a client that was turned away may come again."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Options:
    """What an operator chooses for one router."""

    host: str = "127.0.0.1"
    port: int = 8000
    engines: Sequence[tuple[str, Role]] = ()
    namespace: str = "default"
    deadline_seconds: float = 0.05
    prefill_blocks: int = 2
    max_requests: int = 4096
    idle_seconds: float = 600.0
    drain_seconds: float = 30.0
    look_seconds: float = 1.0
    """Between two looks at how an engine is."""
    first_look_seconds: float = 3.0
    """How long the start waits for engines to say that they are well."""


OnReady = Callable[[str, list[Engine]], None]


@dataclass(eq=False)
class RouteService:
    """One router. `run` it. Without a network it goes by load alone."""

    options: Options
    network: Network | None = None
    on_ready: OnReady = lambda url, engines: None
    """Hears where it listens, and which engines there are by then."""
    fleet: Fleet = field(default_factory=Fleet)
    metrics: RouteMetrics = field(default_factory=RouteMetrics)
    _in_flight: int = 0
    _stopping: bool = False

    async def run(self) -> None:
        """Serve until cancelled; then take no more requests, and end those there are, in time.

        Raises:
            SettingError: nobody can listen there.
        """
        options = self.options
        async with Upstream(options.idle_seconds) as upstream:
            self._upstream = upstream
            self._health = Health(self.fleet, upstream, self.metrics, options.look_seconds)
            bus = self.network.bus if self.network is not None else None
            self._dispatcher = Dispatcher(
                self.fleet,
                upstream,
                Prefixes(upstream, bus, options.deadline_seconds),
                self.metrics,
                self._health.is_well,
                options.prefill_blocks,
            )
            runner = await self._listen()
            await self._keep_up(f"http://{_address(runner)}", runner)

    async def _keep_up(self, url: str, runner: web.AppRunner) -> None:
        """Watch engines and membership until cancelled, and until the last request has ended."""
        async with asyncio.TaskGroup() as tasks:
            background: list[asyncio.Task[None]] = []

            def watch(engine: Engine) -> None:
                background.append(tasks.create_task(self._health.watch(engine)))

            for engine_url, role in self.options.engines:
                watch(self.fleet.fix(engine_url, role))
            if self.network is not None:
                membership = Membership(
                    self.fleet, self.network.directory, self.options.namespace, watch
                )
                background.append(tasks.create_task(membership.follow()))
            try:
                await self._first_look()
                self.on_ready(url, list(self.fleet))
                await asyncio.get_running_loop().create_future()
            finally:
                await self._drain(runner)
                for task in background:
                    task.cancel()

    async def _listen(self) -> web.AppRunner:
        runner = web.AppRunner(
            self._application(),
            handler_cancellation=True,
            shutdown_timeout=self.options.drain_seconds,
            access_log=None,
        )
        await runner.setup()
        try:
            await web.TCPSite(runner, self.options.host, self.options.port).start()
        except OSError as failure:
            await runner.cleanup()
            asked = f"{self.options.host}:{self.options.port}"
            raise SettingError("--port", asked, f"a free one ({failure.strerror})") from None
        return runner

    async def _drain(self, runner: web.AppRunner) -> None:
        """Take no more requests; let those there are come to their end, within the time given."""
        self._stopping = True
        if self._in_flight:
            _log.info("ending %d requests before stopping", self._in_flight)
        await runner.cleanup()

    async def _first_look(self) -> None:
        deadline = asyncio.get_running_loop().time() + self.options.first_look_seconds
        while asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.05)
            engines = list(self.fleet)
            if engines and all(engine.healthy for engine in engines):
                return

    def _application(self) -> web.Application:
        application = web.Application(client_max_size=MAX_REQUEST_BYTES)
        for path in Path:
            application.router.add_post(path, self._answer)
        application.router.add_get("/v1/models", self._models)
        application.router.add_get("/health", self._say_health)
        application.router.add_get("/metrics", self._show_metrics)
        application.router.add_route("*", "/{other:.*}", self._unknown)
        return application

    # -- what clients ask ------------------------------------------------------------------

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        if self._in_flight >= self.options.max_requests or self._stopping:
            self.metrics.rejected.labels("too many").inc()
            return _try_later(f"{self._in_flight} requests are under way")
        self._in_flight += 1
        try:
            asked = prompts.read(Path(request.path), await request.read())
            return await self._dispatcher.answer(asked, request)
        except NotARequest as failure:
            return error(str(failure), "invalid_request_error", 400)
        except web.HTTPRequestEntityTooLarge as failure:
            return error(str(failure.text), "invalid_request_error", 413)
        except NoEngine as failure:
            self.metrics.rejected.labels("no engine").inc()
            return _try_later(str(failure))
        except EngineLost as failure:
            return error(str(failure), "engine_lost", 502)
        except ClientGone:
            if request.transport is not None:
                request.transport.abort()
            return web.Response()  # nobody reads it
        finally:
            self._in_flight -= 1

    async def _models(self, request: web.Request) -> web.StreamResponse:
        engines = self.fleet.usable(ANSWERING)
        if not engines:
            return _try_later("no engine is there")
        headers = asked_headers(request.headers)
        found: dict[str, dict[str, Any]] = {}
        asked = (self._upstream.models(engine, headers) for engine in engines)
        answers = await asyncio.gather(*asked)
        for models in answers:
            for model in models.entries:
                found.setdefault(model["id"], model)
        if not found and answers[0].answer:
            refusal = answers[0]  # that there is no right key, most likely
            return web.Response(
                body=refusal.answer, status=refusal.status, content_type="application/json"
            )
        return web.json_response({"object": "list", "data": list(found.values())})

    async def _say_health(self, _: web.Request) -> web.StreamResponse:
        ready = bool(self.fleet.usable(ANSWERING)) and not self._stopping
        engines = [
            {
                "engine": engine.name,
                "role": engine.role,
                "healthy": engine.healthy,
                "leaving": not engine.listed,
                "running": engine.running,
            }
            for engine in self.fleet
        ]
        body = {"status": "ok" if ready else "stopping" if self._stopping else "no engine"}
        return web.json_response({**body, "engines": engines}, status=200 if ready else 503)

    async def _show_metrics(self, request: web.Request) -> web.StreamResponse:
        page, content_type = self.metrics.page(request.headers.get("Accept", ""))
        return web.Response(body=page, headers={"Content-Type": content_type})

    async def _unknown(self, request: web.Request) -> web.StreamResponse:
        return error(f"{request.method} {request.path} is not routed", "not_found_error", 404)


def _try_later(message: str) -> web.Response:
    headers = {"Retry-After": str(RETRY_AFTER_SECONDS)}
    return error(message, "service_unavailable", 503, headers)


def _address(runner: web.AppRunner) -> str:
    host, port = runner.addresses[0][:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
