"""A leader's eye on its own ranks: who is listed in the directory, who is late, who has gone.

That a record has ended says little by itself: a leader that cannot reach the directory sees all
records end. So one counts as gone only when the directory has answered, and does not list it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING

from kvbm_schemas.records import RankRecord
from kvbm_service.adapters.directory import Change, Directory, Watch
from kvbm_service.errors import DirectoryError, LayoutError, RanksMissing
from kvbm_service.presence import RETRY_SECONDS, decode_record, stop_if_cancelled

if TYPE_CHECKING:
    from kvbm_service.leader_service import LeaderService

_log = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
"""How often it is looked whether ranks are missing, besides whenever something changes."""

MAX_WARNED = 256
"""Processes that are named in the log because they do not belong here, once each."""


class OwnRanks:
    """The ranks of one leader. `run` it; `wake` it when the engine has told of one."""

    def __init__(self, leader: LeaderService) -> None:
        self._leader = leader
        self._prefix = ".".join([*leader.scope, leader.node, ""])
        self._directory: Directory | None = None
        self._woken = asyncio.Event()
        self._doubted: set[int] = set()
        """Ranks whose record has ended, for all that the watch can tell."""
        self._warned: set[str] = set()

    def wake(self) -> None:
        """Something about the ranks has changed."""
        self._woken.set()

    async def run(self, directory: Directory) -> None:
        """Tell the leader who is there; until cancelled."""
        self._directory = directory
        watching = asyncio.create_task(self._watch(directory))
        try:
            await self._look()
        finally:
            watching.cancel()
            await asyncio.wait([watching])
            if not watching.cancelled():
                await watching.result().close()

    async def _watch(self, directory: Directory) -> Watch:
        """Watch the directory, as soon as it can be reached."""
        while True:
            try:
                return await directory.watch(self._on_change, self._prefix)
            except DirectoryError as error:
                _log.debug("directory: %s", error)
            stop_if_cancelled()
            await asyncio.sleep(RETRY_SECONDS)

    async def _look(self) -> None:
        late = False
        while True:
            await self._settle_doubts()
            try:
                self._leader.require_ranks()
            except RanksMissing as error:
                if not late:
                    _log.error("%s; serving without a cache meanwhile", error)
                late = True
            else:
                if late and self._leader.complete:
                    _log.info("all ranks of node %s are there now", self._leader.node)
                    late = False
            self._woken.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._woken.wait(), LOOK_SECONDS)
            stop_if_cancelled()

    def _on_change(self, change: Change) -> None:
        rank = change.key.removeprefix(self._prefix)
        if not rank.isdecimal():
            return
        if change.value is None:
            self._doubted.add(int(rank))
            self.wake()
            return
        record = decode_record(change.key, change.value)
        if isinstance(record, RankRecord) and record.rank == int(rank):
            self._doubted.discard(record.rank)
            self._listed(record)

    def _listed(self, record: RankRecord) -> None:
        try:
            self._leader.rank_listed(record)
        except LayoutError as error:
            if record.agent not in self._warned and len(self._warned) < MAX_WARNED:
                self._warned.add(record.agent)
                _log.warning("left out: %s", error)

    async def _settle_doubts(self) -> None:
        """Ask the directory about the records that seem to have ended.

        One that is still there stays in doubt until it is renewed, or gone: the directory may
        take longer to end a lease than we did.
        """
        if not self._doubted:
            return
        assert self._directory is not None
        try:
            entries = await self._directory.entries(self._prefix)
        except DirectoryError as error:
            _log.debug("directory: %s", error)
            return
        listed = {entry.key.removeprefix(self._prefix) for entry in entries}
        for rank in [rank for rank in self._doubted if str(rank) not in listed]:
            self._doubted.discard(rank)
            _log.warning(
                "rank %d of node %s is not in the directory any more", rank, self._leader.node
            )
            self._leader.rank_unlisted(rank)
