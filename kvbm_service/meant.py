"""Which commands a rank obeys: those made for this very process, and not older than a fence.

Where a rank's process is replaced while its leader lives (core/crew.py), commands can come late:
some that were made for the former process, and some that the leader has given up, whose slots
and device blocks are in use for something else by now.
"""

from __future__ import annotations

import logging
from typing import TypeVar

from msgspec.structs import replace

from kvbm_schemas.records import RankRecord
from kvbm_schemas.step import (
    MARK_BYTES,
    Fetch,
    Lend,
    Load,
    RemoteFetch,
    Save,
    Spill,
    StepCommands,
    Unlend,
    mark,
)

_log = logging.getLogger(__name__)

Command = TypeVar("Command", Save, Load, Spill, Fetch, RemoteFetch, Lend, Unlend)


class Meant:
    """One rank's process."""

    def __init__(self, record: RankRecord) -> None:
        self.fence = 0
        """Commands up to this number are void."""
        self._who = f"rank {record.rank} ({record.agent})"
        self._mark = mark(record.agent)
        self._at = record.rank * MARK_BYTES
        self._said = False

    def heed(self, commands: StepCommands) -> StepCommands:
        """What of these commands counts. Nothing, if another process was meant."""
        if commands.meant and commands.meant[self._at :][:MARK_BYTES] != self._mark:
            if not self._said:
                _log.warning("%s ignores what its predecessor was to do (said once)", self._who)
            self._said = True
            return StepCommands()
        if not self.fence:
            return commands
        return replace(
            commands,
            saves=self._valid(commands.saves),
            loads=self._valid(commands.loads),
            spills=self._valid(commands.spills),
            fetches=self._valid(commands.fetches),
            remote_fetches=self._valid(commands.remote_fetches),
            lends=self._valid(commands.lends),
            unlends=self._valid(commands.unlends),
        )

    def _valid(self, commands: tuple[Command, ...]) -> tuple[Command, ...]:
        return tuple(command for command in commands if command.op > self.fence)
