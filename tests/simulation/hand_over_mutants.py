"""Bugs planted in what prefill engines keep for decode engines."""

from __future__ import annotations

from collections.abc import Sequence

from kvbm_schemas.block import BlockHash
from kvbm_service.core import hand_overs, lent_blocks, lookups
from tests.simulation.mutants import Mutant, Patch
from tests.simulation.weather import Weather

PREFILL = Weather(
    nodes=2, host_slots=6, device_blocks=14, lent_blocks=8, requests=80, hand_overs=0.7,
    copy_seconds=0.01,
)  # fmt: skip
TWO_RANKS = Weather(
    nodes=2, world_size=2, host_slots=6, device_blocks=14, lent_blocks=8, requests=80,
    hand_overs=0.7, copy_seconds=0.01, aborts=0.1,
)  # fmt: skip
MORTAL_RANKS = Weather(
    nodes=2, world_size=2, host_slots=6, device_blocks=14, lent_blocks=8, requests=80,
    hand_overs=0.8, rank_losses=3.0, copy_seconds=0.005,
)  # fmt: skip


def _give_back_before_all_ranks_stop(patch: Patch) -> None:
    right = lent_blocks.LentBlocks.moved

    def moved(self: lent_blocks.LentBlocks, op: int, rank: int) -> bool:
        blocks = self._asked[op].device_blocks
        if self._lent[blocks[0]].phase is lent_blocks._Phase.ENDING:
            self._asked[op].waiting.clear()
        return right(self, op, rank)

    patch.setattr(lent_blocks.LentBlocks, "moved", moved)


def _give_back_at_once(patch: Patch) -> None:
    right = lent_blocks.LentBlocks.end

    def end(self: lent_blocks.LentBlocks, loan: lent_blocks.Loan) -> None:
        before = set(self._lent)
        right(self, loan)
        ending = lent_blocks._Phase.ENDING
        for op, asked in list(self._asked.items()):
            if self._lent[asked.device_blocks[0]].phase is ending:
                del self._asked[op]
                for block in asked.device_blocks:
                    del self._lent[block]
                    self._freed += [block] if block in before else []

    patch.setattr(lent_blocks.LentBlocks, "end", end)


def _answer_before_all_ranks_lend(patch: Patch) -> None:
    right = lent_blocks.LentBlocks.lend

    def lend(
        self: lent_blocks.LentBlocks, chain: Sequence[BlockHash], blocks: Sequence[int], s: float
    ) -> lent_blocks.Loan | None:
        loan = right(self, chain, blocks, s)
        if loan is not None:
            loan.waits.clear()
        return loan

    patch.setattr(lent_blocks.LentBlocks, "lend", lend)


def _never_end(patch: Patch) -> None:
    patch.setattr(hand_overs.HandOvers, "tick", lambda *_: None)


def _stop_lending_what_another_still_reads(patch: Patch) -> None:
    right = lent_blocks.LentBlocks.end

    def end(self: lent_blocks.LentBlocks, loan: lent_blocks.Loan) -> None:
        loan.blocks = {name: b for name, b in loan.blocks.items() if b in self._lent}
        for block in loan.blocks.values():
            self._lent[block].loans = 1
        right(self, loan)

    patch.setattr(lent_blocks.LentBlocks, "end", end)
    patch.setattr(lent_blocks.LentBlocks, "check_integrity", lambda *_: None)


def _forget_what_a_lost_rank_held(patch: Patch) -> None:
    patch.setattr(lent_blocks.LentBlocks, "all_at_rest", lambda _: None)
    patch.setattr(lent_blocks.LentBlocks, "check_integrity", lambda *_: None)


def _do_not_hold_lent_blocks(patch: Patch) -> None:
    right = hand_overs.HandOvers.begin

    def begin(self: hand_overs.HandOvers, *what: object) -> list[int] | None:
        held = right(self, *what)  # type: ignore[arg-type]
        return None if held is None else []

    patch.setattr(hand_overs.HandOvers, "begin", begin)
    patch.setattr(lent_blocks.LentBlocks, "take_freed", lambda _: [])


def _keep_pins_of_ended_hand_overs(patch: Patch) -> None:
    right = hand_overs.HandOvers.release

    def release(self: hand_overs.HandOvers, token: str, reason: str = "") -> None:
        if token in self._open:
            self._open[token].pinned = []
        right(self, token, reason)

    patch.setattr(hand_overs.HandOvers, "release", release)


def _wait_for_ever(patch: Patch) -> None:
    right = lookups.Lookups._advance

    def advance(self: lookups.Lookups, request: str, reader: object, *rest: object) -> int | None:
        if getattr(reader, "origin", None) is not None and getattr(reader, "plan", None):
            reader.deadline = 1e9  # type: ignore[attr-defined]
        return right(self, request, reader, *rest)  # type: ignore[arg-type]

    patch.setattr(lookups.Lookups, "_advance", advance)


HAND_OVER_MUTANTS = [
    Mutant(
        "give lent blocks back before all ranks have stopped", _give_back_before_all_ranks_stop,
        TWO_RANKS, "overwrites a block that it lends",
    ),
    Mutant("give lent blocks back at once", _give_back_at_once, PREFILL, "that it lends"),
    Mutant(
        "answer before all ranks lend", _answer_before_all_ranks_lend, TWO_RANKS,
        "lends a block that is not there",
    ),
    Mutant("never end a hand-over", _never_end, PREFILL, "still keeps what it handed over"),
    Mutant(
        "stop lending what another still reads", _stop_lending_what_another_still_reads, PREFILL,
        "lends a block that is not there",
    ),
    Mutant(
        "forget what they lent when a rank was lost", _forget_what_a_lost_rank_held,
        MORTAL_RANKS, "lost device blocks",
    ),
    Mutant("do not hold what they lend", _do_not_hold_lent_blocks, PREFILL, "that it lends"),
    Mutant(
        "keep the pins of ended hand-overs", _keep_pins_of_ended_hand_overs, PREFILL,
        "still pins slots",
    ),
    Mutant(
        "wait for ever for who hands over", _wait_for_ever,
        Weather(nodes=2, requests=60, hand_overs=0.8, lent_blocks=6, loss=0.3), "has waited",
    ),
]  # fmt: skip
