"""Small things that the core's tests are built from."""

from __future__ import annotations

import hashlib
from typing import TypeVar

from kvbm_schemas import step
from kvbm_schemas.block import HASH_BYTES, BlockHash, Tier
from kvbm_schemas.records import NodeRecord, RankRecord, SlabRecord
from kvbm_schemas.requests import Leased, Located, Segment
from kvbm_service.core.columns import pack_u32, pack_u64
from kvbm_service.core.effects import Effect
from kvbm_service.core.leader import Leader, Limits

LOOKUP_SECONDS = 0.02
LEASE_SECONDS = 30.0
E = TypeVar("E")


def block(name: str) -> BlockHash:
    """A block's name, made of a readable one."""
    return BlockHash(hashlib.sha256(name.encode()).digest()[:HASH_BYTES])


def chain(names: str) -> list[BlockHash]:
    """One block for each letter."""
    return [block(name) for name in names]


def rank_record(
    node: str = "me", rank: int = 0, world_size: int = 1, slots: int = 8, life: int = 1
) -> RankRecord:
    """What a worker says of itself."""
    slab = SlabRecord(base=0, headers=0, slots=slots, slot_bytes=64, header_bytes=32)
    return RankRecord(
        node=node,
        rank=rank,
        world_size=world_size,
        agent=f"{node}/{rank}/{life}",
        agent_metadata=b"",
        slab=slab,
    )


def node_record(node: str, epoch: int = 1, world_size: int = 1) -> NodeRecord:
    """What a leader says of itself."""
    return NodeRecord(node=node, epoch=epoch, world_size=world_size, block_bytes=64)


class Rig:
    """A leader and both of its sides, driven by hand."""

    def __init__(
        self, slots: int = 8, world_size: int = 1, online: bool = True, held_blocks: int = 1024
    ) -> None:
        limits = Limits(LOOKUP_SECONDS, LEASE_SECONDS, 10.0, held_blocks)
        ranks = [rank_record("me", r, world_size, slots) for r in range(world_size)]
        self.world_size = world_size
        self.leader = Leader(ranks, limits)
        self.leader.online = online
        self.leader.journal.begin(1, empty=True)

    def effects(self, kind: type[E]) -> list[E]:
        """What the core wants done, of one kind; the rest is forgotten."""
        self.leader.check_integrity()
        effects: list[Effect] = self.leader.take_effects()
        return [effect for effect in effects if isinstance(effect, kind)]

    def effect(self, kind: type[E]) -> E:
        """The only effect of this kind."""
        (effect,) = self.effects(kind)
        return effect

    # -- the engine's side

    def save(self, names: str, good: bool = True) -> None:
        """Store these blocks, and let all ranks report."""
        self.leader.store(chain(names), list(range(len(names))))
        for command in self.leader.take_commands(0.0).saves:
            for rank in range(self.world_size):
                self.saved(command.op, rank, good)
        self.leader.take_freed_blocks()
        self.leader.take_effects()

    def saved(self, op: int, rank: int = 0, good: bool = True) -> None:
        """One rank has come to the end of a save."""
        failed = b"" if good else pack_u32(range(64))
        moved = step.Moved(op=op, failed=failed, reason="" if good else "broken")
        self.leader.report(step.StepResults(rank=rank, moved=(moved,)), now=0.0)
        self.leader.check_integrity()

    def loaded(
        self, load: step.Load, rank: int = 0, failed: tuple[int, ...] = (), now: float = 0.0
    ) -> None:
        """One rank has come to the end of a load."""
        result = step.LoadResult(
            op=load.op, request=load.request, failed_blocks=pack_u32(failed)
        )
        self.leader.report(step.StepResults(rank=rank, loads=(result,)), now)
        self.leader.check_integrity()

    def readable(self, tier: Tier = Tier.HOST) -> list[BlockHash]:
        """What a snapshot says of a tier."""
        return dict(self.leader.snapshot()[1])[tier]

    def load_command(self) -> step.Load:
        """The only load of this step."""
        (load,) = self.leader.take_commands(0.0).loads
        return load

    # -- the bus's side

    def meet(self, node: str, epoch: int = 1, world_size: int | None = None) -> None:
        """Another node, with as many ranks as ours, takes part."""
        size = world_size or self.world_size
        self.leader.peers.leader_changed(node, node_record(node, epoch, size))
        for rank in range(size):
            record = rank_record(node, rank, size, life=epoch)
            self.leader.peers.rank_changed(node, rank, record)


def located(*places: tuple[str, int], tier: Tier = Tier.HOST) -> Located:
    """The registry's answer: from each node in turn, so many blocks."""
    segments, start = [], 0
    for node, count in places:
        segments.append(Segment(node=node, tier=tier, start=start, count=count))
        start += count
    return Located(segments=tuple(segments))


def leased(
    node: str, count: int, world_size: int = 1, life: int = 1, number: int = 0,
    seconds: float = LEASE_SECONDS,
) -> Leased:  # fmt: skip
    """An owner's answer: `count` slots."""
    return Leased(
        lease=f"{node:-<14}{number:02}",
        seconds=seconds,
        epoch=life,
        slots=pack_u32(range(100, 100 + count)),
        fills=pack_u64(range(500, 500 + count)),
        agents=tuple(f"{node}/{rank}/{life}" for rank in range(world_size)),
    )

