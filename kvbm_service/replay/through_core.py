"""Requests on their way through the leader, with an engine and a rank that never fail.

Each request is computed before the next one comes: it is matched, loads what it hits, and
saves the rest. The engine keeps nothing itself, so every hit is one of the leader's tiers.
"""

from __future__ import annotations

from collections.abc import Iterator

from kvbm_schemas.block import BlockHash
from kvbm_schemas.records import RankRecord, SlabRecord
from kvbm_schemas.step import LoadResult, Moved, StepCommands, StepResults
from kvbm_service.core.leader import Leader
from kvbm_service.core.limits import Limits
from kvbm_service.core.pool import Pool
from kvbm_service.core.reads import Hits
from kvbm_service.replay.trace import Request, Trace


def leader_hits(trace: Trace, host_slots: int, disk_slots: int = 0) -> Iterator[Hits]:
    """The hits of each request, by tier."""
    longest = max((len(request.chain) for request in trace.requests), default=1)
    limits = Limits(lookup_seconds=0.0, held_blocks=max(1024, longest))
    leader = Leader([_rank(host_slots, disk_slots)], limits)
    leader.journal.begin(1, empty=True)
    for number, request in enumerate(trace.requests):
        if request.chain:
            yield _run(leader, f"request-{number}", request)
    leader.check_integrity()


def pool_hits(trace: Trace, pool: Pool) -> Iterator[int]:
    """The hits of each request, with a pool alone: as `leader_hits` with the host tier only."""
    for fill, request in enumerate(trace.requests, 1):
        pool.use(request.chain, request.seconds)
        yield pool.match(request.chain)
        pool.commit(pool.reserve(request.chain, fill).slots)


def _run(leader: Leader, name: str, request: Request) -> Hits:
    chain, now = request.chain, request.seconds
    leader.arrive(name, list(chain), now)
    found = leader.match(name, 0, now)
    assert found is not None, "without other nodes every answer is immediate"
    if found:
        leader.load(name, 0, range(found), now)
        _obey(leader, now)
    hits = leader.hits(name) if found else Hits()
    _save(leader, name, chain, now)
    leader.finish(name)
    leader.take_effects()
    leader.take_accounts()
    return hits


def _save(leader: Leader, name: str, chain: list[BlockHash], now: float) -> None:
    leader.store(chain, range(len(chain)), request=name)
    _obey(leader, now)


def _obey(leader: Leader, now: float) -> None:
    """Do what the leader wants until it wants nothing more."""
    while True:
        commands = leader.take_commands(now)
        results = _results(commands)
        if not results.moved and not results.loads:
            break
        leader.report(results, now)
    leader.take_freed_blocks()


def _results(commands: StepCommands) -> StepResults:
    ops = (
        *(save.op for save in commands.saves),
        *(spill.op for spill in commands.spills),
        *(fetch.op for fetch in commands.fetches),
    )
    return StepResults(
        rank=0,
        moved=tuple(Moved(op=op) for op in ops),
        loads=tuple(LoadResult(op=load.op, request=load.request) for load in commands.loads),
    )


def _rank(host_slots: int, disk_slots: int) -> RankRecord:
    slab = SlabRecord(base=0, headers=0, slots=host_slots, slot_bytes=64, header_bytes=32)
    return RankRecord(
        node="replay",
        rank=0,
        world_size=1,
        agent="replay",
        agent_metadata=b"",
        slab=slab,
        disk_slots=disk_slots,
    )
