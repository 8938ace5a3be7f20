"""Sending a prompt to an engine, and to another one when that is lost."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from kvbm_service.adapters.route_metrics import Outcome, RouteMetrics
from kvbm_service.errors import EngineLost, NoEngine
from kvbm_service.route import prompts, relay
from kvbm_service.route.choice import Candidate, choose, fresh
from kvbm_service.route.fleet import ANSWERING, PREFILLING, Engine, Fleet, Role
from kvbm_service.route.prefixes import Known, Prefixes
from kvbm_service.route.prompts import Asked
from kvbm_service.route.upstream import Upstream, is_unavailable, lost

MAX_TRIES = 3
"""Engines that one request is sent to: a request that kills engines must not kill all of them."""
MAX_PREFILL_TRIES = 2
"""Prefill engines that one prompt is sent to; then the decode engine computes it."""
USUAL_BLOCK_TOKENS = 16
"""Tokens per block where the engine does not say."""

IsWell = Callable[[Engine], Awaitable[bool]]


class Unavailable(EngineLost):
    """An engine says itself that it cannot serve; `response` is how."""

    def __init__(self, message: str, response: web.Response) -> None:
        super().__init__(message)
        self.response = response


@dataclass(eq=False)
class Load:
    """One request's part of what an engine has to do."""

    engine: Engine
    tokens: int = 0

    def expect(self, tokens: int) -> None:
        """So much of the prompt is to be computed there."""
        self.engine.ahead += tokens - self.tokens
        self.tokens = tokens

    def computed(self) -> None:
        """The prompt has been."""
        self.expect(0)


