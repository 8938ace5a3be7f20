"""Turning a plan into an order for the ranks: which device block gets what, and from where."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from typing import NamedTuple

from kvbm_schemas import step
from kvbm_schemas.block import BlockHash, Tier, pack
from kvbm_service.core.accounts import Path
from kvbm_service.core.columns import pack_u32, pack_u64
from kvbm_service.core.reads import Grant, Hits, Pinned, Plan, Reader
from kvbm_service.core.tiers import Tiers

PATHS = {Tier.HOST: Path.HOST_TO_DEVICE, Tier.DISK: Path.DISK_TO_DEVICE}


class Taken(NamedTuple):
    """Consecutive blocks of a load that come from one place."""

    tier: Tier
    node: str
    """Empty: from here."""
    names: Sequence[BlockHash]
    device_blocks: Sequence[int]
    """Where they go."""

    @property
    def path(self) -> Path:
        """The way they go."""
        return Path.REMOTE_TO_DEVICE if self.node else PATHS[self.tier]

    def arrived(self, failed: AbstractSet[int]) -> list[BlockHash]:
        """Those whose device block is not among `failed`."""
        pairs = zip(self.names, self.device_blocks, strict=True)
        return [name for name, block in pairs if block not in failed]

    def lost(self, failed: AbstractSet[int]) -> list[BlockHash]:
        """Those whose device block is among `failed`."""
        pairs = zip(self.names, self.device_blocks, strict=True)
        return [name for name, block in pairs if block in failed]


class _Columns:
    """A transfer's columns as they grow, one entry per block."""

    def __init__(self) -> None:
        self.hashes: list[BlockHash] = []
        self.blocks: list[int] = []
        self.slots: list[int] = []
        self.fills: list[int] = []

    def read(self) -> step.LocalRead | None:
        if not self.blocks:
            return None
        return step.LocalRead(
            hashes=pack(self.hashes),
            blocks=pack_u32(self.blocks),
            slots=pack_u32(self.slots),
            fills=pack_u64(self.fills),
        )


class LoadOrder:
    """A load of `chain[computed:]` into `device_blocks`, as the reader's plan says."""

    def __init__(
        self, reader: Reader, computed: int, device_blocks: Sequence[int], tiers: Tiers
    ) -> None:
        assert reader.plan is not None
        self._chain = reader.chain
        self.computed = computed
        self._end = computed + len(device_blocks)
        self.device_blocks = device_blocks
        self._tiers = tiers
        self.plan: Plan = reader.plan
        self.taken: list[Taken] = []
        """What comes from where, in chain order, once written out."""

    def command(self, op: int, request: str, now: float, transfer_seconds: float) -> step.Load:
        """Write the load out for the ranks."""
        own = {Tier.HOST: _Columns(), Tier.DISK: _Columns()}
        remote: list[step.RemoteRead] = []
        for piece in self.plan.pieces:
            start, stop = max(self.computed, piece.start), min(piece.end, self._end)
            if start >= stop:
                continue
            columns = own[piece.tier] if isinstance(piece, Pinned) else _Columns()
            self._append(columns, piece, start, stop)
            if isinstance(piece, Grant) and (read := columns.read()) is not None:
                seconds = max(0.0, min(transfer_seconds, piece.deadline - now))
                remote.append(
                    step.RemoteRead(
                        node=piece.node,
                        agents=piece.agents,
                        seconds=seconds,
                        hashes=read.hashes,
                        blocks=read.blocks,
                        slots=read.slots,
                        fills=read.fills,
                        tier=piece.tier,
                    )
                )
        return step.Load(
            op=op,
            request=request,
            local=own[Tier.HOST].read(),
            disk=own[Tier.DISK].read(),
            remote=tuple(remote),
        )

    def _append(self, to: _Columns, piece: Pinned | Grant, start: int, stop: int) -> None:
        blocks = self.device_blocks[start - self.computed : stop - self.computed]
        names = self._chain[start:stop]
        fills: Sequence[int]
        if isinstance(piece, Pinned):
            tier, node, fills = piece.tier, "", self._tiers.fills(piece)
        else:
            tier, node, fills = piece.tier, piece.node, piece.fills
        self.taken.append(Taken(tier, node, names, blocks))
        to.hashes.extend(names)
        to.blocks.extend(blocks)
        to.slots.extend(piece.slots[start - piece.start : stop - piece.start])
        to.fills.extend(fills[start - piece.start : stop - piece.start])

    @property
    def hits(self) -> Hits:
        """How many blocks come from where, once written out."""
        counts = dict.fromkeys(Path, 0)
        for taken in self.taken:
            counts[taken.path] += len(taken.names)
        return Hits(
            host=counts[Path.HOST_TO_DEVICE],
            disk=counts[Path.DISK_TO_DEVICE],
            remote=counts[Path.REMOTE_TO_DEVICE],
        )
