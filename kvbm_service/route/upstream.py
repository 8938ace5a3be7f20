"""Talking to engines over HTTP: OpenAI's interface as vLLM serves it."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Annotated, Any, NamedTuple

import aiohttp
import msgspec

from kvbm_service.errors import ClientGone, EngineLost
from kvbm_service.route.fleet import Engine

CONNECT_SECONDS = 5.0
"""How long a connection to an engine may take to be made."""
HEALTH_SECONDS = 5.0
"""How long an engine may take to say that it is well, and what it serves."""
KEEPALIVE_SECONDS = 2.0
"""How long an unused connection is kept: engines close theirs after five."""
MAX_ANSWER_BYTES = 1 << 26
"""An answer that comes in one piece is no longer; a stream may be."""
MAX_MODELS = 4_096
"""Models and adapters of one engine; a longer list is not believed."""

_UNAVAILABLE = frozenset({502, 503, 504})
"""Answers by which an engine, or what stands before it, says that another one be asked."""

_FAILURES = (aiohttp.ClientError, OSError)


class _Models(msgspec.Struct):
    data: Annotated[list[dict[str, Any]], msgspec.Meta(max_length=MAX_MODELS)]


class Models(NamedTuple):
    """What an engine serves: entries with at least an `id`; beside them, all of its answer."""

    entries: tuple[dict[str, Any], ...]
    status: int
    answer: bytes


class _Tokenized(msgspec.Struct):
    tokens: list[int]


class _Prefilled(msgspec.Struct):
    kv_transfer_params: dict[str, Any] | None = None


class Exchange:
    """One request at an engine. Whoever waits for it gives up when the engine is given up, or
    is silent for too long.
    """

    def __init__(self, engine: Engine, idle_seconds: float, patience: asyncio.Timeout) -> None:
        self.engine = engine
        self._idle_seconds = idle_seconds
        self._patience = patience
        self._given_up = False
        self.response: aiohttp.ClientResponse
        self.writing = False
        """Whether the client is the one that is waited for."""

    def goes_on(self) -> None:
        """Something has come, or has been taken."""
        if not self._given_up:
            now = asyncio.get_running_loop().time()
            self._patience.reschedule(now + self._idle_seconds)

    def give_up(self) -> None:
        """Nothing will come any more."""
        self._given_up = True
        if self._patience.when() is not None and not self._patience.expired():
            self._patience.reschedule(asyncio.get_running_loop().time())

    @property
    def why(self) -> str:
        """What to say of an exchange that has run out of patience."""
        if self._given_up:
            return "it does not answer any more"
        return f"it was silent for {self._idle_seconds:g} s"

    async def body(self) -> bytes:
        """All of the answer.

        Raises:
            EngineLost: it is longer than any answer should be.
        """
        parts, size = [], 0
        async for part in self.parts():
            parts.append(part)
            size += len(part)
            if size > MAX_ANSWER_BYTES:
                raise lost(self.engine, f"its answer is longer than {MAX_ANSWER_BYTES} bytes")
        return b"".join(parts)

    async def parts(self) -> AsyncIterator[bytes]:
        """The answer as it comes."""
        async for part in self.response.content.iter_any():
            self.goes_on()
            yield part


class Upstream:
    """All connections to engines. Use it as a context."""

    def __init__(self, idle_seconds: float) -> None:
        self._idle_seconds = idle_seconds
        self._exchanges: defaultdict[Engine, set[Exchange]] = defaultdict(set)
        self._session = aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS),
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_SECONDS),
            auto_decompress=False,
            skip_auto_headers=("User-Agent", "Accept-Encoding"),
        )

    async def __aenter__(self) -> Upstream:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._session.close()

    @asynccontextmanager
    async def post(
        self, engine: Engine, path: str, body: bytes, headers: Mapping[str, str]
    ) -> AsyncIterator[Exchange]:
        """Ask an engine. Leaving the context early cancels the request there.

        Raises:
            EngineLost: it could not be reached, or was lost before the context ended.
            ClientGone: the client was waited for, for too long.
        """
        given = {**headers, "Content-Type": "application/json"}
        exchange: Exchange | None = None
        try:
            async with asyncio.timeout(self._idle_seconds) as patience:
                exchange = Exchange(engine, self._idle_seconds, patience)
                self._exchanges[engine].add(exchange)
                async with self._session.post(
                    engine.url + path, data=body, headers=given
                ) as exchange.response:
                    exchange.goes_on()
                    yield exchange
        except aiohttp.ClientError as error:
            raise lost(engine, _in_words(error)) from None
        except TimeoutError as error:
            if exchange is not None and exchange.writing:
                raise ClientGone("the client takes nothing of its answer") from None
            raise lost(engine, exchange.why if exchange is not None else str(error)) from None
        except OSError as error:
            raise lost(engine, _in_words(error)) from None
        finally:
            if exchange is not None:
                self._exchanges[engine].discard(exchange)
            if not self._exchanges[engine]:
                del self._exchanges[engine]

    def give_up(self, engine: Engine) -> None:
        """Nobody waits for this engine any more."""
        for exchange in self._exchanges.get(engine, ()):
            exchange.give_up()

    async def prefill(
        self, engine: Engine, path: str, body: bytes, headers: Mapping[str, str]
    ) -> tuple[int, dict[str, Any] | None]:
        """Have a prompt computed: the status, and how another engine gets its blocks, if it can.

        Raises:
            EngineLost: as `post`, or it said so itself.
        """
        async with self.post(engine, path, body, headers) as exchange:
            answer, status = await exchange.body(), exchange.response.status
        if is_unavailable(status):
            raise lost(engine, f"HTTP {status}")
        try:
            return status, msgspec.json.decode(answer, type=_Prefilled).kv_transfer_params
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return status, None

    async def tokenize(
        self, engine: Engine, body: Mapping[str, Any], headers: Mapping[str, str]
    ) -> list[int]:
        """The tokens of a prompt.

        Raises:
            EngineLost: they cannot be had there.
        """
        async with self.post(engine, "/tokenize", msgspec.json.encode(body), headers) as exchange:
            answer, status = await exchange.body(), exchange.response.status
        if status != 200:
            raise lost(engine, f"/tokenize: HTTP {status}")
        try:
            return msgspec.json.decode(answer, type=_Tokenized).tokens
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise lost(engine, f"/tokenize: {error}") from None

    async def is_well(self, engine: Engine) -> str:
        """Empty if the engine says that it can serve; else why it does not."""
        try:
            async with (
                asyncio.timeout(HEALTH_SECONDS),
                self._session.get(f"{engine.url}/health") as response,
            ):
                return "" if response.status == 200 else f"HTTP {response.status}"
        except TimeoutError:
            return f"no answer within {HEALTH_SECONDS:g} s"
        except _FAILURES as error:
            return _in_words(error)

    async def models(self, engine: Engine, headers: Mapping[str, str]) -> Models:
        """What an engine serves, or its answer if it does not say so."""
        try:
            async with (
                asyncio.timeout(HEALTH_SECONDS),
                self._session.get(f"{engine.url}/v1/models", headers=headers) as response,
            ):
                answer, status = await response.read(), response.status
            found = msgspec.json.decode(answer, type=_Models).data
        except (TimeoutError, *_FAILURES):
            return Models((), 502, b"")
        except (msgspec.DecodeError, UnicodeDecodeError):
            return Models((), status, answer)
        return Models(
            tuple(model for model in found if isinstance(model.get("id"), str)), status, answer
        )


def is_unavailable(status: int) -> bool:
    """Whether another engine should be asked instead."""
    return status in _UNAVAILABLE


def lost(engine: Engine, why: str) -> EngineLost:
    """What is said of an engine that cannot be had."""
    return EngineLost(f"engine {engine.name}: {why}")


def _in_words(error: Exception) -> str:
    return str(error) or type(error).__name__
