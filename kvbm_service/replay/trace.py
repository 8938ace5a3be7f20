"""Reads a trace: which request came when, and which blocks it had.

The format is Mooncake's, one JSON object per line: `timestamp` in ms, `hash_ids` (one number
per block; equal numbers mean equal blocks with equal blocks before them), `input_length` and
`output_length` in tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec

from kvbm_schemas.block import HASH_BYTES, BlockHash
from kvbm_service.errors import SettingError

_EXAMPLE = '{"timestamp": 0, "input_length": 700, "output_length": 9, "hash_ids": [0, 1]}'


class _Line(msgspec.Struct):
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: list[int]


class Request(NamedTuple):
    """A request's blocks in order, and when it came, in seconds."""

    seconds: float
    chain: list[BlockHash]


class Trace(NamedTuple):
    """All requests, in the order in which they came."""

    name: str
    requests: list[Request]
    blocks: int
    """How many blocks were asked for."""
    unique_blocks: int

    @classmethod
    def read(cls, path: Path) -> Trace:
        """The trace in this file.

        Raises:
            SettingError: there is none, or a line is not what it should be.
        """
        try:
            lines = path.read_bytes().splitlines()
        except OSError as error:
            allowed = f"a file in Mooncake's jsonl format ({error.strerror})"
            raise SettingError("--trace", str(path), allowed) from None
        return cls.of(path.stem, list(_requests(path, lines)))

    @classmethod
    def of(cls, name: str, requests: list[Request]) -> Trace:
        """These requests, put in order."""
        requests = sorted(requests, key=lambda request: request.seconds)
        blocks = sum(len(request.chain) for request in requests)
        unique = {block for request in requests for block in request.chain}
        return cls(name, requests, blocks, len(unique))

    def slots(self, share: float) -> int:
        """The capacity that is this share of the unique blocks."""
        return max(1, int(self.unique_blocks * share))


def block_name(number: int) -> BlockHash:
    """The name that stands for a number of the trace."""
    return BlockHash(hashlib.blake2b(b"%d" % number, digest_size=HASH_BYTES).digest())


def _requests(path: Path, lines: list[bytes]) -> Iterator[Request]:
    decoder = msgspec.json.Decoder(_Line)
    names: dict[int, BlockHash] = {}
    count = 0
    for number, text in enumerate(lines, 1):
        if not text.strip():
            continue
        try:
            line = decoder.decode(text)
        except msgspec.DecodeError as error:
            raise SettingError("--trace", f"{path}:{number}", f"{error}; like {_EXAMPLE}") from None
        for one in line.hash_ids:
            if one not in names:
                names[one] = block_name(one)
        count += 1
        yield Request(line.timestamp / 1000, [names[one] for one in line.hash_ids])
    if count == 0:
        raise SettingError("--trace", str(path), f"lines like {_EXAMPLE}; it has none")
