"""Small things that the core's tests are built from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from kvbm_schemas import step
from kvbm_schemas.block import HASH_BYTES, BlockHash, Tier, pack
from kvbm_schemas.records import NodeRecord, RankRecord, SlabRecord
from kvbm_schemas.requests import Leased, Located, Segment
from kvbm_service.core.columns import pack_u32, pack_u64
from kvbm_service.core.effects import Effect, TellRanks
from kvbm_service.core.leader import Leader
from kvbm_service.core.limits import Limits

INSTANCE = "this life"
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
    node: str = "me",
    rank: int = 0,
    world_size: int = 1,
    slots: int = 8,
    life: int = 1,
    disk_slots: int = 0,
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
        disk_slots=disk_slots,
    )


def node_record(node: str, epoch: int = 1, world_size: int = 1) -> NodeRecord:
    """What a leader says of itself."""
    return NodeRecord(node=node, epoch=epoch, world_size=world_size, block_bytes=64)


class Rig:
    """A leader and both of its sides, driven by hand."""

    def __init__(
        self,
        slots: int = 8,
        world_size: int = 1,
        online: bool = True,
        held_blocks: int = 1024,
        disk: int = 0,
        **limits: Any,
    ) -> None:
        chosen = Limits(LOOKUP_SECONDS, LEASE_SECONDS, 10.0, held_blocks)._replace(**limits)
        ranks = [
            rank_record("me", r, world_size, slots, disk_slots=disk) for r in range(world_size)
        ]
        self.world_size = world_size
        self.leader = Leader(ranks, chosen, INSTANCE)
        self.leader.peers.online = online
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
        self.moved(op, rank, failed=() if good else range(64))

    def moved(
        self,
        op: int,
        rank: int = 0,
        failed: Iterable[int] = (),
        seconds: float = 0.0,
        now: float = 0.0,
    ) -> None:
        """One rank has come to the end of a move."""
        column = pack_u32(failed)
        reason = "broken" if column else ""
        moved = step.Moved(op=op, failed=column, reason=reason, seconds=seconds)
        self.leader.report(step.StepResults(rank=rank, moved=(moved,)), now)
        self.leader.check_integrity()

    def all_moved(self, op: int, failed: Iterable[int] = (), now: float = 0.0) -> None:
        """Every rank has come to the end of a move."""
        for rank in range(self.world_size):
            self.moved(op, rank, failed, now=now)

    def on_disk(self, names: str) -> None:
        """These blocks are on the disk: an earlier life has left them there."""
        self.find(Tier.DISK, names)
        self.leader.take_effects()

    def find(self, tier: Tier, names: str, first_slot: int | None = None) -> int:
        """Every rank has found these blocks, and the leader takes them over."""
        first = self.leader.tiers.pool(tier).used if first_slot is None else first_slot
        found = survivors(tier, names, range(first, first + len(names)))
        adopted = self.leader.adopt([found] * self.world_size)
        self.leader.check_integrity()
        return adopted

    def lose_disk(self, rank: int = 0) -> None:
        """One rank has given its disk up."""
        self.leader.report(step.StepResults(rank=rank, disk_lost="it is gone"), now=0.0)
        self.leader.check_integrity()

    def accounts(self, kind: type[E]) -> list[E]:
        """What the core tells of its work, of one kind; the rest is forgotten."""
        return [account for account in self.leader.take_accounts() if isinstance(account, kind)]

    def loaded(
        self, load: step.Load, rank: int = 0, failed: tuple[int, ...] = (), now: float = 0.0
    ) -> None:
        """One rank has come to the end of a load."""
        result = step.LoadResult(op=load.op, request=load.request, failed_blocks=pack_u32(failed))
        self.leader.report(step.StepResults(rank=rank, loads=(result,)), now)
        self.leader.check_integrity()

    def readable(self, tier: Tier = Tier.HOST) -> list[BlockHash]:
        """What a snapshot says of a tier."""
        return dict(self.leader.snapshot()[1])[tier]

    def step(self, now: float = 0.0) -> step.StepCommands:
        """What the ranks have to do around the coming forward pass."""
        commands = self.leader.take_commands(now)
        self.leader.check_integrity()
        return commands

    def load_command(self) -> step.Load:
        """The only load of this step."""
        (load,) = self.step().loads
        return load

    def load(self, names: str, device_blocks: Sequence[int], request: str = "r") -> step.Load:
        """A request loads all of these blocks, for which nobody has to be asked."""
        self.leader.arrive(request, chain(names), now=0.0)
        assert self.leader.match(request, 0, now=0.0) == len(names)
        self.leader.load(request, 0, device_blocks, now=0.0)
        return self.load_command()

    # -- the bus's side

    def meet(self, node: str, epoch: int = 1, world_size: int | None = None) -> None:
        """Another node, with as many ranks as ours, takes part."""
        size = world_size or self.world_size
        self.leader.peers.leader_changed(node, node_record(node, epoch, size))
        for rank in range(size):
            record = rank_record(node, rank, size, life=epoch)
            self.leader.peers.rank_changed(node, rank, record)


def told_to_fetch(rig: Rig) -> step.Fetch:
    """The only fetch that all ranks are to carry out at once."""
    order = rig.effect(TellRanks).order
    assert isinstance(order, step.Fetch)
    return order


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


def survivors(
    tier: Tier, names: str, slots: Iterable[int], fills: Iterable[int] | None = None
) -> step.Survivors:
    """What a rank says it has found: these blocks, oldest first, in these slots."""
    places = list(slots)
    stamps = fills or range(1000, 1000 + len(names))
    return step.Survivors(
        tier=tier, hashes=pack(chain(names)), slots=pack_u32(places), fills=pack_u64(stamps)
    )
