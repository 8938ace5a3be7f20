"""Loads under way: device blocks being filled, from wherever their blocks are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Sequence
from dataclasses import dataclass, field

from kvbm_schemas import step
from kvbm_schemas.block import BlockHash, Tier
from kvbm_schemas.events import Loaded, Source
from kvbm_service.core.accounts import Path
from kvbm_service.core.columns import unpack_u32
from kvbm_service.core.effects import Announce
from kvbm_service.core.load_order import LoadOrder
from kvbm_service.core.orders import Orders
from kvbm_service.core.outbox import Outbox
from kvbm_service.core.peers import Peers
from kvbm_service.core.reads import Reader
from kvbm_service.core.tiers import Tiers


@dataclass(slots=True)
class Load:
    """A load that some ranks have not finished."""

    op: int
    request: str
    order: LoadOrder
    waiting: set[int]
    began: float
    failed: set[int] = field(default_factory=set)
    reason: str = ""
    seconds: dict[Path, float] = field(default_factory=dict)
    given_up: bool = False
    """Whether some rank will never report."""

    def arrived(self, path: Path) -> list[BlockHash]:
        """The blocks that came this way."""
        return [
            name
            for taken in self.order.taken
            if taken.path is path
            for name in taken.arrived(self.failed)
        ]


class Loads:
    """One node's open loads by op, and the ranks that have not reported yet."""

    def __init__(
        self,
        node: str,
        world_size: int,
        tiers: Tiers,
        orders: Orders,
        peers: Peers,
        outbox: Outbox,
        transfer_seconds: float,
    ) -> None:
        self._node = node
        self._world_size = world_size
        self._tiers = tiers
        self._orders = orders
        self._peers = peers
        self._outbox = outbox
        self._transfer_seconds = transfer_seconds
        self._open: dict[int, Load] = {}

    def __len__(self) -> int:
        return len(self._open)

    def begin(
        self, request: str, reader: Reader, computed: int, device_blocks: Sequence[int], now: float
    ) -> Load:
        """Order the reader's plan for `chain[computed:]` into `device_blocks`."""
        op = self._orders.next_op()
        order = LoadOrder(reader, computed, device_blocks, self._tiers)
        self._orders.load(order.command(op, request, now, self._transfer_seconds))
        load = self._open[op] = Load(op, request, order, set(range(self._world_size)), began=now)
        return load

    def report(self, result: step.LoadResult, rank: int, now: float) -> Load | None:
        """A rank has finished. Returns the load once the last one has.

        An unknown op, or a second report of the same rank, changes nothing.
        """
        load = self._open.get(result.op)
        if load is None or rank not in load.waiting:
            return None
        load.waiting.remove(rank)
        load.failed.update(unpack_u32(result.failed_blocks))
        load.reason = load.reason or result.reason
        for path, seconds in (
            (Path.HOST_TO_DEVICE, result.host_seconds),
            (Path.DISK_TO_DEVICE, result.disk_seconds),
            (Path.REMOTE_TO_DEVICE, result.remote_seconds),
        ):
            load.seconds[path] = max(seconds, load.seconds.get(path, 0.0))
        return None if load.waiting else self._end(load, now)

    def give_up(
        self, reason: str, now: float, rank: int | None = None, untold: Container[int] = ()
    ) -> list[Load]:
        """Nothing that is open will arrive. Returns the loads that have ended; see `Moves`."""
        for op, load in self._open.items():
            load.given_up, load.reason = True, load.reason or reason
            load.failed.update(load.order.device_blocks)
            if rank is None or op in untold:
                load.waiting.clear()
            else:
                load.waiting.discard(rank)
        ended = [load for load in self._open.values() if not load.waiting]
        return [self._end(load, now) for load in ended]

    def _end(self, load: Load, now: float) -> Load:
        del self._open[load.op]
        if not load.given_up:
            self._blame(load, now)
        self._account(load, now)
        return load

    def _blame(self, load: Load, now: float) -> None:
        """Own blocks that could not be read are forgotten; a node that failed is left alone."""
        lost: dict[Tier, list[BlockHash]] = {}
        for taken in load.order.taken:
            names = taken.lost(load.failed)
            if names and taken.node:
                self._peers.shun(taken.node, now)
            elif names:
                lost.setdefault(taken.tier, []).extend(names)
        for tier, names in lost.items():
            self._tiers.drop(tier, names)

    def _account(self, load: Load, now: float) -> None:
        """Tell how the load went, and where its blocks came from."""
        arrived: Counter[tuple[str, Tier]] = Counter()
        by_path: dict[Path, list[int]] = {}
        for taken in load.order.taken:
            bad = len(load.failed.intersection(taken.device_blocks))
            good = len(taken.names) - bad
            count = by_path.setdefault(taken.path, [0, 0])
            count[0] += good
            count[1] += bad
            if good:
                arrived[taken.node or self._node, taken.tier] += good
        for path, (good, bad) in by_path.items():
            self._outbox.transferred(path, good, bad, load.reason, load.seconds.get(path, 0.0))
        self._outbox.effects.append(
            Announce(
                Loaded(
                    request=load.request[:256],
                    sources=tuple(
                        Source(node, tier, blocks, blocks * self._outbox.block_bytes)
                        for (node, tier), blocks in arrived.items()
                    ),
                    failed=len(load.failed),
                    seconds=now - load.began,
                )
            )
        )

    def check_integrity(self) -> None:
        """Every open load waits for some rank."""
        assert all(load.waiting for load in self._open.values()), "a finished load was kept"
