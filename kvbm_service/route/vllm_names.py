"""What vLLM calls the blocks of a prompt, without vLLM. Pure.

vLLM names a full block by a hash of three things: the name of the block before it, its tokens,
and what else shapes it (the adapter, and in the first block the cache salt). Before the first
block there is a root, the hash of a seed. A hash is SHA-256 over the three, written either as a
pickle or as canonical CBOR; releases differ in how they write what else shapes a block.

How one engine does it is told by a word in its directory record, like

    vllm tagged sha256 vllm-none-hash
"""

from __future__ import annotations

import enum
import hashlib
import pickle
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Self

from kvbm_schemas.block import HASH_BYTES, BlockHash

MAX_NAMED = 4_096
"""Blocks of a prompt that are named; where those behind them are makes no difference any more."""

_ENGINE = "vllm"


class Keys(enum.StrEnum):
    """How a release writes what, beside its tokens, shapes a block."""

    PLAIN = "plain"
    """Until vLLM 0.30: the adapter's name; the salt."""
    TAGGED = "tagged"
    """Since: each with a word before it, and the adapter's path behind its name."""


class Naming(NamedTuple):
    """How an engine names blocks."""

    keys: Keys
    algorithm: str
    seed: str

    def __str__(self) -> str:
        return f"{_ENGINE} {self.keys} {self.algorithm} {self.seed}"

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """Read what `str` has written; None if it is something else, or not known here."""
        engine, _, rest = text.partition(" ")
        words = rest.split(" ", 2)
        if engine != _ENGINE or len(words) != 3:
            return None
        keys, algorithm, seed = words
        if keys not in list(Keys) or algorithm not in ALGORITHMS or not seed:
            return None
        return cls(Keys(keys), algorithm, seed)


class Adapter(NamedTuple):
    """A LoRA adapter as vLLM was told of it."""

    name: str
    path: str


Shape = tuple[object, ...] | None


def block_names(
    naming: Naming,
    block_tokens: int,
    tokens: Sequence[int],
    adapter: Adapter | None = None,
    salt: str = "",
) -> list[BlockHash]:
    """The names of the full blocks that a prompt begins with, `MAX_NAMED` at most."""
    digest = ALGORITHMS[naming.algorithm]
    parent = digest(naming.seed)
    names = []
    for index in range(min(len(tokens) // block_tokens, MAX_NAMED)):
        inside = tuple(tokens[index * block_tokens : (index + 1) * block_tokens])
        shape = _shape(naming.keys, adapter, salt if index == 0 else "")
        parent = digest((parent, inside, shape))
        names.append(BlockHash(parent[:HASH_BYTES]))
    return names


def _shape(keys: Keys, adapter: Adapter | None, salt: str) -> Shape:
    shape: list[object] = []
    tagged = keys is Keys.TAGGED
    if adapter is not None:
        shape.append(("lora", adapter.name, adapter.path) if tagged else adapter.name)
    if salt:
        shape.append(("cache_salt", salt) if tagged else salt)
    return tuple(shape) or None


def _pickled(value: object) -> bytes:
    return hashlib.sha256(pickle.dumps(value, protocol=5)).digest()


def _cbor(value: object) -> bytes:
    return hashlib.sha256(canonical_cbor(value)).digest()


ALGORITHMS: Mapping[str, Callable[[object], bytes]] = {"sha256": _pickled, "sha256_cbor": _cbor}
"""Those that give the same names in every process."""


def canonical_cbor(value: object) -> bytes:
    """RFC 8949's shortest form of what names are made of: None, int ≥ 0, str, bytes, tuple."""
    if value is None:
        return b"\xf6"
    if isinstance(value, int):
        return _cbor_head(0, value)
    if isinstance(value, bytes):
        return _cbor_head(2, len(value)) + value
    if isinstance(value, str):
        text = value.encode()
        return _cbor_head(3, len(text)) + text
    assert isinstance(value, tuple), "names are made of nothing else"
    return _cbor_head(4, len(value)) + b"".join(map(canonical_cbor, value))


def _cbor_head(major: int, number: int) -> bytes:
    if number < 24:
        return bytes([major << 5 | number])
    for size, width in ((24, 1), (25, 2), (26, 4), (27, 8)):
        if number < 1 << 8 * width:
            return bytes([major << 5 | size]) + number.to_bytes(width, "big")
    raise OverflowError(f"{number} is no token")
