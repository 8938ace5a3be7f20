"""What the service costs the engine's own threads, per block."""

from __future__ import annotations

import asyncio
import secrets
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import msgspec

from kvbm_schemas.block import BlockHash
from kvbm_schemas.records import RankRecord, SlabRecord
from kvbm_schemas.step import LoadResult, Moved, StepCommands, StepResults
from kvbm_schemas.subjects import Scope
from kvbm_service.bench.row import Row
from kvbm_service.leader_service import LeaderService
from kvbm_service.network import Network
from kvbm_service.settings import Settings

BLOCKS = 256
"""Blocks per request: 8 192 tokens in blocks of 32."""
ROUNDS = 200

M = TypeVar("M")


def rows() -> list[Row]:
    """Matching, saving and loading as the scheduler's thread sees them.

    Saving and loading include what rides the step channel: commands and results are
    serialised and read back once, as between an engine's processes. The yardstick is the
    least that Python can do per block: look a name up in a dictionary and append a number.
    """
    saves, loads, matches, floors = [], [], [], []
    device_blocks = list(range(BLOCKS))
    with _leader() as leader:
        for number in range(ROUNDS):
            request = f"request-{number}"
            chain = [BlockHash(secrets.token_bytes(16)) for _ in range(BLOCKS)]
            known = dict.fromkeys(chain, 1)
            floors.append(_seconds(_floor, chain, known))
            saves.append(_seconds(_save, leader, request, chain, device_blocks))
            leader.arrive(request, chain)
            matches.append(_seconds(leader.match, request, 0))
            loads.append(_seconds(_load, leader, request, device_blocks))
            leader.finish(request)
    floor = statistics.median(floors)
    least = "a dict lookup and an append per block"

    def row(name: str, samples: list[float], scale: float) -> Row:
        value, yardstick = statistics.median(samples) * scale, floor * scale
        return Row(name, value, "us", least, yardstick, value / yardstick)

    return [
        row("caller_us_per_block_save", saves, 1e6 / BLOCKS),
        row("caller_us_per_block_load", loads, 1e6 / BLOCKS),
        row("match_256", matches, 1e6),
    ]


def _seconds(call: Callable[..., object], *arguments: object) -> float:
    began = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - began


def _floor(chain: list[BlockHash], known: dict[BlockHash, int]) -> list[int]:
    found = []
    for block in chain:
        if block in known:
            found.append(known[block])  # noqa: PERF401
    return found


def _save(
    leader: LeaderService, request: str, chain: list[BlockHash], device_blocks: list[int]
) -> None:
    leader.store(request, None, chain, device_blocks)
    commands = _across(leader.take_commands(), StepCommands)
    moved = tuple(Moved(op=save.op) for save in commands.saves)
    leader.report([_across(StepResults(rank=0, moved=moved), StepResults)])


def _load(leader: LeaderService, request: str, device_blocks: list[int]) -> None:
    leader.load(request, 0, device_blocks)
    commands = _across(leader.take_commands(), StepCommands)
    loads = tuple(LoadResult(op=load.op, request=load.request) for load in commands.loads)
    leader.report([_across(StepResults(rank=0, loads=loads), StepResults)])


def _across(message: msgspec.Struct, kind: type[M]) -> M:
    return msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=kind)


@contextmanager
def _leader() -> Iterator[LeaderService]:
    """A leader of one rank that never finds a network."""

    async def nowhere() -> Network:
        await asyncio.Event().wait()
        raise AssertionError("nothing sets this event")

    leader = LeaderService(Settings(), Scope("bench", "bench"), "bench", 1, nowhere)
    leader.attach(
        RankRecord(
            node="bench",
            rank=0,
            world_size=1,
            agent="bench",
            agent_metadata=b"",
            slab=SlabRecord(
                base=0, headers=0, slots=8 * BLOCKS, slot_bytes=1 << 20, header_bytes=32
            ),
            device_blocks=4 * BLOCKS,
        )
    )
    leader.start()
    try:
        yield leader
    finally:
        leader.close()
