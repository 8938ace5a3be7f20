"""How a leader answers those who ask what it holds, without anyone noticing.

A copy is taken a slice at a time, with pauses in which the engine's thread and the loop's other
work have their turn; and it is sent a chunk at a time, so that neither the server nor whoever
asked is overrun. One copy is under way at any time, and serves all who have asked by its end.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from kvbm_schemas.block import pack
from kvbm_schemas.codec import encode
from kvbm_schemas.requests import SnapshotChunk
from kvbm_service.core.snapshot import Snapshot

if TYPE_CHECKING:
    from kvbm_service.leader_service import LeaderService

MAX_ASKERS = 32
"""Who may wait for a snapshot. Further ones are not answered: they ask again."""
PAUSE_SECONDS = 0.001
"""Between two slices, and between two chunks."""
REST_SECONDS = 0.25
"""Between two snapshots: whoever asks without end gets no more of our time than this leaves."""

Send = Callable[[str, bytes], Awaitable[None]]

log = logging.getLogger(__name__)


class Snapshots:
    """Those who wait for a snapshot of one leader's blocks. `run` answers them."""

    def __init__(self, leader: LeaderService, send: Send) -> None:
        """`send` publishes a payload, or loses it; it never raises."""
        self.turned_away = 0
        """Questions that were not taken, because too many waited."""
        self._leader = leader
        self._send_to = send
        self._asked = asyncio.Event()
        self._askers: dict[str, str] = {}
        """Where the answers go, by asker."""

    def ask(self, reply: str) -> None:
        """Someone wants a snapshot at `reply`. Their later question voids an earlier one."""
        asker, _, _ = reply.rpartition(".")
        if asker not in self._askers and len(self._askers) >= MAX_ASKERS:
            self.turned_away += 1
            if self.turned_away == 1:
                log.warning("more than %d ask for a snapshot at once; some wait", MAX_ASKERS)
            return
        self._askers[asker] = reply
        self._asked.set()

    async def run(self) -> None:
        """Answer, until cancelled."""
        while True:
            await self._asked.wait()
            copy = await self._copy()
            self._asked.clear()
            replies = list(self._askers.values())
            self._askers.clear()
            if copy is not None:
                await self._send(copy, replies)
            await asyncio.sleep(REST_SECONDS)

    async def _copy(self) -> Snapshot | None:
        """Take a copy. None if that did not work out: whoever asked will ask again."""
        copy = self._leader.on_core(lambda core: core.begin_snapshot(), None)
        if copy is None:
            return None
        looking = True
        while looking:
            looking = self._leader.on_core(lambda core: copy.look(), False)
            await asyncio.sleep(PAUSE_SECONDS)
        if copy.at is None:
            log.info("too much changes for a snapshot to be taken; whoever wants one asks again")
            return None
        return copy

    async def _send(self, copy: Snapshot, replies: list[str]) -> None:
        assert copy.at is not None
        total = copy.total
        for index, (tier, blocks) in enumerate(copy.chunks()):
            chunk = SnapshotChunk(
                epoch=copy.at.epoch,
                seq=copy.at.seq,
                index=index,
                total=total,
                tier=tier,
                hashes=pack(blocks),
            )
            payload = encode(chunk, self._leader.settings.wire)
            for reply in replies:
                await self._send_to(reply, payload)
            await asyncio.sleep(PAUSE_SECONDS)
