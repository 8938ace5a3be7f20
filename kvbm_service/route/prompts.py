"""What a request says, as far as routing goes, and the requests that are made of it. Pure."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

import msgspec

BYTES_PER_TOKEN = 4
"""A guess, for prompts that nobody has tokenised."""

_RENDERING = (
    "model",
    "messages",
    "prompt",
    "add_generation_prompt",
    "add_special_tokens",
    "continue_final_message",
    "chat_template",
    "chat_template_kwargs",
    "tools",
)
"""Of a request, what decides on its tokens: vLLM's `/tokenize` takes the same fields."""

_TEMPLATE_WORDS = ("documents", "reasoning_effort")
"""Fields of a chat that vLLM hands to the chat template, too."""

_ANSWERING = (
    "stream_options",
    "max_completion_tokens",
    "min_tokens",
    "best_of",
    "kv_transfer_params",
)
"""Fields that make no sense where only the prompt is computed."""


class Path(enum.StrEnum):
    """Where prompts are posted."""

    CHAT = "/v1/chat/completions"
    COMPLETION = "/v1/completions"


class NotARequest(ValueError):
    """The client sent something that no engine would understand."""


@dataclass(frozen=True)
class Asked:
    """A client's request."""

    path: Path
    raw: bytes
    body: dict[str, Any]
    tokens: list[int] | None
    """The prompt, where the client gave it as token ids."""
    tokenize: dict[str, Any] | None
    """What to post to `/tokenize` to have them; None: there is no need, or no way."""
    single: bool
    """One prompt, and one answer that is sampled as it comes."""

    @property
    def model(self) -> str:
        """What the client calls it; empty: whatever there is."""
        return _text(self.body.get("model"))

    @property
    def salt(self) -> str:
        """Who may share blocks with this prompt."""
        return _text(self.body.get("cache_salt"))

    @property
    def guessed_tokens(self) -> int:
        """About how long the prompt is."""
        if self.tokens is not None:
            return len(self.tokens)
        return len(self.raw) // BYTES_PER_TOKEN


def read(path: Path, raw: bytes) -> Asked:
    """Understand a request.

    Raises:
        NotARequest: it is no JSON object.
    """
    try:
        body = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise NotARequest(f"the body is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise NotARequest("the body is not a JSON object")
    prompt = body.get("messages" if path is Path.CHAT else "prompt")
    single = not body.get("use_beam_search") and (
        path is Path.CHAT or isinstance(prompt, str) or _are_tokens(prompt)
    )
    # What the engine truncates, or gets as an embedding, has other tokens than /tokenize says.
    plain = single and not body.get("truncate_prompt_tokens") and not body.get("prompt_embeds")
    tokens = prompt if plain and path is Path.COMPLETION and _are_tokens(prompt) else None
    words = plain and tokens is None and (isinstance(prompt, str) or _is_text_only(prompt))
    return Asked(path, raw, body, tokens, _rendering(body) if words else None, single)


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _are_tokens(prompt: object) -> bool:
    return isinstance(prompt, list) and bool(prompt) and all(type(one) is int for one in prompt)


def _is_text_only(messages: object) -> bool:
    """Whether nothing but text is in a chat: images shape blocks in ways not known here."""
    if not isinstance(messages, list):
        return False
    for message in messages:
        content = message.get("content") if isinstance(message, dict) else None
        parts = content if isinstance(content, list) else ()
        if any(not isinstance(part, dict) or part.get("type") != "text" for part in parts):
            return False
    return True


def _rendering(body: dict[str, Any]) -> dict[str, Any]:
    asked = {name: body[name] for name in _RENDERING if body.get(name) is not None}
    words = {name: body[name] for name in _TEMPLATE_WORDS if body.get(name) is not None}
    given = asked.get("chat_template_kwargs")
    if words:
        asked["chat_template_kwargs"] = {**words, **(given if isinstance(given, dict) else {})}
    return asked


def whole(asked: Asked) -> bytes:
    """The request as an engine gets it that does all of it: as the client sent it.

    What engines tell each other about KV is not for clients to say.
    """
    if "kv_transfer_params" not in asked.body:
        return asked.raw
    body = {name: value for name, value in asked.body.items() if name != "kv_transfer_params"}
    return msgspec.json.encode(body)


def prefill(asked: Asked) -> bytes:
    """The same prompt, for an engine that computes it and keeps its blocks for another one."""
    body = {name: value for name, value in asked.body.items() if name not in _ANSWERING}
    body |= {"stream": False, "n": 1, "max_tokens": 1}
    if asked.path is Path.CHAT:
        body["max_completion_tokens"] = 1
    body["kv_transfer_params"] = {"do_remote_decode": True}
    return msgspec.json.encode(body)


def decode(asked: Asked, params: dict[str, Any]) -> bytes:
    """The request, for the engine that is to fetch its blocks as `params` say."""
    return msgspec.json.encode({**asked.body, "kv_transfer_params": params})
