"""What is said between a program and the engine it started: one JSON message per line."""

from __future__ import annotations

from typing import Any

import msgspec


class Line(msgspec.Struct, frozen=True, tag=True):
    """Base of both directions. `id` ties an answer to what was asked."""

    id: int


class Ask(Line, frozen=True):
    """Answer a prompt, greedily, with exactly `max_tokens` tokens."""

    prompt: list[int]
    max_tokens: int
    cache_salt: str | None = None
    kv_transfer_params: dict[str, Any] | None = None


class Abort(Line, frozen=True):
    """Stop working on the `Ask` with this id; it is then refused."""


class Reset(Line, frozen=True):
    """Forget the device pool's prefix cache (and, if `connector`, the connector's too)."""

    connector: bool = False


class Call(Line, frozen=True):
    """Call a method of every rank's worker."""

    method: str
    arguments: list[Any]


class Stop(Line, frozen=True):
    """Shut down cleanly."""


class Stage(Line, frozen=True):
    """How far the start has come. `ready`: the last of them."""

    what: str
    ready: bool = False


class Answer(Line, frozen=True):
    """The answer to `Ask`."""

    tokens: list[int]
    logprobs: list[float]
    """Of each token of the answer."""
    cached_tokens: int
    """Prompt tokens that were not computed, wherever their KV came from."""
    ttft_seconds: float
    """From the question to the first token, as the engine's front end saw it."""
    seconds: float
    """From the question to the last token."""
    kv_transfer_params: dict[str, Any] | None = None
    """What an engine that goes on with the request has to be told, if one is to."""


class Done(Line, frozen=True):
    """The answer to `Reset` and `Call`."""

    result: Any = None


class Refused(Line, frozen=True):
    """What was asked went wrong; the engine may live on."""

    error: str


ToEngine = Ask | Abort | Reset | Call | Stop
FromEngine = Stage | Answer | Done | Refused
