"""A small server that speaks OpenAI's interface, for the client: real HTTP, no model behind it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web


class Served:
    """Answers three words to everything, and remembers what it was asked."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.url = ""
        self.refuse: Callable[[dict[str, Any]], bool] = lambda request: False
        self.seconds_to_first_token = 0.0
        self.tells_of_cache = True

    async def models(self, _: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "tiny", "object": "model"}]})

    async def chat(self, request: web.Request) -> web.StreamResponse:
        asked = await request.json()
        self.requests.append(asked)
        if self.refuse(asked):
            return web.json_response({"error": {"message": "too long"}}, status=400)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await self._send(response, {"choices": [{"index": 0, "delta": {"role": "assistant"}}]})
        await asyncio.sleep(self.seconds_to_first_token)
        for word in ("three ", "words ", "said"):
            await self._send(response, {"choices": [{"index": 0, "delta": {"content": word}}]})
        words = sum(len(message["content"].split()) for message in asked["messages"])
        usage: dict[str, Any] = {"prompt_tokens": words, "completion_tokens": 3}
        if self.tells_of_cache:
            usage["prompt_tokens_details"] = {"cached_tokens": words // 2}
        await self._send(response, {"choices": [], "usage": usage})
        await response.write(b"data: [DONE]\n\n")
        return response

    async def _send(self, response: web.StreamResponse, chunk: dict[str, Any]) -> None:
        await response.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")


@asynccontextmanager
async def serving() -> AsyncIterator[Served]:
    """The server, on a free port of loopback."""
    served = Served()
    application = web.Application(client_max_size=1 << 24)
    application.router.add_get("/v1/models", served.models)
    application.router.add_post("/v1/chat/completions", served.chat)
    runner = web.AppRunner(application)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    served.url = f"http://{host}:{port}"
    try:
        yield served
    finally:
        await runner.cleanup()
