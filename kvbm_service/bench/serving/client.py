"""One question to a served model, over OpenAI's interface, streamed, with the times it took."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from typing import Annotated

import aiohttp
import msgspec

MAX_LINE_BYTES = 1 << 20
"""One event of a stream is never longer; the rest of the answer would be lost otherwise."""


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta = msgspec.field(default_factory=_Delta)


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _Details | None = None


class _Chunk(msgspec.Struct):
    choices: Annotated[list[_Choice], msgspec.Meta(max_length=128)] = []
    usage: _Usage | None = None


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


class Asked(msgspec.Struct, frozen=True):
    """What became of one question. Times in seconds since the benchmark's beginning."""

    user: int
    round: int
    asked_at: float
    first_token_at: float | None = None
    ended_at: float = 0.0
    prompt_tokens: int = 0
    answer_tokens: int = 0
    cached_tokens: int | None = None
    """None: the server does not say (vLLM does with `--enable-prompt-tokens-details`)."""
    error: str = ""


class Server:
    """The model behind `url`. Use it as a context."""

    def __init__(self, url: str, model: str, api_key: str, timeout_seconds: float) -> None:
        self._url = url.rstrip("/").removesuffix("/v1")
        self.model = model
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._session = aiohttp.ClientSession(
            headers=headers,
            timeout=aiohttp.ClientTimeout(total=timeout_seconds),
            connector=aiohttp.TCPConnector(limit=0),
            read_bufsize=MAX_LINE_BYTES,
        )

    async def __aenter__(self) -> Server:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._session.close()

    async def find_model(self) -> str:
        """The first model that the server has, kept for what is asked from now on.

        Raises:
            aiohttp.ClientError, TimeoutError: the server cannot be reached, or refuses.
            msgspec.DecodeError: what answers is no such server.
        """
        async with self._session.get(f"{self._url}/v1/models") as response:
            response.raise_for_status()
            found = msgspec.json.decode(await response.read(), type=_Models)
        if not found.data:
            raise msgspec.DecodeError("the server has no model")
        self.model = found.data[0].id
        return self.model

    async def ask(
        self,
        messages: Sequence[dict[str, str]],
        answer_tokens: int,
        asked: Asked,
        began: float,
    ) -> tuple[str, Asked]:
        """The answer's text, and `asked` with what was measured. Errors stand in its `error`."""
        request = {
            "model": self.model,
            "messages": list(messages),
            "max_tokens": answer_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        text, usage, first_at, error = "", _Usage(), None, ""
        try:
            async with self._session.post(
                f"{self._url}/v1/chat/completions", json=request
            ) as response:
                if response.status != 200:
                    error = f"HTTP {response.status}: {(await response.text())[:200]}"
                else:
                    async for chunk in _chunks(response):
                        if any(_says_something(choice.delta) for choice in chunk.choices):
                            first_at = first_at or time.perf_counter() - began
                            text += chunk.choices[0].delta.content or ""
                        usage = chunk.usage or usage
        except (aiohttp.ClientError, TimeoutError, msgspec.DecodeError, ValueError) as failure:
            error = f"{type(failure).__name__}: {failure}"
        if not error and first_at is None:
            error = "the answer is empty"
        details = usage.prompt_tokens_details
        return text, msgspec.structs.replace(
            asked,
            first_token_at=first_at,
            ended_at=time.perf_counter() - began,
            prompt_tokens=usage.prompt_tokens,
            answer_tokens=usage.completion_tokens,
            cached_tokens=details.cached_tokens if details else None,
            error=error,
        )


def _says_something(delta: _Delta) -> bool:
    return bool(delta.content or delta.reasoning_content)


async def _chunks(response: aiohttp.ClientResponse) -> AsyncIterator[_Chunk]:
    async for line in response.content:
        data = line.strip().removeprefix(b"data:").strip()
        if data and data != b"[DONE]" and line.startswith(b"data:"):
            yield msgspec.json.decode(data, type=_Chunk)
