"""How fast the registry's core is, beside a bare dictionary of 64-bit integers.

Both apply the same events and answer the same lookups, in one thread: the registry from
messages as they come off the wire, packed, the dictionary from lists of integers that are
there already. The dictionary maps a name to a bit per holder, and its lookup walks a chain
while someone has all of it: the least that Python can do, and with half the name's bits.
"""

from __future__ import annotations

import secrets
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import numpy as np

from kvbm_schemas.block import HASH_BYTES, Tier
from kvbm_schemas.codec import Decoder, encode
from kvbm_schemas.events import Stored
from kvbm_schemas.subjects import Scope
from kvbm_service.bench.row import Row
from kvbm_service.core.block_index import compile_now
from kvbm_service.core.registry import Registry

BLOCKS = 1 << 20
BATCHES = (16, 64, 512)
"""Blocks per event: all sizes are applied in turn, a third of the blocks each."""
HOLDERS = 8
LOOKUPS = 4_000
ROUNDS = 3

SCOPE = Scope("bench", "bench")
YARDSTICK = "a dict of 64-bit ints"


def rows() -> list[Row]:
    """Events applied, keys looked up, and memory per block."""
    compile_now()
    names = secrets.token_bytes(BLOCKS * HASH_BYTES)
    numbers = np.frombuffer(names, np.uint64)[::2].tolist()
    payloads, lists = _events(names, numbers)
    registry, known = _registry(), dict[int, int]()
    applied = [_rates(payloads, lists) for _ in range(ROUNDS)]
    _apply(registry, "n0", payloads)
    _apply_to(known, 0, lists)
    one = (registry.bytes_held / BLOCKS, _dict_bytes(known) / BLOCKS)
    for holder in range(1, HOLDERS):
        _apply(registry, f"n{holder}", payloads)
        _apply_to(known, holder, lists)
    eight = (registry.bytes_held / BLOCKS, _dict_bytes(known) / BLOCKS)
    assert (registry.blocks, registry.copies) == (BLOCKS, BLOCKS * HOLDERS)
    rows = [_row("registry_apply", "blocks/s", applied)]
    for length, name in ((64, "registry_lookup"), (512, "registry_lookup_512")):
        looked = [_lookups(registry, known, names, numbers, length) for _ in range(ROUNDS)]
        rows.append(_row(name, "keys/s", looked))
    rows.append(_row("registry_bytes_per_block", "B", [one]))
    rows.append(_row(f"registry_bytes_per_block_{HOLDERS}_holders", "B", [eight]))
    return rows


def _row(name: str, unit: str, pairs: list[tuple[float, float]]) -> Row:
    value = statistics.median(ours for ours, _ in pairs)
    yardstick = statistics.median(theirs for _, theirs in pairs)
    return Row(name, value, unit, YARDSTICK, yardstick, value / yardstick)


def _registry() -> Registry:
    """A registry that knows the nodes, all live at their first event."""
    registry = Registry(seed=secrets.randbits(64))
    for holder in range(HOLDERS):
        registry.joined(SCOPE, f"n{holder}", 1, now=0.0)
    return registry


def _events(names: bytes, numbers: list[int]) -> tuple[list[bytes], list[list[int]]]:
    """The same blocks as event payloads and as lists of integers."""
    payloads: list[bytes] = []
    lists: list[list[int]] = []
    at = 0
    for part, size in enumerate(BATCHES, start=1):
        end = BLOCKS * part // len(BATCHES)
        while at < end:
            to = min(at + size, end)
            hashes = names[at * HASH_BYTES : to * HASH_BYTES]
            event = Stored(epoch=1, seq=len(lists) + 1, tier=Tier.HOST, hashes=hashes)
            payloads.append(encode(event))
            lists.append(numbers[at:to])
            at = to
    return payloads, lists


def _apply(registry: Registry, node: str, payloads: list[bytes]) -> None:
    decode = Decoder(Stored).decode
    for payload in payloads:
        registry.event(SCOPE, node, decode(payload), 0.0)


def _apply_to(known: dict[int, int], holder: int, lists: list[list[int]]) -> None:
    bit = 1 << holder
    for batch in lists:
        for number in batch:
            known[number] = known.get(number, 0) | bit


def _rates(payloads: list[bytes], lists: list[list[int]]) -> tuple[float, float]:
    """Blocks per second into an empty registry, and into an empty dictionary."""
    ours = _seconds(partial(_apply, _registry(), "n0", payloads))
    return BLOCKS / ours, BLOCKS / _seconds(partial(_apply_to, {}, 0, lists))


def _lookups(
    registry: Registry, known: dict[int, int], names: bytes, numbers: list[int], length: int
) -> tuple[float, float]:
    """Keys per second, in whole chains of `length` in random order."""
    starts = [secrets.randbelow(BLOCKS // length) * length for _ in range(LOOKUPS)]
    chains = [names[at * HASH_BYTES : (at + length) * HASH_BYTES] for at in starts]
    assert sum(part.count for part in registry.lookup(SCOPE, chains[0])) == length

    def ours() -> None:
        for chain in chains:
            registry.lookup(SCOPE, chain)

    lists = [numbers[at : at + length] for at in starts]

    def theirs() -> None:
        for chain in lists:
            _longest(known, chain)

    keys = LOOKUPS * length
    return keys / _seconds(ours), keys / _seconds(theirs)


def _longest(known: dict[int, int], chain: list[int]) -> int:
    """How many blocks of a chain some holder has from its head."""
    common = -1
    for at, number in enumerate(chain):
        common &= known.get(number, 0)
        if not common:
            return at
    return len(chain)


def _dict_bytes(known: dict[int, int]) -> int:
    """A dictionary with its keys; its values are small integers that everyone shares."""
    return sys.getsizeof(known) + len(known) * sys.getsizeof(next(iter(known)))


def _seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began