class Dispatcher:
    """Sends prompts to the engines of a fleet."""

    def __init__(
        self,
        fleet: Fleet,
        upstream: Upstream,
        prefixes: Prefixes,
        metrics: RouteMetrics,
        is_well: IsWell,
        prefill_blocks: int,
    ) -> None:
        self._fleet = fleet
        self._upstream = upstream
        self._prefixes = prefixes
        self._metrics = metrics
        self._is_well = is_well
        self._prefill_blocks = prefill_blocks

    async def answer(self, asked: Asked, request: web.Request) -> web.StreamResponse:
        """Have a request answered by whichever engine is best.

        Raises:
            NoEngine: there is none.
            EngineLost: those that were tried are lost; nothing has been sent to the client.
            ClientGone: nobody waits for the answer any more.
        """
        headers = relay.asked_headers(request.headers)
        began = asyncio.get_running_loop().time()
        known = await self._find_out(asked, headers)
        left_out: set[Engine] = set()
        failure: EngineLost | None = None
        for _ in range(MAX_TRIES):
            usable = self._fleet.usable(ANSWERING, asked.model)
            engines = [engine for engine in usable if engine not in left_out]
            if not engines:
                break
            engine = self._choose(ANSWERING, engines, known)
            if failure is not None:
                self._metrics.retries.inc()
            try:
                return await self._at(engine, asked, known, request, headers, began)
            except Unavailable as error:
                failure = error
                left_out.add(engine)
            except EngineLost as error:
                failure = error
                if not await self._is_well(engine):
                    left_out.add(engine)
        if isinstance(failure, Unavailable):
            return failure.response
        raise failure or NoEngine("no engine is there to answer; try again soon")

    async def _find_out(self, asked: Asked, headers: Mapping[str, str]) -> Known:
        engines = self._fleet.usable(ANSWERING | PREFILLING, asked.model)
        with self._metrics.lookup_seconds.time():
            return await self._prefixes.of(asked, engines, headers)

    def _choose(self, roles: frozenset[Role], engines: Sequence[Engine], known: Known) -> Engine:
        candidates = [known.candidate(engine) for engine in engines]
        return engines[choose(candidates, known.tokens, self._fleet.turn(roles))]

    async def _at(
        self,
        engine: Engine,
        asked: Asked,
        known: Known,
        request: web.Request,
        headers: Mapping[str, str],
        began: float,
    ) -> web.StreamResponse:
        candidate = self._note_prefix(engine, known)
        with self._load(engine) as load:
            params = None
            if self._wants_prefill(engine, asked, known, candidate):
                params = await self._prefilled(asked, known, headers)
            if params is None:
                load.expect(fresh(candidate, known.tokens))
                body = prompts.whole(asked)
            else:
                body = prompts.decode(asked, params)
            with self._counted(engine) as outcome:
                stream = relay.Stream(request)
                try:
                    async with self._upstream.post(engine, asked.path, body, headers) as exchange:
                        if is_unavailable(exchange.response.status):
                            why = lost(engine, f"HTTP {exchange.response.status}")
                            raise Unavailable(str(why), await relay.in_one_piece(exchange))
                        if exchange.response.status >= 400:
                            outcome.append(Outcome.REFUSED)
                        if not relay.is_stream(exchange):
                            return await relay.in_one_piece(exchange)
                        await stream.forward(exchange, lambda: self._began(load, began))
                except EngineLost as error:
                    if stream.response is None:
                        raise
                    outcome.append(Outcome.LOST)
                    await stream.fail(str(error))
                assert stream.response is not None
                return stream.response

    def _began(self, load: Load, began: float) -> None:
        """The first byte of an answer is there: its prompt has been computed."""
        load.computed()
        now = asyncio.get_running_loop().time()
        self._metrics.first_byte_seconds.observe(now - began)

    def _note_prefix(self, engine: Engine, known: Known) -> Candidate:
        """What the engine has of the prompt; from now on, all of it."""
        chain, candidate = known.chain(engine), known.candidate(engine)
        if chain is not None:
            held = max(candidate.device, candidate.own)
            self._metrics.prefix_blocks.observe(held // chain.block_tokens)
            engine.recent.sent(chain.names)
        return candidate

    # -- prefill elsewhere -----------------------------------------------------------------

    def _wants_prefill(
        self, engine: Engine, asked: Asked, known: Known, candidate: Candidate
    ) -> bool:
        """Whether the prompt's blocks had better be computed elsewhere."""
        if engine.role is not Role.DECODE or not asked.single:
            return False
        record = engine.record
        block_tokens = (record.block_tokens if record is not None else 0) or USUAL_BLOCK_TOKENS
        missing = known.tokens - max(candidate.device, candidate.own)
        worth_it = missing >= self._prefill_blocks * block_tokens
        if not worth_it:
            self._metrics.prefills.labels("not worth it").inc()
        return worth_it

    async def _prefilled(
        self, asked: Asked, known: Known, headers: Mapping[str, str]
    ) -> dict[str, Any] | None:
        """How a decode engine gets a prompt's blocks from a prefill engine; None: it has to
        compute them.
        """
        left_out: set[Engine] = set()
        for _ in range(MAX_PREFILL_TRIES):
            usable = self._fleet.usable(PREFILLING, asked.model)
            engines = [one for one in usable if one not in left_out]
            if not engines:
                break
            prefiller = self._choose(PREFILLING, engines, known)
            params, status = await self._prefill_at(prefiller, asked, known, headers)
            if params:
                self._metrics.prefills.labels("done").inc()
                return params
            if 400 <= status < 500:
                break  # the decode engine is going to say the same to the client
            left_out.add(prefiller)
        self._metrics.prefills.labels("failed" if left_out else "no engine").inc()
        return None

    async def _prefill_at(
        self, engine: Engine, asked: Asked, known: Known, headers: Mapping[str, str]
    ) -> tuple[dict[str, Any] | None, int]:
        candidate = self._note_prefix(engine, known)
        with self._load(engine) as load, self._counted(engine) as outcome:
            load.expect(fresh(candidate, known.tokens))
            try:
                status, params = await self._upstream.prefill(
                    engine, asked.path, prompts.prefill(asked), headers
                )
            except EngineLost:
                outcome.append(Outcome.LOST)
                await self._is_well(engine)
                return None, 0
            if status >= 400:
                outcome.append(Outcome.REFUSED)
            return params, status

    # -- accounts --------------------------------------------------------------------------

    @contextmanager
    def _load(self, engine: Engine) -> Iterator[Load]:
        engine.running += 1
        in_flight = self._metrics.in_flight.labels(engine.url)
        in_flight.inc()
        load = Load(engine)
        try:
            yield load
        finally:
            load.computed()
            engine.running -= 1
            in_flight.dec()

    @contextmanager
    def _counted(self, engine: Engine) -> Iterator[list[Outcome]]:
        """Counts a request; what is put into the list first is what came of it."""
        outcome: list[Outcome] = []
        try:
            yield outcome
            outcome.append(Outcome.ANSWERED)
        except EngineLost:
            outcome.append(Outcome.LOST)
            raise
        finally:
            ended = (*outcome, Outcome.CANCELLED)[0]
            self._metrics.requests.labels(engine.url, engine.role, ended).inc()
