"""What blocks are called under TensorRT-LLM: a chained SHA-256 of all that their bytes depend on.

TensorRT-LLM's own block hashes are not used: they have 64 bits and can be made to collide, and it
tells them only when a block is there, not when one is looked for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from kvbm_schemas.block import HASH_BYTES, BlockHash

NOT_IN_NAMES = (
    "multimodal_hashes",
    "multimodal_positions",
    "multimodal_embedding",
    "prompt_embedding_table",
    "py_multimodal_data",
    "encoder_tokens",
)
"""Inputs of a request that its tokens do not tell of."""


class NameChain:
    """The names of one request's full blocks, as its tokens become known."""

    def __init__(self, root: bytes, block_tokens: int) -> None:
        self.names: list[BlockHash] = []
        self.tokens = 0
        """How many tokens are known."""
        self._block_tokens = block_tokens
        self._parent = root
        self._begun: list[int] = []
        """Tokens of the block that is not full yet."""

    def extend(self, tokens: Sequence[int]) -> None:
        """These tokens come next."""
        self.tokens += len(tokens)
        self._begun.extend(tokens)
        whole = len(self._begun) // self._block_tokens * self._block_tokens
        blocks = np.array(self._begun[:whole], dtype="<i8").reshape(-1, self._block_tokens)
        for block in blocks:
            self._parent = hashlib.sha256(self._parent + block.tobytes()).digest()
            self.names.append(BlockHash(self._parent[:HASH_BYTES]))
        del self._begun[:whole]


def root_of(request: Any, instance: str) -> bytes | None:
    """What a request's blocks depend on beside its tokens; None: on more than can be named.

    The numbers of LoRA adapters are the engine's own, so blocks that one has shaped are named for
    this life of the engine (`instance`) alone.
    """
    if any(getattr(request, field, None) is not None for field in NOT_IN_NAMES):
        return None
    lora = getattr(request, "lora_task_id", None)
    described = [
        "kvbm trtllm 1",
        salt_of(request),
        None if lora is None else [str(lora), instance],
    ]
    return hashlib.sha256(msgspec.json.encode(described)).digest()


def salt_of(request: Any) -> list[str | None]:
    """What a request may share blocks by, as the releases of TensorRT-LLM call it."""
    salts = (getattr(request, field, None) for field in ("cache_salt", "cache_salt_id"))
    return [None if salt is None else str(salt) for salt in salts]
