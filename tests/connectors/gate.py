"""Gates before a rank's real mover and disk: let a test hold back transfers, or lose them."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np

from kvbm_schemas.block import Tier
from kvbm_service.adapters.disk import Contents, Disk
from kvbm_service.adapters.mover import (
    Blocks,
    DevicePool,
    Fence,
    Hop,
    Indices,
    Mask,
    Mover,
    RemoteSlab,
)
from kvbm_service.errors import TransferError

PATIENCE_SECONDS = 30.0
"""A transfer that a test forgot to let go fails after so long."""


class Valve:
    """One kind of transfer."""

    def __init__(self) -> None:
        self.blocks = 0
        """How many blocks came through."""
        self.calls = 0
        self.waiting = 0
        """How many transfers stand before the closed valve."""
        self.failing = False
        """Every transfer fails as a whole."""
        self.loses = 0
        """So many blocks at the end of each read do not arrive."""
        self._open = threading.Event()
        self._open.set()

    def close(self) -> None:
        """Hold back what comes from now on."""
        self._open.clear()

    def open(self) -> None:
        """Let everything go."""
        self._open.set()

    def enter(self) -> None:
        """Called by a transfer before it begins."""
        self.calls += 1
        self.waiting += 1
        in_time = self._open.wait(PATIENCE_SECONDS)
        self.waiting -= 1
        assert in_time, "nobody opened the valve"
        if self.failing:
            raise TransferError("the test wants this transfer to fail")


class Gate:
    """`Mover`: the real one behind four valves.

    Before a read, its destination is filled with rubbish by `scribble`: what is right
    afterwards was written by this read.
    """

    def __init__(self, mover: Mover, scribble: Callable[[Indices], None]) -> None:
        self.saves, self.loads, self.pulls, self.fetches = Valve(), Valve(), Valve(), Valve()
        self._mover = mover
        self._scribble = scribble

    @property
    def agent(self) -> str:
        return self._mover.agent

    @property
    def agent_metadata(self) -> bytes:
        return self._mover.agent_metadata

    def mark(self) -> Fence:
        return self._mover.mark()

    def save(self, blocks: Blocks) -> None:
        self.saves.enter()
        self._mover.save(blocks)
        self.saves.blocks += len(blocks.slots)

    def load(self, blocks: Blocks) -> Mask:
        return self._read(self.loads, blocks, lambda: self._mover.load(blocks))

    @property
    def pool(self) -> DevicePool | None:
        return self._mover.pool

    def lend(self, blocks: Blocks) -> None:
        self._mover.lend(blocks)

    def unlend(self, device: Indices, op: int) -> None:
        self._mover.unlend(device, op)

    def unlend_all(self, op: int) -> None:
        self._mover.unlend_all(op)

    def connect(self, peer: RemoteSlab) -> None:
        self._mover.connect(peer)

    def forget(self, agent: str) -> None:
        self._mover.forget(agent)

    def pull(
        self, agent: str, blocks: Blocks, timeout_seconds: float, tier: Tier = Tier.HOST
    ) -> Mask:
        return self._read(
            self.pulls, blocks, lambda: self._mover.pull(agent, blocks, timeout_seconds, tier)
        )

    def fetch(self, agent: str, hop: Hop, timeout_seconds: float) -> Mask:
        self.fetches.enter()
        arrived = self._mover.fetch(agent, hop, timeout_seconds)
        self.fetches.blocks += int(arrived.sum())
        return arrived

    def progress(self) -> None:
        self._mover.progress()

    def close(self) -> None:
        self._mover.close()

    def _read(self, valve: Valve, blocks: Blocks, read: Callable[[], Mask]) -> Mask:
        self._scribble(blocks.device)
        valve.enter()
        arrived = read()
        if valve.loses:
            lost = np.arange(len(arrived)) >= len(arrived) - valve.loses
            self._scribble(blocks.device[lost])
            arrived = arrived & ~lost
        valve.blocks += int(arrived.sum())
        return arrived


class DiskGate:
    """`Disk`: the real one behind three valves. Rubbish is where a load is to go, as above."""

    def __init__(self, disk: Disk, scribble: Callable[[Indices], None]) -> None:
        self.writes, self.loads, self.fetches = Valve(), Valve(), Valve()
        self.disk = disk
        self._scribble = scribble

    @property
    def slots(self) -> int:
        return self.disk.slots

    def contents(self) -> Contents:
        return self.disk.contents()

    def forget(self) -> None:
        self.disk.forget()

    def under_way(self) -> frozenset[int]:
        return self.disk.under_way()

    def give_up(self, reason: str) -> None:
        self.disk.give_up(reason)

    def save(self, blocks: Blocks) -> Mask:
        return self._through(self.writes, lambda: self.disk.save(blocks))

    def spill(self, hop: Hop) -> Mask:
        return self._through(self.writes, lambda: self.disk.spill(hop))

    def load(self, blocks: Blocks) -> Mask:
        self._scribble(blocks.device)
        return self._through(self.loads, lambda: self.disk.load(blocks))

    def fetch(self, hop: Hop) -> Mask:
        return self._through(self.fetches, lambda: self.disk.fetch(hop))

    def close(self) -> None:
        self.disk.close()

    def _through(self, valve: Valve, move: Callable[[], Mask]) -> Mask:
        valve.enter()
        in_place = move()
        valve.blocks += int(in_place.sum())
        return in_place
