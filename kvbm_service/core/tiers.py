"""This node's tiers: which block is in which slot of which, told to everyone as it changes.

The host tier is always there, if only as a few slots through which other nodes are served.
The disk tier may be absent, or be given up when the disk fails.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from kvbm_schemas.block import BlockHash, Tier, pack, unpack
from kvbm_schemas.records import TierStatus
from kvbm_schemas.step import Survivors
from kvbm_service.core.columns import pack_u32, pack_u64, unpack_u32, unpack_u64
from kvbm_service.core.journal import Journal
from kvbm_service.core.pool import Pool, Reservation
from kvbm_service.core.reads import Pinned


class Run(NamedTuple):
    """Consecutive blocks of a chain, `chain[start:end]`, all readable in `tier`."""

    tier: Tier
    start: int
    end: int


class Tiers:
    """The pools of one node."""

    def __init__(self, host_slots: int, disk_slots: int, journal: Journal) -> None:
        self.host = Pool(host_slots)
        self.disk: Pool | None = Pool(disk_slots) if disk_slots else None
        self.evicted = dict.fromkeys((Tier.HOST, Tier.DISK), 0)
        """How many blocks had to make room, by tier."""
        self._journal = journal

    def pool(self, tier: Tier) -> Pool:
        """The slots of a tier that is there."""
        pool = self.host if tier is Tier.HOST else self.disk
        assert pool is not None, f"there is no {tier}"
        return pool

    def has(self, tier: Tier) -> bool:
        """Whether the tier is there."""
        return tier is Tier.HOST or (tier is Tier.DISK and self.disk is not None)

    @property
    def _pools(self) -> list[tuple[Tier, Pool]]:
        return [(tier, self.pool(tier)) for tier in (Tier.HOST, Tier.DISK) if self.has(tier)]

    # -- looking -------------------------------------------------------------------

    def use(self, chain: Sequence[BlockHash], now: float) -> None:
        """A request with this whole chain has come."""
        for _, pool in self._pools:
            pool.use(chain, now)

    def runs(self, chain: Sequence[BlockHash], start: int) -> list[Run]:
        """Where `chain[start:]` can be read, as far as it goes without a gap: host before disk."""
        runs: list[Run] = []
        end = start
        while end < len(chain) and (run := self._run(chain, end)) is not None:
            runs.append(run)
            end = run.end
        return runs

    def pin_runs(self, chain: Sequence[BlockHash], start: int) -> list[Pinned]:
        """Pin all that `runs` finds, so that it stays where it is."""
        pinned: list[Pinned] = []
        while start < len(chain):
            tier, slots = Tier.HOST, self.host.pin_run(chain, start)
            if not slots and self.disk is not None:
                end = self.disk.match_without(chain, start, self.host)
                tier, slots = Tier.DISK, self.disk.pin(chain[start:end])
            if not slots:
                break
            pinned.append(Pinned(tier, start, slots))
            start += len(slots)
        return pinned

    def absent(self, chain: Sequence[BlockHash], start: int) -> list[int]:
        """Which of `chain[start:]` are readable in no tier, as indices."""
        first = self.host.match(chain, start)
        absent = self.host.absent(chain, range(first, len(chain)))
        return self.disk.absent(chain, absent) if self.disk is not None else absent

    def _run(self, chain: Sequence[BlockHash], start: int) -> Run | None:
        end = self.host.match(chain, start)
        if end > start:
            return Run(Tier.HOST, start, end)
        if self.disk is not None:
            end = self.disk.match_without(chain, start, self.host)
        return Run(Tier.DISK, start, end) if end > start else None

    def status(self) -> tuple[TierStatus, ...]:
        """How full each tier is."""
        return tuple(
            TierStatus(tier, pool.capacity, pool.used, pool.pinned) for tier, pool in self._pools
        )

    @property
    def present(self) -> list[Tier]:
        """The tiers that are there."""
        return [tier for tier, _ in self._pools]

    def snapshot(self) -> list[tuple[Tier, list[BlockHash]]]:
        """Every readable block of each tier, at once."""
        return [(tier, pool.blocks()) for tier, pool in self._pools]

    @property
    def empty(self) -> bool:
        """Whether no block can be read."""
        return not any(len(pool) for _, pool in self._pools)

    def is_known(self, block: BlockHash) -> bool:
        """Whether the block is in some tier, or on its way there."""
        return any(block in pool for _, pool in self._pools)

    def is_coming(self, block: BlockHash) -> bool:
        """Whether the block can be read in no tier yet, and is on its way to one."""
        return self.is_known(block) and not any(pool.readable(block) for _, pool in self._pools)

    # -- filling -------------------------------------------------------------------

    def reserve(
        self,
        tier: Tier,
        chain: Sequence[BlockHash],
        fill: int,
        after: BlockHash | None = None,
    ) -> Reservation:
        """Take slots for the blocks of `chain` that are not in the tier; see `Pool.reserve`."""
        taken = self.pool(tier).reserve(chain, fill, after)
        if taken.evicted:
            self.evicted[tier] += len(taken.evicted)
            self._journal.removed(taken.evicted, tier)
        return taken

    def settle(self, tier: Tier, slots: Sequence[int], failed: set[int]) -> list[BlockHash]:
        """The bytes of these slots are in place, but for the positions in `failed`.

        Returns the blocks that became readable.
        """
        if not self.has(tier):
            return []
        pool = self.pool(tier)
        pool.abort([slots[position] for position in sorted(failed)])
        good = [slot for position, slot in enumerate(slots) if position not in failed]
        stored = pool.commit(good)
        if stored:
            self._journal.stored(stored, tier)
        return stored

    def adopt(self, survivors: Sequence[Survivors]) -> int:
        """Take over what an earlier life left in one tier: what all ranks have alike.

        `survivors` are those of each rank. Returns how many blocks that were.
        """
        tier = survivors[0].tier
        if not self.has(tier):
            return 0
        blocks, slots, fills = _alike(survivors)
        taken = self.pool(tier).adopt(blocks, slots, fills)
        stored = [block for block, good in zip(blocks, taken, strict=True) if good]
        if stored:
            self._journal.stored(stored, tier)
        return len(stored)

    def held(self) -> list[Survivors]:
        """What every rank has in each tier: where each block is, and under what stamp."""
        return [_held(tier, pool) for tier, pool in self._pools]

    # -- dropping ------------------------------------------------------------------

    def drop(self, tier: Tier, blocks: Iterable[BlockHash]) -> None:
        """Forget blocks that could not be read."""
        if self.has(tier):
            pool = self.pool(tier)
            lost = [block for block in blocks if pool.drop(block)]
            if lost:
                self._journal.removed(lost, tier)

    def clear(self) -> None:
        """Forget every block."""
        for _, pool in self._pools:
            pool.clear()
        self._journal.cleared()

    def give_up_disk(self) -> None:
        """The disk has failed: there is no disk tier any more."""
        if self.disk is not None:
            lost, self.disk = self.disk.blocks(), None
            self._journal.removed(lost, Tier.DISK)

    def fills(self, pinned: Pinned) -> Sequence[int]:
        """The fill stamps of pinned slots; in a tier that was given up meanwhile, none: 0."""
        if self.has(pinned.tier):
            return self.pool(pinned.tier).fills(pinned.slots)
        return [0] * len(pinned.slots)

    def unpin(self, tier: Tier, slots: Sequence[int]) -> None:
        """Undo a pin; of a tier that was given up meanwhile, nothing is left to undo."""
        if self.has(tier):
            self.pool(tier).unpin(slots)

    def check_integrity(self) -> None:
        """Each pool's tables agree."""
        for _, pool in self._pools:
            pool.check_integrity()


def _held(tier: Tier, pool: Pool) -> Survivors:
    blocks = pool.blocks()
    slots = [slot for block in blocks if (slot := pool.slot(block)) is not None]
    return Survivors(
        tier=tier,
        hashes=pack(blocks),
        fills=pack_u64(pool.fills(slots)),
        slots=pack_u32(slots),
    )


def _alike(survivors: Sequence[Survivors]) -> tuple[list[BlockHash], list[int], list[int]]:
    """The blocks that every rank has in the same slot with the same stamp, oldest first."""
    first, *others = survivors
    blocks = unpack(first.hashes)
    slots, fills = list(unpack_u32(first.slots)), list(unpack_u64(first.fills))
    different = [
        other
        for other in others
        if (other.hashes, other.slots, other.fills) != (first.hashes, first.slots, first.fills)
    ]
    if not different:
        return blocks, slots, fills
    entries = list(zip(blocks, slots, fills, strict=True))
    common = set(entries)
    for other in different:
        common &= set(
            zip(unpack(other.hashes), unpack_u32(other.slots), unpack_u64(other.fills), strict=True)
        )
    kept = [entry for entry in entries if entry in common]
    return [b for b, _, _ in kept], [s for _, s, _ in kept], [f for _, _, f in kept]
