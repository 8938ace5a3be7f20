"""Bugs planted in how the loss of a rank is lived through, and in who is followed afterwards."""

from __future__ import annotations

from typing import Any

from kvbm_schemas.step import StepCommands, Survivors
from kvbm_service import meant
from kvbm_service.core import crew, cursor, leader, loads, moves, salvage, tiers
from tests.simulation.mutants import Mutant, Patch
from tests.simulation.weather import Weather

FRAGILE = Weather(
    nodes=2, world_size=2, host_slots=8, device_blocks=8, requests=80, rank_losses=4.0,
    copy_seconds=0.02,
)  # fmt: skip
"""Ranks are lost in the midst of long copies."""
SLOW = Weather(
    nodes=1, world_size=2, host_slots=24, device_blocks=14, requests=150, rank_losses=3.0,
    copy_seconds=0.06, naps=0.3,
)  # fmt: skip
"""Copies outlast the loss of a rank."""
MORTAL = Weather(
    nodes=2, world_size=2, host_slots=12, requests=80, rank_losses=4.0, crashes=2.0,
    copy_seconds=0.01,
)  # fmt: skip
"""What a lost rank left behind may be found by a later life of the whole node, too."""
CLOCKS = Weather(nodes=2, requests=60, crashes=2.0, clock_jumps=0.5)


def _keep_what_a_rank_has_lost(patch: Patch) -> None:
    right = salvage.Salvage.end

    def end(self: salvage.Salvage) -> list[list[Survivors]]:
        had = self._held or []
        right(self)
        return [[one] for one in had]

    patch.setattr(salvage.Salvage, "end", end)


def _tell_nobody_of_the_loss(patch: Patch) -> None:
    right = leader.Leader.rank_lost

    def rank_lost(self: leader.Leader, rank: int, now: float) -> None:
        with Patch.context() as without:
            without.setattr(tiers.Tiers, "clear", lambda self: None)
            right(self, rank, now)

    patch.setattr(leader.Leader, "rank_lost", rank_lost)


def _promise_without_a_rank(patch: Patch) -> None:
    patch.setattr(crew.Crew, "whole", property(lambda self: True))


def _do_not_wait_until_all_are_at_rest(patch: Patch) -> None:
    right = leader.Leader.rank_took_place

    def rank_took_place(self: leader.Leader, record: Any, survivors: Any, now: float) -> None:
        right(self, record, survivors, now)
        for rank in range(len(self.crew.agents)):
            if self.crew.at_rest(self.crew.fence, rank):
                self._all_at_rest(now)

    patch.setattr(leader.Leader, "rank_took_place", rank_took_place)


def _forget_whom_a_load_waits_for(patch: Patch) -> None:
    right = loads.Loads.give_up
    patch.setattr(
        loads.Loads, "give_up", lambda self, reason, now, rank=None, untold=(): right(
            self, reason, now
        )
    )  # fmt: skip


def _forget_whom_a_move_waits_for(patch: Patch) -> None:
    right = moves.Moves.give_up
    patch.setattr(
        moves.Moves, "give_up", lambda self, reason, rank=None, untold=(): right(self, reason)
    )


def _wait_for_the_lost_rank(patch: Patch) -> None:
    patch.setattr(moves.Moves, "give_up", lambda self, reason, rank=None, untold=(): [])


def _obey_what_is_not_meant(patch: Patch) -> None:
    right = meant.Meant.heed

    def heed(self: meant.Meant, commands: StepCommands) -> StepCommands:
        self._mark = commands.meant[self._at :][:4]
        return right(self, commands)

    patch.setattr(meant.Meant, "heed", heed)


def _obey_what_is_void(patch: Patch) -> None:
    patch.setattr(meant.Meant, "_valid", lambda self, commands: commands)


def _follow_only_greater_epochs(patch: Patch) -> None:
    right = cursor.Cursor.started
    patch.setattr(
        cursor.Cursor, "started",
        lambda self, epoch, now: right(self, epoch, now) if epoch > self.at.epoch else (),
    )  # fmt: skip


RANK_MUTANTS = [
    Mutant("keep what a rank has lost", _keep_what_a_rank_has_lost, FRAGILE, "has lost"),
    Mutant("tell nobody of a lost rank", _tell_nobody_of_the_loss, FRAGILE, "has lost"),
    Mutant("promise without a rank", _promise_without_a_rank, FRAGILE, "without all its ranks"),
    Mutant("do not wait until all ranks are at rest", _do_not_wait_until_all_are_at_rest,
           FRAGILE, "is rewritten"),
    Mutant("free device blocks that a load still fills", _forget_whom_a_load_waits_for,
           SLOW, "wrong bytes"),
    Mutant("free slots that a save still fills", _forget_whom_a_move_waits_for, SLOW,
           "other bytes"),
    Mutant("wait for a rank that is lost", _wait_for_the_lost_rank, FRAGILE, "is still busy"),
    Mutant("let a rank do what its predecessor was to do", _obey_what_is_not_meant, MORTAL,
           "other bytes"),
    Mutant("let a rank do what was given up", _obey_what_is_void, FRAGILE, "is rewritten"),
    Mutant("follow only greater epochs", _follow_only_greater_epochs, CLOCKS, "does not know"),
]  # fmt: skip
