"""What the ranks are told around a step, and what they have not finished of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from kvbm_schemas import step
from kvbm_schemas.block import BlockHash, Tier, pack
from kvbm_schemas.records import RankRecord
from kvbm_service.core.accounts import Path
from kvbm_service.core.columns import pack_u32, pack_u64
from kvbm_service.core.moves import Move, Moves
from kvbm_service.core.reads import Grant

SAVE_PATHS = {Tier.HOST: Path.DEVICE_TO_HOST, Tier.DISK: Path.DEVICE_TO_DISK}


@dataclass(slots=True)
class _Saving:
    """What the coming step saves, all under one op. 0: nothing so far."""

    op: int = 0
    blocks: list[BlockHash] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    device_blocks: list[int] = field(default_factory=list)


class Orders:
    """Commands for the coming step, and the moves that are open because of earlier ones.

    An op's number also stamps the slots that it fills, so no number is ever used twice, not
    even by a later life that finds those slots again.
    """

    def __init__(self, world_size: int, save_to: Tier, instance: str) -> None:
        self.moves = Moves(world_size)
        self._save_to = save_to
        self._instance = instance
        self._last_op = 0
        self._saving = _Saving()
        self._loads: list[step.Load] = []
        self._spills: list[step.Spill] = []
        self._fetches: list[step.Fetch] = []
        self._remote_fetches: list[step.RemoteFetch] = []
        self._lends: list[step.Lend] = []
        self._unlends: list[step.Unlend] = []
        self._forget = False

    @property
    def last_op(self) -> int:
        """The greatest number so far."""
        return self._last_op

    def next_op(self) -> int:
        """A number for a new op."""
        self._last_op += 1
        return self._last_op

    def skip_ops(self, used: int) -> None:
        """Numbers up to `used` stamp slots of an earlier life."""
        self._last_op = max(self._last_op, used)

    # -- giving orders -------------------------------------------------------------

    @property
    def save_op(self) -> int:
        """The op under which the coming step saves."""
        if not self._saving.op:
            self._saving.op = self.next_op()
        return self._saving.op

    def save(
        self, blocks: Sequence[BlockHash], slots: Sequence[int], device_blocks: Sequence[int]
    ) -> None:
        """Device → where this node saves; the slots were reserved with the fill `save_op`."""
        self._saving.blocks.extend(blocks)
        self._saving.slots.extend(slots)
        self._saving.device_blocks.extend(device_blocks)

    def load(self, load: step.Load) -> None:
        """Fill a request's device blocks."""
        self._loads.append(load)

    def spill(
        self, op: int, blocks: list[BlockHash], host: list[int], fills: list[int], disk: list[int]
    ) -> None:
        """Host slots, which are pinned → disk slots."""
        pinned = (Tier.HOST, host)
        self.moves.begin(op, Move(Path.HOST_TO_DISK, Tier.DISK, blocks, disk, pinned=pinned))
        self._spills.append(
            step.Spill(
                op=op,
                hashes=pack(blocks),
                fills=pack_u64(fills),
                host=pack_u32(host),
                disk=pack_u32(disk),
            )
        )

    def fetch(
        self, op: int, blocks: list[BlockHash], disk: list[int], fills: list[int], host: list[int]
    ) -> step.Fetch:
        """Disk slots, which are pinned → host slots. Returned to be sent, or put into a step."""
        pinned = (Tier.DISK, disk)
        move = Move(Path.DISK_TO_HOST, Tier.HOST, blocks, host, pinned=pinned)
        self.moves.begin(op, move, by_bus=True)
        return step.Fetch(
            op=op,
            hashes=pack(blocks),
            fills=pack_u64(fills),
            disk=pack_u32(disk),
            host=pack_u32(host),
            instance=self._instance,
        )

    def lend(self, op: int, blocks: list[BlockHash], device_blocks: list[int]) -> step.Lend:
        """Let other nodes read device blocks. Returned to be sent, or put into a step."""
        return step.Lend(
            op=op, hashes=pack(blocks), blocks=pack_u32(device_blocks), instance=self._instance
        )

    def unlend(self, op: int, device_blocks: list[int]) -> None:
        """Let nobody believe what he reads in these device blocks any more."""
        self._unlends.append(step.Unlend(op=op, blocks=pack_u32(device_blocks)))

    def put_into_step(self, order: step.Fetch | step.Lend) -> None:
        """Have an order ride the coming step."""
        if isinstance(order, step.Fetch):
            self.moves.ask_by_step(order.op)
            self._fetches.append(order)
        else:
            self._lends.append(order)

    def fetch_remote(
        self, op: int, blocks: list[BlockHash], grant: Grant, positions: list[int],
        host: list[int], seconds: float,
    ) -> None:  # fmt: skip
        """Leased slots of another node, those at `positions` of the grant → host slots."""
        self.moves.begin(op, Move(Path.REMOTE_TO_HOST, Tier.HOST, blocks, host, grant=grant))
        self._remote_fetches.append(
            step.RemoteFetch(
                op=op,
                node=grant.node,
                agents=grant.agents,
                seconds=seconds,
                hashes=pack(blocks),
                slots=pack_u32(grant.slots[position] for position in positions),
                fills=pack_u64(grant.fills[position] for position in positions),
                host=pack_u32(host),
            )
        )

    def forget(self) -> None:
        """Let no later life find what is in the tiers."""
        self._forget = True

    # -- handing them over ---------------------------------------------------------

    def take(
        self,
        came: tuple[RankRecord, ...],
        gone: tuple[str, ...],
        meant: bytes = b"",
        fence: int = 0,
    ) -> step.StepCommands:
        """Everything the ranks have to do around the coming forward pass."""
        commands = step.StepCommands(
            saves=self._take_save(),
            loads=tuple(self._loads),
            peers=came,
            gone=gone,
            spills=tuple(self._spills),
            fetches=tuple(self._fetches),
            remote_fetches=tuple(self._remote_fetches),
            forget=self._forget,
            meant=meant,
            fence=fence,
            lends=tuple(self._lends),
            unlends=tuple(self._unlends),
        )
        self._clear()
        self._forget = False
        return commands

    def drop(self) -> set[int]:
        """Forget what no rank has been told yet, all but to forget. Returns the ops of it."""
        ops = {save.op for save in self._take_save()}
        ops |= {load.op for load in self._loads} | {spill.op for spill in self._spills}
        ops |= {fetch.op for fetch in self._fetches}
        ops |= {fetch.op for fetch in self._remote_fetches}
        self._clear()
        return ops

    def _clear(self) -> None:
        self._loads, self._spills = [], []
        self._fetches, self._remote_fetches = [], []
        self._lends, self._unlends = [], []

    def _take_save(self) -> tuple[step.Save, ...]:
        saving, self._saving = self._saving, _Saving()
        if not saving.blocks:
            return ()
        path, tier = SAVE_PATHS[self._save_to], self._save_to
        self.moves.begin(
            saving.op, Move(path, tier, saving.blocks, saving.slots, saving.device_blocks)
        )
        return (
            step.Save(
                op=saving.op,
                hashes=pack(saving.blocks),
                blocks=pack_u32(saving.device_blocks),
                slots=pack_u32(saving.slots),
                tier=tier,
            ),
        )

    @property
    def held_blocks(self) -> int:
        """Device blocks that unfinished saves keep, those of the coming step included."""
        return self.moves.held_blocks + len(self._saving.device_blocks)

    @property
    def waiting(self) -> bool:
        """Whether something waits for the coming step."""
        return bool(
            self._saving.blocks
            or self._loads
            or self._spills
            or self._fetches
            or self._remote_fetches
            or self._lends
            or self._unlends
            or self._forget
        )
