"""An engine as others write them: what vLLM's server says and does, with no model behind it.

It is other people's software, so it may be played here: the same endpoints, chunks, errors and
hand-over parameters as vLLM's, as slow, ill and mortal as a test wants it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

from aiohttp import web

WORDS = ("one ", "two ", "three ", "four")


class FakeEngine:
    """One engine. Everything a test may turn is a plain attribute."""

    def __init__(self, name: str = "engine", port: int = 0) -> None:
        self.name = name
        self.port = port
        self.asked: list[dict[str, Any]] = []
        """Bodies of all requests for answers, in order."""
        self.headers: list[dict[str, str]] = []
        self.tokenized: list[dict[str, Any]] = []
        self.cancelled = 0
        self.running = 0
        self.most_running = 0
        self.status = 200
        """Anything else is what every request for an answer gets."""
        self.health = 200
        self.hold = asyncio.Event()
        """Answers wait for it before their first byte."""
        self.hold.set()
        self.hold_middle = asyncio.Event()
        """Answers wait for it after the second chunk."""
        self.hold_middle.set()
        self.die_before_first = False
        self.die_after: int | None = None
        """Cut the connection after so many chunks."""
        self.die_within_a_line = False
        self.key = ""
        self.chatter = 0
        """Bytes that it adds to each chunk."""
        self.tokenize_seconds = 0.0
        self.can_tokenize = True
        self.tokens_of: Callable[[str], list[int]] = lambda text: list(text.encode())
        self.models: list[dict[str, Any]] = [{"id": "tiny", "object": "model", "root": "/m/tiny"}]
        self.params: dict[str, Any] | None = {"remote": {"blocks": [1, 2]}}
        """What a prefill gives for the decode engine."""
        self._runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> None:
        application = web.Application(client_max_size=1 << 26)
        application.router.add_get("/health", self._health)
        application.router.add_get("/v1/models", self._models)
        application.router.add_post("/tokenize", self._tokenize)
        application.router.add_post("/v1/chat/completions", self._answer)
        application.router.add_post("/v1/completions", self._answer)
        self._runner = web.AppRunner(
            application, handler_cancellation=True, shutdown_timeout=0.1, access_log=None
        )
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True).start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        """As when its process is killed: all connections end, nobody listens."""
        if self._runner is not None:
            runner, self._runner = self._runner, None
            server = runner.server
            assert server is not None
            for connection in list(server.connections):
                if connection.transport is not None:
                    connection.transport.abort()
            await runner.cleanup()

    async def _health(self, _: web.Request) -> web.Response:
        return web.Response(status=self.health)

    async def _models(self, request: web.Request) -> web.Response:
        if self.key and request.headers.get("Authorization") != f"Bearer {self.key}":
            return web.json_response({"error": "Unauthorized"}, status=401)
        return web.json_response({"object": "list", "data": self.models})

    async def _tokenize(self, request: web.Request) -> web.Response:
        asked = await request.json()
        self.tokenized.append(asked)
        await asyncio.sleep(self.tokenize_seconds)
        if not self.can_tokenize:
            return web.json_response({"error": {"message": "no"}}, status=404)
        text = asked.get("prompt") or "".join(one["content"] for one in asked["messages"])
        tokens = self.tokens_of(text)
        return web.json_response({"count": len(tokens), "max_model_len": 4096, "tokens": tokens})

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        asked = await request.json()
        self.asked.append(asked)
        self.headers.append(dict(request.headers))
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            return await self._say(request, asked)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1

    async def _say(self, request: web.Request, asked: dict[str, Any]) -> web.StreamResponse:
        if self.status != 200:
            return self._error(self.status)
        transport = request.transport
        assert transport is not None
        if asked.get("stream_options") and not asked.get("stream"):
            return self._error(400)
        if not asked.get("stream"):
            await self.hold.wait()
            if self.die_before_first:
                transport.abort()
            return web.json_response(self._whole(asked))
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        await self.hold.wait()
        for number, word in enumerate(WORDS):
            if self.die_before_first or number == self.die_after:
                if self.die_within_a_line:
                    await response.write(b'data: {"choices": [{"del')
                    await asyncio.sleep(0.05)
                transport.abort()
                return response
            if number == 2:
                await self.hold_middle.wait()
            with suppress(ConnectionResetError):
                await response.write(self._chunk(asked, word))
        await response.write(b"data: [DONE]\n\n")
        return response

    def _error(self, status: int) -> web.Response:
        body = {"error": {"message": f"{self.name} says no", "type": "BadRequestError",
                          "param": None, "code": status}}  # fmt: skip
        return web.json_response(body, status=status)

    def _whole(self, asked: dict[str, Any]) -> dict[str, Any]:
        words = WORDS[: asked.get("max_tokens") or len(WORDS)]
        text = "".join(words)
        choice = {"text": text} if "prompt" in asked else {"message": {"content": text}}
        body: dict[str, Any] = {"object": "answer", "choices": [choice], "engine": self.name}
        if (asked.get("kv_transfer_params") or {}).get("do_remote_decode"):
            body["kv_transfer_params"] = self.params
        return body

    def _chunk(self, asked: dict[str, Any], word: str) -> bytes:
        choice = {"text": word} if "prompt" in asked else {"delta": {"content": word}}
        body = {"choices": [choice], "engine": self.name}
        padding = b": " + b"x" * self.chatter + b"\n\n" if self.chatter else b""
        return b"data: " + json.dumps(body).encode() + b"\n\n" + padding


@asynccontextmanager
async def fake_engines(*names: str) -> AsyncIterator[list[FakeEngine]]:
    """So many engines, each on a free port of loopback."""
    engines = [FakeEngine(name) for name in names]
    try:
        for engine in engines:
            await engine.start()
        yield engines
    finally:
        for engine in engines:
            await engine.stop()
