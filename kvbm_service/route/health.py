"""Watching how engines are: those that fail are left alone until they are well again."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from kvbm_service.adapters.route_metrics import RouteMetrics
from kvbm_service.route.fleet import Engine, Fleet
from kvbm_service.route.upstream import Upstream
from kvbm_service.route.vllm_names import Adapter

MODELS_SECONDS = 15.0
"""Between two questions what it serves."""
FAILURES_UNTIL_ILL = 2
"""Looks in a row that fail before an engine gets no more requests: one may get lost."""
FAILURES_UNTIL_GIVEN_UP = 4
"""… before the requests that it has are taken for lost, too."""

_log = logging.getLogger(__name__)


class Health:
    """How the engines of a fleet are."""

    def __init__(
        self, fleet: Fleet, upstream: Upstream, metrics: RouteMetrics, look_seconds: float
    ) -> None:
        self._fleet = fleet
        self._upstream = upstream
        self._metrics = metrics
        self._look_seconds = look_seconds

    async def is_well(self, engine: Engine) -> bool:
        """Look at an engine that has just failed. If it fails again, it gets no more requests."""
        if engine.healthy and (why := await self._upstream.is_well(engine)):
            self._is_ill(engine, why)
        return engine.healthy

    async def watch(self, engine: Engine) -> None:
        """Look at an engine from time to time, until it has left and done what it had begun."""
        failures, models_at, now = 0, 0.0, asyncio.get_running_loop().time
        try:
            while True:
                why = await self._upstream.is_well(engine)
                failures = failures + 1 if why else 0
                if not why and (not engine.healthy or now() >= models_at):
                    await self._learn_models(engine)
                    models_at = now() + MODELS_SECONDS
                self._judge(engine, failures, why)
                if not engine.listed and not engine.running and not engine.healthy:
                    return
                await asyncio.sleep(self._look_seconds)
        finally:
            self._fleet.remove(engine)
            self._metrics.forget(engine.url)

    def _judge(self, engine: Engine, failures: int, why: str) -> None:
        if not why and not engine.healthy:
            engine.healthy = True
            _log.info("engine %s is ready", engine)
        if failures >= FAILURES_UNTIL_ILL and engine.healthy:
            self._is_ill(engine, why)
        if failures == FAILURES_UNTIL_GIVEN_UP:
            self._upstream.give_up(engine)
        self._metrics.healthy.labels(engine.url).set(engine.healthy)

    def _is_ill(self, engine: Engine, why: str) -> None:
        if engine.healthy:
            engine.healthy = False
            engine.recent.forget()
            self._metrics.healthy.labels(engine.url).set(0)
            _log.warning("engine %s gets no requests until it is well again: %s", engine, why)

    async def _learn_models(self, engine: Engine) -> None:
        models = (await self._upstream.models(engine, {})).entries
        if models:
            adapters = {model["id"]: model for model in models if _is_adapter(model)}
            engine.bases = frozenset(model["id"] for model in models) - frozenset(adapters)
            engine.adapters = {
                name: Adapter(name, model["root"]) for name, model in adapters.items()
            }


def _is_adapter(model: dict[str, Any]) -> bool:
    """vLLM lists adapters with the model that they belong to, and their path."""
    return bool(model.get("parent")) and isinstance(model.get("root"), str)
