"""What is in the ranks' slots, as far as commands and their outcomes tell: the dumb truth.

A slot holds what the last move into it brought, once every rank has confirmed that. From when
a move into it is ordered until then it holds nothing. What is being read must not be written.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from kvbm_schemas import step
from kvbm_schemas.block import BlockHash, Tier, pack, unpack
from kvbm_service.core.columns import pack_u32, pack_u64, unpack_u32, unpack_u64


class Spot(NamedTuple):
    """A slot of a tier."""

    tier: Tier
    slot: int


class Label(NamedTuple):
    """What a slot holds, and by which op."""

    name: BlockHash
    fill: int


MAX_SECONDS = 10.0
"""Of a transfer."""

Move = step.Save | step.Spill | step.Fetch | step.RemoteFetch
Order = Move | step.Load


@dataclass
class Doing:
    """A move or a load that some ranks have not finished."""

    command: Order
    waiting: set[int]
    reads: Sequence[Spot] = ()
    writes: Sequence[Spot] = ()
    device: Sequence[int] = ()
    """Device blocks that are read (by a save), or written (by a load)."""
    failed: set[int] = field(default_factory=set)

    @property
    def positions(self) -> list[int]:
        """Of a move's blocks in its command."""
        return list(range(len(self.writes)))


class RankModel:
    """The slots of all ranks, which are alike but for what is under way."""

    def __init__(self, world_size: int, first_op: int) -> None:
        self.doing: dict[int, Doing] = {}
        self.holds: dict[Spot, Label] = {}
        self.leased: dict[str, tuple[float, list[Spot]]] = {}
        """Until when each lease of ours protects which slots."""
        self.lost: set[Tier] = set()
        """Tiers of which nothing can be read any more."""
        self.unreadable: set[tuple[Spot, Label]] = set()
        """What some rank could not read."""
        self._world_size = world_size
        self._first_op = first_op

    # -- commands --------------------------------------------------------------------------

    def told(self, command: Order) -> None:
        """All ranks are told to do this."""
        assert self._first_op <= command.op, "a stamp of an earlier life is used again"
        assert command.op not in self.doing
        if isinstance(command, step.Spill | step.Fetch):
            assert Tier.DISK not in self.lost
        doing = self._understood(command)
        assert len(set(doing.writes)) == len(doing.writes)
        busy = {*self.read, *(spot for other in self.doing.values() for spot in other.writes)}
        assert busy.isdisjoint(doing.writes), "a slot in use is to be overwritten"
        for spot in doing.writes:
            self.holds.pop(spot, None)
        self.doing[command.op] = doing

    @property
    def read(self) -> Counter[Spot]:
        """Slots that are being read, or lent."""
        reads = Counter(spot for doing in self.doing.values() for spot in doing.reads)
        reads.update(spot for _, spots in self.leased.values() for spot in spots)
        return reads

    def _understood(self, command: Order) -> Doing:
        ranks = set(range(self._world_size))
        match command:
            case step.Save():
                writes = _spots(command.tier, command.slots)
                return Doing(command, ranks, writes=writes, device=unpack_u32(command.blocks))
            case step.Spill():
                reads = self.proven(Tier.HOST, command.host, command.hashes, command.fills)
                return Doing(command, ranks, reads, _spots(Tier.DISK, command.disk))
            case step.Fetch():
                reads = self.proven(Tier.DISK, command.disk, command.hashes, command.fills)
                return Doing(command, ranks, reads, _spots(Tier.HOST, command.host))
            case step.RemoteFetch():
                assert 0 <= command.seconds <= MAX_SECONDS
                return Doing(command, ranks, writes=_spots(Tier.HOST, command.host))
            case step.Load():
                return self._load(command, ranks)

    def _load(self, command: step.Load, ranks: set[int]) -> Doing:
        reads: list[Spot] = []
        device: list[int] = []
        for tier, own in ((Tier.HOST, command.local), (Tier.DISK, command.disk)):
            if own is not None:
                reads += self.proven(tier, own.slots, own.hashes, own.fills)
                device += unpack_u32(own.blocks)
        for remote in command.remote:
            device += unpack_u32(remote.blocks)
        return Doing(command, ranks, reads, device=device)

    def proven(self, tier: Tier, slots: bytes, hashes: bytes, fills: bytes) -> list[Spot]:
        """These slots, which had better hold these blocks."""
        spots = _spots(tier, slots)
        if tier in self.lost:
            return spots
        for spot, name, fill in zip(spots, unpack(hashes), unpack_u64(fills), strict=True):
            assert self.holds.get(spot) == Label(name, fill), f"{spot} holds something else"
        return spots

    # -- outcomes --------------------------------------------------------------------------

    def reported(self, op: int, rank: int, failed: Iterable[int]) -> None:
        """A rank is through. To be called before the leader is told."""
        doing = self.doing[op]
        doing.waiting.remove(rank)
        doing.failed.update(failed)
        if doing.waiting:
            return
        del self.doing[op]
        if isinstance(doing.command, step.Load):
            own = zip(doing.reads, doing.device, strict=False)  # those of other nodes come last
            self._doubt([spot for spot, block in own if block in doing.failed])
            return
        if isinstance(doing.command, step.Fetch):
            self._doubt([doing.reads[position] for position in doing.failed])
        for position, name in enumerate(unpack(doing.command.hashes)):
            if position not in doing.failed:
                self.holds[doing.writes[position]] = Label(name, op)

    def _doubt(self, spots: Iterable[Spot]) -> None:
        self.unreadable.update(
            (spot, self.holds[spot]) for spot in spots if spot.tier not in self.lost
        )

    def held(self, block: BlockHash, tier: Tier) -> bool:
        """Whether some slot of the tier holds the block."""
        return any(spot.tier is tier and label.name == block for spot, label in self.holds.items())

    def expire(self, now: float) -> None:
        """Leases end by themselves."""
        self.leased = {token: one for token, one in self.leased.items() if one[0] > now}


def survivors(tier: Tier, labels: dict[Spot, Label]) -> step.Survivors:
    """What a rank says it has found."""
    found = sorted(labels.items(), key=lambda one: one[1].fill)
    return step.Survivors(
        tier=tier,
        hashes=pack([label.name for _, label in found]),
        fills=pack_u64(label.fill for _, label in found),
        slots=pack_u32(spot.slot for spot, _ in found),
    )


def _spots(tier: Tier, slots: bytes) -> list[Spot]:
    return [Spot(tier, slot) for slot in unpack_u32(slots)]
