"""What a model would write into its KV cache: bytes that depend on every token before them.

A stand-in for the forward pass, whose results can be foretold. The KV of a position is a digest
of the whole prefix up to it (and of the cache salt and LoRA), and the next token is one, too:
whoever computes from a single wrong byte is noticed, and so is whoever loses a token.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

VOCABULARY = 500

Digests = npt.NDArray[np.uint64]
"""One per position."""


class Text:
    """A prompt and the only continuation that this model has for it."""

    def __init__(self, prompt: Sequence[int], salt: str = "", lora: str = "") -> None:
        self.prompt_length = len(prompt)
        self._tokens = list(prompt)
        self._digests: list[int] = []
        self._last = hashlib.blake2b(f"{salt}/{lora}".encode(), digest_size=8).digest()

    def token(self, position: int) -> int:
        """The token at `position`, be it given or generated."""
        while position >= len(self._tokens):
            before = int(self.digests(len(self._tokens))[-1])
            self._tokens.append(before % VOCABULARY)
        return self._tokens[position]

    def generated(self, count: int) -> list[int]:
        """The first `count` tokens after the prompt."""
        return [self.token(self.prompt_length + i) for i in range(count)]

    def digests(self, length: int) -> Digests:
        """Of the first `length` positions."""
        while len(self._digests) < length:
            self._last = _next(self._last, self.token(len(self._digests)))
            self._digests.append(int.from_bytes(self._last, "little"))
        return np.array(self._digests[:length], np.uint64)


@lru_cache(maxsize=1 << 16)
def _next(before: bytes, token: int) -> bytes:
    return hashlib.blake2b(before + token.to_bytes(4, "little"), digest_size=8).digest()
