"""One answer on its way from an engine to a client."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

import aiohttp
import msgspec
from aiohttp import web

from kvbm_service.errors import ClientGone
from kvbm_service.route.upstream import Exchange

MAX_LINE_BYTES = 1 << 20
"""What a stream's line may have before it is sent on unfinished."""

LAST_WORD_SECONDS = 5.0
"""How long a client may take to be told that its engine is lost."""

ENGINE_HEADER = "X-KVBM-Engine"
"""Says which engine has answered."""

_ONE_HOP = frozenset({
    "connection", "content-encoding", "content-length", "date", "keep-alive", "proxy-authenticate",
    "proxy-authorization", "server", "te", "trailer", "transfer-encoding", "upgrade",
})  # fmt: skip
_NOT_ASKED = _ONE_HOP | {"accept-encoding", "content-type", "expect", "host", "cookie"}


def asked_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """Of a client's headers, those that an engine gets: who asks, tracing, …"""
    return {name: value for name, value in headers.items() if name.lower() not in _NOT_ASKED}


def _answered_headers(exchange: Exchange) -> dict[str, str]:
    given = exchange.response.headers.items()
    kept = {name: value for name, value in given if name.lower() not in _ONE_HOP}
    return {**kept, ENGINE_HEADER: exchange.engine.name}


def error_body(message: str, kind: str, status: int) -> dict[str, Any]:
    """An error as OpenAI's interface has them."""
    return {"error": {"message": message, "type": kind, "param": None, "code": status}}


def error(
    message: str, kind: str, status: int, headers: Mapping[str, str] | None = None
) -> web.Response:
    """The same as an answer."""
    body = msgspec.json.encode(error_body(message, kind, status))
    return web.Response(body=body, status=status, headers=headers, content_type="application/json")


def is_stream(exchange: Exchange) -> bool:
    """Whether the engine answers bit by bit."""
    return exchange.response.content_type == "text/event-stream"


async def in_one_piece(exchange: Exchange) -> web.Response:
    """The whole answer, whatever it is, as the engine gave it."""
    body = await exchange.body()
    return web.Response(
        body=body, status=exchange.response.status, headers=_answered_headers(exchange)
    )


class Stream:
    """An answer that the client sees as it comes. Whole lines only: so what is added when an
    engine dies in the middle of one is understood.
    """

    def __init__(self, request: web.Request) -> None:
        self._request = request
        self._unsent = b""
        self.response: web.StreamResponse | None = None
        """There as soon as the client has got a byte, from when on nobody else can answer."""

    async def forward(self, exchange: Exchange, on_first: Callable[[], None]) -> None:
        """Send on what comes, to its end. `on_first` hears of the first of it.

        Raises:
            ClientGone: the client takes nothing more.
        """
        async for part in exchange.parts():
            lines, newline, rest = (self._unsent + part).rpartition(b"\n")
            self._unsent = rest
            if len(rest) > MAX_LINE_BYTES:
                lines, self._unsent = lines + newline + rest, b""
                newline = b""
            if lines or newline:
                if self.response is None:
                    on_first()
                await self._send(exchange, lines + newline)
        if self._unsent or self.response is None:
            await self._send(exchange, self._unsent)
        await self._end()

    async def fail(self, message: str) -> web.StreamResponse:
        """Say that this is not the whole answer, and end."""
        assert self.response is not None
        event = msgspec.json.encode(error_body(message, "engine_lost", 502))
        try:
            async with asyncio.timeout(LAST_WORD_SECONDS):
                await self.response.write(b"data: " + event + b"\n\n")
                await self._end()
        except (aiohttp.ClientError, ConnectionError, TimeoutError) as error:
            raise ClientGone from error
        return self.response

    async def _send(self, exchange: Exchange, data: bytes) -> None:
        exchange.writing = True
        try:
            if self.response is None:
                response = web.StreamResponse(
                    status=exchange.response.status, headers=_answered_headers(exchange)
                )
                await response.prepare(self._request)
                self.response = response
            await self.response.write(data)
        except (aiohttp.ClientError, ConnectionError) as error:
            raise ClientGone from error
        exchange.writing = False
        exchange.goes_on()

    async def _end(self) -> None:
        assert self.response is not None
        try:
            await self.response.write_eof()
        except (aiohttp.ClientError, ConnectionError) as error:
            raise ClientGone from error
